"""`.dsc` files: programs as text, for tests, for `dsc opt`, and to be read by people.

The text is the whole program but for the values of its weights. What is read back is equal to what
was written, so a pass can be tried on a hand-written graph of five lines.
"""

from __future__ import annotations

from pathlib import Path

from dsc.errors import ParseError, UsageError
from dsc.files import write_text
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.verifier import verify
from dsc.ir.weights import WeightSource

SUFFIX = ".dsc"


def read_program(file: Path | str, source: WeightSource | None = None) -> Program:
    """The program in a text file, verified. Its weights have types alone, unless `source` is given.

    Raises:
        UsageError: the file cannot be read, or is no text.
        ParseError: it is not a program; says where.
        VerificationError: it breaks a rule of the IR.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot read it: {problem}", where=str(path)) from None
    try:
        program = parse_program(text, source)
    except ParseError as problem:
        where = f"{path}, {problem.where}" if problem.where else str(path)
        raise ParseError(problem.what, where, problem.hint, problem.picture) from None
    verify(program)
    return program


def write_program(program: Program, file: Path | str) -> None:
    """Write a program as text. Weight values stay where they are."""
    write_text(file, print_program(program))
