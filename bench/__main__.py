"""Measure dsc beside its peers on the same weights, by one protocol.

    python -m bench --shape moonlight-6l [--quick] [--peers transformers,llama.cpp] [--out DIR]
    python -m bench --folder CHECKPOINT
    python -m bench --quant int4 --peers llama.cpp     weights in integers, beside Q4_0
    python -m bench --against ../another-checkout      two commits in turns, without other peers

Writes report.md, report.json and decode-b1.svg. A peer that is not installed is reported as skipped
with the reason; llama.cpp and vLLM's CPU build may live in environments of their own
(`--llama-python`, `--vllm-python`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import plot, table
from bench.engines import PEERS, SLOW
from bench.remote import ROOT, EngineFailed, Remote, missing
from bench.run import Cell, Effort, Result, run_cell
from bench.shapes import shape_config, write_checkpoint
from dsc.asked import QUANT
from dsc.hardware import cpu

CONTEXTS = (128, 1024, 4096, 16384)
QUICK = Effort(rounds=3, tokens=8, seconds=0.5)
PROMPT = 512
QUANTISED = {"llama.cpp": ("none", "int8", "int4")}
"""What other than bf16 a peer's weights may be in."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command was asked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--shape", default="moonlight-6l", help="PRESET-Nl: random weights, N layers"
    )
    model.add_argument("--folder", type=Path, help="a checkpoint instead of a shape")
    parser.add_argument("--quick", action="store_true", help="two minutes: dsc alone, few rounds")
    parser.add_argument("--peers", type=_names, help=f"of {', '.join(PEERS)}; or none")
    parser.add_argument("--against", type=Path, help="a checkout of another commit, as the peer")
    parser.add_argument("--contexts", type=_numbers)
    parser.add_argument("--quant", choices=list(QUANT), default="none", help="what weights are in")
    parser.add_argument("--batches", type=_numbers)
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--slow-context", type=int, default=4096, help=f"most for {', '.join(SLOW)}"
    )
    parser.add_argument("--threads", type=int, default=cpu().cores)
    parser.add_argument("--llama-python", default=sys.executable, help="a python with llama_cpp")
    parser.add_argument("--vllm-python", default=sys.executable, help="a python with vllm")
    parser.add_argument("--cache", type=Path, default=ROOT / "bench" / "out" / "cache")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out" / "peers")
    found = parser.parse_args(arguments)
    alone = found.quick or found.against is not None
    found.peers = ([] if alone else list(PEERS)) if found.peers is None else found.peers
    found.contexts = found.contexts or ([128, 1024] if alone else list(CONTEXTS))
    found.batches = found.batches or ([1] if alone else [1, 8])
    effort = QUICK if found.quick else Effort()
    found.effort = effort if found.rounds is None else Effort(found.rounds, effort.tokens)
    return found


