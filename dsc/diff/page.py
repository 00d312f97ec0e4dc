"""The comparison as one HTML page that needs nothing else: no script, no font, no address.

Everything that comes from files is escaped, and the page forbids itself to load anything.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from dsc._version import __version__
from dsc.cli.console import human_bytes
from dsc.diff.compare import Diff, EntryDiff, Layer
from dsc.diff.lines import UNCHANGED, Line, Row
from dsc.diff.svg import Timeline, graph_svg, timeline, timeline_svg
from dsc.ir.graph import Graph
from dsc.rewrite.explain import summary

NEUTRAL = frozenset({"regions", "parameters"})
"""Measures of which neither more nor less is better."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
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


def page(diff: Diff) -> str:
    """The whole page."""
    style = Path(__file__).with_name("page.css.txt").read_text("utf-8")
    before, after = diff.sides
    title = f"{before.label} → {after.label}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{escape(before.title)} compared with {escape(after.title)}'
        f" by dsc {escape(__version__)}</p>",
        f"<p>Results: {escape(diff.agreement)}.</p>",
        *_unpaired(diff),
        _contents(diff),
    ]
    for index, entry in enumerate(diff.entries):
        body += _entry(diff, entry, index)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dsc diff: {escape(title)}</title><style>\n{style}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _contents(diff: Diff) -> str:
    links = (f'<a href="#e{i}">{escape(e.name)}</a>' for i, e in enumerate(diff.entries))
    return f"<nav>{''.join(links)}</nav>"


def _unpaired(diff: Diff) -> Iterator[str]:
    for side, names in zip(diff.sides, diff.unpaired, strict=True):
        if names:
            yield f"<p>Only in {escape(side.label)}: {escape(', '.join(names))}.</p>"


def _entry(diff: Diff, entry: EntryDiff, index: int) -> Iterator[str]:
    at = ", ".join(f"{k} = {v}" for k, v in sorted(entry.at[1].items()))
    yield f'<h2 id="e{index}">{escape(entry.name)}</h2>'
    plans = tuple(
        timeline(program, name, side.plan(name))
        for side, program, name in zip(diff.sides, entry.programs, entry.names, strict=True)
    )
    yield _cards(entry, plans)
    yield f'<h3>By layer <span class="dim">one step at {escape(at)}; an arrow: changed</span></h3>'
    yield _costs(entry)
    if entry.errors:
        yield _errors(entry.errors)
    yield '<h3>Text and graph <span class="dim">equal layers are shown once</span></h3>'
    yield _legend()
    for run in entry.runs():
        yield from _run(diff, entry, run)
    yield '<h3>Memory <span class="dim">offsets in the arena over the launches, at the largest'
    yield " sizes; line: live bytes, dashed: the least any plan needs</span></h3>"
    for side, found in zip(diff.sides, plans, strict=True):
        yield _memory(side.label, found)


def _cards(entry: EntryDiff, plans: Sequence[Timeline | None]) -> str:
    before, after = entry.totals
    cards = [
        (words, _change(key, before.get(key), after.get(key)))
        for key, words in COLUMNS
        if key in before or key in after
    ]
    sizes = [None if p is None else float(p.size) for p in plans]
    cards.append(("arena", _change("arena_bytes", *sizes)))
    if entry.error is not None:
        cards.append(("max error, relative", f"{entry.error:.2g}"))
    inside = "".join(f'<div class="card"><span>{w}</span><b>{v}</b></div>' for w, v in cards)
    return f'<div class="cards">{inside}</div>'


def _costs(entry: EntryDiff) -> str:
    shown = [
        c for c in COLUMNS if any(c[0] in t for x in entry.layers for t in (x.before, x.after))
    ]
    head = "".join(f"<th>{words}</th>" for _, words in shown)
    rows = []
    for run in entry.runs():
        first = run[0]
        name = run_name(run)
        if len(run) > 1:
            name += f" ({len(run)}, each)"
        cells = "".join(
            f"<td>{_change(k, run_value(run, 0, k), run_value(run, 1, k))}</td>" for k, _ in shown
        )
        rows.append(f"<tr><td>{escape(name)}{_presence(first)}</td>{cells}</tr>")
    sums = "".join(
        f"<td>{_change(k, entry.totals[0].get(k), entry.totals[1].get(k))}</td>" for k, _ in shown
    )
    rows.append(f'<tr class="total"><td>all</td>{sums}</tr>')
    table = f'<table class="costs"><tr><th>layer</th>{head}</tr>{"".join(rows)}</table>'
    return f'<div class="wide">{table}</div>'


def run_value(run: Sequence[Layer], side: int, key: str) -> float | None:
    """A measure of the layers of a run: the first one's, a mean of measured times."""
    found = [(x.before, x.after)[side].get(key) for x in run]
    known = [v for v in found if v is not None]
    if not known:
        return None
    return sum(known) / len(known) if key == "milliseconds" else known[0]


def _presence(layer: Layer) -> str:
    if layer.before and layer.after:
        return ""
    return f' <span class="dim">only {"after" if layer.after else "before"}</span>'


