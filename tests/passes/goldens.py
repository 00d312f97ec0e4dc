"""What each raise pass does to one traced layer, as text: `<pass>/v3.before.dsc`, `v3.after.dsc`.

Each golden holds the part of the layer that its pass is about, cut out of the trace in
`tests/data/traced/v3.dsc`. After a deliberate change, `python -m tests.passes.goldens` writes them
anew, and the difference is reviewed as text.
"""

from __future__ import annotations

from pathlib import Path

from dsc import pipeline
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.printer import print_graph
from dsc.ir.program import Program
from dsc.rewrite.base import PassReport
from dsc.rewrite.harness import program_of

HERE = Path(__file__).resolve().parent
TRACE = HERE.parent / "data" / "traced" / "v3.dsc"
ATTENTION = "model.layers.0.self_attn"
MOE = "model.layers.0.mlp"
PARTS = {
    "canonicalise_views": (ATTENTION,),
    "eliminate_common_subexpressions": ("model.rotary_emb",),
    "raise_rms_norm": ("model.layers.0.input_layernorm",),
    "raise_swiglu": (f"{MOE}.shared_experts", f"{MOE}.shared_experts.act_fn"),
    "raise_rope": ("model.rotary_emb", ATTENTION),
    "raise_attention": ("model", ATTENTION),
    "raise_append": (ATTENTION, ""),
    "raise_mla": (ATTENTION, f"{ATTENTION}.kv_b_proj", ""),
    "raise_router": (f"{MOE}.gate",),
    "raise_experts": (MOE, f"{MOE}.experts", f"{MOE}.experts.act_fn"),
    "raise_select_rows": ("",),
}
"""The modules whose nodes a golden shows; what else they read is an input."""


def part(graph: Graph, modules: tuple[str, ...]) -> Graph:
    """The nodes that lie in `modules` as a graph of their own, under the same names."""
    nodes = [node for node in graph.nodes if node.loc in modules]
    made = {v.name for node in nodes for v in node.outputs}
    inside = {id(node) for node in nodes}
    masked = any(node.op in ("sdpa", "append") or node.loc == "" for node in nodes)
    inputs = {v.name: v for v in graph.inputs if v.name == "lengths" and masked}
    for node in nodes:
        inputs |= {x.name: x for x in node.operands if isinstance(x, Value) and x.name not in made}
    outside: list[Node] = [node for node in graph.nodes if id(node) not in inside]
    read = {x.name for node in outside for x in node.operands} | {x.name for x in graph.outputs}
    outputs = [v for node in nodes for v in node.outputs if v.name in read]
    order = [v.name for v in outputs]
    names = list(inputs)
    aliases = tuple(
        (order.index(graph.outputs[o].name), names.index(graph.inputs[i].name))
        for o, i in graph.aliases
        if graph.outputs[o].name in order and graph.inputs[i].name in names
    )
    return Graph("main", tuple(inputs.values()), tuple(nodes), tuple(outputs), (), aliases)


def apply(name: str, program: Program) -> str:
    """The text of an example's graph after a pass."""
    return print_graph(pipeline.make(name).run(program, PassReport()).entries["main"])


def write() -> None:
    """Write every golden anew."""
    program = parse_program(TRACE.read_text("utf-8"))
    for name in pipeline.RAISE:
        if name in PARTS:
            (graph,) = program.entries.values()
            before = print_graph(part(graph, PARTS[name]))
            folder = HERE / name
            folder.mkdir(exist_ok=True)
            (folder / "v3.before.dsc").write_text(before, "utf-8")
            after = apply(name, program_of(before))
            (folder / "v3.after.dsc").write_text(print_graph(parse_graph(after)), "utf-8")
        program = pipeline.make(name).run(program, PassReport())


if __name__ == "__main__":
    write()