def _names(text: str) -> list[str]:
    found = [] if text in ("", "none") else text.split(",")
    unknown = [name for name in found if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no peer {', '.join(unknown)}; of {', '.join(PEERS)}")
    return found


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError("numbers from 1")
    return found


def cells(contexts: Sequence[int], batches: Sequence[int], quant: str = "none") -> list[Cell]:
    """The cells of the table, in order."""
    decode = [Cell("decode", context, batch, quant) for batch in batches for context in contexts]
    return [Cell("prefill", PROMPT, 1, quant), *decode]


class Bench:
    """One run of the command."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.folder = asked.folder.resolve() if asked.folder else self._shape(asked.shape)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.skipped: dict[str, str] = {}
        self.engines: dict[str, dict[str, Any]] = {}
        self.probe = ""
        self.results: list[Result] = []
        self.commit = _commit()

    def _shape(self, name: str) -> Path:
        folder: Path = self.asked.cache.resolve() / name
        config = shape_config(name)
        if not folder.is_dir():
            _say(f"writing random weights of {name} to {folder}")
            write_checkpoint(config, folder)
        return folder

    def run(self) -> None:
        """Measure every peer in turns with us; us alone when there is none."""
        asked = self.asked
        asked.cache.mkdir(parents=True, exist_ok=True)
        with Remote("probe", threads=asked.threads) as machine:
            self.probe = machine.call("open", **self.options())["units"]
            peers = [name for name in asked.peers if self._installed(name)]
            peers += [f"dsc@{_commit(asked.against)}"] if asked.against else []
            with self._open("dsc", sys.executable) as ours:
                for name in peers or [""]:
                    self._beside(ours, name, machine)
                self.engines["dsc"]["rss"] = ours.call("rss")

    def _beside(self, ours: Remote, peer: str, machine: Remote) -> None:
        """All cells, in turns with one peer; without a peer by ourselves."""
        todo = cells(self.asked.contexts, self.asked.batches, self.asked.quant)
        if not peer:
            for cell in todo:
                self._measure([ours], cell, machine)
            return
        try:
            theirs = self._open(peer, self._python(peer))
        except EngineFailed as problem:
            self.skipped[peer] = str(problem)
            return
        with theirs:
            for cell in todo:
                slow = peer in SLOW and cell.context > self.asked.slow_context
                if slow:
                    why = "it expands the whole cache in every step (--slow-context measures it)"
                    self.skipped[f"{peer}, {cell.name}"] = why
                else:
                    self._measure([ours, theirs], cell, machine)
            try:
                self.engines[peer]["rss"] = theirs.call("rss")
            except EngineFailed as problem:
                self.skipped[peer] = str(problem)

    def _measure(self, remotes: Sequence[Remote], cell: Cell, machine: Remote) -> None:
        _say(f"{cell.name}: {', '.join(r.engine for r in remotes)}")
        size = cell.read_bytes(self.config)
        found = run_cell(
            remotes, cell, self.asked.effort, lambda: machine.call("speed", size=size), self.config
        )
        for result in found:
            _say("  " + "  ".join(table._row(result)[1:]))
        self.results += found

    def _installed(self, peer: str) -> bool:
        why = missing(peer, self._python(peer))
        if not why and self.asked.quant not in QUANTISED.get(peer, ("none",)):
            why = f"it has no weights in {self.asked.quant} here"
        if why:
            self.skipped[peer] = why
        return not why

    def _python(self, peer: str) -> str:
        asked = {"llama.cpp": self.asked.llama_python, "vllm": self.asked.vllm_python}
        return str(asked.get(peer, sys.executable))

    def _open(self, engine: str, python: str) -> Remote:
        _say(f"opening {engine}")
        name, _, commit = engine.partition("@")
        options = self.options()
        if commit:
            options["commit"] = commit
        root = self.asked.against.resolve() if commit else ROOT
        remote = Remote(name, python, self.asked.threads, root=root)
        remote.engine = engine
        try:
            self.engines[engine] = remote.call("open", **options)
        except EngineFailed:
            remote.close()
            raise
        return remote

    def options(self) -> dict[str, Any]:
        """What every engine is told."""
        effort = self.asked.effort
        room = effort.tokens * (effort.rounds + 1) + 4
        return {
            "folder": str(self.folder),
            "cache": str(self.asked.cache.resolve()),
            "threads": self.asked.threads,
            "max_batch": max(self.asked.batches),
            "max_context": max(max(self.asked.contexts) + room, PROMPT),
            "vocabulary": self.config["vocab_size"],
            "commit": self.commit,
            "quant": self.asked.quant,
        }

    def write(self) -> Path:
        """Write the report."""
        out: Path = self.asked.out
        out.mkdir(parents=True, exist_ok=True)
        facts = {
            "shape": self.folder.name,
            "quant": self.asked.quant,
            "threads": self.asked.threads,
            "machine": cpu().name,
            "commit": self.commit,
            "probe": self.probe,
            "engines": self.engines,
            "skipped": self.skipped,
        }
        (out / "report.json").write_text(json.dumps(table.as_json(facts, self.results), indent=1))
        (out / "report.md").write_text(table.markdown(facts, self.results))
        for batch in self.asked.batches:
            picture = plot.decode_svg(self.results, batch)
            if picture:
                (out / f"decode-b{batch}.svg").write_text(picture)
        return out / "report.md"


def _commit(root: Path = ROOT) -> str:
    """The commit, and a digest of what was changed since: a compiled model belongs to both."""
    name = _git(root, "describe", "--always").strip() or "unknown"
    changes = _git(root, "diff", "HEAD")
    return f"{name}-{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else name


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, write, and print the table."""
    bench = Bench(parse())
    try:
        bench.run()
    except EngineFailed as problem:
        sys.exit(f"bench: {problem}")
    finally:
        report = bench.write()
    print(report.read_text())


if __name__ == "__main__":
    main()
