"""Operator calls over odd shapes, as data: what the TVM kernels are held against.

A case is an operator with operand types and attributes in the text form of an operator's `example`
(`i64[B,S]=5`: integers below 5). `F` stands for the element type under test; dims may be symbols,
which take the sizes of `POINTS` in turn. All cases are entries of one program, compiled at once.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsc.ir.dims import Range, evaluate
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.op import registry
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import TensorType
from dsc.ir.weights import random_tensor

POINTS = (
    {"B": 1, "S": 1, "L": 1, "C": 5, "N": 1},
    {"B": 3, "S": 5, "L": 2, "C": 77, "N": 50},
)
"""A decode step and a ragged chunk; C is a cache's capacity, N any number of rows."""


def _route(score: str, fill: str, normalise: bool) -> str:
    options = f'group_score="{score}", fill={fill}, normalise={str(normalise).lower()}'
    return f"top_k=3, scale=2.5, groups=4, keep=2, {options}"


_EXPERTS = "F[B,S,{d}], i64[B,S,3]=7, f32[B,S,3], F[7,{g},{d}], F[7,{d},{i}]"
CASES: dict[str, list[str]] = {
    "embedding": ["i64[B,S]=11, F[11,20]", "i64[N]=11, F[11,7]"],
    "linear": [
        "F[B,S,64], F[48,64]",
        "F[B,S,70], F[37,70], F[37]",
        "F[N,7], F[3,7]",
        "F[N,512], F[160,512]",
    ],
    "rms_norm": [
        "F[B,S,64], F[64] {eps=1e-06}", "F[N,7], F[7] {eps=1e-05}",
        "F[N,32], f32[32] {eps=1e-05}",
    ],
    "layer_norm": [
        "F[B,S,64], F[64], F[64] {eps=1e-05}", "F[N,7], F[7] {eps=1e-05}",
        "F[N,32], f32[32], f32[32] {eps=1e-05}",
    ],
    "rope": [
        f'F[B,S{heads},12], i64[B,S]=900, f32[6] {{layout="{layout}", scale=1.25}}'
        for layout in ("interleaved", "deinterleave", "half")
        for heads in ("", ",3")
    ]
    + [
        f'F[B,S,3,20], i64[B,S]=900, f32[6] {{layout="{layout}", scale=1.25, dims=12}}'
        for layout in ("interleaved", "deinterleave", "half")
    ],
    "append": ["F[B,C,6], F[B,S,6], i64[B]=4"],
    "cache_write": [
        "F[B,C,6], F[B,S,6], i64[B]=4",
        "F[B,C,64], F[B,S,64], i64[B]=4",
        "F[9,64,6], F[B,S,6], i64[B]=120, i64[B,2]=pages",
        "F[9,64,64], F[B,S,64], i64[B]=184, i64[B,3]=pages",
    ],
    "select_rows": ["F[B,S,20], i64[B,L]=S"],
    "attention": [
        "F[B,S,4,10], F[B,C,2,10], F[B,C,2,6], i64[B]=4 {scale=0.3, causal=true}",
        "F[B,S,3,16], F[B,C,3,16], F[B,C,3,32] {scale=0.25, causal=true}",
        "F[B,S,3,7], F[B,C,3,7], F[B,C,3,9] {scale=0.3, causal=false}",
        "F[B,S,6,64], F[B,C,2,64], F[B,C,2,32], i64[B]=4 {scale=0.2, causal=true, window=3}",
        "F[B,S,6,16], F[B,C,2,16], F[B,C,2,16], i64[B]=4, F[6]"
        " {scale=0.3, causal=true, chunk=3, softcap=1.5}",
    ],
    "mla_attention": [
        "F[B,S,4,16], F[B,S,4,8], F[B,C,32], F[B,C,8], F[112,32], i64[B]=4 {scale=0.2}",
        "F[B,S,3,5], F[B,S,3,6], F[B,C,10], F[B,C,6], F[36,10], i64[B]=4 {scale=0.3}",
        "F[B,S,4,16], F[B,S,4,8], F[9,32,32], F[9,32,8], F[112,32], i64[B]=88, i64[B,3]=pages"
        " {scale=0.2}",
        "F[B,S,3,5], F[B,S,3,6], F[9,64,10], F[9,64,6], F[36,10], i64[B]=120, i64[B,2]=pages"
        " {scale=0.3}",
    ],
    "latent_attention": [
        "F[B,S,16,64], F[B,S,16,16], F[B,C,64], F[B,C,16], i64[B]=4 {scale=0.1}",
        "F[B,S,5,20], F[B,S,5,6], F[B,C,20], F[B,C,6], i64[B]=4 {scale=0.3}",
        "F[B,S,16,64], F[B,S,16,16], F[9,32,64], F[9,32,16], i64[B]=88, i64[B,3]=pages {scale=0.1}",
        "F[B,S,5,20], F[B,S,5,6], F[9,64,20], F[9,64,6], i64[B]=120, i64[B,2]=pages {scale=0.3}",
    ],
    "swiglu": ["F[B,S,48], F[B,S,48]"],
    "route": [
        f'F[B,S,24], F[12,24], f32[12] {{score="sigmoid", {_route("top2", "-inf", True)}}}',
        f'F[N,24], F[12,24], f32[12] {{score="sigmoid", {_route("top2", "0.0", True)}}}',
        f'F[N,24], f32[12,24] {{score="softmax", {_route("max", "-inf", False)}}}',
        'F[N,9], F[5,9] {score="softmax", top_k=2, normalise=false, shared=2}',
        'F[N,9], F[5,9], f32[5], f32[5] {score="softmax", top_k=2, normalise=true}',
    ],
    "experts": [
        _EXPERTS.format(d=32, g=48, i=24),
        _EXPERTS.format(d=10, g=14, i=7) + ' {act="gelu"}',
        _EXPERTS.format(d=10, g=12, i=6) + ' {act="relu"}',
        _EXPERTS.format(d=10, g=12, i=6) + ' {act="gelu_tanh"}',
    ],
    "dispatch": ["F[N,10], i64[N,3]=7 {experts=7}"],
    "grouped_linear": ["F[8,10], F[3,6,10], i64[4]=offsets"],
    "combine": ["F[3*N,10], i64[3*N]=order, f32[N,3]"],
    "add": ["F[B,S,33], F[B,S,33]", "F[B,S,4,16], F[B,1,4,1]", "i64[N], i64[]", "F[], F[]"],
    "sub": ["F[N,32], F[32]"],
    "mul": ["F[N,32], F[N,1]"],
    "div": ["F[N,8], F[N,8]", "i64[N]=90, i64[1]=9"],
    "remainder": ["F[N,8], F[8]"],
    "maximum": ["F[N,8], F[N,8]"],
    "minimum": ["F[N,8], F[N,8]"],
    "lt": ["F[N,8], F[8]", "i64[N], i64[N]"],
    "eq": ["i64[N]=3, i64[N]=3"],
    "ne": ["i64[N,16]=3, i64[16]=3"],
    "logical_and": ["bool[N,16], bool[N,16]"],
    "logical_or": ["bool[N], bool[N]"],
    "logical_not": ["bool[N,16]"],
    "where": ["bool[N,1,16], F[4,1], F[]"],
    **{
        op: ["F[N,18]"]
        for op in ("neg", "abs", "exp", "sigmoid", "silu", "tanh", "cos", "sin", "erf", "relu")
    },
    "gelu": ["F[N,16]"],
    "gelu_tanh": ["F[N,18]"],
    "square": ["F[N,16]"],
    "cast": ["F[N,16] {dtype=f32}", "f32[N,9] {dtype=bf16}", "bool[N,8] {dtype=f32}",
             "i64[N] {dtype=f32}", "f32[N,8] {dtype=i64}", "f32[N,8] {dtype=f16}"],
    "full": [" {shape=[5,3], value=0.5, dtype=f32}", " {shape=[], value=3, dtype=i64}"],
    "arange": [" {start=2, end=9, dtype=i64}"],
    "permute": ["F[B,S,4,16] {dims=[0,2,1,3]}", "F[B,S,6] {dims=[2,0,1]}"],
    "expand": ["F[B,1,6] {shape=[B,5,6]}", "F[S,1] {shape=[4,S,9]}"],
    "slice": ["F[N,20] {axis=1, start=3, end=17, step=2}", "F[N,20] {axis=-1, start=16, end=20}",
              "F[C,B,8] {axis=0, start=1, end=C}"],
    "concat": ["F[B,S,3], F[B,S,8], F[B,S,1] {axis=-1}", "F[B,S,8], F[B,C,8] {axis=1}"],
    "stack": ["F[N,8], F[N,8]"],
    "split": ["F[B,S,7] {sizes=[3,4]}", "F[B,S,5,48] {sizes=[32,16]}",
              "F[6,N] {sizes=[2,4], axis=0}"],
    "gather": ["F[N,9], i64[N,4]=9 {axis=1}"],
    "take": ["F[9,8], i64[B,S]=9 {axis=0}", "F[N,9], i64[4]=9 {axis=-1}"],
    "sum": ["F[B,S,48] {axes=[-1]}", "F[B,S,5] {axes=[0,2], keepdims=true}", "F[N,7] {axes=[0]}"],
    "mean": ["F[B,S,48] {axes=[-1], keepdims=true}", "F[N,7] {axes=[0,1]}"],
    "amax": ["F[B,S,9] {axes=[-1]}", "i64[N,9] {axes=[0]}"],
    "amin": ["F[N,9] {axes=[0,1]}"],
    "argmax": ["F[N,40] {axis=-1}"],
    "cumsum": ["f32[N,9] {axis=0}", "i64[N,9] {axis=-1}"],
    "softmax": ["F[N,50]", "F[B,S,9] {axis=1}"],
    "topk": ["f32[N,12] {k=4}"],
    "matmul": ["F[B,S,24], F[24,32]", "F[B,1,S,7], F[4,7,5]"],
    "einsum": [
        'F[B,S,4,8], F[4,8,32] {eq="bshd,hdc->bshc"}',
        'F[B,S,4,32], F[4,6,32] {eq="bshc,hvc->bshv"}',
        'F[N,7], F[7,5] {eq="nd,dc->cn"}',
    ],
}  # fmt: skip


