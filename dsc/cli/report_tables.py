"""A report as tables for the terminal: passes, why some did not fire, entries, layers.

Reports come from files, perhaps a stranger's: what they hold is shown as text, never as markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsc.cli.console import human_bytes
from dsc.ir.layers import runs
from dsc.rewrite.explain import summary

LAYER_COSTS = ("parameters", "weight_bytes", "read_bytes", "written_bytes", "flops")
HEIGHTS = " ▁▂▃▄▅▆▇█"
WORST = 24
"""Operators that a table of what quantising costs shows, at most."""
SAME = ("nodes", "regions", "cache_bytes_per_token", *LAYER_COSTS)
"""What two layers share when they are shown as one line."""


def print_report(console: Console, report: Mapping[str, Any], entry: str | None = None) -> None:
    """Print a report; only one of its entries where `entry` names it."""
    if not report:
        console.print("the report is empty")
        return
    for line in _head(report):
        console.print(Text(clean(line)))
    passes = report.get("passes", [])
    if passes:
        console.print()
        console.print(passes_table(passes))
    for line in not_fired(passes):
        console.print(Text(clean(line)))
    entries = {k: v for k, v in report.get("entries", {}).items() if entry in (None, k)}
    if entries:
        console.print()
        console.print(entries_table(entries))
    for name, found in entries.items():
        if found.get("layers"):
            console.print()
            console.print(layers_table(name, found))
    if report.get("packed", {}).get("layers") and entry is None:
        console.print()
        console.print(packed_table(report["packed"]))
    if report.get("quantisation"):
        console.print()
        console.print(quantisation_table(report["quantisation"]))
    for note in report.get("notes", []):
        console.print(Text(clean(f"note: {note}")))


def _head(report: Mapping[str, Any]) -> Iterator[str]:
    if "parameters" in report:
        yield f"parameters            {human_count(report['parameters'])}"
    if report.get("cache_bytes_per_token"):
        yield f"cache, a token        {report['cache_bytes_per_token']:,} B"
    if report.get("packed"):
        ranks = report["packed"]["ranks"]
        each = f", each of {ranks} ranks" if ranks > 1 else ""
        yield f"weights, packed       {report['packed']['bytes']:,} B{each}"
    if report.get("seconds"):
        spent = ", ".join(f"{name} {value:.2f}" for name, value in report["seconds"].items())
        yield f"seconds               {spent}"


def passes_table(passes: Sequence[Mapping[str, Any]]) -> Table:
    """One line a pass: time, nodes left, what fired and where."""
    table = table_of("passes", ("pass",), ("ms", "nodes", "fired", "missed"))
    for each in passes:
        fired = "; ".join(_fired(each, rule, n) for rule, n in each.get("fired", {}).items())
        nodes = "+".join(str(n) for n in each.get("nodes", {}).values())
        what = fired or ("changed" if each.get("changed") else "-")
        missed = str(len(each.get("missed", ())) or "-")
        told = each.get("text") or each.get("name", "?")
        add_row(table, told, f"{1e3 * each.get('seconds', 0):.0f}", nodes, what,
             missed)  # fmt: skip
    return table


def _fired(record: Mapping[str, Any], rule: str, times: int) -> str:
    places = summary(record.get("places", {}).get(rule, []))
    return f"{rule} x{times}" + (f" ({places})" if places else "")


def not_fired(passes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each reason that a rule did not fire."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for each in passes:
        for rule, where, reason in each.get("missed", ()):
            reasons.setdefault((each.get("name", "?"), rule, reason), []).append(where)
    for (name, rule, reason), places in reasons.items():
        where = summary([p for p in places if p])
        yield f"  {name}: {rule} did not fire{' at ' if where else ''}{where}: {reason}"


def entries_table(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each entry and point."""
    table = table_of(
        "entries, a step", ("entry", "at"),
        ("nodes", "launches", "params", "weights", "read", "written", "flop", "arena", "at least"),
    )  # fmt: skip
    for name, entry in entries.items():
        launches = str(entry.get("launches", "-"))
        for index, point in enumerate(entry.get("points", ())):
            first = index == 0
            at = " ".join(f"{k}={v}" for k, v in sorted(point["at"].items()))
            add_row(
                table, name if first else "", at, str(entry["nodes"]) if first else "",
                launches if first else "", human_count(point["parameters"]),
                *(human_bytes(point[k]) for k in ("weight_bytes", "read_bytes", "written_bytes")),
                human_flops(point["flops"]),
                *(_bytes(entry.get(k)) if first else "" for k in ("arena_bytes",
                                                                  "arena_lower_bound")),
            )  # fmt: skip
    return table


