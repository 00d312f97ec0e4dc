"""The variants of routing, and the proof that a region is one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import inf, log2
from typing import Any

from dsc.ir.graph import GraphBuilder, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.rewrite import lift
from dsc.rewrite.widen import widened

SHIFTS = (0.0, -0.3, -0.6, -1.2)
"""Mean biases to try: what masked groups are filled with shows where biased scores are below it."""
TOKENS = 8
"""Extent of every symbol in the larger experiment: 64 tokens for a [b,s] batch."""


def emit(
    b: GraphBuilder,
    x: Operand,
    gate: Operand,
    biases: Sequence[Operand | None],
    attrs: Mapping[str, Any],
    idx: Value,
    w: Value,
) -> tuple[Operand, Operand]:
    """route, and its results in the types of what it replaces; biases choose, and are of logits."""
    given = [bias and b.as_type(bias, DType.f32) for bias in biases]
    index, weight = b.call("route", x, gate, *given, **attrs)
    shaped = b.as_shape(index, idx.type.shape)
    return shaped, b.as_type(b.as_shape(weight, idx.type.shape), w.type.dtype)


def _variants(region: lift.Region, experts: int, top_k: int) -> Iterator[dict[str, Any]]:
    """Hypotheses in order of simplicity: no groups first."""
    scores = [s for s in ("sigmoid", "softmax") if s in region.ops] or ["sigmoid", "softmax"]
    shapes = [v.type.shape for n in region.nodes for v in n.outputs]
    groups = {
        s[-2]
        for s in shapes
        if len(s) > 2 and isinstance(s[-2], int) and s[-2] > 1 and s[-2] * s[-1] == experts
    }
    kept = {n.attrs["k"] for n in region.nodes if n.op == "topk"}
    grouped = [(1, 1, "top2", -inf)] + [
        (g, keep, how, fill)
        for g, keep, how, fill in product(
            sorted(groups), sorted(kept), ("top2", "max"), (-inf, 0.0)
        )
        if keep < g
        and experts // g >= (2 if how == "top2" else 1)
        and top_k <= keep * (experts // g)
    ]
    for score, (g, keep, how, fill), normalise in product(scores, grouped, (True, False)):
        yield {
            "score": score, "groups": g, "keep": keep, "group_score": how, "fill": fill,
            "top_k": top_k, "normalise": normalise, "scale": 1.0,
        }  # fmt: skip


def prove(
    region: lift.Region, place: Sequence[int], experts: int, top_k: int
) -> dict[str, Any] | str:
    """The variant that routes as the region does, or why there is none.

    `place` tells which leaves are x, the gate, the bias that chooses and that of the logits (-1:
    none); the region's outputs are the chosen indices and their weights.
    """
    graph = widened(region.graph)
    inputs = [*graph.inputs]
    idx, w = graph.outputs
    assert isinstance(idx, Value)
    assert isinstance(w, Value)
    small = lift.assignments(graph)[0]
    sizes = [*[dict.fromkeys(small, TOKENS)] * len(SHIFTS), dict.fromkeys(small, 1), small]
    cases = [
        lift.Case(each, [_tensor(v, i, place, each, seed) for i, v in enumerate(inputs)])
        for seed, each in enumerate(sizes)
    ]
    try:
        wanted = lift.run(graph, cases[0])
    except Exception as problem:
        return f"the router does not run: {problem}"
    why = "no variant chooses the same experts"
    for attrs in _variants(region, experts, top_k):

        def body(b: GraphBuilder, *xs: Value, attrs: Any = attrs) -> tuple[Operand, Operand]:
            biases = [xs[at] if at >= 0 else None for at in place[2:]]
            return emit(b, xs[place[0]], xs[place[1]], biases, attrs, idx, w)

        found = lift.run(lift.build(inputs, body), cases[0])
        scale = _ratio(wanted, found)
        if scale is None:
            continue
        attrs["scale"] = lift.as_written(scale, [1.0, *region.constants()])
        why = lift.prove(graph, lift.build(inputs, body), cases, _same_routing)
        if not why:
            return attrs
    return f"{why} ({top_k} of {experts} experts)"


def _tensor(
    value: Value, index: int, place: Sequence[int], sizes: Mapping[str, int], seed: int
) -> torch.Tensor:
    """Inputs whose logits are exact sums, so that no rounding decides between two experts."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    shape = lift.at_sizes(value, sizes)
    if index == place[3]:
        return torch.randint(-64, 65, shape, generator=generator) / 64
    if index == place[2]:
        return torch.randn(shape, generator=generator) * 0.5 + SHIFTS[seed % len(SHIFTS)]
    if index == place[0]:
        return torch.randint(-3, 4, shape, generator=generator).float()
    most = max(1, (1 << 22) // (3 * shape[-1]))
    spread = 2 * most / 3**0.5 * shape[-1] ** 0.5
    step = 2.0 ** -round(log2(spread / 1.5))
    return torch.randint(-most, most + 1, shape, generator=generator).float() * step


def _sorted(outputs: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights of each token by ascending expert: their order has no meaning."""
    idx, order = outputs[0].sort(-1)
    return idx, outputs[1].gather(-1, order)


def _ratio(wanted: list[Any], found: list[Any]) -> float | None:
    """The factor between weights, when the choices agree and it is one number."""
    (a, w), (b, v) = _sorted(wanted), _sorted(found)
    if a.shape != b.shape or not bool((a == b).all()):
        return None
    factor = float(w.sum() / v.sum())
    return factor if not lift.differ(w, v * factor) else None


def _same_routing(left: list[Any], right: list[Any]) -> str:
    (a, w), (b, v) = _sorted(left), _sorted(right)
    return lift.differ(a, b) or lift.differ(w, v)
