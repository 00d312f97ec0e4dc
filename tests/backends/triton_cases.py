"""Operator calls over odd shapes, as data: what the Triton kernels are held against.

Each case is one operator with operand types and attributes in the text form of an operator's
`example` (`i64[2,3]=5`: integers below 5). All cases are entries of one program, so that one
interpreting process runs them all.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dsc.backends.triton.lower import TABLE
from dsc.backends.triton.pointwise import EXPRESSIONS
from dsc.backends.triton.rows import ALONG_ROWS
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.op import registry
from dsc.ir.paging import BLOCK_TABLE
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import TensorType
from dsc.ir.weights import random_tensor

SAMPLING = [
    [0.7, 0, 1.0, 0.0], [1.5, 20, 0.8, 0.0], [0.0, 3, 0.5, 0.0], [1.0, 0, 0.6, 0.02],
    [2.0, 7, 1.0, 0.0],
]  # fmt: skip
"""Temperature, top-k, top-p and min-p: drawn from all, from few, the likeliest."""
_ROUTE = 'groups=4, keep=2, group_score="{}", top_k=3, normalise={}, scale=2.5'
EXTRA: dict[str, list[str]] = {
    "linear": [
        "f32[1,70], f32[33,70]",
        "f32[3,5,130], f32[257,130], f32[257]",
        "bf16[4,96], bf16[40,96]",
        "f32[0,8], f32[4,8]",
    ],
    "einsum": [
        'f32[2,3,4,8], f32[4,8,20] {eq="bshd,hdc->bshc"}',
        'f32[2,3,4,20], f32[4,8,20] {eq="bshc,hdc->bshd"}',
        'f32[2,4,3,5], f32[2,4,7,5] {eq="bhsd,bhtd->bhst"}',
        'f32[3,5], f32[4,6] {eq="ab,cd->acbd"}',
    ],
    "matmul": ["f32[33,17], f32[17,65]", "bf16[2,3,20,40], bf16[3,40,24]"],
    "rms_norm": [
        "f32[5,200], f32[200] {eps=1e-06}", "bf16[3,7,96], bf16[96] {eps=1e-05}",
        "bf16[130,72], f32[72] {eps=1e-05}",
    ],
    "layer_norm": [
        "f32[5,200], f32[200], f32[200] {eps=1e-05}", "bf16[3,7,96], bf16[96] {eps=1e-05}",
        "bf16[13,72], f32[72], f32[72] {eps=1e-05}",
    ],
    "rope": [
        f'f32[2,5{heads},16], i64[2,5]=900, f32[8] {{layout="{layout}", scale=1.25}}'
        for layout in ("interleaved", "deinterleave", "half")
        for heads in ("", ",3")
    ]
    + [
        f'f32[2,5,3,20], i64[2,5]=900, f32[6] {{layout="{layout}", scale=1.25, dims=12}}'
        for layout in ("interleaved", "deinterleave", "half")
    ],
    "softmax": ["f32[3,300]", "f32[3,5,4] {axis=1}", "bf16[2,9] {axis=-1}"],
    "attention": [
        "f32[2,3,4,40], f32[2,19,2,40], f32[2,19,2,24], i64[2]=16 {scale=0.2, causal=true}",
        "f32[1,33,2,16], f32[1,33,2,16], f32[1,33,2,16] {scale=0.25, causal=true}",
        "f32[1,5,3,7], f32[1,600,3,7], f32[1,600,3,9] {scale=0.3, causal=false}",
        "bf16[1,20,2,32], bf16[1,20,2,32], bf16[1,20,2,32] {scale=0.2, causal=true}",
        "f32[2,3,4,40], f32[2,99,2,40], f32[2,99,2,24], i64[2]=96, f32[4]"
        " {scale=0.2, causal=true, window=5, softcap=2.0}",
        "bf16[1,33,2,16], bf16[1,33,2,16], bf16[1,33,2,16] {scale=0.2, causal=true, chunk=7}",
        "f32[2,3,4,40], f32[9,16,2,40], f32[9,16,2,24], i64[2]=60, f32[4], i64[2,4]"
        " {scale=0.2, causal=true, window=25}",
        "bf16[1,20,4,96], bf16[1,20,2,96], bf16[1,20,2,80] {scale=0.2, causal=true}",
        "f32[2,3,4,72], f32[9,16,2,72], f32[9,16,2,40], i64[2]=60, f32[4], i64[2,4]"
        " {scale=0.2, causal=true}",
    ],
    "mla_attention": [
        "f32[2,1,8,32], f32[2,1,8,16], f32[2,70,128], f32[2,70,16], f32[512,128], i64[2]=69"
        " {scale=0.14}",
        "f32[1,17,3,12], f32[1,17,3,6], f32[1,40,20], f32[1,40,6], f32[72,20], i64[1]=23"
        " {scale=0.3}",
        "bf16[2,5,3,12], bf16[2,5,3,6], bf16[7,32,20], bf16[7,32,6], bf16[72,20], i64[2]=60,"
        " i64[2,3] {scale=0.3}",
    ],
    "latent_attention": [
        "f32[2,1,8,128], f32[2,1,8,16], f32[2,600,128], f32[2,600,16], i64[2]=599 {scale=0.14}",
        "f32[2,4,5,20], f32[2,4,5,6], f32[2,40,20], f32[2,40,6], i64[2]=30 {scale=0.3}",
        "bf16[1,1,16,64], bf16[1,1,16,16], bf16[1,50,64], bf16[1,50,16], i64[1]=49 {scale=0.14}",
        "f32[3,2,5,20], f32[3,2,5,6], f32[9,64,20], f32[9,64,6], i64[3]=190, i64[3,3] {scale=0.3}",
    ],
    "route": [
        f'f32[7,24], f32[16,24], f32[16] {{score="{score}", {_ROUTE.format(group, normal)}}}'
        for score, group, normal in (("sigmoid", "top2", "true"), ("softmax", "max", "false"))
    ]
    + [
        'f32[2,3,9], f32[6,9] {score="softmax", top_k=2, normalise=false}',
        'f32[2,3,9], f32[6,9] {score="sigmoid", top_k=3, normalise=true, scale=2.0, shared=2}',
        'bf16[5,32], f32[12,32], f32[12] {score="sigmoid", top_k=4, normalise=true, scale=2.0}',
        'f32[5,9], f32[12,9], f32[12], f32[12] {score="softmax", top_k=4, normalise=true}',
        'f32[9,24], f32[16,24], f32[16] {score="sigmoid", fill=0.0, groups=4, keep=2,'
        ' group_score="top2", top_k=3, normalise=true}',
    ],
    "experts": [
        "f32[1,32], i64[1,4]=16, f32[1,4], f32[16,48,32], f32[16,32,24]",
        'f32[2,9,40], i64[2,9,3]=4, f32[2,9,3], f32[4,20,40], f32[4,40,10] {act="gelu"}',
        'f32[2,9,40], i64[2,9,3]=4, f32[2,9,3], f32[4,20,40], f32[4,40,10] {act="gelu_tanh"}',
        'bf16[11,64], i64[11,2]=6, f32[11,2], bf16[6,64,64], bf16[6,64,32] {act="relu"}',
    ],
    "dispatch": ["f32[70,9], i64[70,3]=7 {experts=7}"],
    "embedding": ["i64[5]=9, bf16[9,300]", "i64[2,2]=6, f32[6,5000]"],
    "select_rows": ["bf16[3,6,33], i64[3,2]=6"],
    "append": ["bf16[2,3,9], bf16[2,4,9], i64[2]=4", "f32[1,0,5], f32[1,2,5], i64[1]=1"],
    "cache_write": [
        "bf16[2,9,12], bf16[2,3,12], i64[2]=6", "f32[1,9,12], f32[1,1,12], i64[1]=6",
        "bf16[9,4,12], bf16[3,5,12], i64[3]=6, i64[3,3]",
    ],
    "add": ["bf16[5,1,7], bf16[3,1]", "i64[4,5], i64[5]", "f32[], f32[3,0]"],
    "div": ["i64[40]=50, i64[1]=3", "i32[6,5]=90, i32[6,1]=2"],
    "remainder": ["i64[33]=60, i64[]=2"],
    "where": ["bool[3,4], bf16[3,4], bf16[]"],
    "cast": [
        "f32[5,9] {dtype=bf16}", "bf16[5,9] {dtype=f32}", "i64[7]=300 {dtype=f32}",
        "bool[6] {dtype=i64}", "f32[9] {dtype=i32}", "i64[9]=3 {dtype=bool}",
    ],
    "sum": ["f32[3,5,7] {axes=[0,2]}", "bf16[70,40] {axes=[0]}", "i64[3,4]=9 {axes=[-1]}"],
    "mean": ["f32[2,9000] {axes=[-1], keepdims=true}"],
    "amax": ["f32[3,70] {axes=[1]}", "i64[5,6]=90 {axes=[0]}"],
    "argmax": ["f32[4,5000] {axis=-1}", "f32[4,6,5] {axis=1}"],
    "sample": ["f32[5,2,300], f32[5,4], i64[5,2]", "bf16[5,1,5000], f32[5,4], i64[5,2]"],
    "cumsum": ["f32[3,5000] {axis=-1}", "i64[4,7]=9 {axis=0}"],
    "topk": ["f32[6,70] {k=7}"],
    "gather": ["f32[2,5,3], i64[2,4,3]=5 {axis=1}"],
    "take": ["f32[3,6,5], i64[4]=6 {axis=1}"],
    "concat": ["bf16[2,3,5], bf16[2,4,5] {axis=1}"],
    "reshape": ["f32[6,4] {shape=[2,3,2,2]}"],
    "full": [' {shape=[3,4], value=-inf, dtype=bf16}', " {shape=[], value=3, dtype=i64}"],
}  # fmt: skip

# Shapes that reach the tile policies of a GPU: too slow for the interpreter, which has its own.
LARGE: dict[str, list[str]] = {
    "linear": [
        "bf16[300,520], bf16[264,520], bf16[264]",
        "bf16[1,7168], bf16[1000,7168]",
        "bf16[17,200], bf16[8200,200]",
        "bf16[129,130], bf16[131,130]",
        "f16[65,128], f16[136,128]",
        "f32[100,300], f32[130,300]",
    ],
    "einsum": [
        'bf16[1,1,128,128], bf16[128,128,512] {eq="bshd,hdc->bshc"}',
        'bf16[2,3,16,512], bf16[16,128,512] {eq="bshc,hdc->bshd"}',
    ],
    "matmul": ["bf16[3,130,70], bf16[3,70,200]"],
    "grouped_linear": [
        "bf16[700,160], bf16[64,96,160], i64[65]",
        "bf16[2000,256], bf16[8,264,256], i64[9]",
    ],
    "rms_norm": ["bf16[130,7168], bf16[7168] {eps=1e-06}"],
    "rope": ['bf16[2,300,16,64], i64[2,300]=160000, f32[32] {layout="deinterleave", scale=1.0}'],
    "softmax": ["f32[3,9000]"],
    "attention": [
        "bf16[1,200,8,192], bf16[1,200,8,192], bf16[1,200,8,128] {scale=0.07, causal=true}",
        "bf16[2,70,8,128], bf16[2,300,2,128], bf16[2,300,2,128], i64[2]=200"
        " {scale=0.09, causal=true}",
    ],
    "mla_attention": [
        "bf16[2,130,16,128], bf16[2,130,16,64], bf16[2,400,512], bf16[2,400,64], bf16[4096,512],"
        " i64[2]=250 {scale=0.005}",
    ],
    "latent_attention": [
        "bf16[3,1,128,512], bf16[3,1,128,64], bf16[3,4000,512], bf16[3,4000,64], i64[3]=3900"
        " {scale=0.02}",
        "bf16[1,1,16,512], bf16[1,1,16,64], bf16[1,8000,512], bf16[1,8000,64], i64[1]=7999"
        " {scale=0.02}",
        "bf16[2,6,20,512], bf16[2,6,20,64], bf16[2,120,512], bf16[2,120,64], i64[2]=90"
        " {scale=0.02}",
        "f32[1,2,24,512], f32[1,2,24,64], f32[1,600,512], f32[1,600,64], i64[1]=500 {scale=0.02}",
    ],
    "route": [
        'bf16[300,16], bf16[256,16], f32[256] {score="sigmoid", groups=8, keep=4,'
        ' group_score="top2", top_k=8, normalise=true, scale=2.5}',
    ],
    "experts": ["bf16[3,512], i64[3,8]=64, f32[3,8], bf16[64,512,512], bf16[64,512,256]"],
    "dispatch": ["bf16[700,64], i64[700,8]=64 {experts=64}"],
    "combine": ["bf16[5600,64], i64[5600], f32[700,8]"],
    "argmax": ["f32[3,129280] {axis=-1}"],
    "topk": ["f32[130,256] {k=8}"],
    "embedding": ["i64[600]=9000, bf16[9000,2048]"],
    "cache_write": ["bf16[3,900,576], bf16[3,257,576], i64[3]=640"],
    "add": ["bf16[3,1000,48], bf16[48]"],
    "swiglu": ["bf16[700,1408], bf16[700,1408]"],
    "sum": ["bf16[3,5000] {axes=[-1]}"],
}  # fmt: skip

EXACT_TOLERANCE = 1e-3
NARROW_TOLERANCE = 2e-2  # of the largest value, for 16-bit results


@dataclass(frozen=True)
class Case:
    """One call: its graph and the inputs that it runs on."""

    op: str
    graph: Graph
    inputs: Mapping[str, torch.Tensor]

    def expected(self) -> tuple[torch.Tensor, ...]:
        """What the operator's reference gives, on copies: a cache may be written in place."""
        return self.given(self.inputs)

    def given(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What it gives of other inputs."""
        (node,) = self.graph.nodes
        definition = registry()[self.op]
        result = definition.reference(*(x.clone() for x in inputs.values()), **node.attrs)
        return result if isinstance(result, tuple) else (result,)

    def check(self, found: Mapping[str, torch.Tensor]) -> None:
        """Hold results against the reference: types exactly, values within the tolerances."""
        for result, expected in zip(found.values(), self.expected(), strict=True):
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            if expected.dtype in (torch.bfloat16, torch.float16):
                finite = expected[expected.isfinite()].abs()
                bound = NARROW_TOLERANCE * max(1.0, float(finite.max()) if len(finite) else 1.0)
                torch.testing.assert_close(
                    result.float(), expected.float(), rtol=0, atol=bound, equal_nan=True
                )
            else:
                atol = EXACT_TOLERANCE if expected.is_floating_point() else 0
                torch.testing.assert_close(result, expected, rtol=0, atol=atol, equal_nan=True)


def build(op: str, text: str, name: str) -> Case:
    """The case that a text describes."""
    operands, attrs = parse_operands(text)
    builder = GraphBuilder(name)
    values, inputs = [], {}
    for at, (type, high) in enumerate(operands):
        values.append(builder.input(f"x{at}", type))
        inputs[f"x{at}"] = _operand(op, at, type, high)
    if op == "combine":
        inputs["x1"] = torch.randperm(len(inputs["x1"]), generator=torch.Generator().manual_seed(3))
    if op == "sample":
        inputs["x1"] = torch.tensor(SAMPLING)[: len(inputs["x0"])]
        inputs["x2"] = torch.tensor([[7, 3], [1 << 60, 1 << 40], [7, 4], [8, 0], [9, 1]])
        inputs["x2"] = inputs["x2"][: len(inputs["x0"])]
    if op == "grouped_linear":
        inputs["x2"] = _segments(len(inputs["x0"]), len(inputs["x2"]) - 1)
    named = registry()[op].operand_names(len(operands))
    if named[-1:] == (BLOCK_TABLE,):
        pool = next(f"x{i}" for i, name in enumerate(named) if name in ("k", "latent", "cache"))
        inputs[f"x{len(operands) - 1}"] = block_table(len(inputs[pool]), operands[-1][0])
    outputs = builder.call(op, *values, **attrs)
    names = tuple(f"y{at}" for at in range(len(outputs)))
    aliases = registry()[op].aliases
    return Case(op, builder.finish(outputs, names, aliases), inputs)


def block_table(pages: int, type: TensorType) -> torch.Tensor:
    """Pages in no order, none twice; the last sequence lacks its last one."""
    b, blocks = (int(d) for d in type.shape)  # type: ignore[arg-type]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(pages))
    table = order[: b * blocks].reshape(b, blocks)
    table[-1, -1] = -1
    return table


def _segments(rows: int, groups: int) -> torch.Tensor:
    """Offsets of groups of uneven size over rows, one of them empty."""
    if groups == 4:
        return torch.tensor([0, 3, 3, 9, 11])
    cuts = torch.randint(0, rows, (groups - 2,), generator=torch.Generator().manual_seed(groups))
    return torch.cat([torch.tensor([0, 0]), cuts.sort().values, torch.tensor([rows])])


def _operand(op: str, at: int, type: TensorType, high: int | None) -> torch.Tensor:
    tensor = random_tensor(type, f"{op}{at}", high or 2)
    seeded = torch.Generator().manual_seed(zlib.crc32(f"{op}{at}{type}".encode()))
    if type.dtype.is_float:
        tensor = torch.randn(tensor.shape, generator=seeded).to(tensor.dtype)
        return tensor.abs() + 0.5 if op in ("log", "sqrt", "rsqrt", "pow") and at == 0 else tensor
    if op in ("div", "remainder"):
        return tensor - 20 if at == 0 else tensor + 1
    return tensor


EMITTED = frozenset(TABLE) | EXPRESSIONS.keys() - {"copy"} | {"cast"} | ALONG_ROWS
"""Operators of the tree that triton has a kernel for."""


def cases(operators: frozenset[str]) -> dict[str, Case]:
    """All cases of the operators by name: each operator's own example, then the odd shapes."""
    found: dict[str, Case] = {}
    for op in sorted(operators):
        texts = [registry()[op].example, *EXTRA.get(op, [])]
        if op == "grouped_linear":
            texts = ["f32[11,20], f32[4,9,20], i64[5]=2", "bf16[11,32], bf16[4,16,32], i64[5]=2"]
        for number, text in enumerate(texts):
            name = f"{op}_{number}"
            found[name] = build(op, text, name)
    return found


def large_cases() -> dict[str, Case]:
    """The cases of `LARGE` by name."""
    texts = {f"{op}_large_{at}": (op, x) for op, some in LARGE.items() for at, x in enumerate(some)}
    return {name: build(op, text, name) for name, (op, text) in texts.items()}


def program_of(found: Mapping[str, Case]) -> Program:
    """One program with an entry for each case."""
    return Program("cases", {k: c.graph for k, c in found.items()}, stage=Stage.LOWERED)
