"""The README.md of an ONNX artifact: files, limits, every input and output, and how to call them.

It is made from the program, like the models themselves, and its example runs as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from dsc._version import __version__
from dsc.backends.onnxruntime.interface import Form, Interface, meaning
from dsc.ir.program import Program
from dsc.ir.types import DType

TEXT = """# {name} as ONNX

A step of a causal language model: new tokens and caches go in, logits and grown caches come out.
Written by dsc {version}, in standard operators of opset {opset}. It needs ONNX Runtime {runtime} or
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

Greedy, one sequence, from this folder; `run.py`, where there is one, does the same with text.

```python
{example}```
"""

NUMPY = """import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{model}")
results = [x.name for x in session.get_outputs()]
caches = [x for x in session.get_inputs() if x.name.startswith("past.")]
past = {{x.name: np.zeros((1, 0, x.shape[2]), np.{dtype}) for x in caches}}
new, held, made = np.array([[{first}]]), 0, []
for _ in range(8):
    step = {{"input_ids": new, "positions": held + np.arange(new.shape[1])[None]}}
    step |= {{"lengths": np.array([held]), "logits_at": np.array([[new.shape[1] - 1]])}}
    found = dict(zip(results, session.run(results, {{**step, **past}})))
    held += new.shape[1]
    past = {{name: found[name.replace("past", "present")][:, :held] for name in past}}
    new = found["logits"][:, -1].argmax(-1)[:, None]
    made.append(int(new[0, 0]))
print(made)
"""
VALUES = """import numpy as np
import onnxruntime
from onnxruntime import OrtValue

BFLOAT16 = 16  # ONNX's number; NumPy has no such type
session = onnxruntime.InferenceSession("{model}")
results = [x.name for x in session.get_outputs()]
caches = [x for x in session.get_inputs() if x.name.startswith("past.")]
empty = {{x.name: np.zeros((1, 0, x.shape[2]), np.uint16) for x in caches}}
make = OrtValue.ortvalue_from_numpy_with_onnx_type
past = {{name: make(x, BFLOAT16) for name, x in empty.items()}}
new, held, made = np.array([[{first}]]), 0, []
for _ in range(8):
    step = {{"input_ids": new, "positions": held + np.arange(new.shape[1])[None]}}
    step |= {{"lengths": np.array([held]), "logits_at": np.array([[new.shape[1] - 1]])}}
    given = {{name: OrtValue.ortvalue_from_numpy(x) for name, x in step.items()}}
    found = dict(zip(results, session.run_with_ort_values(results, {{**given, **past}})))
    held += new.shape[1]
    past = {{name: found[name.replace("past", "present")] for name in past}}
    new = found["logits"].numpy()[:, -1].argmax(-1)[:, None]
    made.append(int(new[0, 0]))
print(made)
"""
SPELLED = {DType.f32: "float32", DType.f16: "float16", DType.bf16: "bfloat16", DType.i64: "int64"}
"""As NumPy and ONNX users say it."""
LAYER = re.compile(r"^(past|present)\.(\d+)\.(.*)$")


def card(program: Program, files: Mapping[str, str], form: Form) -> str:
    """The text for the models in `files`, by entry."""
    general = list(program.entries)[-1]
    graph = program.entries[general]
    border = Interface.of(graph, form)
    inputs = ((v.name, border.inputs[v.name], v.type.shape) for v in graph.inputs)
    given = zip(graph.output_names, graph.outputs, strict=True)
    outputs = ((name, border.outputs[name], x.type.shape) for name, x in given)
    generation = program.meta.get("generation", {})
    first = generation.get("bos_token_id") or 0
    example = NUMPY if form.numpy else VALUES
    dtype = next((border.outputs[name] for name in border.caches), DType.f32)
    return TEXT.format(
        name=program.name,
        version=__version__,
        opset=form.opset,
        runtime=form.runtime,
        weights="onnx/model.safetensors",
        models="\n".join(_models(program, files)),
        **asdict(program.limits),
        stops=_stops(generation),
        inputs="\n".join(_rows(inputs)),
        outputs="\n".join(_rows(outputs)),
        example=example.format(model=files[general], dtype=SPELLED[dtype], first=first),
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
    return f"A text ends at one of the ids {', '.join(map(str, ids))}." if ids else ""


def _rows(ports: Iterable[tuple[str, DType, Any]]) -> Iterator[str]:
    """A line for each input or output; those that every layer has share one."""
    lines: dict[str, list[int]] = {}
    for name, dtype, shape in ports:
        found = LAYER.match(name)
        shown = name if found is None else f"{found[1]}.N.{found[3]}"
        dims = ", ".join(map(str, shape))
        line = f"| `{shown}`{{}} | {SPELLED[dtype]} | [{dims}] | {meaning(shown)} |"
        lines.setdefault(line, []).append(-1 if found is None else int(found[2]))
    for line, layers in lines.items():
        spread = "" if layers == [-1] else f", N = {layers[0]} to {layers[-1]}"
        yield line.replace("{}", spread)
