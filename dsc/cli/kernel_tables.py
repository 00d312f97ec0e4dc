"""`dsc inspect --kernels` as tables: each kernel of each target, and steps on each card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsc.cli.console import human_bytes
from dsc.cli.report_tables import add_row, clean, human_flops, table_of


def print_kernels(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report of kernels (`dsc.backends.base.TellsKernels`)."""
    for target in dict.fromkeys(each["target"] for each in report["kernels"]):
        own = [each for each in report["kernels"] if each["target"] == target]
        console.print(kernels_table(target, own))
        console.print()
        if any(each["in"] for each in own):
            console.print(launches_table(target, own))
            idle = sum(not each["in"] for each in own)
            if idle:
                console.print(
                    f"{idle} more kernels are of steps of other sizes, or choose tokens on the GPU"
                )
            console.print()
        if any(each["target"] == target for each in report["choices"]):
            console.print(choices_table(target, report["choices"]))
            console.print()
    if report["steps"]:
        console.print(steps_table(report["steps"]))
    for line in report["assumptions"]:
        console.print(Text(clean(line)))


def kernels_table(target: str, kernels: Sequence[Mapping[str, Any]]) -> Table:
    """One line a kernel of a target: what its binary takes."""
    table = table_of(
        f"kernels for {target}", ("kernel",),
        ("warps", "regs", "spills", "shared", "programs", "warps used", "bound"),
    )  # fmt: skip
    table.add_column("matrix", overflow="fold")
    for each in kernels:
        matrix = ", ".join(f"{name} x{count}" for name, count in each["matrix"].items())
        registers, spills = (
            "-" if each[k] is None else str(each[k]) for k in ("registers", "spill_bytes")
        )
        add_row(
            table, each["kernel"], str(each["warps"]), registers, spills,
            human_bytes(each["shared"]), str(each["programs"]), f"{each['occupancy']:.0%}",
            each["bound"], matrix or "-",
        )  # fmt: skip
    return table


def launches_table(target: str, kernels: Sequence[Mapping[str, Any]]) -> Table:
    """One line a kernel of a target that a modelled step launches: its part in each of them."""
    steps = list(dict.fromkeys(step for each in kernels for step in each["in"]))
    table = table_of(
        f"launches for {target} in each step, bytes over weights and caches among them, flops",
        ("kernel",), steps,
    )  # fmt: skip
    for each in kernels:
        if each["in"]:
            add_row(table, each["kernel"], *(_part(each["in"].get(step)) for step in steps))
    return table


def choices_table(target: str, choices: Sequence[Mapping[str, Any]]) -> Table:
    """One line a choice: its tile, and those that `dsc tune` would try."""
    table = table_of(f"tiles for {target}; dsc tune tries the others", ("choice", "tile"), ())
    table.add_column("others", overflow="fold")
    for each in choices:
        if each["target"] == target:
            tile = spelled_tile(each["tile"]) + ("" if each["rule"] else ", measured")
            others = "; ".join(map(spelled_tile, each["others"]))
            add_row(table, each["choice"], tile, others)
    return table


def spelled_tile(tile: Mapping[str, int]) -> str:
    """A tile in a word: its sizes, then its warps and more.

    >>> spelled_tile({"m": 16, "n": 64, "k": 0, "warps": 8, "stages": 2, "ahead": 0, "spans": 4})
    '16x64 w8 s2 spans4'
    """
    sizes = (str(tile[name]) for name in ("m", "n", "k", "rows", "columns") if tile.get(name))
    rest = {"w": tile["warps"], "s": tile.get("stages", 0), "spans": tile.get("spans", 0)}
    rest["spans"] *= rest["spans"] > 1
    more = (f"{name}{count}" for name, count in rest.items() if count)
    return " ".join(("x".join(sizes), *more, *(["ahead"] if tile.get("ahead") else [])))


def _part(sums: Mapping[str, int] | None) -> str:
    if sums is None:
        return ""
    flops = f" {human_flops(sums['flops'])}" if sums["flops"] else ""
    moved = f"{human_bytes(sums['bytes'])}/{human_bytes(sums['stored'])}"
    return f"x{sums['launches']} {moved}{flops}"


def steps_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """One line for each card and step: what is launched and moved, and the time it could take."""
    table = table_of(
        "steps, modelled", ("card", "step"),
        ("batch", "new", "context", "launches", "bytes", "floor", "over floor", "flop", "floor ms",
         "modelled ms", "of the floor's speed"),
    )  # fmt: skip
    for each in steps:
        over = each["bytes"] / each["floor_bytes"] if each["floor_bytes"] else 0.0
        add_row(
            table, each["card"], each["step"],
            *(str(each[k]) for k in ("batch", "new", "context", "launches")),
            human_bytes(each["bytes"]), human_bytes(each["floor_bytes"]), f"{over:.3f}",
            human_flops(each["flops"]), f"{1e3 * each['floor_seconds']:.3f}",
            f"{1e3 * each['seconds']:.3f}", f"{each['floor_seconds'] / each['seconds']:.0%}",
        )  # fmt: skip
    return table
