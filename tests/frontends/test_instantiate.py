"""Instantiated layers are what a trace of every layer gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.parity import randomise
from dsc.errors import UsageError
from dsc.frontends import torch_export
from dsc.frontends.causal_lm import trace_step
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.instantiate import trace_by_kind
from dsc.frontends.layer_kinds import layer_kinds
from dsc.frontends.meta_run import Irregular
from dsc.frontends.segments import cut
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Range
from dsc.ir.graph import Attrs, Graph, Node, Operand, Value, Weight
from dsc.ir.interpreter import Interpreter
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.models import v3
from dsc.models.configs import config
from tests.family import small, small_v2, stock

SYMBOLS = {"B": Range(1, 4), "S": Range(1, 64), "P": Range(0, 64), "L": Range(1, 64)}
Build = Callable[[ModelConfig], nn.Module]


def ours(cfg: ModelConfig) -> nn.Module:
    return randomise(v3.build(cfg))


def kinds_of(module: nn.Module, cfg: ModelConfig) -> tuple[int, ...]:
    """Return the kinds of a module's layers, by its step at full depth."""
    names = states_of(cfg).input_names(), states_of(cfg).output_names()
    return layer_kinds(module, states_of(cfg).example_inputs(), *names).kinds


def traced(module: nn.Module, cfg: ModelConfig, *, whole: bool = False) -> Program:
    return trace_step(module, states_of(cfg), SYMBOLS, whole=whole)


def lines(graph: Graph) -> list[tuple[Any, ...]]:
    """Spell a graph node by node: all of it but the names of values inside."""
    numbers = {v.name: (v.name, v.type) for v in graph.inputs}
    found: list[tuple[Any, ...]] = [tuple(numbers.values())]
    for node in graph.nodes:
        operands = tuple(numbers[x.name] if isinstance(x, Value) else x for x in node.inputs)
        found.append((node.op, operands, node.attrs, node.loc))
        for value in node.outputs:
            numbers[value.name] = (str(len(numbers)), value.type)
    outputs = tuple(numbers[x.name] if isinstance(x, Value) else x for x in graph.outputs)
    return [*found, outputs, graph.output_names, graph.aliases]


# Equal to a trace of every layer.

CASES: dict[str, tuple[Build, ModelConfig, tuple[int, ...]]] = {
    "ours": (ours, small(num_hidden_layers=4, first_k_dense_replace=2), (0, 1, 2, 2)),
    "stock": (stock, small(), (0, 1, 1)),
}
MORE: dict[str, tuple[Build, ModelConfig, tuple[int, ...]]] = {
    "ours_all_dense": (ours, small(first_k_dense_replace=3), (0, 1, 1)),
    "ours_all_moe_tied": (
        ours,
        small(first_k_dense_replace=0, tie_word_embeddings=True),
        (0, 1, 1),
    ),
    "stock_deeper": (stock, small(num_hidden_layers=4), (0, 1, 1, 1)),
    "stock_v2": (stock, small_v2(), (0, 1, 1)),
}


def assert_equals_whole_trace(build: Build, cfg: ModelConfig, kinds: tuple[int, ...]) -> None:
    module = build(cfg)
    assert kinds_of(module, cfg) == kinds
    depths: list[int] = []
    whole = traced(module, cfg, whole=True)

    def trace(part: nn.Module, layers: Sequence[int] | None) -> Program:
        depth = cfg.num_hidden_layers if layers is None else len(layers)
        depths.append(depth)
        return traced(part, cfg.model_copy(update={"num_hidden_layers": depth}), whole=True)

    names = states_of(cfg).input_names(), states_of(cfg).output_names()
    found = trace_by_kind(module, states_of(cfg).example_inputs(), *names, trace)
    assert depths == [max(kinds) + 1], "the model was traced whole"

    ((a,), (b,)) = found.entries.values(), whole.entries.values()
    assert lines(a) == lines(b)
    assert structural_hash(a) == structural_hash(b)
    assert found.weights == whole.weights
    assert (found.stage, found.symbols, found.meta) == (whole.stage, whole.symbols, whole.meta)
    for name in found.weights:
        assert torch.equal(found.source.load(name), whole.source.load(name))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_whole_trace(case: tuple[Build, ModelConfig, tuple[int, ...]]) -> None:
    assert_equals_whole_trace(*case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MORE.values(), ids=MORE.keys())
