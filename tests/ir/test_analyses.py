"""Analyses: uses, lifetimes, storage, structural hashes, and cost against counts by hand."""

from __future__ import annotations

import pytest
from hypothesis import given

from dsc.ir.analyses import (
    cost,
    flops,
    last_uses,
    overwritten,
    producers,
    storage_roots,
    structural_hash,
    total_cost,
    uses,
)
from dsc.ir.dims import Dim, symbol
from dsc.ir.graph import Graph, Node, Value, Weight
from dsc.ir.parser import parse_graph
from tests.ir.strategies import graphs

B, S, P = (symbol(n) for n in "BSP")


def test_uses_and_producers_name_nodes_and_outputs() -> None:
    graph = parse_graph("graph g(%x: f32[4]) { %a = add %x, %x\n %b = neg %a\n return %a, %b }")
    add, neg = graph.nodes
    assert uses(graph) == {"x": [(add, 0), (add, 1)], "a": [(neg, 0), (None, 0)], "b": [(None, 1)]}
    assert producers(graph) == {"a": add, "b": neg}


def test_last_uses_free_each_value_once_and_outputs_never() -> None:
    graph = parse_graph(
        """graph g(%x: f32[4], %unread: f32[4]) {
             %a = neg %x
             %b = add %a, %x
             %c, %d = split %b {sizes=[1,3]}
             %e = neg %c
             return %e, %a
           }"""
    )
    assert last_uses(graph) == {1: ["x"], 2: ["b", "d"], 3: ["c"]}


@given(graphs())
def test_last_uses_partition_what_is_read(graph: Graph) -> None:
    dead = last_uses(graph)
    freed = [name for names in dead.values() for name in names]
    assert len(freed) == len(set(freed))
    kept = {x.name for x in graph.outputs if isinstance(x, Value)}
    read = {x.name for n in graph.nodes for x in (*n.operands, *n.outputs) if isinstance(x, Value)}
    assert set(freed) == read - kept
    for position, names in dead.items():
        later = {x.name for n in graph.nodes[position + 1 :] for x in n.operands}
        assert not later & set(names)


# --- structural hashes ----------------------------------------------------------------------------


def renamed(graph: Graph) -> Graph:
    """The same computation under other value names, weight names and locations."""

    def other(x: Value | Weight | None) -> Value | Weight | None:
        if isinstance(x, Weight):
            return Weight(f"other.{x.name}", x.type)
        return None if x is None else Value(f"v{x.name}", x.type)

    nodes = tuple(
        Node(n.op, tuple(map(other, n.inputs)), n.attrs, tuple(Value(f"v{v.name}", v.type)
             for v in n.outputs), "elsewhere")
        for n in graph.nodes
    )  # fmt: skip
    inputs = tuple(Value(f"v{v.name}", v.type) for v in graph.inputs)
    outputs = tuple(x for x in map(other, graph.outputs) if x is not None)
    return Graph("renamed", inputs, nodes, outputs, graph.output_names, graph.aliases)


@given(graphs(bodies=False))
def test_a_structural_hash_ignores_names_and_places(graph: Graph) -> None:
    assert structural_hash(renamed(graph)) == structural_hash(graph)


BASE = "graph g(%x: f32[4,6], %y: f32[4,6], @v: f32[6], @w: f32[6]) { BODY return %b }"
VARIANTS = [
    "%a = rms_norm %x, @w {eps=1e-06} %b = add %a, %y",
    "%a = rms_norm %x, @w {eps=1e-05} %b = add %a, %y",
    "%a = rms_norm %x, @w {eps=1e-06} %b = add %y, %a",
    "%a = rms_norm %y, @w {eps=1e-06} %b = add %a, %y",
    "%a = rms_norm %x, @w {eps=1e-06} %b = sub %a, %y",
    "%a = rms_norm %x, @w {eps=1e-06} %c = add %a, %y %b = mul %c, @w",
    "%a = rms_norm %x, @w {eps=1e-06} %c = add %a, %y %b = mul %c, @v",
    "%b = fused %x {body=graph i(%z: f32[4,6]) { %q = rms_norm %z, @w {eps=1e-06} return %q }}",
    "%b = fused %x {body=graph i(%z: f32[4,6]) { %q = rms_norm %z, @w {eps=1e-05} return %q }}",
    "%c = fused %x {body=graph i(%z: f32[4,6]) { %q = mul %z, @w return %q }} %b = mul %c, @w",
    "%c = fused %x {body=graph i(%z: f32[4,6]) { %q = mul %z, @w return %q }} %b = mul %c, @v",
    "%c = fused %x {body=graph i(%z: f32[4,6]) { %q = mul %z, @w return %q }}"
    " %d = fused %c {body=graph i(%z: f32[4,6]) { %q = mul %z, @v return %q }}"
    " %b = fused %d {body=graph i(%z: f32[4,6]) { %q = mul %z, @w return %q }}",
    "%c = fused %x {body=graph i(%z: f32[4,6]) { %q = mul %z, @w return %q }}"
    " %d = fused %c {body=graph i(%z: f32[4,6]) { %q = mul %z, @v return %q }}"
    " %b = fused %d {body=graph i(%z: f32[4,6]) { %q = mul %z, @v return %q }}",
    "%c = reshape %x {shape=[24]} %b = reshape %c {shape=[6,4]}",
    "%c = reshape %x {shape=[24]} %b = reshape %c {shape=[4,6]}",
]


