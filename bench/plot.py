"""The report as a picture: tokens a second by context, a line an engine, in plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from bench.run import Result

WIDTH, HEIGHT, MARGIN = 640, 400, 60
COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5")


def decode_svg(results: Sequence[Result], batch: int) -> str:
    """Decode rates at one batch, both axes logarithmic; empty where there are none."""
    found = [r for r in results if r.seconds and r.cell.phase == "decode" and r.cell.batch == batch]
    if not found:
        return ""
    contexts = sorted({r.cell.context for r in found})
    rates = [r.tokens_per_second for r in found]
    x = _scale(contexts[0], contexts[-1], MARGIN, WIDTH - MARGIN)
    y = _scale(min(rates) / 1.2, max(rates) * 1.2, HEIGHT - MARGIN, MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 24, f"decode, batch {batch}: tokens/s by context", "middle"),
    ]
    for context in contexts:
        parts.append(_text(x(context), HEIGHT - MARGIN + 20, str(context), "middle"))
    for rate in _ticks(min(rates), max(rates)):
        line = f'<path d="M{MARGIN} {y(rate):.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>'
        parts += [line, _text(MARGIN - 8, y(rate) + 4, f"{rate:g}", "end")]
    for number, engine in enumerate(dict.fromkeys(r.engine for r in found)):
        colour = COLOURS[number % len(COLOURS)]
        mine = {r.cell.context: r.tokens_per_second for r in found if r.engine == engine}
        points = [(x(c), y(mine[c])) for c in contexts if c in mine]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        parts.append(_text(points[-1][0] + 6, points[-1][1] - 6, engine, "end", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _scale(low: float, high: float, start: float, end: float):  # type: ignore[no-untyped-def]
    span = math.log(high / low) or 1.0
    return lambda value: start + (end - start) * math.log(value / low) / span


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**p for p in powers for digit in (1, 2, 5)]
    return [t for t in found if low / 1.2 <= t <= high * 1.2]


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
