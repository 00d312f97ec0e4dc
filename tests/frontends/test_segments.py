"""A small trace cut by hand: which node is whose, what is refused, and layers written from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsc.frontends.instantiate import instantiate
from dsc.frontends.layer_kinds import LayerStack
from dsc.frontends.meta_run import Irregular
from dsc.frontends.segments import cut
from dsc.ir.graph import Graph, Node
from dsc.ir.interpreter import Interpreter
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, leaf

F4 = TensorType(DType.f32, (4,))
WEIGHTS = ("embed.w", "head.w", "m.layers.0.w", "m.layers.1.w")
LINES = """
  %p0 = neg %past.0.k loc "cache"
  %e = add %x, @embed.w loc "embed"
  %p1 = neg %past.1.k loc "cache"
  %c0 = add %p0, %e loc "m.layers.0"
  %s0 = add %c0, @m.layers.0.w loc "m.layers.0.mlp"
  %c1 = add %p1, %s0 loc "m.layers.1"
  %d1 = add %c1, %e loc "m.layers.1"
  %s1 = add %d1, @m.layers.1.w loc "m.layers.1.mlp"
  %q0 = neg %c0
  %t_1 = cos %x loc "m.layersx.0"
  %q1 = neg %c1
  %y = add %s1, @head.w loc "head"
  %z = add %y, %t_1 loc "head"
  return %z as "logits", %q0 as "present.0.k" updates %past.0.k,
    %q1 as "present.1.k" updates %past.1.k