def test_a_structural_hash_tells_computations_apart() -> None:
    hashes = [structural_hash(parse_graph(BASE.replace("BODY", body))) for body in VARIANTS]
    assert len(set(hashes)) == len(VARIANTS)


def test_a_structural_hash_sees_state() -> None:
    text = "graph g(%c: f32[1,4,2], %n: f32[1,1,2], %l: i64[1]) { %d = cache_write %c, %n, %l "
    plain, state = (parse_graph(text + f"return %d {u}}}") for u in ("", "updates %c"))
    assert structural_hash(plain) != structural_hash(state)


# --- storage --------------------------------------------------------------------------------------


def test_storage_is_shared_through_views_and_writes() -> None:
    graph = parse_graph(
        """graph g(%c: f32[2,7,4], %new: f32[2,1,4], %n: i64[2]) {
             %v = reshape %c {shape=[2,7,2,2]}
             %d = cache_write %c, %new, %n
             %a, %b = split %d {sizes=[1,3]}
             %e = neg %b
             %f = fused %new, %d, %n {body=graph i(%x: f32[2,1,4], %k: f32[2,7,4], %m: i64[2]) {
               %y = neg %x
               %z = cache_write %k, %y, %m
               return %y, %z
             }}
             return %f
           }""".replace("%f = fused", "%f0, %f = fused")
    )
    roots = storage_roots(graph)
    assert {name for name, root in roots.items() if root == "c"} == {"c", "v", "d", "a", "b", "f"}
    assert roots["e"] == "e"
    assert roots["f0"] == "f0"
    assert overwritten(graph.nodes[1]) == {0}
    assert overwritten(graph.nodes[-1]) == {1}
    assert overwritten(graph.nodes[0]) == set()


# --- cost -----------------------------------------------------------------------------------------


def node_of(signature: str, line: str) -> Node:
    graph = parse_graph(f"graph g({signature}) {{ {line} return }}")
    return graph.nodes[-1]


LINEAR = node_of("%x: bf16[B,S,7168], @w: bf16[1536,7168]", "%y = linear %x, @w")
MLA = node_of(
    "%q: bf16[B,S,128,128], %r: bf16[B,S,128,64], %c: bf16[B,P+S,512], %k: bf16[B,P+S,64],"
    " @kv: bf16[32768,512], %n: i64[B]",
    "%y = mla_attention %q, %r, %c, %k, @kv, %n {scale=0.1}",
)
LATENT = node_of(
    "%q: bf16[B,S,128,512], %r: bf16[B,S,128,64], %c: bf16[B,P+S,512], %k: bf16[B,P+S,64],"
    " %n: i64[B]",
    "%y = latent_attention %q, %r, %c, %k, %n {scale=0.1}",
)
EXPERTS = node_of(
    "%x: bf16[2,7168], %i: i64[2,8], %w: f32[2,8], @g: bf16[256,4096,7168],"
    " @d: bf16[256,7168,2048]",
    "%y = experts %x, %i, %w, @g, @d",
)


