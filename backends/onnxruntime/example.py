"""The example.py of an ONNX artifact, which its README.md shows: a text, continued greedily.

It is a program for people to read and change: onnxruntime, numpy and tokenizers alone, the caches
handed from step to step, the model chosen by how many tokens a step has.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsc.backends.onnxruntime.contrib import providers_of
from dsc.backends.onnxruntime.interface import in_place
from dsc.ir.program import Program

TEXT = '''\
"""Continues a text by the likeliest tokens. In its folder: python example.py "In the beginning"."""

import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession{value}
from tokenizers import Tokenizer

MODELS = {models}  # by the most new tokens of a step
CONTEXT, ENDS, START = {context}, {ends}, {start}
{types}

prompt, file = " ".join(sys.argv[1:]), Path("tokenizer.json")
tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
ids = tokenizer.encode(prompt).ids if tokenizer and prompt else [START]
sessions = {{n: InferenceSession(x, providers={providers}) for n, x in MODELS.items()}}
general = sessions[max(sessions)]
{names}caches = [x for x in general.get_inputs() if x.name.startswith("past.")]
held, last = 0, min(len(ids) + 64, CONTEXT)  # tokens in the caches; tokens of the text, at most
{past}
while len(ids) < last:
    new = np.array([ids[held:][: max(sessions)]])
    count = new.shape[1]
    step = {{"input_ids": new, "positions": held + np.arange(count)[None]}}
    step |= {{"lengths": np.array([held]), "logits_at": np.array([[count - 1]])}}
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
    "names": "names = [x.name for x in general.get_outputs()]\n",
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


def example(program: Program, files: Mapping[str, str], provider: str) -> str:
    """The program's text, for the models in `files`, by entry."""
    steps = {g.entry: g.step for g in program.guards}
    chunk = program.limits.prefill_chunk
    most: dict[str, int] = {}
    for entry, path in files.items():
        most[path] = max(most.get(path, 0), min(steps.get(entry) or chunk, chunk))
    generation = program.meta.get("generation", {})
    models = ", ".join(f'{size}: "{path}"' for path, size in most.items())
    return TEXT.format(
        **(IN_PLACE if in_place(program) else GROWN),
        models=f"{{{models}}}",
        providers=providers_of(provider),
        context=program.limits.max_context,
        ends=generation.get("eos_token_id") or [],
        start=generation.get("bos_token_id") or 0,
    )
