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

from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.op import registry
from dsc.ir.parser import parse_operands
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import TensorType
from dsc.ir.weights import random_tensor

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
    "rms_norm": ["f32[5,200], f32[200] {eps=1e-06}", "bf16[3,7,96], bf16[96] {eps=1e-05}"],
    "rope": [
        f'f32[2,5{heads},16], i64[2,5]=900, f32[8] {{layout="{layout}", scale=1.25}}'
        for layout in ("interleaved", "deinterleave", "half")
        for heads in ("", ",3")
    ],
    "softmax": ["f32[3,300]", "f32[3,5,4] {axis=1}", "bf16[2,9] {axis=-1}"],
    "attention": [
        "f32[2,3,4,40], f32[2,19,2,40], f32[2,19,2,24], i64[2]=16 {scale=0.2, causal=true}",
        "f32[1,33,2,16], f32[1,33,2,16], f32[1,33,2,16] {scale=0.25, causal=true}",
        "f32[1,5,3,7], f32[1,600,3,7], f32[1,600,3,9] {scale=0.3, causal=false}",
        "bf16[1,20,2,32], bf16[1,20,2,32], bf16[1,20,2,32] {scale=0.2, causal=true}",
    ],
    "mla_attention": [
        "f32[2,1,8,32], f32[2,1,8,16], f32[2,70,128], f32[2,70,16], f32[512,128], i64[2]=69"
        " {scale=0.14}",
        "f32[1,17,3,12], f32[1,17,3,6], f32[1,40,20], f32[1,40,6], f32[72,20], i64[1]=23"
        " {scale=0.3}",
    ],
    "latent_attention": [
        "f32[2,1,8,128], f32[2,1,8,16], f32[2,600,128], f32[2,600,16], i64[2]=599 {scale=0.14}",
        "f32[2,4,5,20], f32[2,4,5,6], f32[2,40,20], f32[2,40,6], i64[2]=30 {scale=0.3}",
        "bf16[1,1,16,64], bf16[1,1,16,16], bf16[1,50,64], bf16[1,50,16], i64[1]=49 {scale=0.14}",
    ],
    "route": [
        f'f32[7,24], f32[16,24], f32[16] {{score="{score}", {_ROUTE.format(group, normal)}}}'
        for score, group, normal in (("sigmoid", "top2", "true"), ("softmax", "max", "false"))
    ]
    + [
        'f32[2,3,9], f32[6,9] {score="softmax", top_k=2, normalise=false}',
        'f32[2,3,9], f32[6,9] {score="sigmoid", top_k=3, normalise=true, scale=2.0, shared=2}',
        'bf16[5,32], f32[12,32], f32[12] {score="sigmoid", top_k=4, normalise=true, scale=2.0}',
        'f32[9,24], f32[16,24], f32[16] {score="sigmoid", fill=0.0, groups=4, keep=2,'
        ' group_score="top2", top_k=3, normalise=true}',
    ],
    "experts": [
        "f32[1,32], i64[1,4]=16, f32[1,4], f32[16,48,32], f32[16,32,24]",
        'f32[2,9,40], i64[2,9,3]=4, f32[2,9,3], f32[4,20,40], f32[4,40,10] {act="gelu"}',
        'bf16[11,64], i64[11,2]=6, f32[11,2], bf16[6,64,64], bf16[6,64,32] {act="relu"}',
    ],
    "dispatch": ["f32[70,9], i64[70,3]=7 {experts=7}"],
    "embedding": ["i64[5]=9, bf16[9,300]", "i64[2,2]=6, f32[6,5000]"],
    "select_rows": ["bf16[3,6,33], i64[3,2]=6"],
    "append": ["bf16[2,3,9], bf16[2,4,9], i64[2]=4", "f32[1,0,5], f32[1,2,5], i64[1]=1"],
    "cache_write": ["bf16[2,9,12], bf16[2,3,12], i64[2]=6"],
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
    "cumsum": ["f32[3,5000] {axis=-1}", "i64[4,7]=9 {axis=0}"],
    "topk": ["f32[6,70] {k=7}"],
    "gather": ["f32[2,5,3], i64[2,4,3]=5 {axis=1}"],
    "take": ["f32[3,6,5], i64[4]=6 {axis=1}"],
    "concat": ["bf16[2,3,5], bf16[2,4,5] {axis=1}"],
    "reshape": ["f32[6,4] {shape=[2,3,2,2]}"],
    "full": [' {shape=[3,4], value=-inf, dtype=bf16}', " {shape=[], value=3, dtype=i64}"],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call: its graph and the inputs that it runs on."""

    op: str
    graph: Graph
    inputs: Mapping[str, torch.Tensor]

    def expected(self) -> tuple[torch.Tensor, ...]:
        """What the operator's reference gives, on copies: a cache may be written in place."""
        (node,) = self.graph.nodes
        definition = registry()[self.op]
        attrs = definition.with_defaults(node.attrs)
        result = definition.reference(*(x.clone() for x in self.inputs.values()), **attrs)
        return result if isinstance(result, tuple) else (result,)


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
    if op == "grouped_linear":
        inputs["x2"] = torch.tensor([0, 3, 3, 9, 11])[: len(inputs["x2"])]
    outputs = builder.call(op, *values, **attrs)
    names = tuple(f"y{at}" for at in range(len(outputs)))
    aliases = registry()[op].aliases
    return Case(op, builder.finish(outputs, names, aliases), inputs)


def _operand(op: str, at: int, type: TensorType, high: int | None) -> torch.Tensor:
    tensor = random_tensor(type, f"{op}{at}", high or 2)
    seeded = torch.Generator().manual_seed(zlib.crc32(f"{op}{at}{type}".encode()))
    if type.dtype.is_float:
        tensor = torch.randn(tensor.shape, generator=seeded).to(tensor.dtype)
        return tensor.abs() + 0.5 if op in ("log", "sqrt", "rsqrt", "pow") and at == 0 else tensor
    if op in ("div", "remainder"):
        return tensor - 20 if at == 0 else tensor + 1
    return tensor


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


def program_of(found: Mapping[str, Case]) -> Program:
    """One program with an entry for each case."""
    return Program("cases", {k: c.graph for k, c in found.items()}, stage=Stage.LOWERED)
