"""What the trained tiny model shows on every backend: bars of `bench.bars`."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "tiny-v3"
TEXT = ROOT.parent / "shared" / "text" / "valid.txt"
BACKENDS = ("reference", "onnxruntime", "tvm")
PORTABLE = ("x86-64", "x86-64-v3")
"""CPUs without AVX-512 that code is also made for."""
Figures = dict[str, Any]


def perplexity() -> Figures:
    """tiny-v3 on the validation text: within 0.5% of transformers', in fp32 and in bf16."""
    import torch
    from tokenizers import Tokenizer

    import dsc
    from bench import language

    if not TEXT.is_file():
        return {"ok": None, "skipped": "the validation text is not beside this checkout"}
    ids = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(TEXT.read_text()).ids
    figures: Figures = {"tokens": len(ids)}
    ok = True
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stock = language.perplexity(language.stock_logits(TINY, dtype), ids)
        figures[f"transformers {name}"] = round(stock, 4)
        for backend in BACKENDS:
            compiled = dsc.compile(TINY, backend=backend, dtype=name)
            ours = language.perplexity(language.our_logits(compiled), ids)
            figures[f"{backend} {name}"] = round(ours, 4)
            ok = ok and abs(ours / stock - 1) <= 0.005
    for cpu in PORTABLE:  # bf16 without AVX-512, beside transformers' bf16
        compiled = dsc.compile(TINY, backend="tvm", dtype="bf16", target=f"cpu:{cpu}")
        ours = language.perplexity(language.our_logits(compiled), ids)
        figures[f"tvm bf16 {cpu}"] = round(ours, 4)
        ok = ok and abs(ours / figures["transformers bf16"] - 1) <= 0.005
    return {"ok": ok, **figures}


def greedy() -> Figures:
    """64 greedy tokens of tiny-v3 equal transformers', on every backend."""
    import torch
    from tokenizers import Tokenizer

    import dsc
    from bench import language

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode(language.PROMPT).ids
    figures: Figures = {}
    ok = True
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stock = language.stock_greedy(TINY, dtype, ids, 64)
        figures[f"text {name}"] = tokenizer.decode(stock)
        for backend in BACKENDS:
            compiled = dsc.compile(TINY, backend=backend, dtype=name)
            ours = language.our_greedy(compiled, ids, 64)
            same = next((i for i, (a, b) in enumerate(zip(ours, stock)) if a != b), len(stock))  # noqa: B905
            figures[f"{backend} {name}"] = same
            ok = ok and ours == stock
    return {"ok": ok, **figures}


def triton_compiles() -> Figures:
    """Every kernel of the tiny model compiles for sm_90 and gfx942, with no GPU."""
    import dsc

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        compiled = dsc.compile(TINY, backend="triton", target=["cuda:sm_90", "hip:gfx942"])
        compiled.save(out)
        seconds = time.perf_counter() - start
        cubins = [p.stat().st_size for p in out.rglob("*.cubin")]
        hsacos = [p.stat().st_size for p in out.rglob("*.hsaco")]
    return {
        "ok": len(cubins) == len(hsacos) > 0 and min(cubins + hsacos) > 0,
        "cubins": len(cubins),
        "hsacos": len(hsacos),
        "seconds": round(seconds, 1),
    }


def triton_interprets() -> Figures:
    """Prefill of 16 tokens and 4 decode steps through Triton's interpreter, against ours."""
    import torch

    import dsc

    ids = torch.randint(2048, (1, 20), generator=torch.Generator().manual_seed(0))
    found = {}
    seconds = 0.0
    for backend in ("reference", "triton"):
        compiled = dsc.compile(TINY, backend=backend, dtype="fp32", max_batch=1, max_context=64)
        session = compiled.session()
        start = time.perf_counter()
        rows = [session.prefill(ids[:, :16], all_logits=True)[0]]
        rows += [session.decode(ids[:, 16 + i]) for i in range(4)]
        seconds = time.perf_counter() - start
        found[backend] = torch.cat(rows)
    error = float((found["triton"] - found["reference"]).abs().max())
    return {"ok": error <= 1e-3, "max_difference": error, "seconds": round(seconds, 1)}


def profile_overhead() -> Figures:
    """A profiled decode step of tiny-v3 on tvm takes at most 3% longer, in alternating turns."""
    from statistics import median

    import dsc

    session = dsc.compile(TINY, backend="tvm", max_batch=1).session(max_context=1024)
    session.prefill([list(range(64))])

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(8):
            session.decode([5])
        return time.perf_counter() - start

    pairs = []
    for _ in range(40):
        plain = turn()
        with dsc.Profiler():
            pairs.append(turn() / plain)
    found = median(pairs[5:])
    return {"ok": found <= 1.03, "ratio": round(found, 4)}


def step_overhead() -> Figures:
    """A decode step of tiny-v3 takes 0.15 ms besides its entry: tvm, one sequence, NumPy."""
    import numpy as np

    import dsc

    session = dsc.compile(TINY, backend="tvm", max_batch=1).session(max_context=1024)
    session.prefill(np.full((1, 16), 5))
    executable: Any = session.executable
    entry, inside = executable.functions["decode"], []

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        failed = entry(*given)
        inside.append(time.perf_counter() - start)
        return failed

    executable.functions["decode"] = timed
    token, besides = np.array([5]), []
    for _ in range(1000):
        start = time.perf_counter()
        session.decode(token)
        besides.append(time.perf_counter() - start - inside[-1])
    figures = {"besides_ms": statistics.median(besides), "entry_ms": statistics.median(inside)}
    figures = {name: round(1e3 * seconds, 4) for name, seconds in figures.items()}
    return {"ok": figures["besides_ms"] <= 0.15, **figures}