ALSO_BF16 = frozenset(
    {"embedding", "linear", "rms_norm", "rope", "append", "cache_write", "select_rows", "attention"}
    | {
        "mla_attention",
        "latent_attention",
        "swiglu",
        "route",
        "experts",
        "dispatch",
        "combine",
    }
    | {"grouped_linear", "add", "maximum", "where", "silu", "cast", "permute", "concat", "split"}
    | {"sum", "mean", "amax", "softmax", "matmul", "einsum"}
)
"""Operators whose first case also runs in bf16; the others share their loads and stores."""

WIDE: dict[str, list[str]] = {
    "linear": [
        "F[N,2080], F[70,2080]",
        "F[B,S,64], F[37,64], F[37]",
        "F[N,32], F[3,32]",
        "F[N,20544], F[39,20544]",  # so deep that a task takes fewer columns
    ],
    "experts": [
        _EXPERTS.format(d=64, g=192, i=96),
        _EXPERTS.format(d=96, g=64, i=32) + ' {act="gelu"}',
    ],
    "einsum": [
        'F[B,S,3,64], F[3,64,96] {eq="bshd,hdc->bshc"}',
        'F[B,S,3,96], F[3,32,96] {eq="bshc,hvc->bshv"}',
        'F[B,S,2,32], F[2,32,512] {eq="bshd,hdc->bshc"}',
    ],
    "latent_attention": [
        f"F[B,{s},{h},64], F[B,{s},{h},32], F[B,C,64], F[B,C,32], i64[B]=4 {{scale=0.1}}"
        for s, h in (("S", 6), (1, 16), (1, 3))
    ]
    + [
        f"F[B,{s},{h},64], F[B,{s},{h},32], F[B,{t},64], F[B,{t},32], i64[B]={t - 10} {{scale=0.1}}"
        for s, h, t in (("S", 32, 700), (1, 16, 2600))  # several blocks of keys in a task
    ]
    + [
        f"F[B,{s},{h},64], F[B,{s},{h},32], F[9,{page},64], F[9,{page},32], i64[B]={n},"
        " i64[B,3]=pages {scale=0.1}"
        for s, h, page, n in (
            ("S", 6, 64, 184),
            (1, 16, 64, 187),
            (1, 3, 64, 187),
            ("S", 8, 256, 760),
        )
    ],
    "attention": [
        f"F[B,{s},{h},64], F[B,{t},{g},64], F[B,{t},{g},32], i64[B]={t - 10}{more}"
        for s, h, g, t, more in (
            ("S", 6, 2, 90, " {scale=0.1, causal=true}"),
            (1, 3, 3, 700, " {scale=0.1, causal=true, softcap=2.0}"),
            ("S", 12, 1, 200, ", F[12] {scale=0.1, causal=true, window=70}"),
        )
    ],
    "mla_attention": [
        "F[B,S,3,64], F[B,S,3,32], F[B,700,96], F[B,700,32], F[288,96], i64[B]=690 {scale=0.2}",
        "F[B,S,3,64], F[B,S,3,32], F[B,C,96], F[B,C,32], F[288,96], i64[B]=4 {scale=0.2}",
        "F[B,C,2,32], F[B,C,2,32], F[B,C,64], F[B,C,32], F[128,64], i64[B]=1 {scale=0.2}",
        "F[B,S,3,64], F[B,S,3,32], F[9,256,96], F[9,256,32], F[288,96], i64[B]=750,"
        " i64[B,3]=pages {scale=0.2}",
        "F[B,S,3,64], F[B,S,3,32], F[9,64,96], F[9,64,32], F[288,96], i64[B]=184,"
        " i64[B,3]=pages {scale=0.2}",
        "F[B,C,2,32], F[B,C,2,32], F[9,128,64], F[9,128,32], F[128,64], i64[B]=150,"
        " i64[B,2]=pages {scale=0.2}",
    ],
    "cache_write": ["F[9,64,64], F[B,S,64], i64[B]=184, i64[B,3]=pages"],
    "grouped_linear": [
        "F[8,64], F[3,70,64], i64[4]=offsets",
        "F[8,32], F[3,600,32], i64[4]=offsets",
    ],
}
"""Shapes of whole vectors, for which bf16 has schedules of its own: run in bf16 only."""