@pytest.mark.parametrize(
    ("node", "count"),
    [
        (LINEAR, 2 * B * S * 7168 * 1536),
        (MLA, 2 * B * (P + S) * 512 * 32768 + 2 * B * S * 128 * (P + S) * (192 + 128)),
        (LATENT, 2 * B * S * 128 * (P + S) * (512 + 64 + 512)),
        (EXPERTS, 2 * 2 * 8 * (7168 * 4096 + 2048 * 7168)),
        (node_of("%a: f32[B,1,3,4], %b: f32[5,4,7]", "%y = matmul %a, %b"), 2 * B * 5 * 3 * 7 * 4),
        (node_of("%a: f32[B,S,3], %b: f32[3,4]", '%y = einsum %a, %b {eq="bsh,hn->bsn"}'),
         2 * B * S * 12),
        (node_of("%q: f32[B,8,S,4], %k: f32[B,8,P,4], %v: f32[B,8,P,6]",
                 "%y = sdpa %q, %k, %v {scale=1.0}"), 2 * B * 8 * S * P * 10),
        (node_of("%q: f32[B,S,8,4], %k: f32[B,P,2,4], %v: f32[B,P,2,6]",
                 "%y = attention %q, %k, %v {scale=1.0, causal=true}"), 2 * B * 8 * S * P * 10),
        (node_of("%x: f32[S,6], @w: f32[3,8,6], %o: i64[4]", "%y = grouped_linear %x, @w, %o"),
         2 * S * 6 * 8),
        (node_of("%x: f32[S,6], @w: f32[3,6,8], %o: i64[3]", "%y = grouped_mm %x, @w, %o"),
         2 * S * 6 * 8),
        (node_of("%x: f32[B,S,6], @w: f32[8,6]",
                 '%i, %y = route %x, @w {score="sigmoid", top_k=2, normalise=true}'),
         2 * B * S * 48),
        (node_of("%x: f32[B,S]", "%y = silu %x"), B * S),
        (node_of("%x: f32[B,4], @w: f32[6,4]",
                 "%y = fused %x {body=graph i(%z: f32[B,4]) { %a = linear %z, @w %b = neg %a"
                 " return %b }}"), 2 * B * 24 + 6 * B),
    ],
)  # fmt: skip
def test_flops_are_those_counted_by_hand(node: Node, count: Dim) -> None:
    assert flops(node) == count


def test_bytes_are_those_that_move() -> None:
    moved = cost(LINEAR)
    assert (moved.read, moved.written, moved.weights) == (
        2 * B * S * 7168, 2 * B * S * 1536, 2 * 1536 * 7168,
    )  # fmt: skip
    experts = cost(EXPERTS)
    assert experts.weights == 2 * 16 * (4096 * 7168 + 7168 * 2048), "16 of 256 experts"
    many = node_of(
        "%x: bf16[B,8], %i: i64[B,2], %w: f32[B,2], @g: bf16[4,6,8], @d: bf16[4,8,3]",
        "%y = experts %x, %i, %w, @g, @d",
    )
    assert cost(many).weights == 2 * 4 * (48 + 24)
    assert cost(node_of("%x: f32[B,4]", "%y = reshape %x {shape=[4,B]}")).written == 0


def test_lookups_read_rows_and_caches_write_rows() -> None:
    embedding = cost(node_of("%i: i64[B,S], @w: bf16[129280,8]", "%y = embedding %i, @w"))
    assert (embedding.read, embedding.weights) == (8 * B * S, 16 * B * S)
    rows = cost(node_of("%x: f32[B,S,8], %i: i64[B,1]", "%y = select_rows %x, %i"))
    assert rows.read == 32 * B + 8 * B
    write = cost(node_of("%c: f32[B,100,8], %n: f32[B,S,8], %l: i64[B]",
                         "%y = cache_write %c, %n, %l"))  # fmt: skip
    assert (write.read, write.written) == (32 * B * S + 8 * B, 32 * B * S)
    fused = node_of(
        "%c: f32[B,100,8], %n: f32[B,S,8], %l: i64[B]",
        "%y = fused %c, %n, %l {body=graph i(%k: f32[B,100,8], %m: f32[B,S,8], %o: i64[B])"
        " { %a = mul %m, %m %b = cache_write %k, %a, %o return %b }}",
    )
    assert cost(fused).written == 32 * B * S


def test_costs_add_up() -> None:
    total = total_cost([LINEAR, LINEAR])
    assert total.flops == 2 * cost(LINEAR).flops
    assert total.weights == 4 * 1536 * 7168
