"""`dsc diff`: two programs side by side, on the terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from dsc.cli import console, options
from dsc.errors import UsageError
from dsc.files import check_writable, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from dsc.diff.compare import Diff, EntryDiff
    from dsc.diff.measure import Timing
    from dsc.diff.sides import Side

SHOWN = 12
"""Operators that the terminal lists of an entry, the worst first."""
_SIDE = "An artifact, a .dsc file, or one stage of a dump: D/PASS."


def diff(
    a: Annotated[str, Argument(metavar="A", help=_SIDE, show_default=False)],
    b: Annotated[str, Argument(metavar="B", help=_SIDE, show_default=False)],
    output: Annotated[
        Path | None,
        options.unset(
            "-o",
            "--output",
            metavar="PAGE.html",
            help="Write one self-contained page: texts, graphs, costs, memory.",
        ),
    ] = None,
    measure: Annotated[
        bool, Option("--measure", help="Run both on random inputs and compare their times.")
    ] = False,
    profiles: Annotated[
        tuple[Path, Path] | None,
        options.unset(
            "--profiles", metavar="A.json B.json", help="Times from traces that dsc exported."
        ),
    ] = None,
    context: Annotated[
        int | None,
        options.unset(
            "--context",
            min=0,
            help="Tokens in the cache, for costs and --measure.  [default: 1024, or what both take;"
            " 128 under --measure]",
        ),
    ] = None,
    error: Annotated[
        bool,
        Option("--error/--no-error", help="Interpret both and compare their results."),
    ] = True,
    run: Annotated[
        bool,
        Option("--run", help="Run both on the same inputs: the error that each operator adds."),
    ] = False,
    seed: Annotated[int, Option("--seed", help="Of the random inputs.")] = 0,
    json: options.Json = False,
    force: Annotated[bool, Option("--force", help="Replace the page at PAGE.html.")] = False,
    trust: options.Trust = False,
) -> None:
    """Compare A and B layer by layer: IR, bytes, flops, time, results.

    With --run the operators that both have, by the names of what they give, are listed with the
    error that B's adds where it reads what A's did, and with what has come together in B so far, in
    fp32 over the weights that are stored; and the outputs of the code of two artifacts. calc_diff
    is 1 - 2·sum(x·y) / sum(x² + y²): 0 where both are equal, 1 where they have nothing in common.

    Examples:

        dsc diff level-0 level-3 -o page.html

        dsc diff dumps/raise_mla dumps/absorb_mla

        dsc diff v3-reference v3-tvm --measure

        dsc diff v3-bf16 v3-int4 --run
    """
    from dsc.diff.compare import compare, with_operators
    from dsc.diff.page import page
    from dsc.diff.sides import open_side

    _check(output, force, measure, profiles)
    with console.progress_bar() as progress:
        progress("reading")
        sides = open_side(a), open_side(b)
        times = _times(sides, measure, profiles, context, trust, progress)
        progress("comparing")
        found = compare(sides[0], sides[1], times, run=error, seed=seed, context=context)
        if run:
            progress("running operators")
            found = with_operators(found, trust, seed)
        if output is not None:
            progress("drawing")
            write_text(output, page(found))
    if json:
        console.print_json(found.as_dict())
    else:
        _print(found, output)


def _check(
    output: Path | None, force: bool, measure: bool, profiles: tuple[Path, Path] | None
) -> None:
    if measure and profiles:
        raise UsageError("--measure and --profiles both give times", hint="choose one")
    if output is not None and output.exists() and not force:
        raise UsageError(f"{output} exists already", hint="choose another -o, or give --force")
    if output is not None:
        check_writable(output)


def _times(
    sides: tuple[Side, Side],
    measure: bool,
    profiles: tuple[Path, Path] | None,
    context: int | None,
    trust: bool,
    progress: console.StepReporter,
) -> tuple[Mapping[str, Timing], Mapping[str, Timing]]:
    from dsc.diff import measure as measuring

    if profiles is not None:
        first, second = (
            measuring.read_profile(path, side.text.entries)
            for path, side in zip(profiles, sides, strict=True)
        )
        return first, second
    if not measure:
        return {}, {}
    progress("measuring")
    first, second = (
        measuring.measure(side, 128 if context is None else context, trust) for side in sides
    )
    return first, second


def _print(found: Diff, output: Path | None) -> None:
    """Print one table for each pair of entries, and how the results compare."""
    from rich.text import Text

    from dsc.cli.report_tables import clean

    out = console.tables()
    for entry in found.entries:
        _print_entry(out, entry)
        _print_operators(out, entry)
    for side, names in zip(found.sides, found.unpaired, strict=True):
        if names:
            out.print(Text(clean(f"only in {side.label}: {', '.join(names)}")))
    out.print(Text(clean(f"results: {found.agreement}")))
    if output is not None:
        out.print(Text(clean(f"page: {output}")))


def _print_operators(out: Console, entry: EntryDiff) -> None:
    """The operators that add most, and how far the outputs of code are apart."""
    from rich.text import Text

    from dsc.cli.report_tables import add_row, clean, table_of
    from dsc.diff.page import operator_rows

    if entry.operators:
        title = clean(f"{entry.name}: the error that operators add, and what has come together")
        table = table_of(title, ("operator", "value"), ("calc_diff", "max", "so far", "max so far"))
        for cells in operator_rows(entry)[:SHOWN]:
            add_row(table, *cells)
        out.print(table)
        hidden = len(entry.operators) - SHOWN
        if hidden > 0:
            out.print(Text(clean(f"{hidden} more in --json and on the page")))
    for name, off in entry.kernels.items():
        words = f"{entry.name}, compiled: {name} calc_diff {off.sums.calc_diff:.2g}, max"
        out.print(Text(clean(f"{words} {off.most:.2g}")))


def _print_entry(out: Console, entry: EntryDiff) -> None:
    from rich.text import Text

    from dsc.cli.report_tables import add_row, clean, table_of
    from dsc.diff.page import columns, cost_rows, cost_sums

    sizes = (" ".join(f"{k}={v}" for k, v in sorted(at.items())) for at in entry.at)
    at = " → ".join(dict.fromkeys(sizes))
    shown = [key != "parameters" for key, _ in columns(entry)]
    words = compress((words for _, words in columns(entry)), shown)
    table = table_of(clean(f"{entry.name} ({at})"), ("layer",), (*words, "lines"))
    for name, run, costs in cost_rows(entry):
        rows = entry.rows[run[0].name]
        changed = f"{sum(r.differs for r in rows)}/{len(rows)}"
        add_row(table, name, *map(str, compress(costs, shown)), changed)
    add_row(table, "all", *map(str, compress(cost_sums(entry), shown)), "", style="bold")
    out.print(table)
    if entry.error:
        worst = max(entry.errors, key=entry.errors.__getitem__)
        out.print(Text(clean(f"max error {entry.error:.2g} (of {worst})")))
    out.print()
