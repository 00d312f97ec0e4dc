"""The report of a run: Markdown for people, JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.run import Result
from dsc.runtime.protocol import Spread


def as_json(facts: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Everything that was measured."""
    rows = [
        {**asdict(r), "name": r.cell.name, "tokens_per_second": r.tokens_per_second}
        for r in results
    ]
    return {**facts, "results": rows}


def markdown(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The report as Markdown."""
    parts = [
        f"# {facts['shape']}, {facts['threads']} threads",
        f"{facts['machine']}; commit {facts['commit']}. Medians (quartiles) of the rounds whose"
        " probes agree within 10%. The limit of a step is the sum over its operators of the larger"
        " of bytes / read bandwidth and flops / matrix peak, both read beside each round; a median"
        " above 1.02 of it (!) says that the probes are wrong. Products are by"
        f" {facts['probe']}. The ratio is how many times as long a peer took as dsc, in the same"
        " round.",
        _table(
            ("", "engine", "tokens/s", "ms a step", "of the limit", "GB/s read", "ratio", "rounds"),
            [_row(r) for r in results],
        ),
        "## Loading",
        _table(
            ("engine", "compile or convert s", "load s", "peak RSS GB", "computes with"),
            [_engine(name, found) for name, found in facts["engines"].items()],
        ),
    ]
    passed = [f"- {r.cell.name}, {r.engine}: {r.passed}" for r in results if r.passed]
    if passed:
        parts += ["## The probes are wrong", "\n".join(passed)]
    if facts["skipped"]:
        lines = [f"- {name}: {why}" for name, why in facts["skipped"].items()]
        parts += ["## Skipped", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _row(result: Result) -> tuple[str, ...]:
    name = (result.cell.name, result.engine)
    if result.seconds is None:
        return (*name, result.why, "", "", "", "", _rounds(result))
    return (
        *name,
        f"{result.tokens_per_second:.1f}",
        spread(result.seconds, 1e3, 2),
        spread(result.of_limit, 1, 2) + " (!)" * bool(result.passed),
        spread(result.bandwidth, 1e-9, 1),
        spread(result.ratio, 1, 2),
        _rounds(result),
    )


def _rounds(result: Result) -> str:
    return f"{result.rounds - result.dropped} of {result.rounds}" if result.rounds else ""


def _engine(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = (f"{found.get(key, 0.0):.1f}" for key in ("compile_s", "load_s"))
    return (name, *seconds, f"{found.get('rss', 0) / 1e9:.2f}", found.get("units", ""))


def spread(found: Spread | None, scale: float, digits: int) -> str:
    """A median and its quartiles.

    >>> spread(Spread(0.5, 0.25, 1.0, 9), 10, 1)
    '5.0 (2.5-10.0)'
    """
    if found is None:
        return ""
    median, low, high = (x * scale for x in (found.median, found.low, found.high))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
