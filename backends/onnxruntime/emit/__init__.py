"""How each operator of the IR is written in ONNX: one function an operator, one file a family.

An emitter takes the graph writer, the node and the names of its operands, and gives the names of
its results. Unless an operator only moves elements (`MOVES`), its emitter sees fp32 where the
node has bf16 or f16, and its results are rounded back: ONNX Runtime's CPU kernels know bf16 as
something to move, cast and index, and nothing more. Short integers and truth values are int32 to it
in the same way, which wraps as they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dsc.backends.onnxruntime.emit import attention, core, moe, nn, pointwise, shape
from dsc.backends.onnxruntime.emit.coded import is_coded
from dsc.backends.onnxruntime.graph import NARROW, GraphWriter
from dsc.ir.graph import Graph, Node, Operand, Weight
from dsc.ir.kernels import Lowering
from dsc.ir.op import kernel_of, lookup
from dsc.ir.types import DType

Emitter = Callable[..., str | tuple[str, ...]]

EMITTERS: Mapping[str, Emitter] = MappingProxyType(
    {
        **pointwise.EMITTERS,
        **shape.EMITTERS,
        **core.EMITTERS,
        **nn.EMITTERS,
        **attention.EMITTERS,
        **moe.EMITTERS,
    }
)
CACHES = frozenset(attention.CACHES)
"""Operators that take caches as they are at the model's border."""
SHORT = frozenset({DType.i16, DType.i8, DType.u8, DType.boolean})
MOVES = frozenset(
    {"embedding", "select_rows", "reshape", "permute", "slice", "concat", "stack"}
    | {"split", "gather", "take", "cast", "full", "arange", "experts", "grouped_linear"}
    | {"slice_scatter"}
)
"""Operators whose emitters take 16-bit floats as they are."""


def emitter_of(op: str) -> Emitter | None:
    """What writes an operator: the table's function, or what it brings along."""
    own = kernel_of(op, "onnxruntime")
    return own.function if isinstance(own, Lowering) else EMITTERS.get(op)


def emit_graph(
    g: GraphWriter, graph: Graph, names: dict[str, str], origin: str = ""
) -> tuple[str, ...]:
    """Append all nodes of a graph. `names` maps its values to ONNX names and grows as it goes.

    ONNX nodes are named after the node they come from, of a region after the region (`origin`).
    """

    def operand(x: Operand | None) -> str:
        if x is None:
            return ""
        if isinstance(x, Weight):
            return x.name if is_coded(x) else g.weight(x)
        return names[x.name]

    for node in graph.nodes:
        g.loc, g.origin = node.loc, origin or node.outputs[0].name
        inputs = [operand(x) for x in node.inputs]
        if node.body is not None:
            inner = {v.name: x for v, x in zip(node.body.inputs, inputs, strict=True)}
            results = emit_graph(g, node.body, inner, g.origin)
        else:
            results = emit_node(g, node, inputs)
        names.update(zip((v.name for v in node.outputs), results, strict=True))
    return tuple(operand(x) for x in graph.outputs)


def emit_node(g: GraphWriter, node: Node, inputs: list[str]) -> tuple[str, ...]:
    """Append one operator, in fp32 on 16-bit floats, in int32 on shorter integers and truths."""
    emitter = emitter_of(node.op)
    assert emitter is not None, f"{node.op} was refused by `supports`"
    if node.op in CACHES:
        return _as_tuple(emitter(g, node, *inputs))
    if node.op in MOVES:
        own = [
            g.cast(name, DType.f32, x.type.dtype) if x is not None and name in g.pool.wide else name
            for name, x in zip(inputs, node.inputs, strict=True)
        ]
        return _as_tuple(emitter(g, node, *own))
    declared = lookup(node.op)
    patterns = [o.pattern.dtype for o in declared.operands]
    patterns += patterns[-1:] * (len(inputs) - len(patterns))
    wide = [
        name if x is None or is_coded(x)
        else g.cast(name, x.type.dtype, _computed(x.type.dtype, pattern))
        for name, x, pattern in zip(inputs, node.inputs, patterns, strict=False)
    ]  # fmt: skip
    results = _as_tuple(emitter(g, node, *wide))
    return tuple(
        g.cast(name, _computed(v.type.dtype, result.dtype), v.type.dtype)
        for name, v, result in zip(results, node.outputs, declared.results, strict=True)
    )


def _computed(dtype: DType, pattern: str) -> DType:
    """The type that an operator computes in on elements that its declaration calls `pattern`."""
    if dtype in NARROW:
        return DType.f32
    return DType.i32 if pattern == "T" and dtype in SHORT else dtype


def _as_tuple(results: str | tuple[str, ...]) -> tuple[str, ...]:
    return (results,) if isinstance(results, str) else results