def test_equals_the_whole_trace_more(case: tuple[Build, ModelConfig, tuple[int, ...]]) -> None:
    assert_equals_whole_trace(*case)


def test_the_model_of_models_is_translated_as_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decomposing traces a graph twice more: there is a row for all that it is written with."""
    cfg = small(num_hidden_layers=2)
    monkeypatch.setattr(torch_export, "decompositions", lambda: pytest.fail("it was decomposed"))
    assert traced(ours(cfg), cfg).entries


def test_kinds_of_671b() -> None:
    cfg = config("671b")
    with torch.device("meta"):
        module = v3.build(cfg)
    assert kinds_of(module, cfg) == (0, 1, 1, *[2] * 58)


# What tells layers apart.


def test_another_eps_is_another_kind() -> None:
    cfg = small(num_hidden_layers=5)
    for module in (v3.build(cfg), stock(cfg)):
        assert kinds_of(module, cfg) == (0, 1, 1, 1, 1)
        norm: Any = module.get_submodule("model.layers.2.input_layernorm")
        setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 1e-3)
        assert kinds_of(module, cfg) == (0, 1, 2, 1, 1)


def test_another_plain_attribute_is_another_kind_though_nothing_reads_it() -> None:
    cfg = small(num_hidden_layers=4)
    module = v3.build(cfg)
    layer: Any = module.get_submodule("model.layers.2.self_attn")
    layer.sliding_window = 4
    assert kinds_of(module, cfg) == (0, 1, 2, 1)


STEPS = {"by_index": 2, "by_far_index": 3}


class Block(nn.Module):
    """A layer of few nodes, with one cache."""

    def __init__(self, layer_idx: int, by_index: int) -> None:
        super().__init__()
        self.layer_idx, self.by_index = layer_idx, by_index
        self.proj = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor, shared: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        present = torch.cat([past, self.proj(x)], dim=1)
        y = x + shared * present.sum(1, keepdim=True)
        return (y / (self.layer_idx // self.by_index + 1) if self.by_index else y), present


class Blocks(nn.Module):
    """A stack of blocks under another name than usual; `variant` says what is odd about it."""

    def __init__(self, variant: str = "", count: int = 4) -> None:
        super().__init__()
        self.variant = variant
        self.blocks = nn.ModuleList(Block(i, STEPS.get(variant, 0)) for i in range(count))
        if variant == "tied":
            blocks: Any = self.blocks
            blocks[3].proj.weight = blocks[2].proj.weight

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        if self.variant == "data" and bool((x > 0).all()):
            x = -x
        x = first = x.sin()
        masks = [x.cos(), x.exp()]
        presents: list[Tensor] = []
        middle = x
        for i, block in enumerate(self.blocks):
            shared = masks[i % 2] if self.variant == "by_parent" else masks[0]
            if self.variant == "skip" and i == 3:
                shared = middle
            own = past[0] if self.variant == "shared_cache" else past[i]
            middle = x
            x, present = block(x, shared, own)
            x = x + first if self.variant == "between" else x
            presents.append(present[:, 1:] if self.variant == "sliced" and i > 2 else present)
        x = x / len(self.blocks) if self.variant == "counted" else x
        out = x.tanh() + (presents[0].sum() if self.variant == "peek" else 0)
        return out, *presents


def blocks_inputs(depth: int, rows: int = 7) -> list[Tensor]:
    """Inputs of a stack: x [2,3,4], and a cache [2,rows,4] a layer."""
    return [torch.randn(2, 3, 4), *(torch.randn(2, rows, 4) for _ in range(depth))]


def trace_blocks(module: nn.Module) -> tuple[Program, list[int]]:
    """Trace blocks by kind; also the depths that were traced."""
    depths: list[int] = []

    def trace(part: nn.Module, layers: Sequence[int] | None) -> Program:
        from dsc.frontends.torch_export import trace

        depth = 4 if layers is None else len(layers)
        depths.append(depth)
        past, present = ([f"{p}.{i}.latent" for i in range(depth)] for p in ("past", "present"))
        batch, rows = torch.export.Dim("B"), torch.export.Dim("P")
        return trace(
            part,
            tuple(blocks_inputs(depth)),
            {"x": {0: batch}, "past": ({0: batch, 1: rows},) * depth},
            name="step",
            input_names=["x", *past],
            output_names=["out", *present],
            aliases=list(zip(present, past, strict=True)),
        )

    past, present = ([f"{p}.{i}.latent" for i in range(4)] for p in ("past", "present"))
    return trace_by_kind(module, blocks_inputs(4), ["x", *past], ["out", *present], trace), depths


VARIANTS = {
    "": 2,
    "by_index": 3,
    "by_far_index": 4,  # of three kinds; but the last, as the third of a shallow stack, is another
    "by_parent": 3,
    "sliced": 4,  # likewise
    "counted": 4,
    "skip": 4,
    "tied": 4,
    "between": 4,
    "shared_cache": 4,
    "peek": 4,
}
"""How many layers are traced of stacks of four, most of them odd in some way."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_compute_the_same(variant: str) -> None:
    """Whatever is odd about a stack is seen, and what comes out computes what the module does."""
    torch.manual_seed(0)
    module = Blocks(variant).eval()
    program, depths = trace_blocks(module)
    assert depths == [VARIANTS[variant]]
    given = blocks_inputs(4, rows=5)
    inputs = dict(zip(["x", *(f"past.{i}.latent" for i in range(4))], given, strict=True))
    with torch.no_grad():
        expected = module(*given)
    found = Interpreter(program).run("step", inputs)
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_module_that_needs_data_is_left_to_the_tracer() -> None:
    with pytest.raises(UsageError, match="takes a number out of a tensor"):
        trace_blocks(Blocks("data"))


