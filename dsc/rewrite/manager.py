"""Runs passes one after another, and checks each at both ends.

Always: the stage a pass needs, and on its result the verifier (types inferred again, SSA, stage,
aliasing). On request: the interpreter compares the program before and after (`verify_each`), the
text after each pass goes to a folder of numbered files (`dump_dir`) or to a stream (`print_after`).
Wherever a pass is told of, it is by the text with which `dsc opt -p` runs it again.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dsc.errors import DscError, InternalError, UsageError, VerificationError
from dsc.files import write_text
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.verifier import verify
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.twin import Twin

NOT_PASSES = ("input", "all")
"""What `print_after` takes besides: the program before all passes, and every pass."""
LIST = "passes.txt"
"""In a dump folder: the passes that ran, one a line, as `dsc opt -p` takes them."""


@dataclass(frozen=True)
class Watch:
    """What a user wants to see of the passes as they run.

    `print_after` names passes, or `all`; `progress(what, done, total)` is told of each pass.
    """

    print_after: Sequence[str] = ()
    dump_dir: Path | None = None
    verify_each: bool = False
    progress: Callable[[str, int, int], None] | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether nobody looks at single passes."""
        return not (self.print_after or self.dump_dir or self.verify_each)


@dataclass
class PassRecord:
    """One line of report.json's list of passes; `text` is the pass with its options."""

    name: str
    text: str
    seconds: float
    nodes: dict[str, int]
    changed: bool
    report: PassReport
    verified: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        shown = {"name": self.name, "text": self.text, "seconds": round(self.seconds, 4)}
        shown |= {"changed": self.changed}
        return {**shown, "nodes": self.nodes, "verified": self.verified, **self.report.as_dict()}


@dataclass
class Manager:
    """Runs a list of passes over a program and keeps the records."""

    watch: Watch = field(default_factory=Watch)
    records: list[PassRecord] = field(default_factory=list)

    @cached_property
    def twin(self) -> Twin:
        """What compares programs; its import takes the interpreter along."""
        return Twin()

    def run(self, program: Program, passes: Sequence[Pass]) -> Program:
        """The program after all passes. Raises what the checks raise, naming the pass."""
        for _, after in self.steps(program, passes):
            program = after
        return program

    def steps(self, program: Program, passes: Sequence[Pass]) -> Iterator[tuple[Pass, Program]]:
        """Each pass with the program after it, run as they are asked for."""
        self._check_names(passes)
        self._dump(program, "input")
        for index, each in enumerate(passes):
            if self.watch.progress is not None:
                self.watch.progress(f"passes: {each.name}", index, len(passes))
            program = self._one(program, each)
            yield each, program
        if self.watch.progress is not None:
            self.watch.progress("passes", len(passes), len(passes))

    def _one(self, before: Program, each: Pass) -> Program:
        if before.stage not in each.needs:
            wanted = ", ".join(s.name for s in sorted(each.needs))
            raise VerificationError(
                f"pass {each.name} needs a program at stage {wanted}",
                where=f"the program is at {before.stage.name}",
                hint="run the passes that lead there first; dsc/pipeline.py has them in order",
            )
        report = PassReport()
        start = time.perf_counter()
        with _blame(each, before):
            after = each.run(before, report)
            if each.ensures is not None and after.stage < each.ensures:
                raise VerificationError(f"it left the program at stage {after.stage.name}")
            verify(after)
        seconds = time.perf_counter() - start
        nodes = {name: len(graph.nodes) for name, graph in after.entries.items()}
        record = PassRecord(each.name, each.text, seconds, nodes, after is not before, report)
        if self.watch.verify_each and after is not before:
            record.verified = self._compare(each, before, after)
        self.records.append(record)
        self._dump(after, each.name, each.text)
        return after

    def _compare(self, each: Pass, before: Program, after: Program) -> str:
        found = self.twin.compare(each, before, after)
        if not found.ok:
            raise InternalError(
                f"pass {each.name} changed what the program computes: {found}",
                print_program(before),
                f"{_line(each)} --verify-each",
            )
        return str(found)

    def _check_names(self, passes: Sequence[Pass]) -> None:
        known = {p.name for p in passes} | set(NOT_PASSES)
        unknown = [n for n in self.watch.print_after if n not in known]
        if unknown:
            hint = f"one of {', '.join(p.name for p in passes)}, or all"
            raise UsageError(f"no pass that runs is called {', '.join(unknown)}", hint=hint)

    def _dump(self, program: Program, name: str, text: str = "") -> None:
        wanted = {name, "all"} & set(self.watch.print_after)
        if not wanted and self.watch.dump_dir is None:
            return
        shown = f"# after {text or name}\n{print_program(program)}"
        if wanted:
            sys.stdout.write(f"{shown}\n")
        folder = self.watch.dump_dir
        if folder is not None:
            number = len(list(folder.glob("*.dsc")))
            write_text(folder / f"{number:02d}_{name}.dsc", shown)
            listed = [r.text for r in self.records]
            write_text(folder / LIST, "".join(f"{line}\n" for line in listed))


def _line(each: Pass) -> str:
    """The command that runs a pass again on the program it was given, saved as repro.dsc."""
    return f"dsc opt repro.dsc -p {shlex.quote(each.text)}"


@contextmanager
def _blame(each: Pass, before: Program) -> Iterator[None]:
    """Turn what goes wrong inside a pass into an error that names it and can be reproduced."""
    try:
        yield
    except VerificationError as problem:
        raise InternalError(
            f"pass {each.name} made a program that does not verify: {problem}",
            print_program(before),
            _line(each),
        ) from problem
    except (DscError, OSError, MemoryError):  # not the pass's doing
        raise
    except Exception as problem:
        raise InternalError(
            f"pass {each.name} failed: {type(problem).__name__}: {problem}",
            print_program(before),
            _line(each),
        ) from problem


def pass_name(path: Path) -> str:
    """Return the pass of a numbered dump.

    >>> pass_name(Path("03-absorb_mla.dsc")), pass_name(Path("12_fuse.dsc"))
    ('absorb_mla', 'fuse')
    """
    return path.stem.lstrip("0123456789").lstrip("-_.")
