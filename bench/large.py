"""Models that fill a machine, from a checkpoint that lies nowhere: what they take to pack and run.

    python -m bench.large pack OUT [--preset moonlight --layers N --quant int4 --backend tvm]
    python -m bench.large run OUT       RSS and first token of an artifact's run.py, files warm
    python -m bench.large               both: Moonlight's released shapes in int4, which must fit
    python -m bench.large kills         a pack that is killed at random points, first with an
                                        artifact in its place and then with nothing

Each is a process of its own. Memory is what the kernel says of it: `RssAnon` of packing, which is
what it allocated, and the whole RSS of running, mapped weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dsc

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "tiny-v3" / "tokenizer.json"
"""Weights mean nothing, so that any will do whose ids the vocabulary has."""
CONTEXT, PROMPT = 8192, 16
ALLOWED_GB, FIRST_S, STARTS = 10.5, 2.0, 5
FILLED = """
import importlib.util, resource, sys
import numpy as np
spec = importlib.util.spec_from_file_location("run", sys.argv[1] + "/run.py")
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)
model = run.Model(sys.argv[1])
ids = np.random.default_rng(0).integers(1000, size=model.chunk).tolist()
for token, _ in zip(run.generate(model, ids, 8, []), range(8)):
    pass
for cache in model.caches.values():
    cache[...] = 0  # rows that no token was written to have no memory
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
"""A chunk of a prompt, which all experts take part in, and a cache that is full."""
Figures = dict[str, Any]


class Anonymous:
    """The most that this process had allocated, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Anonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        status = Path("/proc/self/status")
        while not self._done.wait(0.005):
            line = next(x for x in status.read_text().splitlines() if x.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(line.split()[1]))


def _compiled(asked: argparse.Namespace) -> dsc.CompiledModel:
    import dsc
    from bench.synthetic import synthetic

    program = synthetic(asked.preset, asked.layers)
    return dsc.compile(
        program, backend=asked.backend, quant=asked.quant, max_batch=1, max_context=CONTEXT
    )


def _pack_here(asked: argparse.Namespace) -> Figures:
    from bench.synthetic import SyntheticSource

    start = time.perf_counter()
    with Anonymous() as memory:
        compiled = _compiled(asked)
        compiled_s = time.perf_counter() - start
        compiled.save(asked.out, force=True)
    done = time.perf_counter() - start
    shutil.copyfile(TOKENIZER, asked.out / "tokenizer.json")
    layered: Any = compiled.program.source
    source = next(s for s in layered.layers if isinstance(s, SyntheticSource))
    size = (asked.out / "weights" / "model.safetensors").stat().st_size
    allowed = 3 * source.largest + 10**9
    return {
        "ok": memory.peak <= allowed,
        "anonymous_gb": memory.peak / 1e9,
        "allowed_gb": allowed / 1e9,
        "weights_gb": size / 1e9,
        "compile_s": compiled_s,
        "pack_s": done - compiled_s,
    }


def packing(out: Path, *options: str) -> subprocess.Popen[str]:
    """A process that packs a synthetic model to `out`."""
    line = [sys.executable, "-m", "bench.large", "pack", str(out), *options]
    return subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def run_cost(out: Path) -> Figures:
    """Seconds to the first token of run.py, and its memory when the context is full."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(TOKENIZER))
    prompt = words.decode(words.encode("the " * 2 * PROMPT).ids[:PROMPT])
    seconds = []
    for _ in range(STARTS + 1):
        start = time.perf_counter()
        line = [sys.executable, str(out / "run.py"), prompt, "--max-new-tokens", "1"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    line = [sys.executable, "-c", FILLED, str(out)]
    told = subprocess.run(line, check=True, text=True, stdout=subprocess.PIPE).stdout
    rss, found = int(told) / 1e9, sorted(seconds[1:])  # the first one warms the files
    return {
        "ok": rss <= ALLOWED_GB and found[STARTS // 2] <= FIRST_S,
        "prompt_tokens": len(words.encode(prompt).ids),
        "first_token_s": found,
        "full_context_rss_gb": rss,
    }


def measure(*options: str) -> Figures:
    """Pack and run in a temporary folder."""
    with tempfile.TemporaryDirectory(dir=ROOT / "bench") as place:
        out = Path(place) / "out"
        with packing(out, *options) as child:
            told = child.communicate()[0]
        if child.returncode:
            raise RuntimeError(f"packing failed: {told}")
        found = {"pack": json.loads(told.splitlines()[-1]), "run": run_cost(out)}
    return {"ok": all(part["ok"] for part in found.values()), **found}


def kills(asked: argparse.Namespace, seed: int = 0) -> Figures:
    """Kill a pack at random points: what stands in its place is whole, or nothing is.

    As many are killed as `asked.times` says; a pack that ends before it is hit is counted apart.
    The first half has an artifact in its place. Packers are forks of this process, which has
    compiled the model; `null` leaves no threads behind that a fork would miss.
    """
    from dsc.runtime.artifact import check_hashes

    draw = random.Random(seed)
    compiled = _compiled(asked)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "bench") as place:
        out = Path(place) / "out"

        def begun() -> int:
            packer = os.fork()
            if packer:
                return packer
            try:
                compiled.save(out, force=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)

        def whole() -> float:
            start = time.perf_counter()
            if os.waitpid(begun(), 0)[1]:
                raise RuntimeError("a pack failed that nobody killed")
            return time.perf_counter() - start

        seconds = min(whole(), whole())  # the first one finds no file in memory
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        died = ended = left = 0
        while died < asked.times and ended < asked.times:
            number = died + ended
            there = died < asked.times // 2  # what the first pack left
            if not there:
                shutil.rmtree(out, ignore_errors=True)
            packer = begun()
            time.sleep(draw.uniform(0, seconds))
            os.kill(packer, signal.SIGKILL)
            killed = os.WIFSIGNALED(os.waitpid(packer, 0)[1])
            beside = [path.name for path in out.parent.iterdir() if path != out]
            print(f"{number}: {killed}, {out.exists()}, {beside}", file=sys.stderr, flush=True)
            if not killed and not out.exists():
                wrong.append(f"pack {number} failed")
            died, ended, left = died + killed, ended + (not killed), max(left, len(beside))
            if out.exists():
                check_hashes(out)
            if out.exists() is not (there or not killed):
                wrong.append(f"kill {number}: an artifact is there: {out.exists()}")
        whole()
        check_hashes(out)
        names = [path.name for path in out.parent.iterdir()]
    return {
        "ok": not wrong and names == ["out"] and left <= 1,
        "gb": size / 1e9,
        "pack_s": seconds,
        "killed": died,
        "ended_before": ended,
        "wrong": wrong,
        "left_at_most": left,
        "left_at_the_end": names[1:],
    }


def main() -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("pack", "run", "kills"))
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--preset", default="moonlight")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--times", type=int, default=20)
    asked = parser.parse_args()
    options = ["--preset", asked.preset, "--quant", asked.quant, "--backend", asked.backend]
    options += ["--layers", str(asked.layers)] if asked.layers else []
    if asked.what in ("pack", "run") and asked.out is None:
        parser.error("OUT is missing")
    if asked.what == "pack":
        print(json.dumps(_pack_here(asked)))
    elif asked.what == "run":
        print(json.dumps(run_cost(asked.out), indent=1))
    elif asked.what == "kills":
        print(json.dumps(kills(asked), indent=1))
    else:
        print(json.dumps(measure(*options), indent=1))


if __name__ == "__main__":
    main()