def _change(key: str, before: float | None, after: float | None) -> str:
    """`before → after`, or one number where both are the same."""
    if before is None and after is None:
        return "-"
    if before is None or after is None or before == after:
        only = after if after is not None else before
        text = spell(key, only or 0)
        return text if before == after else f"- → {text}" if before is None else f"{text} → -"
    kind = "" if key in NEUTRAL else "less" if after < before else "more"
    first, second = spell(key, before), spell(key, after)
    if first == second:
        return first
    return f'{first}<span class="arrow">→</span><span class="{kind}">{second}</span>'


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


def _errors(errors: Mapping[str, float]) -> str:
    ordered = sorted(errors.items(), key=lambda pair: -pair[1])
    worst = ", ".join(f"{escape(name)} {error:.2g}" for name, error in ordered[:6])
    return f'<p class="dim">Largest differences by output: {worst}</p>'


def _legend() -> str:
    items = "".join(f'<span><b style="background:{c}"></b>{w}</span>' for w, c in LEGEND)
    marks = "<span>blue border: not on the other side</span>"
    marks += "<span>grey text: the same line stands elsewhere on the other side</span>"
    return f'<div class="legend">{items}{marks}</div>'


def run_name(run: Sequence[Layer]) -> str:
    """The names of the layers of a run in few words."""
    return summary([x.name for x in run])


def _run(diff: Diff, entry: EntryDiff, run: Sequence[Layer]) -> Iterator[str]:
    """The text and the pictures of the first layer of a run."""
    layer = run[0]
    rows = entry.rows[layer.name]
    different = sum(r.differs for r in rows)
    moved = sum("moved" in r.sides for r in rows)
    note = f"{different} of {len(rows)} lines differ" if different else "unchanged"
    note += f", {moved} stand elsewhere" if moved else ""
    like = f"; shown: {escape(layer.name)}" if len(run) > 1 else ""
    is_open = " open" if different and len(rows) <= OPEN_LINES else ""
    yield f"<details{is_open}><summary>{escape(run_name(run))}"
    yield f'<span class="dim">{note}{like}</span></summary>'
    yield _text(rows, layer.name)
    yield "</details>"
    yield f"<details{is_open}><summary>{escape(run_name(run))}"
    yield '<span class="dim">graph</span></summary><div class="pair">'
    marked = _marked(rows)
    for side, graph, nodes, names in zip(
        diff.sides, entry.graphs, layer.nodes, marked, strict=True
    ):
        picture = _picture(graph, layer.name, len(nodes), names)
        label = f'<div class="label">{escape(side.label)}</div>'
        yield f'<div>{label}<div class="scroll">{picture}</div></div>'
    yield "</div></details>"


def _picture(graph: Graph, layer: str, count: int, changed: frozenset[str]) -> str:
    if not count:
        return '<p class="none">absent</p>'
    if count > LARGEST_GRAPH:
        return f'<p class="none">{count} nodes: too many to draw</p>'
    return graph_svg(graph, layer, changed)


def _marked(rows: Sequence[Row]) -> tuple[frozenset[str], frozenset[str]]:
    """Names of values whose line is not the same on the other side, by side."""
    found: tuple[set[str], set[str]] = (set(), set())
    for row in rows:
        for names, line, kind in zip(found, (row.before, row.after), row.sides, strict=True):
            if line is not None and kind not in UNCHANGED and not line.depth:
                names.update(name[1:] for name in line.results)
    return frozenset(found[0]), frozenset(found[1])


def _text(rows: Sequence[Row], layer: str) -> str:
    lines = "".join(f"<tr>{_cells(row, layer)}</tr>" for row in rows)
    return f'<table class="text">{lines}</table>'


def _cells(row: Row, layer: str) -> str:
    before, after = row.before, row.after
    if row.kind == "changed" and before is not None and after is not None:
        old, new = _word_marks(before.text, after.text)
        return _cell(before, old, "old changed", layer) + _cell(after, new, "new changed", layer)
    left, right = row.sides
    return _cell(before, escape(before.text) if before else "", f"old {left}", layer) + _cell(
        after, escape(after.text) if after else "", f"new {right}", layer
    )


def _cell(line: Line | None, html: str, kind: str, layer: str) -> str:
    if line is None:
        return f'<td class="{kind}"></td>'
    loc = line.loc.removeprefix(layer).lstrip(".")
    origin = f"<i>{escape(loc)}</i>" if loc else ""
    return f'<td class="{kind}">{origin}{"  " * line.depth}{html}</td>'


def _word_marks(before: str, after: str) -> tuple[str, str]:
    """Both lines as HTML, the words that differ marked."""
    old, new = (re.findall(r"[\w.%@\"]+|\s+|.", text) for text in (before, after))
    left: list[str] = []
    right: list[str] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        for out, words in ((left, old[a:b]), (right, new[c:d])):
            text = escape("".join(words))
            out.append(text if tag == "equal" or not text else f"<mark>{text}</mark>")
    return "".join(left), "".join(right)


def _memory(label: str, found: Timeline | None) -> str:
    if found is None:
        text = "not planned: some symbol has no upper bound"
        return f'<div class="label">{escape(label)}: {text}</div>'
    words = (
        f"{label}: {human_bytes(found.size)} in {len(found.blocks)} buffers over {found.steps}"
        f" launches; at least {human_bytes(found.lower_bound)}"
    )
    return (
        f'<div class="label">{escape(words)}</div><div class="scroll">{timeline_svg(found)}</div>'
    )