def layers_table(name: str, entry: Mapping[str, Any]) -> Table:
    """One line for each run of equal layers of an entry, at its first point."""
    at = " ".join(f"{k}={v}" for k, v in sorted(entry.get("at", {}).items()))
    table = table_of(
        f"{name} by layer ({at}), each", ("layer",),
        ("nodes", "launches", "params", "weights", "read", "written", "flop", "cache/token",
         "regions"),
    )  # fmt: skip
    for layers in runs(entry["layers"], itemgetter("layer"), lambda x: [x.get(k) for k in SAME]):
        first = layers[0]
        names = summary([layer["layer"] for layer in layers])
        regions = first.get("regions", {})
        shown = ", ".join(f"{k} x{n}" if n > 1 else k for k, n in regions.items())
        add_row(
            table, names, str(first["nodes"]), str(first.get("launches", "-")),
            human_count(first["parameters"]),
            *(human_bytes(first[k]) for k in ("weight_bytes", "read_bytes", "written_bytes")),
            human_flops(first["flops"]), _bytes(first["cache_bytes_per_token"]), shown or "-",
        )  # fmt: skip
    return table


def packed_table(packed: Mapping[str, Any]) -> Table:
    """One line for each run of layers whose weights are packed alike, and one for all."""
    ranks = packed["ranks"]
    title = "packed weights" + (f", of each of {ranks} ranks" if ranks > 1 else "")
    table = table_of(title, ("layer",), ("each", "together", "in"))

    def add(name: str, alike: Sequence[Mapping[str, Any]]) -> None:
        each, count = alike[0], len(alike)
        kinds = sorted(each["formats"].items(), key=lambda kind: -kind[1])
        shown = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in kinds)
        add_row(table, name, human_bytes(each["bytes"]), human_bytes(count * each["bytes"]), shown)

    for alike in runs(packed["layers"], itemgetter("layer"), itemgetter("formats")):
        add(summary([layer["layer"] for layer in alike]), alike)
    everything: Counter[str] = Counter()
    for layer in packed["layers"]:
        everything.update(layer["formats"])
    add("all", [{"bytes": packed["bytes"], "formats": everything}])
    return table


def quantisation_table(found: Mapping[str, Any]) -> Table:
    """One line for each operator that was quantised alone, the worst first, `WORST` at most."""
    operators = found["operators"]
    hidden = len(operators) - WORST
    more = f"; {hidden} more in report.json" if hidden > 0 else ""
    harm = "KL" if found["measure"] == "kl" else "squared error"
    table = table_of(
        f"each operator alone in codes{more}", ("operator", "codes"),
        ("weights", "plain", "largest x", "error", "calc_diff", harm, "share"),
    )  # fmt: skip
    table.add_column("log2 |x|", overflow="fold")
    table.add_column("kept in", overflow="fold")
    for each in operators[:WORST]:
        x = each["activations"]
        figures = (f"{each[key]:.2g}" for key in ("error", "calc_diff", "harm"))
        add_row(
            table, each["operator"], " ".join(each["codes"]), human_bytes(each["bytes"]),
            human_bytes(each["plain_bytes"]), f"{x['max']:.3g}",
            *(figures if each["measured"] else ("-", "-", "-")), f"{each['share']:.1%}",
            f"{x['log2']:3} {bars(x['counts'])}", each["kept"],
        )  # fmt: skip
    return table


def bars(counts: Sequence[int]) -> str:
    """A histogram in a line of text.

    >>> bars([0, 1, 4, 8, 3])
    ' ▁▄█▃'
    """
    most = max(counts, default=0)
    return "".join(HEIGHTS[-(-8 * n // most)] for n in counts)


def human_count(count: float) -> str:
    """Spell a number of things.

    >>> human_count(36_625_625_632), human_count(70_272), human_count(12)
    ('36.63 B', '70.27 k', '12')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def human_flops(count: float) -> str:
    """Spell a number of operations; a B would be read as bytes beside columns of these.

    >>> human_flops(36_694_000_000_000), human_flops(3_250_000_000)
    ('36.69 T', '3.25 G')
    """
    return human_count(count).replace("B", "G")


def clean(text: str) -> str:
    """Text without characters that a terminal would obey.

    >>> clean("a" + chr(27) + "[2Jb")
    'a?[2Jb'
    """
    return "".join(c if c.isprintable() else "?" for c in text)


def _bytes(count: int | None) -> str:
    return "-" if not count else human_bytes(count)


def table_of(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A table whose first columns are words and whose others are numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.title_style = "bold"
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        words = name in ("fired", "regions", "in")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    return table


def add_row(table: Table, *cells: str, style: str = "") -> None:
    """Add a line of texts."""
    table.add_row(*(Text(clean(cell), style) for cell in cells))
