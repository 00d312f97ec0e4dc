"""Decode steps of exported ONNX models in stock ONNX Runtime, folders taking turns.

    python -m bench.onnx_steps OUT OUT ... [--context 128 --threads 2 --rounds 8 --operators]

Each folder is a process of its own that sleeps while another runs; caches hold random numbers. A
step is told by its best, its first quarter and its median, in milliseconds, with what the session
took to open and what it allocated. `--operators` adds, by ONNX Runtime's own profiler, the sum over
nodes of each node's best, operator by operator; nodes in branches count where they ran.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STEPS, SETTLE = 6, 0.3
"""Steps of a turn, and the seconds after which threads of whoever ran have stopped spinning."""
LARGEST_ID = 1000


class Steps:
    """A session of a folder's model for decoding, and the inputs of a step."""

    def __init__(self, folder: Path, context: int, threads: int, profile: str = "") -> None:
        import onnxruntime

        meta = json.loads((folder / "dsc.json").read_text())["meta"]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry(
            "session.disable_prepacking", "0" if meta["prepack"] else "1"
        )
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        start = time.perf_counter()
        path = str(folder / meta["models"]["decode"])
        self.session: Any = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.opened = time.perf_counter() - start
        self._random = np.random.default_rng(0)
        self._feeds = {
            x.name: self._random.standard_normal((1, context, x.shape[2]), np.float32)
            for x in self.session.get_inputs() if x.name.startswith("past.")
        }  # fmt: skip
        self._feeds |= {
            "positions": np.array([[context]]), "lengths": np.array([context]),
            "logits_at": np.array([[0]]),
        }  # fmt: skip

    def step(self) -> float:
        """Milliseconds of a step with another token."""
        token = self._random.integers(LARGEST_ID, size=(1, 1))
        start = time.perf_counter()
        self.session.run(None, {**self._feeds, "input_ids": token})
        return (time.perf_counter() - start) * 1e3


def _allocated() -> float:
    """Gigabytes that this process has allocated."""
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1e6


def _work(asked: argparse.Namespace) -> None:
    """Answer a line for each that is read: times of some steps."""
    steps = Steps(asked.folders[0], asked.context, asked.threads)
    steps.step()
    print(json.dumps([steps.opened, _allocated()]), flush=True)
    for _ in sys.stdin:
        print(json.dumps([steps.step() for _ in range(STEPS)]), flush=True)


def turns(asked: argparse.Namespace) -> None:
    """Print a line for each folder."""
    command = [sys.executable, "-m", "bench.onnx_steps", "--worker"]
    command += ["--context", str(asked.context), "--threads", str(asked.threads)]
    pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers: list[Any] = [
        subprocess.Popen([*command, str(folder)], **pipe) for folder in asked.folders
    ]
    opened = [json.loads(each.stdout.readline()) for each in workers]
    times: list[list[float]] = [[] for _ in workers]
    for number in range(asked.rounds):
        order = range(len(workers)) if number % 2 == 0 else reversed(range(len(workers)))
        for at in order:
            workers[at].stdin.write("\n")
            workers[at].stdin.flush()
            times[at] += json.loads(workers[at].stdout.readline())
            time.sleep(SETTLE)
    for folder, (seconds, gigabytes), found in zip(asked.folders, opened, times, strict=True):
        found.sort()
        quarter, half = found[len(found) // 4], found[len(found) // 2]
        print(
            f"{folder}: best {found[0]:.1f}, quarter {quarter:.1f}, median {half:.1f} ms;"
            f" opened in {seconds:.1f} s, {gigabytes:.2f} GB allocated"
        )
    for each in workers:
        each.stdin.close()
        each.wait()


def operators(folder: Path, context: int, threads: int, steps: int) -> Counter[str]:
    """Milliseconds of each operator in steps of a folder's model."""
    with tempfile.TemporaryDirectory() as place:
        made = Steps(folder, context, threads, f"{place}/ort")
        for _ in range(steps):
            made.step()
        return spent(json.loads(Path(made.session.end_profiling()).read_text()))


def spent(events: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Milliseconds of each operator in a profile: the sum over its nodes of each one's best."""
    best: dict[tuple[str, str], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["args"]["op_name"], event["name"])
            best[key] = min(event["dur"] / 1e3, best.get(key, event["dur"]))
    total: Counter[str] = Counter()
    for (kind, _), took in best.items():
        total[kind] += took  # type: ignore[assignment]
    return total


def main() -> None:
    """Measure the folders that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        _work(asked)
        return
    turns(asked)
    for folder in asked.folders if asked.operators else ():
        found = operators(folder, asked.context, asked.threads, STEPS * asked.rounds)
        told = ", ".join(f"{kind} {spent:.2f}" for kind, spent in found.most_common(8))
        print(f"{folder}: {told}")


if __name__ == "__main__":
    main()
