"""The README.md of an ONNX artifact: files, limits, every input and output, and how to call them.

It is made from the program, like the models themselves, and shows example.py as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dsc._version import __version__
from dsc.backends.onnxruntime.contrib import ORT, STANDARD
from dsc.backends.onnxruntime.example import example
from dsc.backends.onnxruntime.interface import Interface, in_place, meaning
from dsc.backends.onnxruntime.options import Form
from dsc.ir.program import Program
from dsc.ir.types import DType

TEXT = """# {name} as ONNX

A step of a causal language model: new tokens and caches go in, logits and grown caches come out.
Written by dsc {version}, in {operators} of opset {opset}. It needs ONNX Runtime {runtime} or
later on CPUs. The weights are in `{weights}`, to which the models refer: keep them
together.

| model | takes |
|---|---|
{models}

Limits: B up to {max_batch} sequences, S up to {prefill_chunk} new tokens in a step, lengths + S up
to {max_context} tokens in a sequence. Longer prompts go in several steps, each with the caches of
the one before. {stops}

## Inputs

| name | type | shape | what it is |
|---|---|---|---|
{inputs}

## Outputs

| name | type | shape | what it is |
|---|---|---|---|
{outputs}

## An example

Greedy, one sequence: `example.py`.{checked}

```python
{example}```
"""

SPELLED = {DType.f32: "float32", DType.f16: "float16", DType.bf16: "bfloat16", DType.i64: "int64"}
"""As NumPy and ONNX users say it."""
LAYER = re.compile(r"^(past|present)\.(\d+)\.(.*)$")


SERVED = {
    "genai": "the steps of ONNX Runtime GenAI, by `genai_config.json`",
    "optimum": "the steps of optimum's `ORTModelForCausalLM.from_pretrained`",
    "triton-server": "the sequences of `tritonserver --model-repository`, by `config.pbtxt`",
}
"""What the models of servers are for."""
OPERATORS = {ORT: "operators of ONNX Runtime, and standard ones", STANDARD: "standard operators"}


def card(
    program: Program,
    files: Mapping[str, str],
    form: Form,
    runtime: str,
    weights: str,
    server: tuple[str | None, Iterable[str]] = (None, ()),
    checked: bool = False,
) -> str:
    """The text for the models in `files`, by entry, whose weights are in `weights`.

    `server` and the paths of its own models; `checked`: there is a run.py too.
    """
    general = list(program.entries)[-1]
    graph = program.entries[general]
    border = Interface.of(graph, form)
    inputs = ((v.name, border.inputs[v.name], v.type.shape) for v in graph.inputs)
    given = zip(graph.output_names, graph.outputs, strict=True)
    outputs = ((name, border.outputs[name], x.type.shape) for name, x in given)
    generation = program.meta.get("generation", {})
    own = (f"| `{path}` | {SERVED[server[0]]} |" for path in server[1] if server[0])
    return TEXT.format(
        name=program.name,
        version=__version__,
        operators=OPERATORS[form.ops],
        opset=form.opset,
        runtime=runtime,
        weights=weights,
        models="\n".join([*_models(program, files), *own]),
        checked=" `run.py` does the same and checks more." if checked else "",
        **asdict(program.limits),
        stops=_stops(generation),
        inputs="\n".join(_rows(inputs, in_place(program))),
        outputs="\n".join(_rows(outputs, in_place(program))),
        example=example(program, files, form.provider),
    )


def facts(program: Program) -> dict[str, str]:
    """What a model's metadata says of it, as text."""
    known = {**asdict(program.limits), "name": program.name}
    known |= program.meta.get("generation", {})
    return {key: x if isinstance(x, str) else json.dumps(x) for key, x in known.items()}


def _models(program: Program, files: Mapping[str, str]) -> Iterator[str]:
    """A line for each file: the steps for which it was made."""
    steps = {g.entry: g.step for g in program.guards}
    for path in dict.fromkeys(files.values()):
        most = max(steps.get(e) or _OPEN for e, f in files.items() if f == path)
        takes = "any S" if most == _OPEN else f"S up to {most}: less work for few tokens"
        yield f"| `{path}` | {takes} |"


_OPEN = 1 << 62


def _stops(generation: Mapping[str, Any]) -> str:
    ids = generation.get("eos_token_id") or []
    one = "id" if len(ids) == 1 else "one of the ids"
    return f"A text ends at {one} {', '.join(map(str, ids))}." if ids else ""


def _rows(ports: Iterable[tuple[str, DType, Any]], written: bool) -> Iterator[str]:
    """A line for each input or output; those that every layer has share one."""
    lines: dict[str, list[int]] = {}
    for name, dtype, shape in ports:
        found = LAYER.match(name)
        shown = name if found is None else f"{found[1]}.N.{found[3]}"
        dims = ", ".join(map(str, shape))
        line = f"| `{shown}`{{}} | {SPELLED[dtype]} | [{dims}] | {meaning(shown, written)} |"
        lines.setdefault(line, []).append(-1 if found is None else int(found[2]))
    for line, layers in lines.items():
        spread = "" if layers == [-1] else f", N = {layers[0]} to {layers[-1]}"
        yield line.replace("{}", spread)
