"""What a server wants beside the models: another signature over the same weights, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dsc.backends.onnxruntime import genai_config, triton_server
from dsc.backends.onnxruntime.forms import halves
from dsc.backends.onnxruntime.interface import Interface, in_place
from dsc.backends.onnxruntime.model import FOLDER, BuiltModel, build_model, shared_entries
from dsc.backends.onnxruntime.options import Form
from dsc.backends.onnxruntime.stock_signature import StockSignature
from dsc.errors import UsageError
from dsc.ir.graph import Graph
from dsc.ir.program import Program

SERVERS = ("genai", "optimum", "triton-server")


@dataclass(frozen=True)
class Served:
    """Models by path, and texts by name."""

    models: Mapping[str, BuiltModel] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def folder_of(program: Program, server: str | None) -> str:
    """The folder of all models and weights. Raises `UsageError` for a server that is not known.

    Triton's are in the first version of the one model of a repository, which is the whole artifact.
    """
    if server not in (None, *SERVERS):
        raise UsageError(f"server {server!r}", hint=f"one of {', '.join(SERVERS)}")
    return f"{triton_server.repository_name(program)}/1" if server == "triton-server" else FOLDER


def files(program: Program, form: Form, models: Mapping[str, str], server: str | None) -> Served:
    """What `server` wants of a program whose entries are run by `models`.

    Raises `UsageError` where it cannot hold the program.
    """
    if server is None:
        return Served()
    if in_place(program):
        raise UsageError(
            f"{server} hands grown caches from step to step", hint="leave out --for or --cache"
        )
    entry = stepped(program)
    graph = program.entries[entry]
    border = Interface.of(graph, form)
    folder = folder_of(program, server)
    if server == "triton-server":
        return _repository(program, graph, border, form, models)
    if not program.is_causal_lm:
        raise UsageError(
            f"{server} runs causal language models, and this is none", hint="leave out --for"
        )
    whole = server == "optimum"
    signature = StockSignature.of(program, graph, border, whole, whole)
    name = "model" if whole else server
    path = _free(f"{folder}/{name}.onnx", models)
    built = build_model(graph, name, form, signature=signature, halves=halves(program))
    if whole:
        config = json.dumps(program.meta.get("config", {}), indent=1) + "\n"
        return Served({path: built}, {"config.json": config})
    return Served({path: built}, {genai_config.CONFIG: genai_config.text(program, signature, path)})


def _repository(
    program: Program, graph: Graph, border: Interface, form: Form, models: Mapping[str, str]
) -> Served:
    """A model for Triton, and its config.pbtxt."""
    name = triton_server.repository_name(program)
    own = PurePosixPath(models[graph.name])
    config = f"{name}/{triton_server.CONFIG}"
    if not program.is_causal_lm:
        text = triton_server.plain_config(program, name, graph, border, own.name)
        return Served(texts={config: text})
    path = _free(str(own.with_name(triton_server.MODEL)), models)
    signature = triton_server.SequenceSignature.of(graph, border)
    text = triton_server.sequence_config(program, name, signature)
    built = build_model(graph, "model", form, signature=signature, halves=halves(program))
    return Served({path: built}, {config: text})


def _free(path: str, models: Mapping[str, str]) -> str:
    """`path`, where no entry's model lies. Raises `UsageError`."""
    taken = next((entry for entry, other in models.items() if other == path), None)
    if taken is not None:
        raise UsageError(f"{path} is the model of entry {taken}", hint="call the entry otherwise")
    return path


def stepped(program: Program) -> str:
    """The entry for one model that has to take all steps: the cheaper one for few new tokens.

    Where that is another one in the absorbed form, it is that one, whose model has both forms.
    """
    names = list(program.entries)
    return shared_entries(program)["extend" if "extend" in names else names[-1]]
