"""Exported ONNX models in stock ONNX Runtime beside transformers eager and llama.cpp.

    python -m bench.onnx_peers [--cache DIR --llama-python PYTHON --rounds 6 --contexts 128 4096]
                               [--group-size 64]

Moonlight's shapes with 6 layers and random weights, two threads, engines taking turns in processes
of their own. fp32 and int8 stand beside transformers in fp32, int4 beside Q4_0. Memory does not
hold two models in fp32, so that pair is given the same four tokens and touches few experts.

What ONNX Runtime's kernels set is measured in the same turns: a model of nothing but the products
of a step over codes (`KERNELS`: what reads weights or caches), each on its own weights and on
inputs of the shapes that it had. Nothing written around those kernels makes a step faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.engines import CHUNK
from bench.remote import ROOT, EngineFailed, Remote, missing
from bench.shapes import shape_config, write_checkpoint

SHAPE, EXPERTS = "moonlight-6l", (64, 16)
CONTEXTS = (128, 4096)
STEPS, ROOM, SETTLE = 6, 400, 0.3
"""Steps of a turn; tokens that caches have room for; seconds until threads stop spinning."""
FEW = 7
"""A vocabulary of tokens 3 to 6, for what memory cannot hold otherwise."""
LEAST = {
    ("fp32", 4096): 7.0, ("int8", 4096): 14.0, ("int4", 128): 0.7, ("int4", 4096): 1.3,
}  # fmt: skip
"""How many times as fast as the peer a decode step is at least, by weights and context."""
MOST_EXPERTS = 1.15
"""How many times as long as with 16 experts a step with 64 may take."""
CEILING = 0.95
"""What part of a step is ONNX Runtime's kernels where no graph around them makes it faster."""
QUANT = {"fp32": "none", "int8": "int8", "int4": "int4"}


def checkpoint(cache: Path, experts: int = EXPERTS[0]) -> Path:
    """The folder of random weights, written where there is none."""
    folder = cache / (SHAPE if experts == EXPERTS[0] else f"{SHAPE}-{experts}")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        write_checkpoint(shape_config(SHAPE) | {"n_routed_experts": experts}, folder)
    return folder


def commit() -> str:
    """What exports are kept under."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Turns:
    """Engines by name, each in its process, that take turns."""

    def __init__(self, stack: ExitStack, threads: int) -> None:
        self.stack, self.threads = stack, threads
        self.remotes: dict[str, Remote] = {}
        self.opened: dict[str, Any] = {}

    def add(self, name: str, engine: str, python: str = sys.executable, **options: Any) -> None:
        """Open an engine. Raises `EngineFailed`."""
        remote = self.stack.enter_context(Remote(engine, python, self.threads))
        self.opened[name] = remote.call("open", threads=self.threads, **options)
        self.remotes[name] = remote

    def take(self, context: int, rounds: int) -> dict[str, list[list[float]]]:
        """Seconds of decode steps of each engine, round by round; who is first changes."""
        for remote in self.remotes.values():
            remote.call("start", batch=1, context=context, room=ROOM)
            remote.call("steps", count=2)
        _say(f"  turns at {context}: {', '.join(self.remotes)}")
        found: dict[str, list[list[float]]] = {name: [] for name in self.remotes}
        for number in range(rounds):
            for name in list(found) if number % 2 == 0 else reversed(list(found)):
                found[name].append(self.remotes[name].call("steps", count=STEPS))
                time.sleep(SETTLE)
        return found

    def memory(self) -> dict[str, Any]:
        """What processes of ours hold."""
        ours = (name for name, r in self.remotes.items() if r.engine == "stock")
        return {name: self.remotes[name].call("memory") for name in ours}


def milliseconds(rounds: Sequence[Sequence[float]]) -> dict[str, float]:
    """The best and the median of all steps."""
    every = sorted(1e3 * s for each in rounds for s in each)
    return {"best": round(every[0], 2), "median": round(statistics.median(every), 2)}


def ratio(theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> float:
    """The median over rounds of how many times as long as ours their median step took."""
    pairs = zip(theirs, ours, strict=True)
    each = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    return round(statistics.median(each), 3)


def compared(
    asked: argparse.Namespace, weights: str, peer: str, python: str, **options: Any
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Decode steps of ours in `weights` beside a peer's, by context, with the kernels alone."""
    folder = checkpoint(asked.cache)
    own = {"folder": str(folder), "cache": str(asked.cache), "commit": asked.commit}
    own |= {"group": asked.group_size}
    own |= {"vocabulary": FEW if weights == "fp32" else shape_config(SHAPE)["vocab_size"]}
    with ExitStack() as stack:
        turns = Turns(stack, asked.threads)
        turns.add(peer, peer, python, **own, **options)  # first: loading takes more than it keeps
        turns.add(weights, "stock", **own, quant=QUANT[weights])
        for context in asked.contexts:
            found = turns.take(context, asked.rounds)
            told: dict[str, Any] = {name: milliseconds(each) for name, each in found.items()}
            told["ratio"] = ratio(found[peer], found[weights])
            told |= {"memory": turns.memory()[weights], "least": LEAST.get((weights, context))}
            if weights != "fp32":  # whose experts are branches, chosen by the tokens
                told["kernels"] = turns.remotes[weights].call(
                    "kernels", context=context, rounds=asked.rounds
                )
                told["ceiling"] = round(told[peer]["best"] / told["kernels"]["alone"], 3)
            yield context, told


