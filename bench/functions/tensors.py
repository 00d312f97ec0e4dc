"""Reductions, shapes, indexing and products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.functions import Door, Function, attempt, case, numbers, over

X, Y = numbers(6, 4), numbers(6, 4, seed=1)
WHOLE = numbers(6, 4, dtype=torch.int64)
AT = torch.tensor([[0, 3, 1, 2]] * 6)
DENSE = ("f64", "empty", "transposed", "strided", "one")
ROWS = ("f64", "bf16", "transposed", "strided", "expanded", "one")


def _along(name: str, axis: int, x: Tensor) -> Any:
    return getattr(torch, name)(x, axis)


for name in "sum mean prod amax amin logsumexp std var argmax argmin cumsum cumprod".split():
    over("reductions", f"{name}_last", partial(_along, name, -1), X)
for name in "sum mean amax argmin softmax cumsum".split():
    over("reductions", f"{name}_first", partial(_along, name, 0), X)
for name in "sum mean prod max min std norm median argmax numel count_nonzero".split():
    over("reductions", f"{name}_all", getattr(torch, name), X)
over("reductions", "sum_keepdim", lambda x: x.sum((0, 1), keepdim=True), X)
over("reductions", "max_and_min_along", lambda x: (*x.max(-1), *x.min(0)), X, variants=ROWS)
over(
    "reductions",
    "integer_reductions",
    lambda x: (x.sum(-1), x.amax(0), x.prod(-1), x.cumsum(0), x.argmin(-1), x.min()),
    WHOLE,
    variants=("transposed", "one"),
)
over("reductions", "mean_as_double", lambda x: x.mean(-1, dtype=torch.float64), X)
over("reductions", "softmax_last", lambda x: x.softmax(-1), X)
over("reductions", "log_softmax", lambda x: F.log_softmax(x, -1), X)
over("reductions", "logcumsumexp", lambda x: x.logcumsumexp(-1), X)
over("reductions", "normalise", lambda x: F.normalize(x, dim=-1), X)
over("reductions", "vector_norm", lambda x: torch.linalg.vector_norm(x, 1, -1), X)
over("reductions", "nansum", torch.nansum, X)
over("reductions", "var_mean", lambda x: torch.var_mean(x, -1, correction=0), X)
over("reductions", "aminmax", lambda x: torch.aminmax(x, dim=-1), X, variants=ROWS)
over("reductions", "topk", lambda x: x.topk(2, -1), X, variants=ROWS)
over("reductions", "smallest", lambda x: x.topk(2, -1, largest=False), X, variants=ROWS)
over("reductions", "sort", lambda x: x.sort(-1), X, variants=ROWS)
over("reductions", "sort_descending", lambda x: x.sort(-1, descending=True).values, X)
over("reductions", "argsort", lambda x: x.argsort(0), X, variants=("f64", "strided"))
over("reductions", "cummax", lambda x: x.cummax(-1), X, variants=ROWS)
over("reductions", "kthvalue", lambda x: x.kthvalue(2, -1), X, variants=ROWS)
over(
    "reductions", "bincount", lambda x: x.abs().flatten().bincount(minlength=10), WHOLE, variants=()
)
over("reductions", "unique", lambda x: x.unique(), WHOLE, variants=())
over("reductions", "diff", lambda x: x.diff(dim=-1), X)
over("reductions", "trace_of", lambda x: x[:4].trace(), X, variants=("f64", "transposed"))

VIEWS: dict[str, Function] = {
    "reshape": lambda x: x.reshape(2, -1),
    "view_flat": lambda x: x.contiguous().view(-1),
    "transpose": lambda x: x.t(),
    "permute": lambda x: x[None].permute(2, 0, 1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :1].squeeze(-1),
    "flatten": lambda x: x.flatten(),
    "unflatten": lambda x: x.unflatten(-1, (2, 2)),
    "expand": lambda x: x[None].expand(3, *x.shape),
    "split": lambda x: x.split(2, -1),
    "chunk": lambda x: x.chunk(3, 0),
    "unbind": lambda x: x.unbind(-1),
    "narrow": lambda x: x.narrow(-1, 1, 2),
    "swapaxes": lambda x: x.swapaxes(0, 1) * 2,
    "movedim": lambda x: x[None].movedim(0, -1),
    "first_row": lambda x: x[0],
    "last_column": lambda x: x[:, -1],
    "every_second": lambda x: x[:, ::2],
    "diagonal": lambda x: x.diagonal(),
    "as_strided": lambda x: x.contiguous().as_strided((2, 2), (1, 2)),
    "unfold": lambda x: x.unfold(-1, 2, 1),
    "view_as_bits": lambda x: x.contiguous().view(torch.int32),
    "real_of_real": lambda x: x.real,
}
for name, function in VIEWS.items():
    over("views", name, function, X, variants=("transposed", "strided", "one", "f64"))
JOINS: dict[str, Function] = {
    "cat": lambda x, y: torch.cat([x, y, x], -1),
    "cat_rows": lambda x, y: torch.cat([x, y[:1], y.new_zeros(0, 4)]),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "hstack": lambda x, y: torch.hstack([x, y]),
    "dstack": lambda x, y: torch.dstack([x, y]),
    "meshgrid": lambda x, y: torch.meshgrid(x[:, 0], y[0], indexing="ij"),
    "outer": lambda x, y: torch.outer(x[:, 0], y[0]),
    "kron": lambda x, y: torch.kron(x, y[:2]),
    "cdist": lambda x, y: torch.cdist(x, y),
    "tensordot": lambda x, y: torch.tensordot(x, y, dims=([1], [1])),
    "matmul": lambda x, y: x @ y.mT,
    "matvec": lambda x, y: x.mv(y[0]),
    "dot": lambda x, y: x[0].dot(y[0]),
    "addmm": lambda x, y: torch.addmm(x[:, :1], x, y.t(), beta=0.5, alpha=2),
    "bmm": lambda x, y: torch.bmm(x[:, None], y[:, :, None]),
    "baddbmm": lambda x, y: torch.baddbmm(x[:, :1, None], x[:, None], y[:, :, None]),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
    "einsum_implicit": lambda x, y: torch.einsum("ij,jk", x, y.t()),
    "einsum_ellipsis": lambda x, y: torch.einsum("...j,...j->...", x, y),
    "inner": lambda x, y: torch.inner(x, y),
    "chain": lambda x, y: torch.linalg.multi_dot([x, y.t(), x]),
}
for name, function in JOINS.items():
    over("joins and products", name, function, X, Y, variants=DENSE)
FILLS: dict[str, Function] = {
    "repeat": lambda x: x.repeat(2, 3),
    "tile": lambda x: x.tile((2,)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, -1),
    "flip": lambda x: x.flip(0, 1),
    "roll": lambda x: x.roll(1, -1),
    "roll_far": lambda x: x.roll((7, -9), (0, 1)),
    "rot90": lambda x: x.rot90(),
    "pad": lambda x: F.pad(x, (1, 2), value=0.5),
    "pad_negative": lambda x: F.pad(x, (-1, 1, 1, 0)),
    "pad_reflect": lambda x: F.pad(x[None], (1, 1), mode="reflect"),
    "tril": lambda x: x.tril(-1),
    "triu": lambda x: x.triu(1),
    "diag": lambda x: torch.diag(x[0]),
    "diag_embed": lambda x: x.diag_embed(),
    "zeros_like": lambda x: torch.zeros_like(x) + 1,
    "full_like": lambda x: torch.full_like(x, 2.5),
    "new_tensors": lambda x: (x.new_ones(2), x.new_full((2, 3), 7), x.new_zeros(0)),
    "linspace": lambda x: x + torch.linspace(0, 1, 4),
    "arange_by_size": lambda x: torch.arange(x.shape[0]) * 2,
    "arange_of_floats": lambda x: torch.arange(0, 1, 0.25) + x,
    "eye": lambda x: torch.eye(4) @ x.t(),
    "one_hot": lambda x: F.one_hot((x > 0).long(), 3),
    "tril_indices": lambda x: torch.tril_indices(3, 3) + x.shape[0],
    "vander": lambda x: torch.vander(x[0], 3),
    "logspace": lambda x: torch.logspace(0, 1, 4) * x,
}
for name, function in FILLS.items():
    over("fills and copies", name, function, X, variants=ROWS)

LOOKUPS: dict[str, Function] = {
    "gather": lambda x, at: x.gather(1, at),
    "take_along_dim": lambda x, at: x.take_along_dim(at, 1),
    "index_by_tensor": lambda x, at: x[at[0]],
    "index_from_the_end": lambda x, at: x[at[0] - 4],
    "index_two_axes": lambda x, at: x[at[0], at[0]],
    "index_with_slice": lambda x, at: x[:, at[0]],
    "index_select": lambda x, at: x.index_select(0, at[0]),
    "take_flat": lambda x, at: torch.take(x, at),
    "scatter": lambda x, at: x.scatter(1, at, x * 2),
    "scatter_number": lambda x, at: x.scatter(1, at[:, :1], 9.0),
    "scatter_add": lambda x, at: x.scatter_add(1, at, x),
    "scatter_reduce": lambda x, at: x.scatter_reduce(1, at, x, "amax"),
    "index_add": lambda x, at: x.index_add(0, at[0], x[:4]),
    "index_copy": lambda x, at: x.index_copy(0, at[0], x[:4] * 2),
    "index_put": lambda x, at: x.index_put((at[0],), x[:4] * 3),
    "index_put_adds": lambda x, at: x.index_put((at[0] // 2,), x[:4], accumulate=True),
    "index_fill": lambda x, at: x.index_fill(1, at[0, :2], 5.0),
    "embedding": lambda x, at: F.embedding(at, x),
    "masked_select": lambda x, at: x[x > 0],
    "nonzero": lambda x, at: x.gt(0).nonzero(),
    "where_condition": lambda x, at: torch.where(at > 1, x, -x),
    "searchsorted": lambda x, at: torch.searchsorted(x.sort(-1).values, x),
    "bucketize": lambda x, at: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
}
for name, function in LOOKUPS.items():
    over("indexing", name, function, X, AT, variants=())


@case("indexing")
def indices_out_of_range(door: Door) -> Iterator[Any]:
    """An index past the end is an error, not what lies behind the tensor."""
    f = door(lambda x, at: x[at] * 2)
    yield attempt(f, numbers(5), torch.tensor([0, 4]))
    yield attempt(f, numbers(5), torch.tensor([0, 5]))
    yield attempt(f, numbers(5), torch.tensor([-5, -1]))
    yield attempt(f, numbers(5), torch.tensor([-6, 0]))


@case("indexing")
def embedding_out_of_range(door: Door) -> Iterator[Any]:
    """As for an index, from either end."""
    f = door(lambda ids, w: F.embedding(ids, w) + 1)
    yield attempt(f, torch.tensor([[0, 3]]), numbers(4, 3))
    yield attempt(f, torch.tensor([[0, 4]]), numbers(4, 3))
    yield attempt(f, torch.tensor([[0, -1]]), numbers(4, 3))


@case("indexing")
def gather_out_of_range(door: Door) -> Iterator[Any]:
    """The same for gather, whose index a function computes."""
    f = door(lambda x, at: x.gather(-1, at + 1))
    yield attempt(f, numbers(3, 4), torch.zeros(3, 2, dtype=torch.int64))
    yield attempt(f, numbers(3, 4), torch.full((3, 2), 3))


@case("indexing")
def masks_in_place_of_indices(door: Door) -> Iterator[Any]:
    """Assignment under a mask, and reading under one."""

    def f(x: Any, mask: Any) -> Any:
        y = x.clone()
        y[mask] = 0.0
        y[:, 1][mask[:, 1]] += 1
        return y

    g = door(f)
    yield attempt(g, X.clone(), X > 0)
    yield attempt(g, X[:3].clone(), X[:3] < 0)


@case("empties")
def nothing_to_reduce(door: Door) -> Iterator[Any]:
    """Sums of nothing are 0, means are not a number, a largest of nothing is an error."""
    f = door(lambda x: (x.sum(), x.sum(0), x.mean(-1), x.prod(0), x.any(), x.all(0)))
    yield attempt(f, torch.zeros(0, 3))
    yield attempt(f, torch.zeros(2, 0))
    g = door(lambda x: x.amax(0))
    yield attempt(g, torch.zeros(2, 3))
    yield attempt(g, torch.zeros(0, 3))


@case("empties")
def products_of_nothing(door: Door) -> Iterator[Any]:
    """Matrices without rows, columns or an inner axis."""
    f = door(lambda a, b: (a @ b + 1).relu())
    for a, b in (((0, 3), (3, 2)), ((2, 0), (0, 3)), ((2, 3), (3, 0)), ((2, 3), (3, 4))):
        yield attempt(f, numbers(*a), numbers(*b))


@case("empties")
def layers_of_nothing(door: Door) -> Iterator[Any]:
    """Softmax, norms, joins and sorts of an empty batch."""

    def f(x: Any, w: Any) -> Any:
        y = F.layer_norm(F.linear(x, w), (5,))
        return torch.cat([y.softmax(-1), y]), y.cumsum(0), F.silu(y), y.sort(-1).values

    g = door(f)
    for rows in (3, 0, 1, 2):
        yield attempt(g, numbers(rows, 4), numbers(5, 4))


@case("empties")
def empty_slices(door: Door) -> Iterator[Any]:
    """Slices that end where they begin, and what is done with them."""
    f = door(lambda x: (x[:0], x[5:], x[2:2] * 2, torch.cat([x[:0], x]), x[:, :0].sum(-1)))
    for rows in (3, 5, 7):
        yield attempt(f, numbers(rows, 2))


@case("ranks")
def many_axes(door: Door) -> Iterator[Any]:
    """Eight axes, and nine."""
    f = door(lambda x: (x.flip(0) * 2).sum(-1))
    yield attempt(f, numbers(2, 1, 2, 1, 2, 1, 2, 3))
    yield attempt(f, numbers(2, 1, 2, 1, 2, 1, 2, 1, 3))


@case("ranks")
def no_axes(door: Door) -> Iterator[Any]:
    """Everything on tensors without axes."""
    f = door(lambda x, y: (x + y, x.sum(), x.exp().reshape(1), torch.stack([x, y]), x.softmax(0)))
    yield attempt(f, torch.tensor(1.5), torch.tensor(2.0))
    yield attempt(f, torch.tensor(3.0), torch.tensor(-2.0))
