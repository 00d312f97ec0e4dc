"""The shortest time that a step can take: each operator at the speed of memory or of the cores.

limit = sum over operators of max(bytes of weights and caches / bandwidth, flops / matrix peak).
The peak is that of the products that the operator does: those of 8-bit codes have one of their own.
Intermediates count nothing: they can stay in the processor's caches. Of stacked experts those that
a step's tokens choose are read; with uniform routing n tokens of k choices among E experts choose
E (1 - (1 - k/E)^n) of them. A token attends to itself and what came before it, so that of the rows
of a chunk's own tokens it sees half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsc.ir.costs import step_sizes
from dsc.ir.dims import evaluate
from dsc.ir.expert_forms import expected_experts
from dsc.ir.graph import Node
from dsc.ir.op import lookup, traits_of
from dsc.ir.program import Program
from dsc.runtime.costs import expert_nodes, moved, multiplies_codes, real_sizes


@dataclass(frozen=True, slots=True)
class Work:
    """What one operator must read from memory, and compute; `coded`: products of 8-bit codes."""

    bytes: float
    flops: float
    coded: bool = False


def limit_seconds(
    work: Iterable[Work], bandwidth: float, matrix: float, coded: float | None = None
) -> float:
    """Seconds of some operators, one after another, at bytes and at operations a second.

    Products of codes go at `coded` operations a second where it is given.

    >>> limit_seconds([Work(10, 1), Work(1, 40), Work(1, 40, coded=True)], 10, 20, coded=40)
    4.0
    """
    peaks = (matrix, coded or matrix)
    return sum(max(each.bytes / bandwidth, each.flops / peaks[each.coded]) for each in work)


def step_work(program: Program, batch: int, new: int, context: int) -> list[Work]:
    """What a step over `new` tokens of each of `batch` sequences does, after `context` tokens."""
    graph = program.entries[program.choose_entry(new, batch, context + new)]
    unseen = new // 2  # of the rows that the last token sees, by a token in the middle
    held, seen = (
        real_sizes(graph, step_sizes(graph, batch, new, rows), [rows] * batch)
        for rows in (context, context - unseen)
    )
    found = []
    for node in graph.nodes:
        stored = moved(graph, node, held, distinct_experts(node, held, batch * new)).stored
        found.append(Work(stored, moved(graph, node, seen).flops, multiplies_codes(node)))
    return found


def working_set(work: Iterable[Work]) -> int:
    """The bytes that a step reads, and reads again in the next."""
    return round(sum(each.bytes for each in work))


def prefill_work(program: Program, batch: int, tokens: int, chunk: int) -> list[Work]:
    """What a prompt of `tokens` in each of `batch` sequences does, by chunks."""
    found: list[Work] = []
    for at in range(0, tokens, chunk):
        found += step_work(program, batch, min(chunk, tokens - at), at)
    return found


def distinct_experts(node: Node, sizes: Mapping[str, int], tokens: int) -> int | None:
    """The experts that so many tokens choose together, uniformly routed; `None` without any."""
    inner = next(iter(expert_nodes(node)), None)
    if inner is None:
        return None
    chosen = lookup(inner.op).has_operand("idx")
    pairs = inner["idx"].type.numel if chosen else inner["x"].type.shape[0]
    count = evaluate(pairs, sizes)
    experts = evaluate(inner[min(traits_of(inner.op).stacked)].type.shape[0], sizes)
    return round(expected_experts(experts, min(experts, max(1, count // max(1, tokens))), tokens))
