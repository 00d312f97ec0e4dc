"""Latent attention in its two forms, told apart: which absorbed entries are expanded ones.

`absorb_mla` writes attention of decode and extend over the latents themselves, between products
with W_UK and W_UV, the halves of kv_b. An entry that differs from prefill in nothing else needs no
model of its own: `emit/attention.py` writes both forms, and the model chooses by the number of new
tokens. So what ONNX Runtime repacks when it loads a model is repacked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsc.backends.onnxruntime.graph import Halves
from dsc.ir.analyses import live, producers
from dsc.ir.graph import Graph, GraphBuilder, Node, Operand, Value, Weight
from dsc.ir.program import Program
from dsc.ir.weights import WeightExpr, apply
from dsc.rewrite.rebuild import Operands, rebuild

INTO, OUT = "bshn,hnc->bshc", "bshc,hvc->bshv"
"""What the halves are multiplied by."""


def halves(program: Program) -> Halves:
    """Those that a program has beside kv_b, as `absorb_mla` makes them."""
    found = {}
    for name, whole in program.weights.items():
        parts = [program.weights.get(f"{name}.{half}") for half in "kv"]
        k, v = parts
        if k is not None and v is not None and _are_halves(whole, k, v):
            found[name] = (Weight(f"{name}.k", k.type), Weight(f"{name}.v", v.type))
    return found


def _are_halves(whole: WeightExpr, k: WeightExpr, v: WeightExpr) -> bool:
    if (whole.type.rank, k.type.rank, v.type.rank) != (2, 3, 3):
        return False
    heads, nope, width = k.type.shape
    total = nope + v.type.shape[1]
    if whole.type.shape != (heads * total, width):
        return False
    per_head = apply("reshape", whole, shape=(heads, total, width))
    bounds = ((k, 0, nope), (v, nope, total))
    return all(x == apply("slice", per_head, axis=1, start=a, end=b) for x, a, b in bounds)


def absorbed(graph: Graph) -> Iterator[tuple[Node, Node, Node]]:
    """Each product with W_UK, the attention over latents behind it, and the product with W_UV."""
    made = producers(graph)
    for last in graph.nodes:
        if last.op != "einsum" or last.attrs["eq"] != OUT:
            continue
        middle = made.get(last.operands[0].name)
        if middle is None or middle.op != "latent_attention":
            continue
        first = made.get(middle["q_latent"].name)
        if first is not None and first.op == "einsum" and first.attrs["eq"] == INTO:
            yield first, middle, last


def expanded(graph: Graph, known: Halves, program: Program) -> Graph:
    """The graph with its absorbed attention as `mla_attention` over kv_b."""
    wholes = {k.name: name for name, (k, _) in known.items()}
    found = {last.output.name: (first, middle) for first, middle, last in absorbed(graph)}

    def expand(b: GraphBuilder, node: Node, operands: Operands) -> Sequence[Operand] | None:
        if node.outputs[0].name not in found:
            return None
        first, middle = found[node.outputs[0].name]
        whole = wholes.get(first.operands[1].name)
        if whole is None or known[whole][1] != node.operands[1]:
            return None
        kv_b = Weight(whole, program.weights[whole].type)
        _, q_rope, latent, rope, lengths = middle.operands
        q_nope = first.operands[0]
        assert isinstance(q_nope, Value)
        b.taken.discard(node.output.name)
        return b.call(
            "mla_attention", q_nope, q_rope, latent, rope, kv_b, lengths,
            scale=middle.attrs["scale"], hint=node.output.name,
        )  # fmt: skip

    return live(rebuild(graph, expand)) if found else graph
