"""`dsc tune`: the tiles of a compiled model's kernels, measured on the card at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from typer import Option

from dsc.cli import console, options


def tune(
    artifact: options.Artifact,
    entry: Annotated[
        list[str] | None,
        options.unset(
            "--entry",
            metavar="E",
            help="Only this entry: decode_few, decode, extend, prefill, as OUT has them;"
            " repeatable.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        options.unset(
            "--budget",
            metavar="SECONDS",
            min=0.0,
            help="Try no further tiles after so long.  [default: all are tried]",
        ),
    ] = None,
    prepare: Annotated[
        bool,
        Option(
            "--prepare",
            help="Compile the tiles to be tried, here and into OUT, and measure nothing: the card's"
            " machine needs no Triton then.",
        ),
    ] = False,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Measure the tiles of OUT's kernels on the card at hand, and write the fastest into OUT.

    Each kernel by triton has a tile that a rule chose and some that could be faster; plan.json
    lists them. They are compiled, held against the results of OUT as it is, and timed in turns with
    it, by events on the card. What is faster by more than readings scatter is taken, where the
    whole is faster too: OUT is written anew, whole or not at all, with what was measured in
    tuned.json beside the kernels. It is kept as well: the next `dsc compile` for this card takes
    it, unless --no-tune is given.

    Examples:

        dsc tune v3-triton

        dsc tune v3-triton --entry decode --budget 120 --json
    """
    from dsc.tuning import tune as tuned

    with console.progress_bar() as progress:
        found = tuned(artifact, entry or (), budget, prepare, trust, progress)
    if json:
        console.print_json(found)
    elif prepare:
        for each in found["prepared"]:
            _show_dropped(each)
            console.stdout().print(
                f"{artifact}: {each['kernels']} kernels more for {each['target']},"
                f" {console.human_bytes(each['bytes'])}"
            )
    else:
        _show(found)


def _show_dropped(found: Mapping[str, Any]) -> None:
    from dsc.cli.kernel_tables import spelled_tile

    for each in found["dropped"]:
        told = f"not to be had: {each['key']} {spelled_tile(each['tile'])}: {each['why']}"
        console.stderr().print(told, markup=False)


def _show(found: Mapping[str, Any]) -> None:
    from dsc.cli.kernel_tables import spelled_tile
    from dsc.cli.report_tables import add_row, table_of

    out = console.tables()
    if found["taken"]:
        title = f"tiles that are faster on {found['card']}"
        table = table_of(title, ("choice", "before", "now"), ("of the time", "scatter"))
        for each in found["taken"]:
            tiles = (spelled_tile(each[name]) for name in ("before", "tile"))
            shares = (f"{each['share']:.0%}", f"{each['scatter']:.1%}")
            add_row(table, each["key"], *tiles, *shares)
        out.print(table)
    for step in found["steps"]:
        console.stdout().print(
            f"{step['step']:28} {step['before_us']:10.1f} us of kernels before,"
            f" {step['after_us']:.1f} now"
        )
    _show_dropped(found)
    left = f", {found['not_tried']} not tried in time" if found["not_tried"] else ""
    changed = found["why_not"] or f"{len(found['taken'])} taken"
    console.stdout().print(
        f"{found['output']}: {found['choices']} choices, {found['tried']} tiles measured on"
        f" {found['card']} in {found['seconds']:.0f} s{left}; {changed}"
    )
