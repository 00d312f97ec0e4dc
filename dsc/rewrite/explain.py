"""Why a pass did what it did: where it fired, and which condition failed where it nearly did.

    raise_rms_norm on v3, stage TRACED
    fired   RmsNorm 5 times: model.layers.{0..1}.input_layernorm, model.norm and 2 more
    missed  RmsNorm at model.layers.0.self_attn.q_a_layernorm:
              the mean is not over the last axis alone (%x: f32[B,S,24])
                | %y = mul @w, %n : f32[B,S,24] loc "model.layers.0.self_attn.q_a_layernorm"

The best near-miss comes first: the one of whose pattern the most is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsc.ir.graph import Graph
from dsc.ir.printer import print_node
from dsc.ir.program import Program
from dsc.rewrite.base import NearMiss, Pass, PassReport

SHOWN_PLACES = 4
WIDEST = 160
"""Characters of a line of IR that are shown."""


@dataclass(frozen=True)
class Miss:
    """Near-misses of one rule for one reason: the first of them, and all the places."""

    first: NearMiss
    places: tuple[str, ...]
    lines: tuple[str, ...]

    @property
    def rank(self) -> tuple[float, int]:
        """Orders near-misses, best first: the share of the pattern that is there, its size."""
        return (-self.first.matched / self.first.wanted, -self.first.matched)


@dataclass(frozen=True)
class Explanation:
    """What a pass did to a program."""

    title: str
    fired: dict[str, int]
    places: dict[str, list[str]]
    misses: tuple[Miss, ...]

    def __str__(self) -> str:
        """The explanation as lines of text."""
        lines = [self.title]
        for rule, times in self.fired.items():
            where = summary(self.places.get(rule, []))
            lines.append(f"fired   {rule} {_times(times)}{': ' if where else ''}{where}")
        for miss in self.misses:
            lines += _told(miss)
        if len(lines) == 1:
            lines.append("nothing here looks like what it rewrites")
        return "\n".join(lines)


def explain_pass(program: Program, each: Pass) -> Explanation:
    """Run a pass on a program at a stage it takes and tell what it did; the program stays."""
    report = PassReport(explain=True)
    title = f"{each.text} on {program.name}, stage {program.stage.name}"
    after = each.run(program, report)
    graphs = [*program.entries.values(), *after.entries.values()]
    lines = _definitions(graphs)
    misses = sorted(_grouped(report.near, lines), key=lambda m: m.rank)
    return Explanation(title, report.fired, report.places, tuple(misses))


def summary(places: Sequence[str]) -> str:
    """Module paths in few words: layers that differ in their number alone are one.

    >>> summary(["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp", "model.norm"])
    'model.layers.{0..2}.mlp, model.norm'
    """
    numbers: dict[str, list[int]] = {}
    for place in dict.fromkeys(places):
        found = re.search(r"(?<=\blayers\.)\d+", place)
        key = place if found is None else f"{place[: found.start()]}{{}}{place[found.end() :]}"
        numbers.setdefault(key, []).extend([] if found is None else [int(found[0])])
    shown = [key.replace("{}", _spans(sorted(n)), 1) if n else key for key, n in numbers.items()]
    rest = len(shown) - SHOWN_PLACES
    return ", ".join(shown[:SHOWN_PLACES]) + (f" and {rest} more" if rest > 0 else "")


def _spans(numbers: Sequence[int]) -> str:
    """Numbers as spans: 3, or {0..2,5}."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    parts = [str(a) if a == b else f"{a}..{b}" for a, b in spans]
    return parts[0] if parts[0].isdigit() and len(parts) == 1 else f"{{{','.join(parts)}}}"


def _definitions(graphs: Iterable[Graph]) -> dict[str, str]:
    """A line for each value: the node that makes it, or that it is an input."""
    lines: dict[str, str] = {}
    for graph in graphs:
        for value in graph.inputs:
            lines.setdefault(value.name, f"{value}: {value.type} is an input of {graph.name}")
        for node in graph.walk():
            text = print_node(node).splitlines()[0]
            for value in node.outputs:
                lines.setdefault(value.name, text)
    return lines


def _grouped(near: Iterable[NearMiss], lines: dict[str, str]) -> Iterator[Miss]:
    """Near-misses of one rule and reason as one; the same in another layer is the same."""
    groups: dict[tuple[str, str, int], list[NearMiss]] = {}
    for each in near:
        reason = re.sub(r"[%@][\w.]+", "%", each.reason)
        groups.setdefault((each.rule, reason, each.matched), []).append(each)
    for found in groups.values():
        shown = dict.fromkeys(lines[name] for name in found[0].culprits if name in lines)
        places = tuple(dict.fromkeys(m.where for m in found))
        yield Miss(found[0], places, tuple(shown))


def _told(miss: Miss) -> list[str]:
    first = miss.first
    where = summary([p or f"%{first.culprits[0]}" for p in miss.places if p or first.culprits])
    part = f"{first.matched} of {first.wanted} parts fit"
    much = "" if first.matched >= first.wanted else f", where {part}"
    head = f"missed  {first.rule} at {where}{much}:"
    reasons = [f"          {reason}" for reason in first.reason.split("; ")]
    return [head, *reasons, *(f"            | {_cut(line)}" for line in miss.lines)]


def _cut(line: str) -> str:
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
