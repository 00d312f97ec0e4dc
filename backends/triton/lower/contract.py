"""Matrix products: linear, matmul and two-operand einsum onto one strided, batched GEMM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsc.backends.triton.blocks import Tile, ceil_div, next_power, spelled
from dsc.backends.triton.coded_rows import RowCodes
from dsc.backends.triton.codes import einsum_axes, loader
from dsc.backends.triton.context import NONE, Context, Gather, Given
from dsc.backends.triton.prologue import Normed, Spans, Taken
from dsc.backends.triton.slots import ALL_PLAIN, PLAIN, Slot, Slots
from dsc.backends.triton.wanted import Wanted
from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node, Operand
from dsc.ir.ops.core import einsum_terms
from dsc.ir.types import DType
from dsc.ir.views import View


@dataclass(frozen=True, slots=True)
class Form:
    """How a product is computed: what stands in its slots, and how rows and result are stored.

    With `activations` rows are codes; a result that is `asked` for as codes is stored as these
    where tiles hold whole groups of its columns. `widen` multiplies in fp32. `axes` are those of
    the columns and of the sum of a weight in codes; rows may be merged from `spans` of a cache.
    """

    slots: Slots = ALL_PLAIN
    activations: str = ""
    asked: Wanted | None = None
    widen: bool = False
    axes: tuple[int, int] = (-2, -1)
    spans: Spans | None = None

    def kind(self, name: str, x: View, weight: View) -> str:
        """What a product is beside its sizes, as part of the key of its tile."""
        rows = self.activations and f"rows={self.activations}"
        made = ("merged" if self.spans is not None else "", "codes" if self.asked else "")
        titles = (slot.title for slot in self.slots.filled)
        return spelled(name, x.dtype, weight.type.spelled, rows, *titles, *made)


DIRECT = Form()


@dataclass(frozen=True, slots=True)
class Product:
    """out[z, m, n] = sum over k of a[z, m, k] * b[z, n, k]: extents and strides by role."""

    a: View
    b: View
    out: View
    extents: tuple[Dim, Dim, Dim, Dim]  # z, m, n, k
    a_strides: tuple[Dim, Dim, Dim]  # z, m, k
    b_strides: tuple[Dim, Dim, Dim]  # z, n, k
    out_strides: tuple[Dim, Dim, Dim]  # z, m, n


def emit_gemm(
    ctx: Context,
    p: Product,
    bias: View | None = None,
    form: Form = DIRECT,
    limit: View | None = None,
    new_rows: Dim = 0,
) -> None:
    """Append a GEMM. With `limit`, row tiles past limit[z] + new_rows are skipped."""
    z, m, n, k = p.extents
    slots, asked, spans, widen = form.slots, form.asked, form.spans, form.widen
    itemsize = 4 if widen else p.a.dtype.itemsize
    rows, columns = ctx.limit(m), ctx.limit(n)
    numbers = p.b.type.format is None and asked is None
    of = form.kind("gemm", p.a, p.b)
    tile = ctx.blocks.gemm(rows, columns, ctx.limit(k), itemsize, ctx.limit(z), numbers, of)
    coded = RowCodes.of(ctx, form.activations, rows) if form.activations else None
    tile = coded.tile(ctx, tile) if coded is not None else tile
    by_bytes = coded is None and p.b.type.format is not None and p.b.dtype.bits == 8
    if by_bytes and "rows" in slots.prologue.lines:
        tile = ctx.blocks.made_numbers(tile)
    if spans is not None:
        tile = spans.tile(ctx, tile, m)
        slots = replace(slots, prologue=spans.slot(ctx, m))
    tile, slots = as_codes(ctx, p.out, p.out_strides, tile, slots, asked, "matrix * c_batch")
    x, weight, slots = in_codes(ctx, p.a, p.b, tile, slots, form.axes, coded)
    if x is not p.a:
        p = replace(p, a_strides=(0, k, 1))
    given: dict[str, Given] = {"a": None if spans else x, "b": weight, "bias": bias}
    given |= {"limit": limit, "c": p.out}
    given |= {"M": m, "N": n, "K": k, "new_rows": new_rows}
    given |= dict(zip(("a_batch", "a_m", "a_k"), p.a_strides, strict=True))
    given |= dict(zip(("b_batch", "b_n", "b_k"), p.b_strides, strict=True))
    given |= dict(zip(("c_batch", "c_m", "c_n"), p.out_strides, strict=True))
    given |= {"HAS_BIAS": bias is not None, "HAS_LIMIT": limit is not None, "WIDEN": widen}
    given |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    given["GROUP_M"] = 8 if rows > 2 * tile.m else 0
    grid = (ceil_div(m, tile.m) * ceil_div(n, tile.n), z)
    flops = 2 * product((z, m, n, k))
    some = {"a": m * k * x.dtype.itemsize} if slots.prologue.row else NONE
    beside = spans.choice if spans is not None else None
    ctx.launch("gemm:gemm", grid, given, tile, flops, some, slots, beside)


def in_codes(
    ctx: Context,
    x: View,
    weight: View,
    tile: Tile,
    slots: Slots,
    axes: tuple[int, int] = (-2, -1),
    rows: RowCodes | None = None,
    row: str = "m",
) -> tuple[View, View, Slots]:
    """What a kernel's pointers to x and to the weight are, and its slots, where codes are read.

    `rows` says how rows of x become codes; `row` is the number of a row in the kernel's text, where
    the prologue does not call it otherwise.
    """
    if weight.type.format is None:
        return x, weight, slots
    codes = loader(ctx, weight, tile.k, *axes)
    if rows is None:
        return x, codes.codes, replace(slots, loader=codes.slot())
    scales = None
    taken = slots.prologue.row
    as_lies = slots.prologue is PLAIN or taken
    if rows.shares(weight.type) and as_lies and (rows.ahead or rows.known(ctx, x)):
        x, scales = rows.made(ctx, x)
    loads, sums = rows.slots(codes, scales, taken or row)
    return x, codes.codes, replace(slots, loader=loads, sum=sums)


def as_codes(
    ctx: Context,
    out: View,
    strides: tuple[Dim, Dim, Dim],
    tile: Tile,
    slots: Slots,
    asked: Wanted | None,
    start: str = "0",
) -> tuple[Tile, Slots]:
    """The tile and the slots of a product whose result is stored as codes, where that can be.

    Tiles are to hold whole groups of the result's columns; of many rows, which would become codes
    in a launch of their own, they are as wide as that takes, and lower where registers are short.
    `start` is the matrix' first column.
    """
    if asked is None or not out.is_dense or strides[1:] != (asked.width, 1):
        return tile, slots
    group, halves = asked.rows.columns, 2 if slots.epilogue.halves else 1
    if asked.width % group or not _divides(group, strides[0]):
        return tile, slots
    if asked.rows.ahead:
        tile = ctx.blocks.of_groups(tile, group * halves)
    if tile.n % (group * halves):
        return tile, slots
    target, block = asked.target(ctx, out), f"(BLOCK_N // {halves})"
    first = f"({start}) // {group} + tile_n * ({block} // {group})"
    lines = target.lines("m", f"{start} + n", first, block, ("live", "fits"))
    rounds = "x = acc.to(c.dtype.element_ty).to(tl.float32)"
    codes = Slot("codes", {"tile": [rounds, *lines]}, target.arguments())
    return tile, replace(slots, epilogue=slots.epilogue.then(codes))


def _divides(group: int, step: Dim) -> bool:
    return isinstance(step, int) and step % group == 0


def rows_of(ctx: Context, x: Operand, activations: str = "") -> tuple[View, Slot]:
    """Where the rows of a product lie, and what it does to them.

    A norm that no launch makes, or a choice of rows; of `activations` that a launch would make
    codes of, a launch chooses them first.
    """
    later = None if x.name in ctx.views else ctx.later.get(x.name)
    if isinstance(later, Normed) and later.stored is None:
        return later.source, later.slot(ctx, product(x.type.shape[:-1]))
    if isinstance(later, Taken):
        rows = ctx.limit(product(x.type.shape[:-1]))
        coded = RowCodes.of(ctx, activations, rows) if activations else None
        if coded is None or not coded.ahead or coded.known(ctx, later.source):
            return later.source, later.slot()
    return ctx.view(x), PLAIN


def linear_product(ctx: Context, x: View, weight: View, out: View, lead: Sequence[Dim]) -> Product:
    """The product x @ weight^T over `lead` rows, those of x, into a dense `out`."""
    x, _, row_stride = ctx.rows(x)
    n, k = weight.shape
    return Product(
        x, weight, out, (1, product(tuple(lead)), n, k),
        (0, row_stride, 1), (0, weight.strides[0], weight.strides[1]), (0, n, 1),
    )  # fmt: skip


def linear(ctx: Context, node: Node) -> None:
    """x @ weight^T + bias."""
    weight, *bias = map(ctx.view, node.operands[1:])
    shift, rows = ctx.dense(bias[0]) if bias else None, node.attrs["activations"]
    x, prologue = rows_of(ctx, node.operands[0], rows)
    lead = node.operands[0].type.shape[:-1]
    product = linear_product(ctx, x, weight, ctx.result(node), lead)
    emit_gemm(ctx, product, shift, Form(Slots(prologue), rows))


def matmul(ctx: Context, node: Node) -> None:
    """Batched matrix product: an einsum whose leading letters broadcast."""
    a, b = ctx.operands(node)
    shape = node.output.type.shape
    lead = shape[:-2]
    a = views.expand(a, (*lead, *a.shape[-2:]))
    b = views.expand(b, (*lead, *b.shape[-2:]))
    letters = "abcdef"[: len(lead)]
    _contract(ctx, node, a, b, (letters + "mk", letters + "kn"), letters + "mn")


def einsum(ctx: Context, node: Node) -> None:
    """Two operands, letters folded into batch, m, n and k."""
    terms, result = einsum_terms(node.attrs["eq"])
    left, right = node.operands
    if left.type.format is not None:
        left, right, terms = right, left, terms[::-1]
    later = ctx.later.get(left.name) if left.name not in ctx.views else None
    spans = later if isinstance(later, Spans) else None
    a = ctx.view(left) if spans is None else spans.view
    _contract(ctx, node, a, ctx.view(right), terms, result, spans)


def einsum_reason(node: Node) -> str | None:
    """Why an einsum cannot be one GEMM, or `None`."""
    terms, result = einsum_terms(node.attrs["eq"])
    if len(terms) != 2:
        return f"an einsum of {len(terms)} operands; the kernels multiply two"
    left, right = terms
    if any(len(set(t)) != len(t) for t in (*terms, result)):
        return f"a letter repeats in {node.attrs['eq']}"
    lonely = (set(left) ^ set(right)) - set(result)
    if lonely:
        return f"{', '.join(sorted(lonely))} of {node.attrs['eq']} summed over one operand only"
    coded = [i for i, x in enumerate(node.operands) if x.type.format is not None]
    if len(coded) > 1:
        return "an einsum of two operands in codes"
    if coded and _coded_axes(terms[1 - coded[0]], terms[coded[0]], result) is None:
        return f"codes whose last two axes are not the columns and the sum of {node.attrs['eq']}"
    return None


def _coded_axes(left: str, right: str, result: str) -> tuple[int, int] | None:
    """The axes of columns and of the sum of a right operand in codes, if there are such two."""
    n = "".join(c for c in result if c in right and c not in left)
    k = "".join(c for c in right if c in left and c not in result)
    batch = "".join(c for c in result if c in left and c in right)
    return einsum_axes(right, n, k) if right[:-2] == batch else None


def _contract(
    ctx: Context,
    node: Node,
    a: View,
    b: View,
    terms: Sequence[str],
    result: str,
    spans: Spans | None = None,
) -> None:
    left, right = terms
    batch = "".join(c for c in result if c in left and c in right)
    m = "".join(c for c in result if c in left and c not in right)
    n = "".join(c for c in result if c in right and c not in left)
    k = "".join(c for c in left if c in right and c not in result)
    a, a_roles = _roles(ctx, a, left, (batch, m, k))
    b, b_roles = _roles(ctx, b, right, (batch, n, k))
    out_type = node.output.type
    out = ctx.make(out_type)
    folded = _folds(out, result, (batch, m, n))
    if folded is None:
        sizes = dict(zip(result, out_type.shape, strict=True))
        order = batch + m + n
        out = ctx.make(out_type.with_shape(tuple(sizes[c] for c in order)))
        folded = _folds(out, order, (batch, m, n))
        ctx.set(node, views.permute(out, [order.index(c) for c in result]))
    else:
        ctx.set(node, out)
    assert folded is not None, "a dense buffer in role order folds"
    extents = (folded[0][0], folded[1][0], folded[2][0], a_roles[2][0])
    made = Product(a, b, out, extents, _steps(a_roles), _steps(b_roles), _steps(folded))
    axes = _coded_axes(left, right, result) or (-2, -1)
    direct = ctx.views[node.output.name] is out
    asked = ctx.wanted.get(node.output.name) if direct else None
    emit_gemm(ctx, made, form=Form(asked=asked, axes=axes, spans=spans))


Fold = tuple[Dim, Dim]


def _steps(roles: list[Fold]) -> tuple[Dim, Dim, Dim]:
    (_, first), (_, second), (_, third) = roles
    return first, second, third


def _roles(
    ctx: Context, view: View, letters: str, roles: tuple[str, str, str]
) -> tuple[View, list[Fold]]:
    """The operand with its axes folded by role, copied into role order when they do not fold."""
    folded = _folds(view, letters, roles)
    if folded is not None:
        return view, folded
    order = "".join(roles)
    view = ctx.dense(views.permute(view, [letters.index(c) for c in order]))
    folded = _folds(view, order, roles)
    assert folded is not None, "a dense buffer in role order folds"
    return view, folded


def _folds(view: View, letters: str, roles: tuple[str, str, str]) -> list[Fold] | None:
    sizes = dict(zip(letters, zip(view.shape, view.strides, strict=True), strict=True))
    folded: list[Fold] = []
    for role in roles:
        axes = [sizes[c] for c in role]
        merged = views.merge([d for d, _ in axes], [s for _, s in axes])
        if merged is None:
            return None
        folded.append(merged)
    return folded


def grouped_linear(ctx: Context, node: Node) -> None:
    """Rows of each segment times the weight of its group."""
    x, weight, offsets = node.operands
    out, rows = ctx.result(node), node.attrs["activations"]
    emit_grouped(ctx, x, ctx.view(weight), ctx.view(offsets), out, Form(activations=rows))


def emit_grouped(
    ctx: Context,
    multiplied: Operand | View,
    weight: View,
    offsets: View,
    out: View,
    form: Form = DIRECT,
    out_strides: tuple[Dim, Dim] | None = None,
) -> None:
    """Append a grouped GEMM into `out`, rows [rows, n] where no strides are given.

    Rows of a dispatch are gathered: row r is source[order[r] // per_token].
    """
    x, order, per_token = multiplied, None, 1
    later = None if isinstance(x, View) else ctx.later.get(x.name)
    if isinstance(later, Gather):
        x, order, per_token = later.source, later.order, later.slots
    x = x if isinstance(x, View) else ctx.view(x)
    x, given_rows, row_stride = ctx.rows(x)
    weight, offsets = ctx.dense(weight), ctx.dense(offsets)
    experts, n, k = (int(d) for d in weight.shape)  # type: ignore[arg-type]
    rows = out.shape[0]
    most = ctx.limit(rows)
    row, column = out_strides or (n, 1)
    of, slots = form.kind(f"grouped of={experts}", x, weight), form.slots
    tile = ctx.blocks.gemm(max(1, -(-most // experts)), n, k, x.dtype.itemsize, of=of)
    wanted = form.activations
    coded = RowCodes.of(ctx, wanted, ctx.limit(given_rows)) if wanted else None
    tile = coded.tile(ctx, tile) if coded is not None else tile
    tile, slots = as_codes(ctx, out, (0, row, column), tile, slots, form.asked)
    tiles = rows if most <= experts else rows // tile.m + experts
    rows_of_x, codes, slots = in_codes(ctx, x, weight, tile, slots, rows=coded, row="row")
    row_stride = row_stride if rows_of_x is x else k
    given: dict[str, Given] = {"a": rows_of_x, "order": order, "b": codes, "offsets": offsets}
    given |= {"c": out, "N": n, "K": k, "a_m": row_stride, "slots": per_token}
    given |= {"c_m": row, "c_n": column}
    given |= {"EXPERTS": experts, "EXPERTS_PADDED": next_power(experts)}
    given["GATHER"] = order is not None
    given |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    grid = (tiles, ceil_div(n, tile.n))
    flops = 2 * rows * n * k
    ctx.launch("gemm:grouped_gemm", grid, given, tile, flops, slots=slots)


def router_logits(ctx: Context, x: Operand, weight: View) -> View:
    """Logits f32[rows, e] by fp32 arithmetic, whatever the operands are.

    Products of two 16-bit floats of one type are exact in the fp32 that tensor cores sum in, so
    only other operands are widened: without tensor cores this takes half of a decode step.
    """
    t, (rows, prologue) = x.type, rows_of(ctx, x)
    shape = product(t.shape[:-1]), weight.shape[0]
    out = ctx.make(t.with_shape(shape).with_dtype(DType.f32))
    narrow = t.dtype is weight.dtype and t.dtype.bits == 16
    made = linear_product(ctx, rows, weight, out, t.shape[:-1])
    emit_gemm(ctx, made, form=Form(Slots(prologue), widen=not narrow))
    return out