@dataclass(frozen=True)
class Case:
    """One call: the operator, its graph, and how to draw its integers."""

    id: str
    op: str
    graph: Graph
    highs: tuple[Any, ...]
    low_precision: bool

    def inputs(self, env: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Seeded operands at the sizes of `env`."""
        drawn = {}
        for value, high in zip(self.graph.inputs, self.highs, strict=True):
            shape = tuple(evaluate(d, env) for d in value.type.shape)
            limit = high if isinstance(high, int) else env.get(str(high), 2)
            tensor = random_tensor(TensorType(value.type.dtype, shape), value.name + self.id, limit)
            seed = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
            if high == "order":
                tensor = torch.randperm(shape[0], generator=seed)
            elif high == "pages":
                tensor = torch.randperm(9, generator=seed)[: tensor.numel()].reshape(shape)
            elif high == "offsets":
                tensor = torch.tensor([0, 5, 5, 8])
            drawn[value.name] = tensor
        return drawn


def cases(dtype: str) -> Iterator[Case]:
    """All cases with `F` as f32; in bf16 the first one of each of `ALSO_BF16`, and all `WIDE`."""
    for op, texts in CASES.items():
        if dtype != "f32":
            texts = (texts[:1] if op in ALSO_BF16 else []) + WIDE.get(op, [])
        for number, text in enumerate(texts):
            yield _case(f"{op}_{number}_{dtype}", op, text.replace("F[", f"{dtype}["), dtype)


def _case(name: str, op: str, text: str, dtype: str) -> Case:
    named = re.findall(r"\]=(\w+)", text)
    plain, attrs = parse_operands(re.sub(r"\]=\w+", "]", text))
    b = GraphBuilder(name)
    names = _operand_names(op, len(plain))
    inputs = [b.input(n, t) for n, (t, _) in zip(names, plain, strict=True)]
    bounds = iter(int(n) if n.isdigit() else n for n in named)
    marks = re.findall(r"\](=\w+)?(?=[,\s]|$)", text.partition("{")[0])
    highs = tuple(next(bounds) if mark else 2 for mark in marks)
    outputs = b.call(op, *inputs, **attrs)
    results = tuple(f"y{i}" for i in range(len(outputs)))
    aliases = tuple(registry()[op].aliases)
    return Case(name, op, b.finish(outputs, results, aliases), highs, dtype != "f32")


def _operand_names(op: str, count: int) -> list[str]:
    declared = registry()[op].operands
    if declared and declared[-1].variadic:
        return [f"x{i}" for i in range(count)]
    return [d.name for d in declared[:count]]


def program(found: list[Case]) -> Program:
    """One program with an entry for each case."""
    symbols: set[str] = set()
    for case in found:
        for value in case.graph.values():
            symbols |= value.type.symbols
    ranges = {name: Range(1, 128) for name in sorted(symbols)}
    entries = {case.id: case.graph for case in found}
    return Program("kernels", entries, symbols=ranges, stage=Stage.OPTIMIZED)
