"""Attention: generic, multi-head latent in its expanded form, and latent in its absorbed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsc.backends.triton.blocks import ceil_div, next_power, powers, spelled
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.lower.cached import Cache, reader, widened
from dsc.backends.triton.lower.contract import Product, emit_gemm
from dsc.backends.triton.prologue import NORMED_ROWS, Spans, Turned
from dsc.backends.triton.slots import Slot, Slots
from dsc.backends.triton.wanted import Wanted
from dsc.ir import views
from dsc.ir.dims import Dim, Range, free_symbols, product
from dsc.ir.graph import Node
from dsc.ir.types import DType
from dsc.ir.views import View


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of heads; columns of the first two that lie apart are `rest`."""

    q: View
    q_rest: View | None
    k: View
    k_rest: View | None
    v: View


@dataclass(frozen=True, slots=True)
class Sight:
    """What a query sees, and what is done to scores: all rows up to its own, as they are."""

    causal: bool = True
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: View | None = None


ALL = Sight()


def attention(ctx: Context, node: Node) -> None:
    """Flash attention over given keys and values."""
    q, k, v = (ctx.unit_rows(ctx.view(x)) for x in node.inputs[:3])
    lengths, sinks = (
        None if x is None else ctx.dense(ctx.view(x)) for x in map(node.get, ("lengths", "sinks"))
    )
    bounds = {name: node.attrs[name] for name in ("causal", "window", "chunk", "softcap")}
    sight = Sight(**bounds, sinks=sinks)
    place = Cache.of(ctx, node, "k")
    (q, q_rest), (k, k_rest) = _in_powers(q), _in_powers(k)
    pages = place.slot("key_rows", both="rope_rows" if k_rest is not None else "")
    _flash(ctx, node, Heads(q, q_rest, k, k_rest, v), lengths, place, pages, sight)


