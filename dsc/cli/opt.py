"""`dsc opt`: text IR in, text IR out, through the passes that are named."""

from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument, Exit, Option

from dsc.cli import options
from dsc.errors import UsageError


def list_passes(asked: bool) -> None:
    """Print every pass in the order of a compile, with its options and what it does, and end."""
    if not asked:
        return
    import importlib

    from dsc import pipeline
    from dsc.rewrite.options import options_of

    for name in pipeline.PASSES:
        kind = pipeline.kind_of(name)
        what = (importlib.import_module(kind.__module__).__doc__ or "").partition("\n")[0]
        print(f"{name}\n    {what}")
        for option in options_of(kind).values():
            print(f"    {option}")
    raise Exit


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
        options.unset(
            "-p",
            "--passes",
            metavar="pass,pass{option=value}",
            help="Applied in this order. An option has its default where it is not given.",
        ),
    ] = "",
    explain: Annotated[
        str | None,
        options.unset(
            "--explain",
            metavar="PASS",
            help="Apply this pass last and say where it fired and why elsewhere it did not.",
        ),
    ] = None,
    verify_each: options.VerifyEach = False,
    listed: Annotated[
        bool,
        Option(
            "--list",
            help="List the passes in the order of a compile, with their options, and end.",
            callback=list_passes,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Apply passes to a text program and print the result.

    A graph alone is a program of one entry at the stage that the first pass needs. A program that
    is fused or planned already is opened again for a pass that needs it so.

    A pass with options is pass{option=value,option=value}; a value is a number, true or false, a
    word, or words in brackets. An option that says what a backend's kernels take is the backend's
    name. Quote it: shells read braces.

    Examples:

        dsc opt layer.dsc -p absorb_mla,fuse

        dsc opt layer.dsc -p "append_cache_in_place{slack=64},fuse{level=1,limits=tvm}"

        dsc opt layer.dsc --explain "absorb_mla{entries=[decode]}"
    """
    from dsc import backends, pipeline
    from dsc.frontends.text import read_program
    from dsc.ir.printer import print_program

    asked = pipeline.read(passes, backends.get)
    told = pipeline.read(explain or "", backends.get)
    if explain is not None and len(told) != 1:
        raise UsageError(f"--explain {explain!r}", hint="name one pass; -p takes those before it")
    program = read_program(file, stages=pipeline.stages_for([*asked, *told]))
    program = pipeline.apply(program, asked, verify_each=verify_each)
    if told:
        print(pipeline.explain(program, told[0]))
    else:
        sys.stdout.write(print_program(program))