"""


def traced(*changes: str) -> Graph:
    """The trace of two layers, with some lines changed: `old -> new`."""
    lines = LINES
    for change in changes:
        old, new = change.split(" -> ")
        assert old in lines, old
        lines = lines.replace(old, new)
    weights = ", ".join(f"@{name}: f32[4]" for name in WEIGHTS)
    inputs = "%x: f32[4], %past.0.k: f32[4], %past.1.k: f32[4]"
    return parse_graph(f"graph step({inputs}, {weights}) {{ {lines} }}")


def names(nodes: tuple[Node, ...]) -> str:
    return " ".join(n.output.name for n in nodes)


def test_nodes_belong_to_layers_before_between_and_behind_them() -> None:
    parts = cut(traced(), "m.layers")
    assert (names(parts.head), names(parts.tail)) == ("e", "t_1 y z")
    assert [names(p) for p in parts.before] == ["p0", "p1"]
    assert [names(p) for p in parts.segments] == ["c0 s0", "c1 d1 s1"]
    assert [names(p) for p in parts.behind] == ["q0", "q1"]
    assert parts.streams == ("s0", "s1")


REFUSED = {
    "what neg outside all layers leads to is not one: [0, 1]":
        ("%q1 = neg %c1 -> %q1 = neg %q0",),
    "what neg outside all layers leads to is not one: []": ("%y = add %s1 -> %u = neg %c1 %y = add"
        " %s1",),
    "what neg outside all layers leads to is not one: [-2, 0]": ("%z = add %y -> %z = add %q0",),
    "the cache that add outside all layers reads is not one: [0, 1]":
        ("%p1 = neg %past.1.k -> %p1 = add %past.1.k, %p0",),
    "the layers hand on [['p0', 's0'], ['s1']]": ("%c1 = add %p1 -> %c1 = add %p0",),
    "add in m.layers.0 reads %p1, which belongs to another part":
        ("%c0 = add %p0 -> %c0 = add %p1",),
    "add in m.layers.1.mlp reads @m.layers.0.w, which belongs to another part":
        ("@m.layers.1.w loc -> @m.layers.0.w loc",),
    "add in head reads @m.layers.1.w, which belongs to another part":
        ("@head.w loc -> @m.layers.1.w loc",),
    "add in the step reads %c1, which belongs to another part":
        ("%q0 = neg %c0 -> %q0 = add %c0, %c1",),
    "add in head reads %s0, which belongs to another part": ("%y = add %s1 -> %y = add %s0",),
    "the output present.1.k is not made by its layer":
        ("%q1 as -> %p0 as", "%q1 = neg %c1 -> %q2 = neg %x"),
    "the output logits reads %past.0.k, which belongs to another part":
        ("return %z -> return %past.0.k", "%y = add %s1 -> %y = add %x",
         "%z = add %y -> %z = add %x"),
    "the layers hand on [['s0'], ['d1', 's1']]": ("%z = add %y, %t_1 -> %v = add %y, %t_1 loc"
        ' "head" %z = add %v, %d1',),
    "the layers hand on [['s0'], []]": ("%y = add %s1 -> %y = add %x",),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_trace_that_hangs_together_in_another_way_is_refused(words: str) -> None:
    with pytest.raises(Irregular) as caught:
        cut(traced(*REFUSED[words]), "m.layers")
    assert str(caught.value) == words


# --- written out ----------------------------------------------------------------------------------


def model(sizes: tuple[int, ...] = (4, 4, 4, 4)) -> nn.Module:
    """A model of four layers of one parameter each."""
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Module() for _ in sizes]
    for layer, size in zip(layers, sizes, strict=True):
        layer.w = nn.Parameter(torch.randn(size, generator=generator))
    root, inner = nn.Module(), nn.Module()
    inner.layers = nn.ModuleList(layers)
    root.m = inner
    return root


def stack(*kinds: int) -> LayerStack:
    return LayerStack("m.layers", kinds, ("",) * len(kinds), "")


def program() -> Program:
    weights = {name: leaf(name, F4) for name in WEIGHTS}
    source = DictSource({name: torch.randn(4) for name in WEIGHTS})
    return Program("p", {"step": traced()}, weights, source=source)


def test_layers_of_the_first_of_each_kind_are_written_out_with_all_that_is_theirs() -> None:
    short, module = program(), model()
    whole = instantiate(short, stack(0, 1, 1, 1), module)
    graph = whole.entries["step"]
    assert [v.name for v in graph.inputs] == ["x", *(f"past.{i}.k" for i in range(4))]
    assert graph.output_names == ("logits", *(f"present.{i}.k" for i in range(4)))
    assert graph.aliases == tuple((i, i) for i in range(1, 5))
    segments = [n.loc for n in graph.nodes if n.loc.startswith("m.layers.")]
    layer = ["m.layers.{}", "m.layers.{}", "m.layers.{}.mlp"]
    assert segments == ["m.layers.0", "m.layers.0.mlp"] + [
        loc.format(i) for i in (1, 2, 3) for loc in layer
    ]
    assert "m.layersx.0" in {n.loc for n in graph.nodes}
    produced = [v.name for n in graph.nodes for v in n.outputs]
    assert len(set(produced)) == len(produced) == 23
    assert produced[:5] == ["p0_1", "p1_1", "p1_2", "p1_3", "e_1"]
    given = {v.name: torch.randn(4) for v in graph.inputs}
    found = Interpreter(whole).run("step", given)
    stream: Tensor = given["x"] + short.source.load("embed.w")
    first = stream
    for i in range(4):
        row = stream - given[f"past.{i}.k"]
        assert torch.equal(found[f"present.{i}.k"], -row)
        stream = row + first if i else row
        stream = stream + module.get_parameter(f"m.layers.{i}.w")
    expected = stream + short.source.load("head.w") + given["x"].cos()
    torch.testing.assert_close(found["logits"], expected)
    assert set(whole.weights) == {"embed.w", "head.w", *(f"m.layers.{i}.w" for i in range(4))}


def test_layers_need_weights_of_their_own_of_the_same_type() -> None:
    words = r"^the module has no m\.layers\.2\.w of type f32\[4\]$"
    for sizes in ((4, 4, 5), (4, 4)):
        with pytest.raises(Irregular, match=words):
            instantiate(program(), stack(0, 1, 1), model(sizes))
    with pytest.raises(Irregular, match=r"^2 layers traced, 3 expected$"):
        instantiate(program(), stack(0, 1, 2, 2), model())
    absent = instantiate(program(), stack(0, 1, 1), model().to("meta"))
    assert not absent.has_weights
    assert instantiate(program(), stack(0, 1, 1), model()).has_weights
