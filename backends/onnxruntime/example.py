"""The example.py of an ONNX artifact, which its README.md shows: a text continued, or one call.

It is a program for people to read and change: onnxruntime, numpy and tokenizers alone. Of a
language model caches are handed from step to step, and the model is chosen by how many tokens a
step has; of other programs it calls each model once, on numbers that are made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from dsc.backends.onnxruntime.contrib import providers_of
from dsc.backends.onnxruntime.interface import in_place
from dsc.backends.onnxruntime.options import Form
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.types import DType

TEXT = '''\
"""Continues a text by the likeliest tokens: python example.py "In the beginning"."""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession{value}
from tokenizers import Tokenizer

MODELS = {models}  # by the most new tokens of a step
CONTEXT, ENDS, START = {context}, {ends}, {start}
{types}
HERE, prompt = Path(__file__).absolute().parent, " ".join(sys.argv[1:])
if prompt in ("-h", "--help"):
    sys.exit(print(__doc__))
tokenizer = next((Tokenizer.from_file(str(x)) for x in HERE.glob("tokenizer.json")), None)
ids = (tokenizer.encode(prompt).ids if tokenizer else []) or [START]
assert len(ids) < CONTEXT, f"{{len(ids)}} tokens, and a text has {{CONTEXT}} at most"
sessions = {{n: InferenceSession(HERE / x, providers={providers}) for n, x in MODELS.items()}}
{names}caches = [x for x in sessions[max(sessions)].get_inputs() if x.name.startswith("past.")]
held, last = 0, min(len(ids) + 64, CONTEXT)  # tokens in the caches; tokens of the text, at most
{past}
while len(ids) < last:
    count = min(len(ids) - held, max(sessions))  # new tokens of this step
    step = {{"input_ids": np.array([ids[held:][:count]]), "lengths": np.array([held])}}
    step |= {{"positions": held + np.arange(count)[None], "logits_at": np.array([[count - 1]])}}
    session = next(session for most, session in sessions.items() if count <= most)
{run}
    held += count
    if held == len(ids):
        ids.append(int({logits}.numpy()[0, -1].argmax()))
        if ids[-1] in ENDS:
            break
print(tokenizer.decode(ids) if tokenizer else ids)
'''

GROWN = {
    "value": ", OrtValue",
    "names": "names = [x.name for x in sessions[max(sessions)].get_outputs()]\n",
    "types": 'TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}'
    "  # ONNX's numbers",
    "past": """\
empty = OrtValue.ortvalue_from_shape_and_type
past = {x.name: empty([1, 0, *x.shape[2:]], TYPES[x.type]) for x in caches}""",
    "run": """\
    given = {name: OrtValue.ortvalue_from_numpy(x) for name, x in step.items()} | past
    found = dict(zip(names, session.run_with_ort_values(names, given)))
    past = {name: found[name.replace("past", "present")] for name in past}""",
    "logits": 'found["logits"]',
}
IN_PLACE = {
    "value": "",
    "names": "",
    "types": 'TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}',
    "past": "past = {x.name: np.zeros([1, last, *x.shape[2:]], TYPES[x.type]) for x in caches}",
    "run": """\
    io = session.io_binding()
    for name, x in (step | past).items():
        io.bind_cpu_input(name, x)
    for name, x in past.items():  # written where they are
        io.bind_output(name.replace("past", "present"), "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    io.bind_output("logits")
    session.run_with_iobinding(io)""",
    "logits": "io.get_outputs()[-1]",
}
"""How caches are made and a step runs, by how they are kept."""


CALL = '''\
"""Calls the model once, on numbers that are made up: python example.py."""

from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

HERE = Path(__file__).absolute().parent
'''
ONE_CALL = """\

session = InferenceSession(HERE / "{path}", providers={providers})
inputs = {{{sizes}
{inputs}
}}
names = [x.name for x in session.get_outputs()]
for name, array in zip(names, session.run(None, inputs)):
    print(name, array.dtype, array.shape)
"""
SIZE = 2
"""Of an axis that may have any, where that is in its range."""
UNKNOWN = frozenset({DType.bf16, DType.f8e4m3, DType.f8e4m3fnuz, DType.f8e5m2, DType.f8e8m0})
"""Element types of which NumPy has no arrays."""


def example(program: Program, models: Mapping[str, str], form: Form) -> str:
    """The program's text, for the models by entry; empty where NumPy lacks the types for one."""
    providers = providers_of(form.provider)
    if not program.is_causal_lm:
        calls = [_call(program, models, entry, providers) for entry in _general(models)]
        return CALL + "".join(calls) if all(calls) else ""
    generation = program.meta.get("generation", {})
    shown = ", ".join(f'{most}: "{path}"' for path, most in largest_steps(program, models).items())
    return TEXT.format(
        **(IN_PLACE if in_place(program) else GROWN),
        models=f"{{{shown}}}",
        providers=providers,
        context=program.limits.max_context,
        ends=generation.get("eos_token_id") or [],
        start=generation.get("bos_token_id") or 0,
    )


def largest_steps(program: Program, models: Mapping[str, str]) -> dict[str, int]:
    """The most new tokens of the steps that a model is there for, by its path."""
    steps = {g.entry: g.step for g in program.guards}
    chunk = program.limits.prefill_chunk
    most: dict[str, int] = {}
    for entry, path in models.items():
        most[path] = max(most.get(path, 0), min(steps.get(entry) or chunk, chunk))
    return most


def _general(models: Mapping[str, str]) -> list[str]:
    """For each model the last entry that it runs."""
    return list({path: entry for entry, path in models.items()}.values())


def _call(program: Program, models: Mapping[str, str], entry: str, providers: list[str]) -> str:
    graph = program.entries[entry]
    if any(x.type.dtype in UNKNOWN for x in (*graph.inputs, *graph.outputs)):
        return ""
    used = sorted({s for value in graph.inputs for s in value.type.symbols})
    sizes = dict.fromkeys(used, SIZE)
    sizes |= {n: max(r.lo, min(r.hi, SIZE)) for n, r in program.symbols.items()}
    told = f"  # {', '.join(f'{name} = {sizes[name]}' for name in used)}" if used else ""
    inputs = "\n".join(_arrays(graph, sizes))
    return ONE_CALL.format(path=models[entry], providers=providers, sizes=told, inputs=inputs)


def _arrays(graph: Graph, sizes: Mapping[str, int]) -> Iterator[str]:
    """A line for each input: ones, or zeros where numbers may be indices."""
    for value in graph.inputs:
        kind, made = value.type.dtype, "ones" if value.type.dtype.is_float else "zeros"
        shape = [evaluate(dim, sizes) for dim in value.type.shape]
        yield f'    {json.dumps(value.name)}: np.{made}({shape}, "{kind.numpy}"),'
