"""Everything the project promises, measured, as one JSON object: `make bars`.

Each bar is a function that returns its figures and whether they hold. Results go to
`bench/out/bars.json` as they come; a run that was cut off goes on where it stopped, as long as the
commit is the same. `python -m bench.bars NAME …` measures some again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.tiny import BACKENDS, ROOT, TINY, Figures

RESULTS = ROOT / "bench" / "out" / "bars.json"


def import_time() -> Figures:
    """`import dsc`: at most 0.5 s, and none of the toolchains comes along."""
    code = (
        "import sys, time; t = time.perf_counter(); import dsc; s = time.perf_counter() - t;"
        "print(s, *[m for m in ('torch','triton','tvm','onnxruntime','transformers')"
        " if m in sys.modules])"
    )
    runs = [_python(code).split() for _ in range(5)]
    seconds = statistics.median(float(r[0]) for r in runs)
    dragged = sorted({m for r in runs for m in r[1:]})
    return {"ok": seconds < 0.5 and not dragged, "seconds": seconds, "imported": dragged}


def parity() -> Figures:
    """Every case of `bench.parity` on every backend that runs here, against transformers."""
    from bench import parity as grid

    results = []
    for case in grid.CASES:
        with tempfile.TemporaryDirectory() as folder:
            grid.make_checkpoint(case, Path(folder))
            results += [grid.check(case, backend, Path(folder)) for backend in BACKENDS]
    worst = {b: max(r.worst for r in results if r.backend == b) for b in BACKENDS}
    return {
        "ok": all(r.ok for r in results),
        "worst": worst,
        "bad": [r.as_dict() for r in results if not r.ok],
        "cases": len(grid.CASES),
        "excluded": sum(r.excluded for r in results),
        "positions": sum(r.positions for r in results),
    }


def run_scripts() -> Figures:
    """run.py of the tvm and onnx artifacts, in an environment without dsc and without torch."""
    from tokenizers import Tokenizer

    import dsc
    from bench import language

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    ids = tokenizer.encode(language.PROMPT).ids
    figures: Figures = {}
    ok = True
    with tempfile.TemporaryDirectory() as folder:
        python = _bare_environment(Path(folder) / "venv")
        for backend in ("tvm", "onnxruntime"):
            compiled = dsc.compile(TINY, backend=backend)
            out = compiled.save(Path(folder) / backend)
            ours = language.PROMPT + tokenizer.decode(language.our_greedy(compiled, ids, 64))
            command = [python, str(out / "run.py"), language.PROMPT, "--max-new-tokens", "64"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            figures[backend] = done.stdout.strip() == ours.strip()
            figures[f"{backend} stderr"] = done.stderr[-500:]
            figures[f"{backend} lines"] = len((out / "run.py").read_text().splitlines())
            ok = ok and figures[backend] and figures[f"{backend} lines"] < 200
    return {"ok": ok, **figures}


def compile_671b() -> Figures:
    """V3 at 671B, one thread: tracing cold, all passes, cache bytes, parameters touched."""
    from bench.scale import measure_compile

    found = {source: measure_compile(source) for source in ("v3", "stock")}
    ok = found["v3"]["trace_s"] <= 60 and found["stock"]["trace_s"] <= 150
    for figures in found.values():
        ok = ok and figures["passes_s"] <= 60 and figures["peak_gb"] <= 4
        ok = ok and figures["cache_bytes_per_token"] == 70272
        ok = ok and 36e9 <= figures["decode_parameters"] <= 38e9
    return {"ok": ok, **found}


def passes_linear() -> Figures:
    """CPU seconds of all passes at 8, 16, 32 and 61 layers: the cost of a layer stays the same."""
    from bench.scale import measure_compile

    seconds = {n: measure_compile("stock", n)["passes_s"] for n in (8, 16, 32, 61)}
    a_layer = (seconds[32] - seconds[8]) / (32 - 8)
    last = (seconds[61] - seconds[32]) / (61 - 32)
    return {"ok": last <= 1.5 * a_layer, "seconds": seconds, "a_layer": round(a_layer, 4)}


def attention_block() -> Figures:
    """Attention at V3 size, 4096 tokens of context, one token: 30 x stock in the model's bf16."""
    from bench.scale import attention_block as measure

    found = {dtype: measure(dtype) for dtype in ("bf16", "f32")}
    right = found["f32"]["max_difference"] <= 1e-4 and found["bf16"]["max_difference"] <= 0.02
    return {"ok": found["bf16"]["ratio"] >= 30 and right, **found}


def arenas() -> Figures:
    """Arenas, scratch included, against the most live bytes over launches: at most 1.05."""
    from bench.plans import arenas as measure

    return measure()


