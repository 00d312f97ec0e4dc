"""Exports on machines that have no dsc: example.py, ONNX Runtime GenAI, Triton's own schema.

    python -m bench.onnx_servers            every case, a line each

Each case exports the trained tiny checkpoint and has another environment write 64 tokens with it.
In fp32 the text is transformers' greedy one; with weights in codes it is what our interpreter
writes with the same codes.
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
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return str(tokenizer.decode(found))


def interpreted_text(folder: Path) -> str:
    """The greedy text of an artifact's program in our interpreter."""
    import torch
    from tokenizers import Tokenizer

    from dsc.backends.reference import ReferenceExecutable
    from dsc.runtime import artifact
    from dsc.runtime.session import Session

    program = artifact.read(folder, trust=True).program
    session = Session(ReferenceExecutable(program), program, 1, 256)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(PROMPT).ids
    ends = program.meta["generation"]["eos_token_id"]
    logits, last = session.prefill(torch.tensor([ids])), len(ids) + NEW
    while len(ids) < last:
        ids.append(int(logits[0].argmax()))
        if ids[-1] in ends:
            break
        logits = session.decode([ids[-1]])
    return str(tokenizer.decode(ids))


def bar() -> dict[str, Any]:
    """Every case: whether other environments write the same text."""
    import dsc

    same: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        plain = environment(base / "plain", *PLAIN)
        wanted = transformers_text()
        for name, options in FORMS.items():
            out = dsc.export(TINY, base / name, dtype="fp32", **options)
            text = written(plain, out, "example.py", PROMPT)
            coded = options["quant"] != "none"
            same[f"example.py, {name}"] = text == (interpreted_text(out) if coded else wanted)
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
    return {"ok": all(same.values()), "same": same}


if __name__ == "__main__":
    print(json.dumps(bar(), indent=1))
