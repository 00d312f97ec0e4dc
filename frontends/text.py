"""`.dsc` files: programs as text, for tests, for `dsc opt`, and to be read by people.

The text (`print_program`) is the whole program but for the values of its weights. What is read back
is equal to what was written, so a pass can be tried on a hand-written graph of five lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsc.errors import ParseError
from dsc.files import STANDARD_INPUT, read_text
from dsc.ir.parser import parse_verified
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.weights import WeightSource


def read_program(
    file: Path | str, source: WeightSource | None = None, stages: Sequence[Stage] = tuple(Stage)
) -> Program:
    """The program in a text file, or in standard input for `-`, verified.

    Its weights have types alone, unless `source` is given; a graph on its own is at the first of
    `stages` that allows it.

    Raises:
        FileError: the file cannot be read.
        UsageError: it is no text.
        ParseError: it is not a program, or breaks a rule of the IR; says where.
    """
    text = read_text(file)
    try:
        return parse_verified(text, source, stages)
    except ParseError as problem:
        place = "standard input" if str(file) == STANDARD_INPUT else str(file)
        where = f"{place}, {problem.where}" if problem.where else place
        raise ParseError(problem.what, where, problem.hint, problem.picture) from None