def fusion() -> Figures:
    """Launches a layer of a decode step, by level and backend; what levels compute agrees."""
    from bench.plans import launches

    return launches()


def ranks() -> Figures:
    """tiny-v3 on two processes, TP = EP = 2: the logits of one rank, on every backend."""
    import numpy as np

    import dsc
    from dsc.runtime import launch
    from tests.runtime.ranks import steps

    options: dict[str, Any] = {"dtype": "fp32", "max_batch": 1, "max_context": 64}
    figures: Figures = {}
    for backend in BACKENDS:
        one = steps(dsc.compile(TINY, backend=backend, **options)).numpy()
        with tempfile.TemporaryDirectory() as folder:
            out = dsc.compile(TINY, backend=backend, ranks=2, **options).save(Path(folder) / "out")
            line = [sys.executable, "-m", "tests.runtime.ranks", "logits", str(out), folder]
            if launch.run(line, 2):
                raise RuntimeError(f"a rank failed on {backend}")
            two = [np.load(Path(folder) / f"{rank}.npy") for rank in range(2)]
        scale = max(1.0, float(np.abs(one).max()))
        figures[backend] = max(float(np.abs(t - one).max()) / scale for t in two)
    return {"ok": max(figures.values()) <= 1e-5, **figures}


def random_programs() -> Figures:
    """2,000 random programs through all passes: the interpreter agrees before and after."""
    from bench.proofs import random_programs as prove

    return prove()


def verify_each() -> Figures:
    """Every pass verified on small V3 and V2, all fusion levels, and on the 671B, shrunk."""
    from bench.proofs import verify_each as prove

    return prove()


EQUAL_CASES = 340
"""The least number of the 452 functions that a door has to compile and compute as eager does."""


def torch_functions() -> Figures:
    """Small functions of torch are equal to eager through both doors, at least `EQUAL_CASES` each.

    The others are refused in words or run eagerly. Inductor runs every tenth of them beside it.
    """
    from bench import torch_functions as functions

    tenth = ("inductor", "--part", "0/10")
    found = functions.run_apart([("optimize",), ("compile",), tenth])
    doors = [found[door] for door in ("optimize", "compile")]
    return {"ok": all(d["ok"] and d["equal"] >= EQUAL_CASES for d in doors), **found}


def start() -> Figures:
    """From a new process to the first token of a 6 GB artifact, warm, prompt of one: 0.7 s."""
    from bench.footprint import checkpoint, compile_cost, start_cost

    folder = checkpoint()
    if folder is None:
        return {"ok": None, "skipped": "no checkpoint: see bench/footprint.py for where it looks"}
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        compile_cost(folder, Path(place) / "out")
        return start_cost(Path(place) / "out")


def footprint() -> Figures:
    """Memory and start of a 6 GB checkpoint: session, two processes, first token, `dsc compile`."""
    from bench.footprint import checkpoint, measure

    folder = checkpoint()
    if folder is None:
        return {"ok": None, "skipped": "no checkpoint: see bench/footprint.py for where it looks"}
    return measure(folder)


def demo() -> Figures:
    """`make demo` on an environment that is set up: at most 10 minutes."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.demo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    return {
        "ok": done.returncode == 0 and seconds < 600,
        "seconds": round(seconds, 1),
        "output": done.stdout[-600:],
        "errors": done.stderr[-600:] if done.returncode else "",
    }


def random_calls() -> Figures:
    """20,000 calls of compiled entries, half of them wrong: no crash, no write outside of a buffer.

    300 are processes of run.py, 300 run in Triton's interpreter.
    """
    from bench import random_calls as calls

    return calls.figures(20_000)


def varying_sizes() -> Figures:
    """The README's attention at sizes that vary: after the second call none takes 0.05 s."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.varying"], capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode != 0:
        return {"ok": False, "error": run.stderr[-400:]}
    found: dict[str, Any] = json.loads(run.stdout)
    late = max(s for each in found.values() for s in each["seconds"][2:])
    right = all(each["error"] < 1e-5 for each in found.values())
    return {"ok": right and late < 0.05, "slowest after the second": late, **found}


def coded_products() -> Figures:
    """Products of codes in forms drawn from all there are, on all CPUs that this one can be."""
    from bench import coded_products as forms

    return forms.measure(seconds=300)


def damaged_texts() -> Figures:
    """10,000 damaged texts of programs: each a program still, or one error with line and caret."""
    from bench.damaged_texts import run

    found = run(10_000)
    both = found["read"] >= 100 and found["refused"] >= 5_000
    return {"ok": both and found.keys() == {"read", "refused"}, **found}


