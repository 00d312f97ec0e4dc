"""What passes do to a real trace, as text. `python -m tests.passes.goldens` writes all of it anew.

`<pass>/v3.before.dsc` and `v3.after.dsc`: a raise pass on the part of one traced layer that it is
about, cut out of `tests/data/traced/v3.dsc`. `layers/canonical.dsc`: a whole model of one dense and
one MoE layer, raised; `layers/<name>.dsc`: the same after the passes in the file's first line, as
`dsc opt -p` takes them. After a deliberate change the difference is reviewed as text.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsc import backends, pipeline
from dsc.ir import weights
from dsc.ir.formats import Format
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.printer import print_graph, print_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import WeightExpr
from dsc.rewrite.base import PassReport
from tests.rewrite.harness import program_of

HERE = Path(__file__).resolve().parent
TRACE = HERE.parent / "data" / "traced" / "v3.dsc"
TWO_LAYERS = TRACE.with_name("v3_two_layers_bf16.dsc")
LAYERS = HERE / "layers"
CANONICAL = "canonical"
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

_IN_FP8 = "choose_formats"
"""The pass whose golden starts from FP8 weights."""
_ENTRIES = "specialise_entries{entries=[decode,prefill]}"
_ABSORBED = f"{_ENTRIES},absorb_mla"
_MERGED = f"{_ABSORBED},append_cache_in_place{{slack=8}},merge_projections"
AFTER = {
    "hoist_select_rows": "hoist_select_rows",
    "absorb_mla": _ABSORBED,
    "append_cache_in_place": f"{_ABSORBED},append_cache_in_place{{slack=8}}",
    "in_pages": f"{_ABSORBED},append_cache_in_place{{page=64}}",
    "shard": f"{_ABSORBED},shard",
    "lower_moe_dispatch": f"{_ABSORBED},lower_moe_dispatch",
    "merge_projections": f"{_ABSORBED},merge_projections",
    "quantize_weights": f"{_ABSORBED},quantize_weights{{codes=i4}}",
    _IN_FP8: f"{_ABSORBED},merge_projections,{_IN_FP8}",
    "insert_fp8": f"{_ABSORBED},insert_fp8",
    "quantize_activations": f"{_ABSORBED},quantize_weights{{codes=i4}},{_IN_FP8}"
    "{formats=[i8,i4],tile=16},quantize_activations",
    "pair_gates": f"{_ABSORBED},quantize_weights,{_IN_FP8}"
    "{formats=[i8,i4],unsigned=256},pair_gates",
    "quantize_cache": f"{_ABSORBED},append_cache_in_place{{slack=8}},quantize_cache",
    "merge_shared_expert": f"merge_shared_expert,{_ABSORBED}",
    "fuse_1": f"{_MERGED},fuse{{level=1}}",
    "fuse_2": f"{_MERGED},fuse{{level=2}}",
    "fuse_3": f"{_MERGED},fuse",
    "cut_at_collectives": f"{_ABSORBED},shard,fuse{{level=1}},own_outputs,cut_at_collectives",
}
"""The passes of each golden of whole layers."""


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


def raised() -> str:
    """The text of the model of two layers after the passes that raise."""
    program = parse_program(TWO_LAYERS.read_text("utf-8"))
    (graph,) = program.entries.values()
    symbols = Limits(max_batch=4, max_context=64, prefill_chunk=16).symbols
    program = replace(program, entries={"step": graph}, symbols=symbols)
    return print_program(pipeline.apply(program, pipeline.RAISE))


def in_fp8(program: Program) -> Program:
    """The program over matrices in FP8, in blocks of 8 x 8; those outside of layers stay."""

    def stored(name: str, expr: WeightExpr) -> WeightExpr:
        if expr.type.rank < 2 or ".layers." not in name or name.endswith("mlp.gate.weight"):
            return expr
        t = TensorType(DType.f8e4m3, expr.type.shape, Format((8, 8), DType.f32))
        return weights.apply("dequantize", weights.leaf(name, t), dtype=expr.type.dtype)

    found = {name: stored(name, expr) for name, expr in program.weights.items()}
    return replace(program, weights=found)


def layers(passes: str) -> str:
    """The text of a golden of whole layers: the passes, and what they make of the raised model."""
    program = parse_program((LAYERS / f"{CANONICAL}.dsc").read_text("utf-8"))
    program = in_fp8(program) if passes.endswith(_IN_FP8) else program
    return f"# {passes}\n" + print_program(
        pipeline.apply(program, pipeline.read(passes, backends.get))
    )


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
    LAYERS.mkdir(exist_ok=True)
    (LAYERS / f"{CANONICAL}.dsc").write_text(raised(), "utf-8")
    for name, passes in AFTER.items():
        (LAYERS / f"{name}.dsc").write_text(layers(passes), "utf-8")


if __name__ == "__main__":
    write()