def of_experts(asked: argparse.Namespace) -> dict[str, Any]:
    """A decode step with 64 experts a layer beside one with 16, in int8."""
    with ExitStack() as stack:
        turns = Turns(stack, asked.threads)
        for count in EXPERTS:
            turns.add(
                str(count), "stock", folder=str(checkpoint(asked.cache, count)), quant="int8",
                cache=str(asked.cache), commit=asked.commit, group=asked.group_size,
                vocabulary=shape_config(SHAPE)["vocab_size"],
            )  # fmt: skip
        found = turns.take(asked.contexts[0], asked.rounds)
    told: dict[str, Any] = {name: milliseconds(each) for name, each in found.items()}
    return told | {"ratio": ratio(*(found[str(count)] for count in EXPERTS))}


def of_prepacking(asked: argparse.Namespace) -> dict[str, Any]:
    """fp32 with weights repacked when loaded and as they lie: steps, a prompt, memory."""
    options = {
        "folder": str(checkpoint(asked.cache)), "cache": str(asked.cache), "quant": "none",
        "commit": asked.commit, "vocabulary": FEW,
    }  # fmt: skip
    told = {}
    for prepack in (False, True):  # one after another: memory does not hold both
        with ExitStack() as stack:
            turns = Turns(stack, asked.threads)
            turns.add("fp32", "stock", **options, prepack=prepack)
            steps = milliseconds(turns.take(asked.contexts[0], asked.rounds)["fp32"])
            prompt = turns.remotes["fp32"].call("prefill", batch=1, tokens=CHUNK)
            load, memory = turns.opened["fp32"]["load_s"], turns.memory()["fp32"]
        told["prepacked" if prepack else "as they lie"] = {
            **steps, "opened in s": round(load, 1), "prompt of 512 in s": round(prompt, 2),
            "memory": memory,
        }  # fmt: skip
    return told


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All figures, and whether they hold."""
    asked.commit = asked.label or commit()
    pairs = [
        ("fp32", "transformers", sys.executable, {"dtype": "float32"}),
        ("int8", "transformers", sys.executable, {"dtype": "float32"}),
        ("int4", "llama.cpp", asked.llama_python, {"quant": "int4"}),
    ]
    told: dict[str, Any] = {}
    for weights, peer, python, options in pairs:
        if weights not in asked.weights:
            continue
        why = missing(peer, python)
        if why:
            told[weights] = {"skipped": f"{peer}: {why}"}
            continue
        _say(f"{weights} beside {peer}")
        told[weights] = {}
        try:
            for context, found in compared(asked, weights, peer, python, **options):
                told[weights][str(context)] = found
                _say(json.dumps(found))
        except EngineFailed as problem:
            told[weights]["error"] = str(problem)
    if "experts" in asked.weights:
        told["experts"] = of_experts(asked)
    if "prepacking" in asked.weights:
        told["prepacking"] = of_prepacking(asked)
    return {"ok": holds(told), **told}


def holds(told: dict[str, Any]) -> bool | None:
    """Whether every ratio is reached, or is as near as ONNX Runtime's kernels let it come.

    A step counts as near when `CEILING` of it are the kernels. Of nothing measured: None.
    """
    answers = []
    for weights in QUANT:
        for found in told.get(weights, {}).values():
            if isinstance(found, dict) and found["least"]:
                share = found.get("kernels", {}).get("share", 0.0)
                answers.append(found["ratio"] >= found["least"] or share >= CEILING)
            elif not isinstance(found, dict) and "error" in told[weights]:
                answers.append(False)
    if "experts" in told:
        answers.append(told["experts"]["ratio"] <= MOST_EXPERTS)
    return all(answers) if answers else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command was asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "out" / "cache")
    parser.add_argument("--llama-python", default=sys.executable, help="a python with llama_cpp")
    parser.add_argument("--label", help="what exports are kept under; the commit by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--group-size", type=int, help="of int8 and int4; the export's default")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parts = [*QUANT, "experts", "prepacking"]
    parser.add_argument("--weights", nargs="+", choices=parts, default=parts)
    return parser.parse_args(arguments)


def bar() -> dict[str, Any]:
    """All of it, with a cache that goes again: some 30 GB of disk and as many minutes.

    `LLAMA_PYTHON` names a python that has llama_cpp, where this one has not.
    """
    with tempfile.TemporaryDirectory(dir=ROOT / "bench" / "out") as cache:
        if shutil.disk_usage(cache).free < 40 << 30:
            return {"ok": None, "skipped": "it needs 40 GB of disk"}
        llama = os.environ.get("LLAMA_PYTHON", sys.executable)
        return measure(parse(["--cache", cache, "--llama-python", llama]))


if __name__ == "__main__":
    print(json.dumps(measure(parse()), indent=1))