def shared_cache() -> Figures:
    """50 compiles at once over one cache, 20 of them killed: what is kept is whole and right."""
    from bench import compiles

    return compiles.shared_cache()


def first_call() -> Figures:
    """A first call of attention: 1.0 x Inductor's at most, 0.4 s where it was compiled before."""
    from bench.first_call import measure

    found = measure(5)
    return {"ok": found["ratio"] <= 1.0 and found["wall"]["dsc kept"] <= 0.4, **found}


def _bar_of(module: str, name: str = "bar") -> Callable[[], Figures]:
    """The bar that a module of the bench has, imported when it is measured."""

    def bar() -> Figures:
        found: Figures = getattr(import_module(f"bench.{module}"), name)()
        return found

    return bar


BARS: dict[str, Callable[[], Figures]] = {
    "import_time": import_time,
    "torch_functions": torch_functions,
    "parity": parity,
    "perplexity": _bar_of("tiny", "perplexity"),
    "greedy": _bar_of("tiny", "greedy"),
    "triton_compiles": _bar_of("tiny", "triton_compiles"),
    "triton_interprets": _bar_of("tiny", "triton_interprets"),
    "run_scripts": run_scripts,
    "onnx_servers": _bar_of("onnx_servers"),
    "onnx_files": _bar_of("onnx_files"),
    "onnx_configs": _bar_of("onnx_configs"),
    "coded_perplexity": _bar_of("coded_perplexity"),
    "triton_tokens": _bar_of("triton_tokens"),
    "triton_targets": _bar_of("triton_targets", "measure"),
    "triton_cards": _bar_of("cards", "measure"),
    "triton_access": _bar_of("triton_access", "measure"),
    "onnx_peers": _bar_of("onnx_peers"),
    "compile_671b": compile_671b,
    "passes_linear": passes_linear,
    "attention_block": attention_block,
    "arenas": arenas,
    "fusion": fusion,
    "ranks": ranks,
    "random_programs": random_programs,
    "random_configs": _bar_of("random_configs"),
    "types": _bar_of("matrix"),
    "quantised_types": _bar_of("quant_matrix"),
    "quantised_folders": _bar_of("coded_folders"),
    "onnx_folders": _bar_of("onnx_folders"),
    "names": _bar_of("names", "figures"),
    "random_calls": random_calls,
    "damaged_texts": damaged_texts,
    "hostile_files": _bar_of("hostile_files"),
    "coded_products": coded_products,
    "attention": _bar_of("attention", "measure"),
    "decode_bytes": _bar_of("decode_bytes", "measure"),
    "shared_cache": shared_cache,
    "verify_each": verify_each,
    "profile_overhead": _bar_of("tiny", "profile_overhead"),
    "step_overhead": _bar_of("tiny", "step_overhead"),
    "start": start,
    "footprint": footprint,
    "demo": demo,
    "judging": _bar_of("judging"),
    "varying_sizes": varying_sizes,
    "first_call": first_call,
}


def main() -> None:
    """Measure what is missing at this commit, or what is named, and print the JSON."""
    wanted = sys.argv[1:]
    unknown = [name for name in wanted if name not in BARS]
    if unknown:
        sys.exit(f"no bar is called {', '.join(unknown)}; there are {', '.join(BARS)}")
    results = _earlier()
    for name, bar in BARS.items():
        if (wanted and name not in wanted) or (not wanted and name in results["bars"]):
            continue
        print(f"… {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            figures = bar()
        except Exception as problem:
            traceback.print_exc()
            figures = {"ok": False, "error": f"{type(problem).__name__}: {problem}"}
        figures["bar_seconds"] = round(time.perf_counter() - start, 1)
        results["bars"][name] = figures
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    if any(figures["ok"] is False for figures in results["bars"].values()):
        sys.exit(1)


def _earlier() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    if RESULTS.is_file():
        found: dict[str, Any] = json.loads(RESULTS.read_text())
        if found["commit"] == commit:
            return found
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"commit": commit, "machine": machine, "bars": {}}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def _bare_environment(folder: Path) -> str:
    """A venv with numpy, tokenizers and the two runtimes; neither dsc nor torch."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    packages = ["numpy", "ml_dtypes", "tokenizers", "onnxruntime", "apache-tvm", "apache-tvm-ffi"]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), *packages],
        check=True,
    )
    absent = (
        "import importlib.util as u; assert not u.find_spec('torch') and not u.find_spec('dsc')"
    )
    subprocess.run([python, "-c", absent], check=True, cwd=folder)
    return python


if __name__ == "__main__":
    main()
