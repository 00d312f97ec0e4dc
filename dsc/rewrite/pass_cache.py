"""What passes made of programs, kept between runs (`dsc/kept.py`): a second compile runs none.

A key is all that passes depend on, in full: the program's text, the passes with their options, the
backend that has a say in what they do, our sources, and the packages installed, whose arithmetic
proves rewrites. Passes see the types of weights and never their values, so an entry is text alone.
An operator or a rule from outside is code that no key tells of: nothing is kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from dsc import kept
from dsc.errors import DscError
from dsc.ir.op import added
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.rewrite.base import NearMiss, Pass, PassReport
from dsc.rewrite.manager import PassRecord
from dsc.rewrite.registered import registered_rules

KIND = "passes"
OURS = ("", "passes", "backends")
"""Folders of dsc whose code says what passes make of a program."""
WORTH = 0.1
"""Seconds: what passes made in less is made again."""
_HOME = "dsc."


class Prepared(NamedTuple):
    """A program after all passes: as a session runs it, and as the backend emits it."""

    program: Program
    emitted: Program
    records: list[PassRecord]


class PassCache:
    """Where what some passes make of a program is kept."""

    def __init__(self, program: Program, passes: Sequence[Pass], backend: object, target: str):
        self.program = program
        self.key = _key(program, passes, backend, target)
        self._began = time.perf_counter()

    def load(self) -> Prepared | None:
        """What is kept, over the program's own weights; `None` where nothing is."""
        data = None if self.key is None else kept.get(KIND, self.key)
        if data is None:
            return None
        with suppress(ValueError, KeyError, TypeError, RecursionError, DscError):
            entry = json.loads(data)
            program = parse_program(entry["program"], self.program.source)
            emitted = program
            if entry["emitted"] is not None:
                emitted = parse_program(entry["emitted"], self.program.source)
            return Prepared(program, emitted, [_record(each) for each in entry["records"]])
        return None

    def store(self, made: Prepared) -> None:
        """Keep what the passes made, where that took long enough."""
        if self.key is None or time.perf_counter() - self._began < WORTH:
            return
        same = made.emitted is made.program
        entry = {
            "program": print_program(made.program),
            "emitted": None if same else print_program(made.emitted),
            "records": [asdict(each) for each in made.records],
        }
        kept.put(KIND, self.key, json.dumps(entry).encode())


def _key(
    program: Program, passes: Sequence[Pass], backend: object, target: str
) -> Mapping[str, Any] | None:
    ours = (type(each).__module__.startswith(_HOME) for each in (backend, *passes))
    if kept.refused() or registered_rules() or added() or not all(ours):
        return None
    return {
        "program": hashlib.sha256(print_program(program).encode()).hexdigest(),
        "passes": [each.text for each in passes],
        "backend": [type(backend).__qualname__, target],
        "ours": kept.sources(*OURS),
        **kept.surroundings(),
    }


def _record(entry: Mapping[str, Any]) -> PassRecord:
    report = dict(entry["report"])
    near = [NearMiss(**{**miss, "culprits": tuple(miss["culprits"])}) for miss in report["near"]]
    found = PassRecord(**{**entry, "report": PassReport(**{**report, "near": near})})
    return replace(found, seconds=0.0)
