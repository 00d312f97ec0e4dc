"""Exports on machines that have no dsc: example.py, ONNX Runtime GenAI, Triton's own schema.

    python -m bench.onnx_servers            every case, a line each

Each case exports the trained tiny checkpoint and has another environment write 64 tokens with it.
In fp32 the text is transformers' greedy one; with weights in codes it is what our interpreter
writes with the same codes, up to a near-tie.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.onnx_stock import StockSession
from dsc.ir.program import Program
from dsc.runtime import artifact
from dsc.verification import MARGIN, Interpreted, compare, held_to_text, prompt_length

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny-v3"
PROMPT, NEW = "In the beginning", 64
PLAIN = ("onnxruntime", "numpy", "tokenizers")
GENAI = ("onnxruntime-genai", "numpy")
TRITON = ("tritonclient[grpc]",)
BARE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
FORMS: Mapping[str, Mapping[str, Any]] = {
    f"{ops} {quant}": {"onnx_ops": ops, "quant": "none" if quant == "fp32" else quant}
    for ops in ("ort", "standard")
    for quant in ("fp32", "int8", "int4")
}
WITH_GENAI = """
import sys, onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer, settings = og.Tokenizer(model), og.GeneratorParams(model)
ids = tokenizer.encode(sys.argv[2])
settings.set_search_options(do_sample=False, max_length=len(ids) + int(sys.argv[3]))
generator = og.Generator(model, settings)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"""
WITH_TRITON = """
import sys
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
config = text_format.Parse(open(sys.argv[1]).read(), model_config_pb2.ModelConfig())
print(config.name, len(config.sequence_batching.state))
"""


def environment(folder: Path, *packages: str) -> str:
    """The Python of a new environment with these packages and no dsc in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    absent = "import importlib.util as u; assert not any(map(u.find_spec, ('torch', 'dsc')))"
    subprocess.run([python, "-c", absent], check=True, cwd=folder, env=BARE)
    return python


def written(python: str, folder: Path, *arguments: str) -> str:
    """What a program writes in an export's folder; its errors where it fails."""
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=BARE, capture_output=True, text=True, check=False
    )
    return done.stdout.rstrip("\n") if done.returncode == 0 else done.stderr[-2000:]


def transformers_text() -> str:
    """The greedy text of the stock model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(TINY)
    model: Any = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return str(tokenizer.decode(found))


def interpreted(folder: Path) -> tuple[Program, list[int]]:
    """An artifact's program, and the greedy text of our interpreter with it."""
    program = artifact.read(folder, trust=True).program
    session = Interpreted(program).session(1, 256)
    ids = _tokenizer(folder).encode(PROMPT).ids
    ends = program.meta["generation"]["eos_token_id"]
    logits, last = session.prefill(np.array([ids])), len(ids) + NEW
    while len(ids) < last:
        ids.append(int(np.asarray(logits)[0].argmax()))
        if ids[-1] in ends:
            break
        logits = session.decode(np.array(ids[-1:]))
    return program, ids


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def beside_interpreter(folder: Path, text: str) -> tuple[str, str]:
    """What speaks against a text written with codes, and where it parts from the interpreter's.

    Rows are rounded to codes, and a number in the middle between two of them falls to either side
    for its last bit. So logits along the interpreter's text are held to what that explains, as
    `dsc verify` does, and a text may part from it where its two best tokens are as near.
    """
    program, ids = interpreted(folder)
    said, noise = held_to_text(program, ids)
    found = compare(along(folder, ids), said, ids, noise)
    wrong = found.failures(most_excluded=1.0)
    tokenizer = _tokenizer(folder)
    if text == tokenizer.decode(ids):
        return "; ".join(wrong), ""
    ends = (n for n in range(1, len(ids)) if not text.startswith(tokenizer.decode(ids[: n + 1])))
    at = next(ends, len(ids)) - 1
    second, best = np.sort(said[at])[-2:]
    margin, explained = float(best - second), MARGIN * float(noise.errors[at])
    parts = (
        f"token {at + 1}: its best two are {margin:.3g} apart, rounding explains {explained:.3g}"
    )
    return "; ".join([*wrong, parts] if margin > explained else wrong), parts


def along(folder: Path, ids: list[int]) -> Any:
    """Logits [S, vocab] of stock ONNX Runtime along a text, in the steps of `session_logits`."""
    session, prompt = StockSession(folder), prompt_length(len(ids))
    (rows,) = session.prefill([ids[:prompt]])
    return np.concatenate([rows, *(session.decode([token]) for token in ids[prompt:])])


def bar() -> dict[str, Any]:
    """Every case: whether other environments write the same text."""
    import dsc

    same: dict[str, bool] = {}
    wrong, parts = dict[str, str](), dict[str, str]()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        plain = environment(base / "plain", *PLAIN)
        wanted = transformers_text()
        for name, options in FORMS.items():
            out = dsc.export(TINY, base / name, dtype="fp32", **options)
            text = written(plain, out, "example.py", PROMPT)
            case = f"example.py, {name}"
            if options["quant"] == "none":
                same[case] = text == wanted
            else:
                wrong[case], parts[case] = beside_interpreter(out, text)
                same[case] = not wrong[case]
            print(name, text[:120].replace("\n", " "), file=sys.stderr)
        out = dsc.export(TINY, base / "for-genai", dtype="fp32", server="genai")
        python = environment(base / "genai", *GENAI)
        text = written(python, base, "-c", WITH_GENAI, str(out), PROMPT, str(NEW))
        same["ONNX Runtime GenAI"] = text == wanted
        out = dsc.export(TINY, base / "for-triton", dtype="fp32", server="triton-server")
        (config,) = out.glob("*/config.pbtxt")
        python = environment(base / "triton", *TRITON)
        states = written(python, base, "-c", WITH_TRITON, str(config))
        same["config.pbtxt in Triton's schema"] = states == f"{config.parent.name} 9"
    told = {"wrong": wrong, "parts": parts}
    found = {key: {case: x for case, x in each.items() if x} for key, each in told.items()}
    return {"ok": all(same.values()), "same": same, **found}


if __name__ == "__main__":
    print(json.dumps(bar(), indent=1))
