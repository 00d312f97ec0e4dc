"""A program as an ONNX artifact: which models, files and texts there are, what tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsc.backends.base import Backend, EmitOptions, check_supported
from dsc.backends.onnxruntime import contrib, model, serving
from dsc.backends.onnxruntime.card import Export, card, facts
from dsc.backends.onnxruntime.example import example
from dsc.backends.onnxruntime.forms import halves
from dsc.backends.onnxruntime.interface import in_place
from dsc.backends.onnxruntime.options import Form, chosen_form
from dsc.backends.onnxruntime.required_operators import CONFIG, required_operators
from dsc.files import size_of
from dsc.ir.index_ranges import giving_indices
from dsc.ir.program import Program
from dsc.runtime.emission import EXAMPLE, Emission, Place
from dsc.runtime.nodes import whole_entry
from dsc.runtime.plan import Plan

SHARD_SIZE = "50GB"
"""Of tensors in a file of weights, at most, by default: as transformers saves checkpoints."""
PAGE = 1 << 16
"""Large tensors start at multiples of this, by which every system can map them: Windows, whose
grain is the coarsest, in 64 KB (https://onnx.ai/onnx/repo-docs/ExternalData.html)."""
ALLOCATOR = "ONNX Runtime"
"""A session allocates what it computes on the way for itself."""
RUNNER, README = Path(__file__).with_name("runner.py"), "README.md"


def emitted(program: Program, options: EmitOptions, backend: Backend) -> Emission:
    """The artifact. Bytes of models, and the README, come when weights have their places.

    Raises `UsageError` for what nobody can be given, `UnsupportedOperator` with all nodes that have
    no ONNX form.
    """
    asked = options.extra
    shard_size, server = size_of(asked.get("max_shard_size") or SHARD_SIZE), asked.get("server")
    gives_indices = bool(asked.get("indices", True))
    program = giving_indices(program) if gives_indices else program
    folder, form = serving.folder_of(program, server), chosen_form(program, asked)
    check_supported(program, backend)
    shared = model.shared_entries(program)
    paths = {entry: f"{folder}/{owner}.onnx" for entry, owner in shared.items()}
    entries = {
        entry: whole_entry(program.entries[entry], program.symbols, path, ALLOCATOR)
        for entry, path in paths.items()
    }
    plan = Plan(entries, {"backend": backend.name})
    options.admit(plan)
    built = _models(program, shared, paths, form, options)
    served = serving.files(program, form, paths, server)
    built |= served.models
    used = {op_type for one in built.values() for op_type in one.contrib}
    runtime = contrib.least_runtime(form.runtime, used)
    runs = program.is_causal_lm and form.numpy and not in_place(program)
    export = Export(program, paths, form, runtime, server, tuple(served.models), runs)
    texts = {
        CONFIG: required_operators(one.proto for one in built.values()),
        EXAMPLE: example(program, paths, form),
        **served.texts,
    }

    def finish(places: Mapping[str, Place]) -> Mapping[str, bytes]:
        several = len({file for file, *_ in places.values()}) > 1
        text = card(export, f"{folder}/{model.SEVERAL if several else model.WEIGHTS}")
        models = {path: one.serialized(places) for path, one in built.items()}
        return {README: text.encode(), **models}

    return Emission(
        files={name: text.encode() for name, text in texts.items() if text},
        plan=plan,
        weights_path=f"{folder}/{model.WEIGHTS}",
        shard_size=shard_size,
        page=PAGE,
        meta={
            "models": paths,
            "threads": options.threads,
            "prepack": bool(asked.get("prepack", _has_codes(program))),
            "opset": form.opset,
            "onnx_ops": form.ops,
            "provider": form.provider,
            "providers": contrib.providers_of(form.provider),
            "wide_caches": form.wide_caches,
            "indices": gives_indices,
        },
        runner=RUNNER.read_text() if runs else "",
        finish=finish,
        notes=model.notes(built.values(), form.provider),
        needs={"onnxruntime": f"onnxruntime>={runtime}"},
    )


def _models(
    program: Program,
    shared: Mapping[str, str],
    paths: Mapping[str, str],
    form: Form,
    options: EmitOptions,
) -> dict[str, model.BuiltModel]:
    """The models of entries that run others' too, by path."""
    owners, known = sorted(set(shared.values())), halves(program)
    built = {}
    for done, owner in enumerate(owners):
        if options.progress is not None:
            options.progress("models", done, len(owners))
        graph = program.entries[owner]
        built[paths[owner]] = model.build_model(graph, owner, form, facts(program), halves=known)
    return built


def _has_codes(program: Program) -> bool:
    """Whether weights are in codes: what is not repacked for those takes a hundred times longer."""
    return any(t.format is not None for t in program.weight_types().values())
