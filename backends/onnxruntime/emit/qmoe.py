"""Experts in codes as one operator: QMoE, whose choices and weights come from our own router.

QMoE takes the best `k` of `router_probs`, so that the chosen have 0 and all others -inf; what they
weigh is `router_weights`, and one that weighs less than 0 is left out. Of 4-bit codes it takes rows
as 8-bit ones at `accuracy_level` 4, of 8-bit codes always.
"""

from __future__ import annotations

from math import inf
from typing import Any

from dsc.backends.onnxruntime.emit.coded import INT8_ROWS, Matrix, is_coded
from dsc.backends.onnxruntime.graph import GraphWriter, static
from dsc.ir.dims import product
from dsc.ir.graph import Node, Weight
from dsc.ir.types import DType


def is_qmoe(g: GraphWriter, node: Node, w: str) -> bool:
    """Whether QMoE computes what experts say, from codes as they lie in the file."""
    stacks = (node["gate_up"], node["down"])
    if w not in g.pool.positive or not node.attrs["pairs"] or not all(map(is_coded, stacks)):
        return False
    gate_up, down = (Matrix(x) for x in stacks if isinstance(x, Weight))
    if gate_up.bits != down.bits or gate_up.block != down.block:
        return False
    whole = all(m.columns % m.block == 0 for m in (gate_up, down))
    rows = bool(node.attrs["activations"]) or gate_up.bits < 8
    # Zero points of a row of one block lie in another order.
    zeros = [m.blocks > 1 for m in (gate_up, down) if len(m.weight.type.parts) > 2]
    return whole and rows and all(zeros) and g.has("QMoE")


def qmoe(g: GraphWriter, node: Node, x: str, idx: str, w: str, *biases: str) -> str:
    """x [*n, d] through the experts idx [*n, k] with the weights w [*n, k]."""
    types = [a.type for a in node.operands]
    (*n, d), k = types[0].shape, static(types[1].shape[-1])
    gate_up, down = (Matrix(x) for x in (node["gate_up"], node["down"]) if isinstance(x, Weight))
    experts, m = static(gate_up.weight.type.shape[0]), product(tuple(n))
    tokens = g.reshape(g.cast(x, types[0].dtype, DType.f32), types[0].shape, (m, d))
    chosen, weigh = (g.reshape(y, t.shape, (m, k)) for y, t in ((idx, types[1]), (w, types[2])))
    everyone = g.shape((m, experts))
    none = g.op("Expand", g.scalar(-inf), everyone)
    zeros = g.op("Expand", g.scalar(0.0), g.shape((m, k)))
    choice = g.op("ScatterElements", none, chosen, zeros, axis=1)
    nothing = g.op("Expand", g.scalar(0.0), everyone)
    weights = g.op("ScatterElements", nothing, chosen, weigh, axis=1, reduction="add")
    (codes, scales, zero), (codes2, scales2, zero2) = (_parts(g, each) for each in (gate_up, down))
    wide = [
        g.cast(name, x.type.dtype, DType.f32) if x is not None else ""
        for name, x in zip(biases, node.inputs[5:], strict=True)
    ]
    bias, bias2 = [*wide, "", ""][:2]
    attrs = node.attrs
    limit: dict[str, Any] = {} if attrs["limit"] == inf else {"swiglu_limit": float(attrs["limit"])}
    first, second = (codes, scales, bias, codes2, scales2, bias2), (zero, zero2)
    y = g.contrib(
        "QMoE", tokens, choice, *first, "", "", "", *second, "", weights,
        k=k, expert_weight_bits=gate_up.bits, block_size=gate_up.block,
        accuracy_level=INT8_ROWS if attrs["activations"] else 0,
        activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=0,
        activation_alpha=float(attrs["alpha"]), activation_beta=float(attrs["shift"]), **limit,
    )  # fmt: skip
    return g.cast(g.reshape(y, (m, d), types[0].shape), DType.f32, types[0].dtype)


def _parts(g: GraphWriter, matrix: Matrix) -> tuple[str, str, str]:
    """Codes, scales and zero points of a stack, the last empty where there are none."""
    found = []
    for suffix, part in matrix.weight.type.parts:
        found.append(g.stored(matrix.weight, suffix, part, tuple(map(static, part.shape))))
    codes, scales, zero = [*found, ""][:3]
    return codes, scales, zero
