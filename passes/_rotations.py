"""The proof that a region is a rotary embedding, and the operator between its views."""

from __future__ import annotations

from typing import Any

from dsc.ir.dims import Dim, product
from dsc.ir.graph import Graph, GraphBuilder, Operand, Value
from dsc.ir.lazy import torch
from dsc.ir.ops.nn import ROPE_LAYOUTS
from dsc.ir.ops.shape import normalised_dims
from dsc.ir.types import DType
from dsc.rewrite import lift
from dsc.rewrite.rule import Match
from dsc.rewrite.widen import widened

MAX_POSITION = 5000
_ROLES = ("x", "positions", "inv_freq")


def emit(
    b: GraphBuilder,
    x: Operand,
    positions: Operand,
    inv_freq: Operand,
    layout: str,
    scale: float,
    shape: tuple[Dim, ...],
) -> Operand:
    """rope of an x whose axes are b, s, perhaps h, and r, in some order; the result in `shape`.

    Of a row that is wider than the frequencies turn, the first columns turn.
    """
    batch, new = positions.type.shape
    rows = (batch, new, x.type.shape[-1])
    attrs: dict[str, Any] = {"layout": layout, "scale": scale}
    turned_columns = inv_freq.type.shape[0] * 2
    if turned_columns != x.type.shape[-1]:
        attrs["dims"] = turned_columns
    turned = x
    swap = (0, 2, 1, 3)
    headed = x.type.numel != product(rows)
    front = headed and x.type.shape[:2] != (batch, new)
    if front:
        turned = b.as_order(turned, swap)
    elif not headed:
        turned = b.as_shape(turned, rows)
    (turned,) = b.call("rope", turned, positions, b.as_type(inv_freq, DType.f32), **attrs)
    if headed and normalised_dims(turned.type.shape) != normalised_dims(shape):
        turned = b.as_order(turned, swap)
    return b.as_shape(turned, shape)


def prove(m: Match) -> dict[str, Any] | str:
    """The layout and scale under which the region is rope, or why it is none."""
    region: lift.Region = m.region
    graph = widened(region.graph)
    place = {role: region.leaves.index(m.get(role)) for role in _ROLES}
    leaves = [*graph.inputs]

    def tensors(sizes: dict[str, int], seed: int) -> list[torch.Tensor]:
        made = [torch.empty(0)] * 3
        made[place["x"]] = lift.normal(leaves[place["x"]], sizes, seed)
        made[place["positions"]] = lift.integers(
            leaves[place["positions"]], sizes, seed, MAX_POSITION
        )
        made[place["inv_freq"]] = lift.normal(leaves[place["inv_freq"]], sizes, seed).abs()
        return made

    cases = [lift.Case(s, tensors(s, i)) for i, s in enumerate(lift.assignments(graph))]
    scale = _scale_of(graph, cases[0], place)
    if scale is None:
        return "at position 0 it is no multiple of x"
    scale = lift.as_written(scale, [1.0, *region.constants()])
    shape = graph.outputs[0].type.shape
    why = ""
    for layout in ROPE_LAYOUTS:

        def body(b: GraphBuilder, *xs: Value, layout: str = layout) -> Operand:
            x, positions, inv_freq = (xs[place[role]] for role in _ROLES)
            return emit(b, x, positions, inv_freq, layout, scale, shape)

        why = lift.prove(graph, lift.build(leaves, body), cases)
        if not why:
            return {"layout": layout, "scale": scale}
    return f"it is rope in none of the layouts {', '.join(ROPE_LAYOUTS)} ({why})"


def _scale_of(graph: Graph, case: lift.Case, place: dict[str, int]) -> float | None:
    """What x is multiplied by where nothing turns: ones in, at position 0."""
    still = list(case.tensors)
    still[place["x"]] = torch.ones_like(still[place["x"]])
    still[place["positions"]] = torch.zeros_like(still[place["positions"]])
    (out,) = lift.run(graph, lift.Case(case.sizes, still))
    out = out[..., : 2 * still[place["inv_freq"]].shape[0]]
    low, high = float(out.min()), float(out.max())
    return low if abs(high - low) < 1e-6 else None
