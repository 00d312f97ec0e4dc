"""What a calibration found as one picture: an SVG of bars, which needs nothing else to be seen.

Names come from checkpoints, perhaps a stranger's: all of them are escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

DRAWING = "quantisation.svg"
"""The file in the artifact."""
HARM = {"kl": "KL, nats a token", "squared_error": "squared error"}
"""What harm is measured in, by the measure's name."""
MOST = 80
"""Operators that are drawn, the worst first."""
ROW, HEAD, NAMES, RANGE, BARS, WORDS = 18, 44, 330, 110, 360, 120
WIDTH = NAMES + RANGE + BARS + WORDS + 60
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.dim{fill:#777}"
    ".bar{fill:#7aa6ff}.kept{fill:#f2a13c}.range{fill:#b9c2cf}"
)


def draw(found: Mapping[str, Any]) -> str:
    """The picture of what `report["quantisation"]` holds: a line for each operator."""
    shown = found["operators"][:MOST]
    height = HEAD + ROW * len(shown) + 10
    lines = "\n".join(_lines(found, shown))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}"'
        f' viewBox="0 0 {WIDTH} {height}"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n{lines}\n</svg>\n'
    )


def _lines(found: Mapping[str, Any], shown: list[Mapping[str, Any]]) -> Iterator[str]:
    hidden = len(found["operators"]) - len(shown)
    more = f", {hidden} more in report.json" if hidden else ""
    title = f"each operator alone in {found['quant']}; orange: kept{more}"
    yield _text(10, 16, title)
    heads = ("operator", "activations, log2", HARM[found["measure"]], "share, error")
    for x, words in zip(_places(), heads, strict=True):
        yield _text(x, 36, words, "dim")
    most = max((each["harm"] for each in shown), default=0.0)
    for number, each in enumerate(shown):
        yield from _row(each, HEAD + ROW * number, most)


def _places() -> tuple[int, int, int, int]:
    return 10, 20 + NAMES, 40 + NAMES + RANGE, 50 + NAMES + RANGE + BARS


def _row(each: Mapping[str, Any], y: int, most: float) -> Iterator[str]:
    name, histogram, bar, words = _places()
    shown = each["operator"]
    yield _text(name, y + 12, shown if len(shown) < 52 else f"…{shown[-50:]}")
    counts = each["activations"]["counts"]
    tallest, step = max(counts, default=1), RANGE / max(24, len(counts))
    for index, count in enumerate(counts):
        tall = (ROW - 5) * count / tallest
        yield _box(histogram + step * index, y + ROW - 4 - tall, step * 0.9, tall, "range")
    width = BARS * each["harm"] / most if most else 0.0
    yield _box(bar, y + 2, max(width, 1.0), ROW - 6, "kept" if each["kept"] else "bar")
    yield _text(bar + 4, y + 12, f"{each['harm']:.2e}")
    yield _text(words, y + 12, f"{each['share']:.1%}, {each['error']:.3f}", "dim")


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    clean = escape("".join(c if c.isprintable() else "?" for c in words))
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{marked}>{clean}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )
