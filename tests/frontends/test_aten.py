"""Rows of the ATen table, one by one: interpreted, they compute what PyTorch computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsc.frontends.torch_export import trace
from dsc.ir.index_ranges import index_ranges
from tests.frontends.tracing import Function, Lambda, checked, interpreted, traced

# One row of the table at a time: x f32[B,4,6] with B symbolic, i i64[3], b bool[B,4,6], h bf16.

ROWS: dict[str, Function] = {
    "add alpha": lambda x, i, b, h: torch.add(x, x.square(), alpha=0.5),
    "sub alpha": lambda x, i, b, h: torch.sub(x, 2.0, alpha=3),
    "rsub": lambda x, i, b, h: 1.0 - x,
    "promote int and float": lambda x, i, b, h: i[:, None].float() + i * 0.5,
    "promote bf16 and f32": lambda x, i, b, h: h + x,
    "bf16 keeps a number in f32": lambda x, i, b, h: h * 0.1 + 1e-3,
    "bool arithmetic": lambda x, i, b, h: (b * x, b + b, b * b, b.sum(-1)),
    "true division of integers": lambda x, i, b, h: i / 2,
    "floor division": lambda x, i, b, h: (i // 2, (i - 5) // 2, x // 0.3, i % 2, (x - 1) % 0.7),
    "floor division is exact": lambda x, i, b, h: (
        (x * 0 + 1) // 0.1,
        (x * 0 - 1) // 0.1,
        (x * 0 + 1) % 0.1,
        torch.div(-i - 1, 2, rounding_mode="trunc"),
    ),
    "indices from the end": lambda x, i, b, h: (x[:, i - 4], x[:, :, -1 - i], x[:, i, i - 3]),
    "least of integers and of none": lambda x, i, b, h: (i.argmin(), x.round(), x[:, :0].sum(1)),
    "trunc division": lambda x, i, b, h: torch.div(x - 1, 0.3, rounding_mode="trunc"),
    "powers": lambda x, i, b, h: (x**2, x.abs() ** 0.5, x.abs() ** -0.5, x**-1, x**3, i**2),
    "number to a power": lambda x, i, b, h: (2.0**x, x.abs() ** x),
    "maximum and clamp": lambda x, i, b, h: (
        torch.maximum(x, -x),
        x.clamp(-0.5, 0.5),
        x.clamp(min=0),
        x.clamp(max=0.1),
        i.clamp(1),
    ),
    "comparisons promote": lambda x, i, b, h: (x > 0, i >= 1.5, h < x, x == x, i != 1, b == x),
    "logic": lambda x, i, b, h: (
        b & (x > 0),
        b | (x > 0),
        ~b,
        b ^ (x > 0),
        torch.logical_and(x, b),
        torch.logical_not(x),
    ),
    "special values": lambda x, i, b, h: (torch.isnan(x / 0 * 0), torch.isinf(x / 0)),
    "where": lambda x, i, b, h: (
        torch.where(b, x, 0.0),
        torch.where(b, 1.0, h),
        x.masked_fill(b, -math.inf),
    ),
    "functions": lambda x, i, b, h: (
        x.exp(),
        x.abs().log(),
        x.sin(),
        x.cos(),
        x.tanh(),
        x.sigmoid(),
        x.erf(),
        x.relu(),
        x.abs().sqrt(),
        x.abs().rsqrt(),
        x.reciprocal(),
        x.neg(),
        i.neg(),
        x.square(),
        i.sqrt(),
    ),
    "other bases": lambda x, i, b, h: (
        torch.exp2(x),
        torch.log2(x.abs()),
        torch.log10(x.abs()),
        torch.log1p(x.abs() * 1e-6),
        torch.expm1(x * 1e-6),
        torch.expm1(x * 50),
    ),
    "rounding": lambda x, i, b, h: (x.floor(), x.ceil(), x.trunc(), x.sign(), i.floor(), i.sign()),
    "activations": lambda x, i, b, h: (
        F.silu(x),
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        F.softplus(x),
        F.leaky_relu(x),
        F.elu(x),
        F.hardtanh(x),
        F.mish(x),
        F.glu(x),
        F.relu6(x),
        F.hardswish(x),
        F.selu(x),
        F.silu(h),
        F.gelu(h, approximate="tanh"),
    ),
    "casts": lambda x, i, b, h: (x.to(torch.bfloat16), x.long(), i.float(), b.int(), h.type_as(x)),
    "sums": lambda x, i, b, h: (
        x.sum(),
        x.sum(-1),
        x.sum((0, 2), keepdim=True),
        i.sum(),
        h.sum(-1),
        x.sum(1, dtype=torch.float64),
    ),
    "means": lambda x, i, b, h: (x.mean(), x.mean(-1, keepdim=True), h.mean((1, 2))),
    "extremes": lambda x, i, b, h: (
        x.amax(-1),
        x.amin((1, 2)),
        x.max(),
        x.min(),
        *x.max(1),
        *x.min(-1, keepdim=True),
        x.argmax(-1),
        x.argmax(),
        x.argmin(1, keepdim=True),
    ),
    "any and all": lambda x, i, b, h: (b.any(), b.all(-1), (x > 9).any(1, keepdim=True)),
    "variance": lambda x, i, b, h: (x.var(-1), x.var(1, correction=0), x.std(-1, keepdim=True)),
    "cumulative sum": lambda x, i, b, h: (x.cumsum(1), i.cumsum(0), b.cumsum(-1)),
    "softmax": lambda x, i, b, h: (
        x.softmax(-1),
        F.softmax(h, -1, dtype=torch.float32),
        h.softmax(1),
        x.log_softmax(-1),
        torch.logsumexp(x, -1),
    ),
    "topk": lambda x, i, b, h: (
        *x.topk(2),
        x.topk(3, sorted=False).values.sum(-1),
        *x.topk(2, dim=1),
        *x.topk(2, largest=False),
    ),
    "sort": lambda x, i, b, h: (*x.sort(), *x.sort(1, descending=True), x.argsort(-1)),
    "counts": lambda x, i, b, h: torch.histc(i.float(), bins=4, min=0, max=3),
    "products": lambda x, i, b, h: (
        x @ x.mT,
        torch.mm(x[0], x[1].T),
        torch.bmm(x, x.transpose(1, 2)),
        x @ x[0, 0],
        x[0, 0] @ x.mT,
        x[0, 0] @ x[1, 1],
        torch.addmm(x[0, :, :4], x[0], x[1].T, beta=0.5, alpha=2.0),
        torch.baddbmm(x[:, :, :4], x, x.mT),
    ),
    "einsum": lambda x, i, b, h: (
        torch.einsum("bij,bkj->bik", x, x),
        torch.einsum("ij,kj", x[0], x[1]),
    ),
    "attention": lambda x, i, b, h: (
        F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        F.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], is_causal=True, scale=0.3
        ),
        F.scaled_dot_product_attention(
            x[:, None],
            x[:, None],
            x[:, None],
            attn_mask=b[:, None, :, :4] | torch.ones(4, 4).tril().bool(),
        ),
        F.scaled_dot_product_attention(
            x[:, None].expand(-1, 2, -1, -1), x[:, None], x[:, None], enable_gqa=True
        ),
    ),
    "norms": lambda x, i, b, h: (
        F.layer_norm(x, (6,)),
        F.layer_norm(x, (4, 6), x[0], x[1]),
        F.rms_norm(x, (6,), x[0, 0], 1e-5),
        F.rms_norm(h, (6,), h[0, 0], 1e-5),
        F.rms_norm(x, (6,)),
    ),
    "linear and embedding": lambda x, i, b, h: (
        F.linear(x, x[0], x[1, :, 0]),
        F.embedding(i, x[0]),
    ),
    "views": lambda x, i, b, h: (
        x.view(-1, 6),
        x.reshape(x.shape[0], 24),
        x.flatten(1),
        x.unflatten(2, (2, 3)),
        x[:, None],
        x.unsqueeze(-1).squeeze(-1),
        x.squeeze(),
        x.permute(2, 0, 1),
        x.transpose(0, 1),
        x.movedim(0, -1),
        x.expand(2, -1, -1, -1),
        x.mT.contiguous(),
        x[0].t(),
    ),
    "slices": lambda x, i, b, h: (
        x[:, 1:3],
        x[..., ::2],
        x[..., 1::2],
        x[:, -2:],
        x[:, :-1],
        x[:, 1:100],
        x[0],
        x[:, -1],
        x[1:],
        x[:-1],
        x.narrow(1, 1, 2),
        x[..., 1:5:3],
    ),
    "splits": lambda x, i, b, h: (
        *x.split([2, 4], -1),
        *x.chunk(3, -1),
        *x.split(4, -1),
        *x.unbind(1),
        *x.chunk(2, 1),
    ),
    "joins": lambda x, i, b, h: (
        torch.cat([x, x[:, :1]], 1),
        torch.stack([x, x], -1),
        torch.cat([x, h], -1),
        torch.cat([torch.empty(0), x], -1),
        torch.hstack([x, x]),
    ),
    "repeats": lambda x, i, b, h: (
        x.repeat(1, 2, 1),
        x.repeat(2, 1, 1, 3),
        x.repeat_interleave(2, 1),
        i.repeat_interleave(3),
        x.tile(2),
    ),
    "flip and roll": lambda x, i, b, h: (x.flip(-1), x.flip((1, 2)), x.roll(1, 0), x.roll(-2, -1)),
    "pad": lambda x, i, b, h: (
        F.pad(x, (1, 2)),
        F.pad(x, (0, 0, 1, 0), value=2.0),
        F.pad(x, (-1, 1)),
    ),
    "triangles": lambda x, i, b, h: (x.tril(), x.triu(1), torch.ones(4, 6).triu(-1)),
    "fills": lambda x, i, b, h: (
        torch.zeros(3),
        torch.ones_like(x),
        torch.full((2, x.shape[0]), 0.5),
        x.new_zeros(2),
        torch.full_like(i, 7),
        torch.tensor(2.5) * x,
        torch.eye(3),
        torch.tensor([1.0, 2.0, 3.0]) + i,
    ),
    "ranges": lambda x, i, b, h: (
        torch.arange(5),
        torch.arange(x.shape[0]) + x.shape[0],
        torch.arange(1, 9, 3),
        torch.arange(0, 1, 0.25),
        torch.arange(x.shape[0], dtype=torch.float32),
        torch.linspace(0, 1, 5),
    ),
    "sizes as numbers": lambda x, i, b, h: (
        x / x.shape[0] ** 0.5,
        x * x.shape[0],
        x + x.shape[0] * 2.0,
    ),
    "ranges as indices": lambda x, i, b, h: (
        x[torch.arange(-2, 0)],
        x[:, torch.arange(-2, 1)],
        x[:, torch.arange(-1, 2)[1:]],
        x[:, torch.arange(2).expand(3, 2)],
    ),
    "indexing": lambda x, i, b, h: (
        x[:, i],
        x[i[:2] % 2],
        x[:, :, i],
        x[:, i, i],
        x[0, i],
        x[:, [0, -1]],
        x[..., i[:, None], i],
        x.index_select(1, i),
        x[:, 0, i],
        x[i[:, None] % 2, i],
    ),
    "gather": lambda x, i, b, h: (x.gather(1, x.argsort(1)), x.gather(-1, x.argsort(-1)[..., :2])),
    "index_put": lambda x, i, b, h: (
        x[0].index_put((i,), x[1, :3]),
        x[0].index_put((i,), x[1, :3], accumulate=True),
        torch.zeros(4, 6).index_put((i, i), torch.ones(3)),
        x.index_add(1, i, x[:, :3]),
        x.index_copy(2, i, x[:, :, :3]),
    ),
    "assignment": lambda x, i, b, h: assigned(x, b),
    "scatter": lambda x, i, b, h: (
        x.scatter(1, i[None, :, None].expand(x.shape[0], 3, 1), 1.0),
        x.scatter(2, x.argsort(-1), x),
    ),
    "one hot": lambda x, i, b, h: F.one_hot(i, 5),
    "complex": lambda x, i, b, h: rotated(x),
    "sizes and alpha": lambda x, i, b, h: (
        torch.add(torch.arange(4), x.shape[0], alpha=2),
        torch.sub(torch.arange(4), x.shape[0]),
        torch.add(i, x.shape[0], alpha=1),
        i * 1.0,
        i * 1,
        h * 1,
    ),
    "quotients of every sign": lambda x, i, b, h: (
        *(torch.div(j, d, rounding_mode="trunc") for j in (i - 2, -i - 1) for d in (2, -2)),
        *(torch.div(j, d, rounding_mode="floor") for j in (i - 2, -i - 1) for d in (2, -2)),
        x // -0.3,
        h // 0.3,
        x // 0.0,
        torch.div(h, 0.3, rounding_mode="trunc"),
    ),
    "remainders of every sign": lambda x, i, b, h: (
        *(torch.fmod(v, d) for v in (x, -x) for d in (0.7, -0.7)),
        *(torch.fmod(j, d) for j in (i - 2, -i - 1) for d in (2, -2)),
        *(j % d for j in (i - 2, -i - 1) for d in (2, -2)),
        x % -0.7,
    ),
    "powers by factors": lambda x, i, b, h: (
        *((i - 2) ** n for n in (0, 1, 2, 3, 4, 15)),
        *(x**n for n in (0, 1, 4, 2.5, 0.0)),
        x.half().abs() ** 0.5,
        x.half().abs() ** -0.5,
        i.float() ** 2,
        2**i,
    ),
    "rounding of halves": lambda x, i, b, h: (
        (i - 2.5).round(),
        (i * 0.25).round(),
        (0.5 - i).round(),
        (i + 2.0**52).double().trunc(),
        (i - 2.5).bfloat16().round(),
        i.round(),
        i.trunc(),
        (x.double() * 1e-3).round(),
    ),
    "one operand of a rank or two": lambda x, i, b, h: (
        x[0, 0].t(),
        x[0].t(),
        torch.addmm(x[0, :, :4], x[0], x[1].T, beta=0),
        torch.addmm(x[0, :, :4], x[0], x[1].T, alpha=0.5),
        torch.einsum("ba", x[0]),
        torch.einsum("ab, bc", x[0], x[1].T),
        F.linear(x.double(), x[0].double()),
        F.linear(x.double(), x[0].double(), x[0, :, 0].double()),
        F.linear(h, h[0]),
    ),
    "slices at the ends": lambda x, i, b, h: (
        x[:, -100:2],
        x[:, 100:],
        x[:, 4:],
        x[:, 3:],
        x[-2:],
        x[-1],
        x[:, 1:4:2],
        x[:, 0:4:3],
        x[:, -3:-1],
    ),
    "joins of nothing": lambda x, i, b, h: (
        torch.cat([x[:, :0], x[:, :0]], 1),
        torch.cat([x[:, :0], x], 1),
        torch.cat([x, h[:, :1]], -2),
        x.repeat(1, 1, 1),
        x.repeat(1, 1, 1, 1),
        x.repeat(1, 1, 3),
    ),
    "turns of every length": lambda x, i, b, h: (
        x.flip(0),
        x.flip((0, 2)),
        x.roll(-1, 0),
        x.roll(1),
        x[0].roll(7),
        x.roll(4, 1),
        x.roll(5, 1),
        x.roll(-7, 2),
        x.roll((1, 2), (1, 2)),
    ),
    "pads of every axis": lambda x, i, b, h: (
        F.pad(x, (0, 0, -1, 2), value=3.0),
        F.pad(x, (0, 1, 0, 0, 2, 0)),
        F.pad(x, (-2, -1)),
        F.pad(x, (1, -1)),
        F.pad(i, (1, 0), value=9),
    ),
    "ranges of every kind": lambda x, i, b, h: (
        torch.arange(0.5, 3),
        torch.arange(0.0, 4.0),
        torch.arange(-2, 2),
        torch.arange(2, 8, 2),
        torch.arange(7, 1, -2),
        torch.arange(0, 6, 2),
        torch.arange(1, x.shape[0] + 1),
        torch.arange(3, dtype=torch.bfloat16),
    ),
    "indices in several axes": lambda x, i, b, h: (
        x[[-1, 0]],
        x[:, [1, -2]],
        x[i[:2] % 2, i[:2], i[:2]],
        x[i % 2, :, i],
        x[:, i % 2, i],
        x[:, i[:, None] % 2, i],
        x[i[:2] % 2, i[:2]],
        x[[0, -1], 1],
    ),
    "puts in several axes": lambda x, i, b, h: (
        x.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), x[:2, 0]),
        torch.zeros(3, 4, 6).index_put((torch.tensor([0, 2]),), torch.ones(6)),
        x[0].index_put((i,), torch.tensor(2.0)),
        x.scatter(2, x.argsort(-1)[..., :2], x),
        x.scatter(2, x.argsort(-1)[:, :1, :2], 5.0),
    ),
    "assignment of parts": lambda x, i, b, h: parts_assigned(x, b, h, i),
    "dropout in eval": lambda x, i, b, h: F.dropout(x, 0.5, training=False),
}


def assigned(x: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """In-place writes, which export makes functional."""
    y, z = x.clone(), torch.empty_like(x)
    y[:, 1:3] = 0.0
    y[:, 0] = x[:, 1]
    y[b] = 7.0
    z[..., :2] = x[..., :2]
    z[..., 2:] = 1.0
    return y, z, y.mul_(2).add_(1)


def parts_assigned(x: Tensor, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, ...]:
    """Under masks of some axes, of another element type, whole axes, from the end."""
    y, z, u = x.clone(), x.clone(), x.clone()
    y[b[..., 0]] = 3.0
    y[:, b[0]] = 2.0
    z[:, 1:3] = h[:, 1:3]
    z[:, -1:] = 5.0
    u[:, :] = h
    v = x.clone()
    v[:, i] = x[:, :3]
    w = x.clone()
    w.copy_(x[:1])
    return y, z, u, v, w


def rotated(x: Tensor) -> tuple[Tensor, ...]:
    """Rotary embedding as DeepSeek-V2 writes it."""
    angles = torch.outer(torch.arange(4).float(), torch.tensor([1.0, 0.5, 0.25]))
    turns = torch.polar(torch.ones_like(angles), angles)
    z = torch.view_as_complex(x.unflatten(-1, (3, 2)))
    y = z * turns.unsqueeze(0) * 2.0
    return torch.view_as_real(y).flatten(2), (z + y).real, (z - y).imag, (z * z.conj()).real


def arguments(batch: int = 3) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 4, 6, generator=random)
    h = torch.randn(batch, 4, 6, generator=random).bfloat16()
    return x, torch.tensor([2, 0, 3]), x > 0.3, h


DIRECT = frozenset(
    """
    sub alpha, promote int and float, promote bf16 and f32, bf16 keeps a number in f32,
    bool arithmetic, true division of integers, least of integers and of none, trunc division,
    powers, number to a power, maximum and clamp, comparisons promote, special values, other bases,
    rounding, means, extremes, cumulative sum, topk, counts, einsum, linear and embedding,
    flip and roll, sizes as numbers, indexing, one hot, sizes and alpha, quotients of every sign,
    remainders of every sign, powers by factors, rounding of halves, one operand of a rank or two,
    turns of every length, indices in several axes
    """.replace("\n   ", "")
    .strip()
    .split(", ")
)
"""Rows whose operators are translated as they come; the others are decomposed first."""

Results = dict[str, tuple[list[Tensor], list[Tensor]]]


def compared(names: list[str]) -> Results:
    """Interpreted and eager results of rows, all from one trace with a symbolic batch."""
    flatten = torch.utils._pytree.tree_leaves

    def everything(*tensors: Tensor) -> list[Any]:
        return [flatten(ROWS[name](*tensors)) for name in names]

    batch = torch.export.Dim("B", min=3)
    shapes = {"tensors": ({0: batch}, None, {0: batch}, {0: batch})}
    program = trace(Lambda(everything), arguments(), shapes)
    checked(program)
    tensors = arguments()
    found, wanted = iter(interpreted(program, *tensors)), everything(*tensors)
    return {
        name: ([next(found) for _ in expected], expected)
        for name, expected in zip(names, wanted, strict=True)
    }


@pytest.fixture(scope="module")
def direct() -> Results:
    return compared([name for name in ROWS if name in DIRECT])


@pytest.fixture(scope="module")
def decomposed() -> Results:
    return compared([name for name in ROWS if name not in DIRECT])


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        relative = 1e-2 if a.dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(a, b, rtol=relative, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", sorted(DIRECT))
def test_row_means_what_pytorch_means(name: str, direct: Results) -> None:
    assert_equal(*direct[name])


@pytest.mark.parametrize("name", sorted(ROWS.keys() - DIRECT))
def test_row_means_what_pytorch_means_after_decomposition(name: str, decomposed: Results) -> None:
    assert_equal(*decomposed[name])


@pytest.mark.slow
def test_decomposing_changes_no_meaning() -> None:
    for found, wanted in compared(list(ROWS)).values():
        assert_equal(found, wanted)


def test_a_class_of_one_hot_has_to_exist() -> None:
    graph = checked(traced(lambda i: F.one_hot(i, 5), torch.tensor([0, 4])))
    (demand,) = index_ranges(graph, {}).demands
    assert (demand.span.low, demand.span.high) == (0, 4)
