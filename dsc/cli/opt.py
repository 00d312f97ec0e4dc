"""`dsc opt`: text IR in, text IR out, through the passes that are named."""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument, Option

from dsc.cli import options


def opt(
    file: Annotated[
        str,
        Argument(
            metavar="FILE.dsc",
            help="A program, or one graph; - reads it from standard input.",
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

    A graph alone is a program of one entry at the stage that the first pass needs. A program that
    is fused or planned already is opened again for a pass that needs it so.

    Examples:

        dsc opt layer.dsc -p absorb_mla,fuse

        dsc opt layer.dsc --explain absorb_mla
    """
    from dsc import pipeline
    from dsc.frontends.text import read_program
    from dsc.ir.printer import print_program

    names = [name.strip() for name in passes.split(",") if name.strip()]
    asked = [*names, *([] if explain is None else [explain])]
    pipeline.check_names(asked)
    stages = pipeline.stages_for(asked)
    program = read_program(file, stages=stages)
    program = pipeline.apply(program, names, verify_each=verify_each)
    if explain is not None:
        print(pipeline.explain(program, explain))
    else:
        sys.stdout.write(print_program(program))