def mla_attention(ctx: Context, node: Node) -> None:
    """Rebuild keys and values of all heads by one GEMM over the visible latents, then flash.

    The rebuilt buffer is [b, t, heads * (nope + value)]; the kernel reads both parts in place, and
    the rope key from the cache. Latents in pages are brought in order before, those in codes too.
    """
    q_nope, q_rope, latent, rope, kv_b, lengths = ctx.operands(node)[:6]
    lengths, place = ctx.dense(lengths), Cache.of(ctx, node, "latent")
    if latent.type.format is not None or place.page:
        latent = widened(ctx, latent, q_nope.dtype, lengths, q_nope.shape[1], place)
    q_nope, q_rope, latent, rope = map(ctx.unit_rows, (q_nope, q_rope, latent, rope))
    b, t, c = latent.shape
    heads, nope = q_nope.shape[2], q_nope.shape[3]
    width = kv_b.shape[0]
    kv = ctx.make(latent.type.with_shape((b, t, width)))
    lat_b, lat_t, _ = latent.strides
    rebuild = Product(
        latent, kv_b, kv, (b, t, width, c),
        (lat_b, lat_t, 1), (0, kv_b.strides[0], kv_b.strides[1]), (t * width, width, 1),
    )  # fmt: skip
    emit_gemm(ctx, rebuild, limit=lengths, new_rows=q_nope.shape[1])
    per_head = ctx.reshaped(kv, (b, t, heads, width // heads))
    keys = views.narrow(per_head, 3, 0, nope)
    values = views.narrow(per_head, 3, nope, node.output.type.shape[3])
    slot = place.slot("rope_rows")
    _flash(ctx, node, Heads(q_nope, q_rope, keys, rope, values), lengths, place, slot)


def _in_powers(x: View) -> tuple[View, View | None]:
    """Columns of a power of two and those behind them, where blocks of both are the smaller."""
    width = int(x.shape[3])  # type: ignore[arg-type]
    first, rest = powers(width)
    if not rest:
        return x, None
    return views.narrow(x, 3, 0, first), views.narrow(x, 3, first, width - first)


def _flash(
    ctx: Context,
    node: Node,
    parts: Heads,
    lengths: View | None,
    place: Cache,
    pages: Slot,
    sight: Sight = ALL,
) -> None:
    """Append the launch. `pages` says where rows of keys lie."""
    q, q_rope, k, k_rope, v = parts.q, parts.q_rest, parts.k, parts.k_rest, parts.v
    b, s, heads, d = q.shape
    t, groups, e = place.rows, k.shape[2], v.shape[3]
    shared = k_rope is not None and len(k_rope.shape) == 3
    r: Dim = 0 if q_rope is None else q_rope.shape[3]
    sizes = {name: int(x) for name, x in (("D", d), ("R", r), ("E", e))}  # type: ignore[arg-type]
    widest = max(sizes["D"], sizes["E"])
    seen = sight.window or sight.chunk or "all"
    of = spelled("flash", *sizes.values(), f"seen={seen}", pages.title)
    tile = place.tile(ctx.blocks.flash(ctx.limit(s), ctx.limit(t), widest, q.dtype.itemsize, of))
    given: dict[str, Given] = {"q": q, "q_rope": q_rope, "k": k, "k_rope": k_rope, "v": v}
    out = ctx.result(node)
    given |= {"lengths": lengths, "sinks": sight.sinks, "out": out}
    given |= {"S": s, "T": t, "heads": heads}
    given |= {"scale": float(node.attrs["scale"]), "GROUP": heads // groups}
    given |= _named("q", q.strides[:3], ("batch", "row", "head"))
    qr_strides = q_rope.strides[:3] if q_rope is not None else (0, 0, 0)
    given |= _named("qr", qr_strides, ("batch", "row", "head"))
    apart = _sequence if shared else place.batch
    given |= _named("k", (apart(k), *k.strides[1:3]), ("batch", "row", "head"))
    kr_strides: tuple[Dim, ...] = (0, 0, 0)
    if k_rope is not None:
        kr_strides = (place.batch(k_rope), k_rope.strides[1], 0 if shared else k_rope.strides[2])
    given |= _named("kr", kr_strides, ("batch", "row", "head"))
    given |= _named("v", (apart(v), *v.strides[1:3]), ("batch", "row", "head"))
    given |= sizes
    given |= {f"BLOCK_{name}": max(16, next_power(sizes[name])) for name in "DR"}
    given |= dict(zip(("BLOCK_E", "BLOCK_F"), powers(sizes["E"]), strict=True))
    given |= {"CAUSAL": sight.causal, "HAS_LENGTHS": lengths is not None}
    given |= {"HAS_SINKS": sight.sinks is not None, "SOFTCAP": sight.softcap}
    given |= {"WINDOW": sight.window, "CHUNK": sight.chunk}
    given |= {"BLOCK_M": tile.m, "BLOCK_T": tile.n, "AHEAD": tile.ahead}
    grid = (ceil_div(s, tile.m), b * heads)
    slots = Slots(prologue=pages)
    asked = ctx.wanted.get(node.output.name)
    if asked is not None and _stores_codes(ctx, asked, sizes["E"]):
        target, group = asked.target(ctx, out), asked.rows.columns
        places = ("b * S + m", "h * E + e", f"h * (E // {group})", "BLOCK_E", ("rows", "(e < E)"))
        lines = ["x = acc.to(out.dtype.element_ty).to(tl.float32)", *target.lines(*places)]
        slots = replace(slots, epilogue=Slot("codes", {"tile": lines}, target.arguments()))
    window = sight.window
    pairs = _seen(s, t) if sight.causal or lengths is not None else s * t
    pairs = s * window if 0 < window < ctx.limit(t) else pairs
    flops = 2 * product((b, heads, pairs, sum(sizes.values())))
    paged = {"k_rope": k_rope} if shared else {"k": k, "k_rope": k_rope, "v": v}
    touched = place.touched(b, **paged)
    ctx.launch("attention:flash_attention", grid, given, tile, flops, touched, slots)


def _seen(queries: Dim, rows: Dim) -> Dim:
    """Pairs of a query and a row that it sees: the last query all, each before it one less."""
    return queries * rows - queries * (queries - 1) // 2


def _stores_codes(ctx: Context, asked: Wanted, width: int) -> bool:
    """Whether heads of a width are whole groups, and registers are left to make codes in."""
    whole = width % asked.rows.columns == 0 and next_power(width) == width
    return whole and (bool(ctx.blocks.fp8) or ctx.blocks.interprets)


def _named(prefix: str, strides: tuple[Dim, ...], names: tuple[str, ...]) -> dict[str, Given]:
    return {f"{prefix}_{n}": s for n, s in zip(names, strides, strict=True)}


def latent_attention(ctx: Context, node: Node) -> None:
    """Absorbed attention, the cache cut into spans when few programs would read it."""
    queries = node.operands[1]
    later = ctx.later.get(queries.name) if queries.name not in ctx.views else None
    turned = later if isinstance(later, Turned) else None
    q, latent, rope, lengths = (ctx.view(x) for x in (node.operands[0], *node.operands[2:5]))
    q_rope = ctx.view(queries) if turned is None else turned.source
    q, q_row = _token_rows(ctx, q)
    q_rope, qr_row = _token_rows(ctx, q_rope)
    place = Cache.of(ctx, node, "latent")
    latent, values = reader(ctx, latent, q.dtype, place)
    slots, rope = Slots(prologue=place.slot(held="fresh"), loader=values), ctx.unit_rows(rope)
    if turned is not None:
        slots = replace(slots, sum=turned.slot())
    b, s, heads, c = (*q.shape[:2], int(q.shape[2]), int(q.shape[3]))  # type: ignore[arg-type]
    r, t = int(q_rope.shape[3]), place.rows  # type: ignore[arg-type]
    coded = bool(values.lines)
    of = spelled("latent", values.title or q.dtype, slots.prologue.title, slots.sum.title)
    sizes = heads, ctx.limit(t), c, q.dtype.itemsize
    tile = place.tile(ctx.blocks.latent(*sizes, coded, ctx.limit(s), of))
    head_tiles, most = -(-heads // tile.m), tile.spans
    spans, rows = _spans(ctx, most, b), product((b, s))
    merged = (
        ctx.merges.get(node.output.name) is False and ctx.limit(rows) <= NORMED_ROWS and most > 1
    )
    out = None if merged else ctx.result(node)
    partial = lse = None
    apart = 0
    if most > 1:
        wide = q.type.with_dtype(DType.f32)
        room = most * rows if spans == most else most * ctx.limit(s) + rows
        partial = ctx.make(wide.with_shape((room, heads, c)))
        lse = ctx.make(wide.with_shape((room, heads)))
        apart = 1 if merged else 2
    given: dict[str, Given] = {"q": q, "q_rope": q_rope, "latent": latent, "rope": rope}
    given |= {"lengths": ctx.dense(lengths), "partial": partial, "lse": lse, "out": out}
    given |= {"S": s, "T": t, "scale": float(node.attrs["scale"])}
    given |= {"q_row": q_row, "q_head": q.strides[2], "qr_row": qr_row}
    given |= {"qr_head": q_rope.strides[2]}
    given |= _named("l", (place.batch(latent), latent.strides[1]), ("batch", "row"))
    given |= _named("r", (place.batch(rope), rope.strides[1]), ("batch", "row"))
    blocks: dict[str, Given] = {"C": c, "BLOCK_C": max(16, next_power(c)), "APART": apart}
    given |= {"H": heads, "R": r, "BLOCK_R": max(16, next_power(r)), **blocks}
    given |= {"BLOCK_H": tile.m, "BLOCK_T": tile.n}
    grid = (b * s, head_tiles, spans)
    flops = 2 * product((b, heads, _seen(s, t), 2 * c + r))
    scales = values.arguments.get("scales")
    touched = place.touched(b, latent=latent, rope=rope, scales=scales)
    ctx.launch("latent:latent_attention", grid, given, tile, flops, touched, slots)
    if partial is None or lse is None:
        return

    def merge(ctx: Context, into: View) -> None:
        padded = next_power(most)
        part = ctx.blocks.merge(padded, c)
        given: dict[str, Given] = {"partial": partial, "lse": lse, "out": into, "spans": spans}
        given |= {"C": c, "BLOCK_C": part.columns, "SPANS": padded}
        several = 1 if merged else (spans + (most - 2)) // most
        grid = (rows * heads * several, -(-c // part.columns))
        ctx.launch("latent:latent_combine", grid, given, part, beside=tile.choice)

    def copied(ctx: Context) -> View:
        made = ctx.make(node.output.type)
        merge(ctx, made)
        return made

    if out is None:
        ctx.later[node.output.name] = Spans(
            node.output.type, partial, lse, spans, most, copied, tile.choice
        )
    else:
        merge(ctx, out)


def _spans(ctx: Context, most: int, sequences: Dim) -> Dim:
    """Spans of the cache: `most` for one sequence, fewer where there are several.

    So that there are about as many programs whatever the batch is, and no more partial results. Of
    a step's tokens only the most that there may be count: fewer have no more spans than `most`.
    """
    if most == 1 or isinstance(sequences, int):
        return most
    if any(ctx.ranges.get(name, Range(0, 0)).lo < 1 for name in free_symbols(sequences)):
        return most
    return (most + sequences - 1) // sequences


def _sequence(view: View) -> Dim:
    """From one sequence to the next of what is in order."""
    return view.strides[0]


def _token_rows(ctx: Context, view: View) -> tuple[View, Dim]:
    """A [b, s, h, d] operand whose (b, s) fold into one row index, and that row's stride."""
    folded = views.fold(view, 2)
    if folded is None or not views.has_unit_rows(view):
        view = ctx.dense(view)
        folded = views.fold(view, 2)
        assert folded is not None, "a dense value folds"
    return view, folded[1]
