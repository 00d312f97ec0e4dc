"""The comparison as one HTML page that needs nothing else: no script, no font, no address.

`page.html.txt` is its template, which escapes all that it is given; the page forbids itself to load
anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dsc._version import __version__
from dsc.cli.console import human_bytes
from dsc.diff import svg
from dsc.diff.compare import Diff, EntryDiff, Layer
from dsc.diff.layout import HEIGHT
from dsc.diff.lines import UNCHANGED, Line, Row
from dsc.rewrite.explain import summary

NEUTRAL = frozenset({"regions", "parameters"})
"""Measures of which neither more nor less is better."""
OPEN_LINES = 120
"""A layer's text is open when the page is, up to so many lines."""
LARGEST_GRAPH = 260
"""Nodes of a layer that are drawn, at most."""
COLUMNS = (
    ("nodes", "nodes"), ("regions", "fused"), ("weight_bytes", "weights"), ("read_bytes", "read"),
    ("written_bytes", "written"), ("flops", "flop"), ("parameters", "parameters"),
    ("milliseconds", "ms"),
)  # fmt: skip
LEGEND = (
    ("gemm", "#bcd4ff"), ("attention", "#ffd3a8"), ("experts and routing", "#e3c8ff"),
    ("norm", "#c5efcf"), ("cache", "#ffe794"), ("table", "#c9eef2"), ("view", "#f1f2f5"),
    ("pointwise", "#d9f0ff"), ("fused region", "#ffd0de"),
)  # fmt: skip


class Change(NamedTuple):
    """A measure on both sides, in words; `kind` says whether it is "less" or "more" now."""

    before: str
    after: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.before} → {self.after}" if self.after else self.before


class Cell(NamedTuple):
    """One side of a row of text; `words` are marked where they are not those of the other side."""

    kind: str
    words: Sequence[tuple[str, bool]] = ()
    depth: int = 0
    place: str = ""


def page(diff: Diff) -> str:
    """The whole page."""
    loader = FileSystemLoader(Path(__file__).parent)
    pages = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters |= {"bytes": human_bytes, "px": "{:.1f}".format}
    return pages.get_template("page.html.txt").render(
        diff=diff, version=__version__, zip=zip, legend=LEGEND, open_lines=OPEN_LINES,
        largest_graph=LARGEST_GRAPH, box_height=HEIGHT, timeline_size=svg.TIMELINE, cards=cards,
        cells=cells, columns=columns, cost_rows=cost_rows, cost_sums=cost_sums,
        live_line=svg.live_line, marked=marked, part_marks=svg.part_marks, picture=svg.picture,
        rectangles=svg.rectangles, operator_rows=operator_rows,
        run_name=run_name, timelines=timelines,
    )  # fmt: skip


def timelines(diff: Diff, entry: EntryDiff) -> list[svg.Timeline | None]:
    """What lies in the arena of both sides of an entry, where it is planned."""
    sides = zip(diff.sides, entry.programs, entry.names, strict=True)
    return [svg.timeline(program, name, side.plan(name)) for side, program, name in sides]


def cards(entry: EntryDiff, plans: Sequence[svg.Timeline | None]) -> Iterator[tuple[str, Change]]:
    """What an entry costs as a whole, and how far its results are apart."""
    shown = zip(columns(entry), cost_sums(entry), strict=True)
    yield from ((words, value) for (_, words), value in shown)
    yield "arena", change("arena_bytes", *(None if p is None else p.size for p in plans))
    if entry.error is not None:
        yield "max error, relative", Change(f"{entry.error:.2g}")


def operator_rows(entry: EntryDiff) -> list[tuple[str, ...]]:
    """Each operator in words, the worst first: what it adds, and what has come together."""
    return [
        (
            f"{each.op} {each.loc}".strip(), f"%{each.name}",
            f"{each.added.sums.calc_diff:.2g}", f"{each.added.most:.2g}",
            f"{each.come.sums.calc_diff:.2g}", f"{each.come.most:.2g}",
        )
        for each in entry.operators
    ]  # fmt: skip


def columns(entry: EntryDiff) -> list[tuple[str, str]]:
    """The measures that a side of an entry has, and what they are called."""
    return [(key, words) for key, words in COLUMNS if any(key in t for t in entry.totals)]


def cost_rows(entry: EntryDiff) -> Iterator[tuple[str, list[Layer], list[Change]]]:
    """For each run of equal layers its name, and its measures; of times the means."""
    for run in entry.runs():
        name = run_name(run) + (f" ({len(run)}, each)" if len(run) > 1 else "")
        keys = [key for key, _ in columns(entry)]
        yield name, run, [change(key, _value(run, 0, key), _value(run, 1, key)) for key in keys]


def cost_sums(entry: EntryDiff) -> list[Change]:
    """The measures of a whole entry."""
    return [change(key, *(total.get(key) for total in entry.totals)) for key, _ in columns(entry)]


def _value(run: Sequence[Layer], side: int, key: str) -> float | None:
    known = [v for x in run if (v := (x.before, x.after)[side].get(key)) is not None]
    if not known:
        return None
    return sum(known) / len(known) if key == "milliseconds" else known[0]


def change(key: str, before: float | None, after: float | None) -> Change:
    """A measure on both sides; one number where both are the same in words."""
    first, second = ("-" if v is None else spell(key, v) for v in (before, after))
    if first == second:
        return Change(first)
    kind = ""
    if before is not None and after is not None and key not in NEUTRAL:
        kind = "less" if after < before else "more"
    return Change(first, second, kind)


def spell(key: str, value: float) -> str:
    """A measure in words, by what it measures."""
    if key.endswith("bytes"):
        return human_bytes(value)
    if key == "milliseconds":
        return f"{value:.3f}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.2f} {unit}"
    return f"{value:.0f}"


def run_name(run: Sequence[Layer]) -> str:
    """The names of the layers of a run in few words."""
    return summary([x.name for x in run])


def marked(rows: Sequence[Row]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of values whose line is not the same on the other side, by side."""
    names: tuple[set[str], set[str]] = (set(), set())
    for row in rows:
        for known, line, kind in zip(names, (row.before, row.after), row.sides, strict=True):
            if line is not None and kind not in UNCHANGED and not line.depth:
                known.update(name[1:] for name in line.results)
    return frozenset(names[0]), frozenset(names[1])


def cells(row: Row, layer: str) -> tuple[Cell, Cell]:
    """Both sides of a row of a layer's text; of changed lines the words that differ are marked."""
    lines = (row.before, row.after)
    words: Sequence[Sequence[tuple[str, bool]]] = [[(x.text, False)] if x else [] for x in lines]
    if row.kind == "changed" and row.before is not None and row.after is not None:
        words = _compared(row.before.text, row.after.text)
    left, right = map(_cell, row.sides, lines, words, (layer, layer))
    return left, right


def _cell(kind: str, line: Line | None, words: Sequence[tuple[str, bool]], layer: str) -> Cell:
    if line is None:
        return Cell(kind)
    return Cell(kind, words, line.depth, line.loc.removeprefix(layer).lstrip("."))


def _compared(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The words of both lines, and which of them differ."""
    old, new = (re.findall(r"[\w.%@\"]+|\s+|.", text) for text in (before, after))
    left, right = [], []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        left.append(("".join(old[a:b]), tag != "equal"))
        right.append(("".join(new[c:d]), tag != "equal"))
    return [x for x in left if x[0]], [x for x in right if x[0]]
