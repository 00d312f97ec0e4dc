"""Memory and start of a compiled checkpoint of 6 GB, each measured in processes of its own.

The checkpoint is the folder that DSC_BENCH_MODEL names, or the one that `python -m bench --shape
moonlight-6l` left in its cache. `python -m bench.footprint ARTIFACT` measures an artifact that is
there already.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "bench" / "out" / "cache"
SHAPE = "moonlight-6l"
PROMPT, STEPS, CONTEXT = 512, 16, 1024
MEGABYTE = 1e6
OWN = 300.0
"""Megabytes that a session may take besides weights and cache."""
STARTS = 7
FIRST = """
import sys
import numpy as np
import dsc
dsc.load(sys.argv[1], trust=True).session(max_batch=1).prefill(np.array([[5]]))
print([name for name in ("torch", "tvm", "transformers") if name in sys.modules], flush=True)
"""
Figures = dict[str, Any]


def checkpoint() -> Path | None:
    """The folder of the checkpoint, if there is one."""
    folder = Path(os.environ.get("DSC_BENCH_MODEL") or CACHE / SHAPE)
    return folder if (folder / "config.json").is_file() else None


def measure(folder: Path) -> Figures:
    """Compile a checkpoint in a temporary folder beside it, then run it."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        out = Path(place) / "out"
        compiled = compile_cost(folder, out)
        found = {"compile": compiled, **run_cost(out)}
    found["ok"] = all(part["ok"] for part in found.values())
    return found


def compile_cost(folder: Path, out: Path) -> Figures:
    """`dsc compile`: 90 s, and at most three times the largest tensor and 1 GB in memory."""
    limits = ["--max-context", str(2 * CONTEXT), "--backend", "tvm"]
    main = [sys.executable, "-c", "from dsc.cli import main; main()"]
    command = [*main, "compile", str(folder), *limits, "-o", str(out)]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    # Kilobytes of the largest child so far: the first that this process waits for.
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / MEGABYTE
    allowed = 3 * largest_tensor(folder) / MEGABYTE + 1000
    return {
        "ok": seconds <= 90 and peak <= allowed,
        "seconds": round(seconds, 1),
        "peak_mb": round(peak),
        "allowed_mb": round(allowed),
    }


def run_cost(artifact: Path) -> Figures:
    """Memory of one session and of two, and the time to a first token, weights in page cache."""
    weights = (artifact / "weights" / "model.safetensors").stat().st_size / MEGABYTE
    one = _children(artifact, 1, PROMPT)[0]
    cache = one["cache_mb"]
    extra = one["peak_mb"] - weights - cache
    pair = _children(artifact, 2, PROMPT)
    together = sum(each["pss_mb"] for each in pair)
    return {
        "session": {
            "ok": extra <= OWN,
            "peak_mb": round(one["peak_mb"]),
            "weights_mb": round(weights),
            "cache_mb": round(cache),
            "besides_mb": round(extra),
        },
        "two processes": {
            "ok": together <= weights + 2 * (cache + OWN),
            "pss_mb": round(together),
            "shared_clean_mb": [round(each["shared_clean_mb"]) for each in pair],
        },
        "start": start_cost(artifact),
    }


def start_cost(artifact: Path) -> Figures:
    """Seconds from a new process to its first token, after a prompt of one; torch stays out."""
    seconds, dragged = [], ""
    for _ in range(STARTS + 1):
        before = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-c", FIRST, str(artifact)],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            dragged = child.stdout.readline().strip()
            seconds.append(time.perf_counter() - before)
    found = sorted(seconds[1:])  # the first one warms the files
    middle = found[STARTS // 2]
    figures = {"first_token_s": [round(s, 3) for s in found], "imported": dragged}
    return {"ok": middle <= 0.7 and dragged == "[]", **figures}


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor of the safetensors files."""
    largest = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        spans = (entry["data_offsets"] for entry in header.values())
        largest = max(largest, *(stop - start for start, stop in spans))
    return largest


def _children(artifact: Path, count: int, prompt: int) -> list[Figures]:
    """Processes that each hold a session at the same time, and what they saw."""
    command = [sys.executable, "-m", "bench.footprint", str(artifact), str(prompt)]
    running = [
        subprocess.Popen(
            [*command, repr(time.time())],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(count)
    ]  # fmt: skip
    for child in running:
        assert child.stdout is not None
        if child.stdout.readline().strip() != "ready":
            raise RuntimeError("a session failed; its message is above")
    found = []
    for child in running:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("\n")
        child.stdin.flush()
        found.append(json.loads(child.stdout.readline()))
    for child in running:
        child.communicate("\n")
    return found


def _session(artifact: Path, prompt: int, started: float) -> None:
    """Prefill, decode, say so, and report when asked; stay until asked again."""
    import numpy as np

    import dsc
    from dsc.report import cache_bytes

    model = dsc.load(artifact, trust=True)
    session = model.session(max_batch=1, max_context=CONTEXT)
    ids = np.random.default_rng(0).integers(1000, size=(1, prompt))
    logits = session.prefill(ids)
    first = time.time() - started
    for _ in range(STEPS):
        logits = session.decode(logits.argmax(-1))
    print("ready", flush=True)
    sys.stdin.readline()
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
    rows = session.max_context + session.prefill_chunk
    figures = {
        "first_token_s": first,
        "peak_mb": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEGABYTE,
        "cache_mb": cache_bytes(model.program) * rows / MEGABYTE,
        "pss_mb": 1024 * kilobytes["Pss"] / MEGABYTE,
        "shared_clean_mb": 1024 * kilobytes["Shared_Clean"] / MEGABYTE,
    }
    print(json.dumps(figures), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    if len(sys.argv) == 4:
        _session(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    else:
        print(json.dumps(run_cost(Path(sys.argv[1])), indent=1))
