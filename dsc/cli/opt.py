"""`dsc opt`: text IR in, text IR out, through the passes that are named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from dsc.cli import options

if TYPE_CHECKING:
    from dsc.rewrite.base import PassReport


def opt(
    file: Annotated[
        str,
        Argument(
            metavar="FILE.dsc",
            help="A program; - reads it from standard input.",
            show_default=False,
        ),
    ],
    passes: Annotated[
        str,
        Option("-p", "--passes", metavar="pass,pass", help="Applied in this order."),
    ] = "",
    explain: Annotated[
        str | None,
        Option(
            "--explain",
            metavar="PASS",
            help="Apply this pass last and say where it fired and why elsewhere it did not.",
            show_default=False,
        ),
    ] = None,
    verify_each: options.VerifyEach = False,
) -> None:
    """Apply passes to a text program and print the result.

    Examples:

        dsc opt layer.dsc -p absorb_mla,fuse

        dsc opt layer.dsc --explain absorb_mla
    """
    from dsc import pipeline
    from dsc.ir.parser import parse_program
    from dsc.ir.printer import print_program
    from dsc.rewrite.manager import Manager, Watch

    program = parse_program(read_text(file))
    names = [name.strip() for name in passes.split(",") if name.strip()]
    if explain is not None:
        names.append(explain)
    manager = Manager(Watch(verify_each=verify_each))
    program = manager.run(program, [pipeline.pass_named(name) for name in names])
    if explain is None:
        sys.stdout.write(print_program(program))
        return
    print("\n".join(explanation(explain, manager.records[-1].report)))


def explanation(name: str, report: PassReport) -> Iterator[str]:
    """Say line by line what a pass did and where it nearly did something."""
    yield f"{name}: {sum(report.fired.values())} rewrites, {len(report.missed)} near misses"
    for rule, times in report.fired.items():
        yield f"  fired   {rule}  {times} times"
    for rule, where, reason in report.missed:
        yield f"  missed  {rule}  at {where}: {reason}"
    for fact, value in report.facts.items():
        yield f"  {fact}: {value}"


def read_text(file: str) -> str:
    """Read a file, or standard input for `-`."""
    from dsc.errors import UsageError

    if file == "-":
        return sys.stdin.read()
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read it: {error}", where=file) from None
