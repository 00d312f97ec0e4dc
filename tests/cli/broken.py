"""Passes that are wrong under one option, so that a line that drops it repeats nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dsc import pipeline
from dsc.cli import main
from dsc.ir.graph import Node
from dsc.ir.program import Program
from dsc.rewrite.base import Pass, PassReport

ASKED = ("--backend", "null", "--ranks", "4", "--prefill-chunk", "64", "--fusion-level", "1")
BROKEN = {"shard": ("ranks", 4), "append_cache_in_place": ("slack", 64), "fuse": ("level", 1)}
"""A pass, and the option and value of `ASKED` with which it is wrong, and with no other."""


def long_steps(folder: Path) -> str:
    """The small language model with room for 64 new tokens, as a file."""
    text = (Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc").read_text()
    path = folder / "long.dsc"
    path.write_text(text.replace("S=[1,8]", "S=[1,64]"))
    return str(path)


def break_pass(monkeypatch: pytest.MonkeyPatch, name: str, fails: bool = False) -> None:
    """Make a pass wrong under its option of `BROKEN`: it fails, or changes what is computed."""
    kind, (option, value) = pipeline.kind_of(name), BROKEN[name]
    right = kind.run

    def changed(node: Node) -> Node:
        return replace(node, attrs=node.attrs.updated(eps=1.0)) if node.op == "rms_norm" else node

    def run(self: Pass, program: Program, report: PassReport) -> Program:
        done = right(self, program, report)
        if getattr(self, option) != value:
            return done
        if fails:
            raise ZeroDivisionError("a dim of zero")
        return done.map_entries(lambda graph: graph.with_nodes(map(changed, graph.nodes)))

    monkeypatch.setattr(kind, "run", run)


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Run the command in this process: its exit status, and what it wrote on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, capsys.readouterr().err
