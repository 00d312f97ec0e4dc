"""The text form of programs and graphs. `parse` reads back exactly what is printed here.

For example:

    program "tiny" {stage=CANONICAL}
    symbols {B=[1,64], S=[1,512]}
    weights {
      @model.norm.weight : bf16[256] = source "model.norm.weight" : bf16[256]
    }
    graph decode(%x: bf16[B,1,256]) {
      %h = rms_norm %x, @model.norm.weight {eps=1e-06} : bf16[B,1,256] loc "model.norm"
      return %h as "hidden"
    }

Comments run from `#` to the end of the line; result types may be left out and are inferred, and an
attribute that is its operator's default is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsc.ir.dims import Sym
from dsc.ir.graph import Attrs, Graph, Node, Operand, Weight
from dsc.ir.interface_text import print_interface
from dsc.ir.op import registry
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.ir.weights import Source, WeightExpr


def print_program(program: Program) -> str:
    """The whole program as text, ending in a newline."""
    lines = [f"program {json.dumps(program.name)} {{stage={program.stage.name}}}"]
    if program.meta:
        lines.append(f"meta {json.dumps(program.meta, sort_keys=True)}")
    lines += print_interface(program.interface)
    if program.symbols:
        inside = ", ".join(f"{k}={r}" for k, r in sorted(program.symbols.items()))
        lines.append(f"symbols {{{inside}}}")
    if program.weights:
        lines.append("weights {")
        lines += [f"  @{k} : {e.type} = {print_expr(e)}" for k, e in program.weights.items()]
        lines.append("}")
    for entry, graph in program.entries.items():
        lines.append(_graph(graph, "", entry, declare_weights=False))
    return "\n".join(lines) + "\n"


def print_graph(graph: Graph) -> str:
    """One graph as text; the weights it reads are declared beside its inputs."""
    return _graph(graph, "", graph.name, declare_weights=True) + "\n"


def print_expr(expr: WeightExpr) -> str:
    """A weight expression as text."""
    if isinstance(expr, Source):
        return f"source {json.dumps(expr.key)} : {expr.type}"
    args = ", ".join(print_expr(a) for a in expr.args)
    return f"{expr.op}({args}){_attrs(expr.op, expr.attrs, '')}"


def print_node(node: Node, indent: str = "") -> str:
    """One node as text."""
    results = ", ".join(map(str, node.outputs))
    operands = ", ".join("_" if x is None else str(x) for x in node.inputs)
    types = ", ".join(str(v.type) for v in node.outputs)
    loc = f" loc {json.dumps(node.loc)}" if node.loc else ""
    spaced = f" {operands}" if operands else ""
    return f"{results} = {node.op}{spaced}{_attrs(node.op, node.attrs, indent)} : {types}{loc}"


def _graph(graph: Graph, indent: str, name: str, declare_weights: bool) -> str:
    parameters = [f"{v}: {v.type}" for v in graph.inputs]
    if declare_weights:
        parameters += [f"{w}: {w.type}" for w in _weights_of(graph)]
    inner = indent + "  "
    lines = [f"graph {name}({', '.join(parameters)}) {{"]
    lines += [inner + print_node(node, inner) for node in graph.nodes]
    lines.append(f"{inner}return {', '.join(_outputs(graph))}".rstrip())
    return "\n".join([*lines, indent + "}"])


def _outputs(graph: Graph) -> Iterator[str]:
    updated = dict(graph.aliases)
    for index, (operand, name) in enumerate(zip(graph.outputs, graph.output_names, strict=True)):
        text = str(operand)
        if name != operand.name:
            text += f" as {json.dumps(name)}"
        if index in updated:
            text += f" updates {graph.inputs[updated[index]]}"
        yield text


def _weights_of(graph: Graph) -> list[Weight]:
    found: dict[str, Weight] = {}
    operands: list[Operand] = [x for n in graph.walk() for x in n.operands]
    for operand in [*operands, *graph.outputs]:
        if isinstance(operand, Weight):
            found.setdefault(operand.name, operand)
    return list(found.values())


def _attrs(op: str, attrs: Attrs, indent: str) -> str:
    shown = attrs.given(op)
    if not shown:
        return ""
    definition = registry().get(op)
    if definition is not None:
        shown = definition.widened(shown)
    return " {" + ", ".join(f"{k}={_attr(v, indent)}" for k, v in shown.items()) + "}"


def _attr(value: Any, indent: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (DType, Sym)):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ",".join(_attr(v, indent) for v in value) + "]"
    if isinstance(value, Graph):
        return _graph(value, indent, value.name, declare_weights=False)
    return json.dumps(value) if isinstance(value, str) else repr(value)