# Interfaces of segments.


def node(loc: str, out: str, *operands: Operand) -> Node:
    kind = TensorType(DType.f32, (4,))
    return Node("add", operands, Attrs(), (Value(out, kind),), loc)


def two_layers(**changes: str) -> Graph:
    """Two layers of two nodes between an embedding and a head; `changes` rename operands."""
    kind = TensorType(DType.f32, (4,))

    def v(name: str) -> Value:
        return Value(changes.get(name, name), kind)

    def w(name: str) -> Weight:
        return Weight(changes.get(name, name), kind)

    past = [Value(f"past.{i}.latent", kind) for i in (0, 1)]
    nodes = [
        node("embed", "e", Value("x", kind), w("embed.w")),
        node("layers.0", "c0", past[0], v("e")),
        node("layers.0.mlp", "s0", Value("c0", kind), w("layers.0.w")),
        node("layers.1", "c1", v("past.1.latent"), v("s0")),
        node("layers.1.mlp", "s1", v("c1"), w("layers.1.w")),
        node("head", "y", v("s1"), w("head.w")),
    ]
    outputs = (Value("y", kind), Value("c0", kind), Value("c1", kind))
    names = ("logits", "present.0.latent", "present.1.latent")
    return Graph("step", (Value("x", kind), *past), tuple(nodes), outputs, names)


def test_cut_gives_the_segments() -> None:
    parts = cut(two_layers(), "layers")
    assert [[n.output.name for n in s] for s in parts.segments] == [["c0", "s0"], ["c1", "s1"]]
    assert [n.output.name for n in (*parts.head, *parts.tail)] == ["e", "y"]
    assert parts.streams == ("s0", "s1")


@pytest.mark.parametrize(
    "changes",
    [
        {"c1": "c0"},
        {"past.1.latent": "past.0.latent"},
        {"layers.1.w": "layers.0.w"},
        {"head.w": "layers.1.w"},
        {"s1": "s0"},
        {"s0": "e"},
        {"s1": "e"},
    ],
    ids=str,
)
def test_cut_refuses_another_interface(changes: dict[str, str]) -> None:
    with pytest.raises(Irregular):
        cut(two_layers(**changes), "layers")
