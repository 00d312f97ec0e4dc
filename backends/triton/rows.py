"""The generator for regions without a product: norms, softmax, rope, cache writes, pointwise.

A program takes BLOCK_ROWS rows. What operators of a row tell each other stays in registers, on
blocks [BLOCK_ROWS, BLOCK] padded to powers of two; floats of 16 bits are widened, and rounded after
each operator as memory would round them. Angles of rope are computed once for all that it turns,
and the halves of a rotated row go straight to where they are wanted, the cache's rows among it.

Where all operators are pointwise and of one shape, a row is an element and blocks are flat. Columns
that are the same for all operators are shared out among programs, unless one reduces them: then a
row is held whole, or, by a reduction alone, walked along block by block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsc.backends.triton.blocks import ceil_div, next_power
from dsc.backends.triton.coded_cache import parts_of, row_bytes, to_codes
from dsc.backends.triton.pointwise import NAN, applied, literal, normed, rounded, wide_type
from dsc.backends.triton.row_text import RowColumns, RowText
from dsc.ir import views
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Attrs
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read, RowStep
from dsc.ir.traits import Role
from dsc.ir.views import View

if TYPE_CHECKING:
    from dsc.backends.triton.context import Context, Given
    from dsc.backends.triton.wanted import CodedTarget

HELD = 1 << 13
"""Elements of a row that a reduction alone holds; it walks along longer ones."""
MOST = 1 << 15
"""Elements of a row's results, padded, that a program may hold."""
ALONG_ROWS = frozenset(
    {"amax", "amin", "mean", "sum", "rms_norm", "layer_norm", "softmax", "rope", "cache_write"}
)
"""Operators that the generator has a formula for, beside pointwise ones."""
_NORMS = frozenset({"rms_norm", "layer_norm"})
_BELOW = {"amax": 'float("-inf")', "amin": 'float("inf")'}
_EXTREME = {"amax": -(1 << 63), "amin": (1 << 63) - 1}


@dataclass(frozen=True)
class _Value:
    """A result in registers: a block, or of rope two, with the elements of a row that they are."""

    parts: tuple[str, ...]
    columns: RowColumns
    places: tuple[tuple[str, ...], ...] = ()
    """Of each half the indices of its elements in a row, as expressions: (head and) element."""


class RowKernel(RowText):
    """The text of a region's kernel, and what a launch of it is told. Raises `NoKernel`."""

    def __init__(
        self, steps: Sequence[RowStep], rows: Dim, coded: Mapping[int, CodedTarget] | None = None
    ) -> None:
        super().__init__()
        self.steps, self.rows, self.coded = steps, rows, coded or {}
        self.values: dict[int, _Value] = {}
        pairs = {s.number: _pairs(s) for s in steps if s.role is Role.ROTATION}
        counts = {s.number: _count(s, pairs) for s in steps}
        self.columns = {
            count: RowColumns(count, f"d{i}", f"k{i}", f"BLOCK_{i}")
            for i, count in enumerate(dict.fromkeys(counts.values()))
        }
        self.counts = counts
        self.flat = all(s.role is Role.POINTWISE and s.extents == (1,) for s in steps)
        if self.flat:
            self.columns = {1: RowColumns(1, "", "live", "")}
        reduces = any(s.role is Role.REDUCTION for s in steps)
        self.tiled = not reduces and len(self.columns) == 1 and not any(map(_in_codes, steps))
        first = counts[steps[0].number]
        long = not isinstance(first, int) or first > HELD
        self.walks = reduces and len(steps) == 1 and long
        if not self.tiled and not self.walks:
            _check_held(steps, counts)
        self._write_text()

    def _write_text(self) -> None:
        if self.flat:
            self._say("row = tl.program_id(0)", "if WIDE:", "    row = row.to(tl.int64)")
            self._say("row = row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)")
        else:
            self._say("row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS")
            self._say("row += tl.arange(0, BLOCK_ROWS)[:, None]")
        self._say("live = row < rows")
        for columns in self.columns.values():
            if not self.walks and not self.flat:
                self._index(columns, f"tl.program_id(1) * {columns.block} + " if self.tiled else "")
        emit = {
            Role.POINTWISE: self._pointwise,
            Role.REDUCTION: self._reduction,
            Role.ROTATION: self._rotation,
            Role.WRITE: self._write,
        }
        for step in self.steps:
            emit[step.role](step, self.columns[self.counts[step.number]])

    # --- values ----------------------------------------------------------------------------------

    def _read(self, read: Read, columns: RowColumns) -> str:
        """The name of an operand's block; it broadcasts to that of the columns."""
        if isinstance(read.source, Lines):
            return self._load(read.source, columns)
        if isinstance(read.source, Literal):
            value = literal(read.source.value, read.dtype)
            shape = "(1,)" if self.flat else "(1, 1)"
            return self._named(f"tl.full({shape}, {value}, {wide_type(read.dtype)})")
        (*more, part) = self.values[read.source].parts
        if more:
            raise NoKernel("an operator on what rope computes")
        return part

    def _keep(self, step: RowStep, value: _Value) -> None:
        """Hold a step's result, and store it where it leaves the region."""
        self.values[step.number] = value
        for lines in step.writes:
            target = self.coded.get(lines.view.buffer)
            if target is not None:
                self._store_codes(target, value)
                if target.only:
                    continue
            for part, inner in zip(value.parts, value.places or ((),), strict=True):
                place, mask = self._place(lines, value.columns, _indices(inner), each=True)
                self._say(f"tl.store({place}, {part}{mask})")

    def holds(self, view: View, columns: int) -> bool:
        """Whether a program has whole rows of a result, or groups of so many of their columns."""
        if self.walks or self.flat:
            return False
        for step in self.steps:
            for lines in step.writes:
                if lines.view.buffer == view.buffer:
                    (*_, width), dense = lines.view.shape, views.dense_strides(lines.view.shape)
                    by_row = len(lines.inner) == 1 and lines.lead <= 1
                    whole = self.counts[step.number] == width and lines.view.strides == dense
                    plain = step.role in (Role.POINTWISE, Role.REDUCTION)
                    long = isinstance(width, int) and next_power(width) >= columns
                    return by_row and whole and plain and long
        return False

    def _store_codes(self, target: CodedTarget, value: _Value) -> None:
        """A result as codes of groups of its columns, and their scales."""
        (part,), columns, group = value.parts, value.columns, target.rows.columns
        codes, scales = (self._pointer(x) for x in (target.codes, target.scales))
        groups = f"{columns.block} // {group}"
        width, count = map(self._number, (target.codes.shape[1], target.scales.shape[1]))
        first = f"tl.program_id(1) * ({groups}) + " if self.tiled else ""
        self._say(
            f"x = tl.where({columns.mask}, {part}, 0.0)",
            f"x = tl.reshape(x, (BLOCK_ROWS, {groups}, {group}))",
            *target.rows.lines(axis=2),
            f"codes = tl.reshape(codes, (BLOCK_ROWS, {columns.block}))",
            f"tl.store({codes} + row * {width} + {columns.index}, codes, mask={columns.mask})",
            f"group = {first}tl.arange(0, {groups})[None, :]",
            f"tl.store({scales} + row * {count} + group, row_scale, mask=live & (group < {count}))",
        )

    # --- operators --------------------------------------------------------------------------------

    def _pointwise(self, step: RowStep, columns: RowColumns) -> None:
        made = applied(step, [self._read(x, columns) for x in step.reads])
        self._say(f"v{step.number} = {made}")
        self._keep(step, _Value((f"v{step.number}",), columns))

    def _reduction(self, step: RowStep, columns: RowColumns) -> None:
        """Statistics of a row; then each of its elements by them, or they are all there is."""
        op, dtype, name = step.op, step.dtype, f"s{step.number}"
        count, mask = self._number(columns.count), columns.mask
        wide = "tl.float32" if dtype.is_float else "tl.int64"
        start, neutral = "0", "0"
        if op in _EXTREME:
            start = neutral = _BELOW[op] if dtype.is_float else str(_EXTREME[op])
        elif op == "softmax":
            start = neutral = _BELOW["amax"]
            self._say(f"{name}_sum = tl.zeros((BLOCK_ROWS, 1), tl.float32)")
        elif op == "layer_norm":
            self._say(f"{name}_mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)")
            with self._along(columns):
                x = self._read(step.reads[0], columns)
                self._say(*_adding(op, f"{name}_mean", f"tl.where({mask}, {x}, {neutral})"))
            self._say(f"{name}_mean = {name}_mean / {count}")
        self._say(f"{name} = tl.full((BLOCK_ROWS, 1), {start}, {wide})")
        with self._along(columns):
            x = self._read(step.reads[0], columns)
            centred = f"({x} - {name}_mean)" if op == "layer_norm" else x
            x = f"{centred} * {centred}" if op in _NORMS else f"{x}.to({wide})"
            block = f"tl.where({mask}, {x}, {neutral})"
            self._say(*_adding(op, name, block, dtype.is_float))
        if op == "mean":
            self._say(f"{name} = {name} / {count}")
        elif op in _NORMS:
            self._say(f"{name} = tl.rsqrt({name} / {count} + {float(step.attrs['eps'])!r})")
        if op != "softmax" and op not in _NORMS:
            self._say(f"{name} = {rounded(name, dtype)}")
            self._keep(step, _Value((name,), columns))
            return
        with self._along(columns):
            x = self._read(step.reads[0], columns)
            if op == "softmax":
                made = f"tl.exp({x} - {name}) / {name}_sum"
            elif op == "layer_norm":
                scale, *shift = (self._read(r, columns) for r in step.reads[1:])
                made = " + ".join([f"({x} - {name}_mean) * {name} * {scale}", *shift])
            else:
                gain = step.reads[1]
                of = self._read(gain, columns)
                made = normed(x, name, of, dtype, gain.dtype is dtype)
            made = made if op == "rms_norm" else rounded(made, dtype)
            self._say(f"v{step.number} = {made}")
            self._keep(step, _Value((f"v{step.number}",), columns))

    def _rotation(self, step: RowStep, columns: RowColumns) -> None:
        """Pairs (i, i + half) or (2i, 2i + 1), turned by the row's position times a frequency.

        Columns behind those that turn are pairs of neighbours that stay what and where they are.
        """
        x, *given = [r.source for r in step.reads if isinstance(r.source, Lines)]
        if len(given) < 2:
            raise NoKernel("rope of what the region computes")
        positions, frequencies = given
        width, turned = step.extents[-1], step.attrs["dims"] or step.extents[-1]
        half, each = self._number(turned // 2), self._number(width // 2)
        i, heads = columns.index, tuple[str, ...]()
        if len(step.extents) > 1:
            i, heads = self._named(f"{i} % {each}"), (self._named(f"{i} // {each}"),)
        turns = self._named(f"{i} < {half}") if turned != width else ""
        own = self._named(f"tl.where({turns}, {i}, 0)") if turns else i
        position = self._named(f"{self._load(positions, columns)}.to(tl.float32)")
        angle = self._named(f"{position} * {self._load(frequencies, columns, ((own, 0),))}")
        scale = float(step.attrs["scale"])
        cos, sin = (self._named(f"tl.{f}({angle}) * {scale!r}") for f in ("cos", "sin"))
        pairs = ((*heads, f"2 * {i}"), (*heads, f"2 * {i} + 1"))
        halves = ((*heads, i), (*heads, f"{i} + {half}"))
        if turns:
            halves = (
                (*heads, self._named(f"tl.where({turns}, {i}, 2 * {i})")),
                (*heads, self._named(f"tl.where({turns}, {i} + {half}, 2 * {i} + 1)")),
            )
        layout, dtype = step.attrs["layout"], step.dtype
        a, b = (
            self._load(x, columns, _indices(own)) for own in (halves if layout == "half" else pairs)
        )
        parts = f"v{step.number}a", f"v{step.number}b"
        made = f"{a} * {cos} - {b} * {sin}", f"{b} * {cos} + {a} * {sin}"
        for part, still, value in zip(parts, (a, b), made, strict=True):
            value = f"tl.where({turns}, {value}, {still})" if turns else value
            self._say(f"{part} = {rounded(value, dtype)}")
        places = pairs if layout == "interleaved" else halves
        self._keep(step, _Value(parts, columns, places))

    def _write(self, step: RowStep, columns: RowColumns) -> None:
        """A new row behind those that its sequence has; none passes the capacity."""
        new, lengths, cache, *table = step.reads
        assert isinstance(lengths.source, Lines)
        assert isinstance(cache.source, Lines)
        new_rows, capacity, *page = map(self._number, step.over)
        sequence = self._named(f"row // {new_rows}")
        used = lengths.source.view
        pointer = self._pointer(used)
        axes = list(zip(used.shape, used.strides, strict=True))[:1]
        length = " + ".join([pointer, *(self._terms(sequence, axes) or [f"{sequence} * 0"])])
        slot = self._named(f"tl.load({length}, mask=live, other=0) + row % {new_rows}")
        if table:
            assert isinstance(table[0].source, Lines)
            start, inside = self._paged(table[0].source.view, sequence, slot, capacity, page[0])
        else:
            start = self._named(f"{sequence} * {capacity} + {slot}")
            inside = self._named(f"live & ({slot} < {capacity})")
        if cache.source.view.type.format is not None:
            self._write_codes(new, cache.source.view, columns, start, inside)
            return
        start = self._named(f"({start}) * {self._number(step.extents[0])}")
        value = self.values.get(new.source) if isinstance(new.source, int) else None
        if value is None or not value.places:
            value = _Value((self._read(new, columns),), columns, ((columns.index,),))
        target = self._pointer(cache.source.view)
        for part, (element,) in zip(value.parts, value.places, strict=True):
            at = f"{target} + {start} + {element}"
            self._say(f"tl.store({at}, {part}, mask={inside} & {columns.mask})")

    def _paged(
        self, table: View, sequence: str, slot: str, blocks: str, page: str
    ) -> tuple[str, str]:
        """Where a row lies in the pages of a block table, and whether it has one."""
        pointer = self._pointer(table)
        block = self._named(f"{slot} // {page}")
        inside = self._named(f"live & ({block} < {blocks})")
        at = f"{pointer} + {sequence} * {blocks} + {block}"
        number = self._named(f"tl.load({at}, mask={inside}, other=-1)")
        start = self._named(f"{number} * {page} + {slot} % {page}")
        return start, self._named(f"{inside} & ({number} >= 0)")

    def _write_codes(
        self, new: Read, cache: View, columns: RowColumns, row: str, inside: str
    ) -> None:
        """A new row as codes and their scales, at a row of the cache."""
        codes, scales = ((self._pointer(part), part) for part in parts_of(cache))
        width, count = row_bytes(cache.type), int(scales[1].shape[-1])  # type: ignore[arg-type]
        value = self._read(new, columns)
        blank = f"tl.zeros((BLOCK_ROWS, {columns.block}), tl.float32)"
        self._say(
            f"codes = tl.where({columns.mask}, {value}.to(tl.float32), {blank})",
            *to_codes("codes", cache.type, "BLOCK_ROWS"),
            f"at = {codes[0]} + {row} * {width} + {columns.index}",
            f"tl.store(at, codes, mask={inside} & {columns.mask})",
            f"group = tl.arange(0, {next_power(count)})[None, :]",
            f"at = {scales[0]} + {row} * {width // 4} + group",
            f"tl.store(at, codes_scales, mask={inside} & (group < {count}))",
        )

    # --- the launch -------------------------------------------------------------------------------

    def text(self) -> tuple[str, str]:
        """The kernel's name and source."""
        blocks = ["BLOCK_ROWS", *(c.block for c in self.columns.values())]
        if self.flat:
            blocks = ["WIDE", "BLOCK_ROWS"]
        names = [*self.pointers.values(), "rows", *self.numbers.values()]
        parameters = [*names, *(f"{b}: tl.constexpr" for b in blocks)]
        ops = [s.op for s in self.steps]
        digest = hashlib.sha256("\n".join([*parameters, *self.lines]).encode()).hexdigest()[:8]
        name = f"{'_'.join(dict.fromkeys(ops))[:48].rstrip('_')}_{digest}"
        arguments = "".join(f"    {p},\n" for p in parameters)
        doc = f'    """{" ".join(ops)}; rows in registers, operands by strides."""\n'
        body = "".join(f"{line}\n" for line in self.lines)
        return name, (
            '"""Generated: a kernel over rows."""\n\n'
            "import triton\nimport triton.language as tl\n\n\n"
            f"@triton.jit\ndef {name}(\n{arguments}):\n{doc}{body}"
        )

    def launch(self, ctx: Context) -> None:
        """Append the launch."""
        name, text = self.text()
        ctx.sources.setdefault(name, text)
        rows = self.rows
        widths = [next_power(ctx.limit(count)) for count in self.columns]
        if self.flat:
            tile = ctx.blocks.flat(ctx.limit(rows), name)
        elif self.tiled:
            tile = ctx.blocks.copy(ctx.limit(rows), widths[0], name)
        elif self.walks:
            tile = ctx.blocks.loop(ctx.limit(rows), widths[0], name)
        else:
            tile = replace(ctx.blocks.rows(ctx.limit(rows), sum(widths), name), columns=0)
        grid: tuple[Dim, ...] = (ceil_div(rows, tile.rows),)
        if self.tiled and not self.flat:
            grid = (*grid, ceil_div(next(iter(self.columns)), tile.columns))
        given: dict[str, Given] = {name: view for view, name in self.pointers.items()}
        given |= {name: dim for dim, name in self.numbers.items()}
        given |= {"rows": rows, "BLOCK_ROWS": tile.rows}
        if self.flat:
            reach = max(ctx.limit(d) for d in (rows, *map(views.extent, self.pointers)))
            given["WIDE"] = reach >= 1 << 31
        else:
            for columns, width in zip(self.columns.values(), widths, strict=True):
                given[columns.block] = tile.columns or width
        ctx.launch(f"{name}:{name}", grid, given, tile)


def elementwise(op: str, operands: Sequence[View | Literal], target: View) -> RowKernel:
    """The kernel of one pointwise operator, or `copy`, on operands that broadcast to `target`."""
    rank, dtype = len(target.shape), target.dtype
    reads = tuple(
        Read(x, dtype)
        if isinstance(x, Literal)
        else Read(Lines.of(views.expand(x, target.shape), rank), x.dtype)
        for x in operands
    )
    writes = (Lines.of(target, rank),)
    step = RowStep(0, op, dtype, Attrs(), reads, Role.POINTWISE, (1,), writes=writes)
    return RowKernel((step,), product(target.shape))


def _pairs(step: RowStep) -> int:
    """How many pairs of elements of a row rope turns."""
    if not all(isinstance(d, int) for d in step.extents):
        raise NoKernel("rope of rows of symbolic width")
    return int(product(step.extents)) // 2  # type: ignore[arg-type]


def _count(step: RowStep, pairs: Mapping[int, int]) -> Dim:
    """How many columns a step goes over; rope, and what writes its result, over its pairs."""
    if step.role is Role.REDUCTION:
        return product(step.over)
    source = step.reads[0].source
    number = source if step.role is Role.WRITE and isinstance(source, int) else step.number
    return pairs.get(number, product(step.extents))


def _check_held(steps: Sequence[RowStep], counts: Mapping[int, Dim]) -> None:
    """Raise `NoKernel` where a program cannot hold the results of a row."""
    held = 0
    for step in steps:
        count = counts[step.number]
        if not isinstance(count, int):
            raise NoKernel("a row of symbolic width between two operators")
        held += next_power(count) * (2 if step.role is Role.ROTATION else 1)
    if held > MOST:
        raise NoKernel(f"{held} elements of a row are too many to hold")


def _in_codes(step: RowStep) -> bool:
    """Whether a step writes rows as codes, of which a program needs whole ones."""
    read = [r.source.view for r in step.reads if isinstance(r.source, Lines)]
    return step.role is Role.WRITE and any(view.type.format is not None for view in read)


def _indices(inner: Sequence[str]) -> list[tuple[str, int]]:
    return [(index, k) for k, index in enumerate(inner)]


def _adding(op: str, name: str, block: str, is_float: bool = True) -> list[str]:
    """How a reduction takes in a block in which what is no element is neutral."""
    if op == "softmax":
        return [
            f"x = {block}",
            f"peak = tl.maximum({name}, tl.max(x, axis=1)[:, None])",
            'safe = tl.where(peak == float("-inf"), 0.0, peak)',
            f"{name}_sum = {name}_sum * tl.exp({name} - safe)",
            f"{name}_sum += tl.sum(tl.exp(x - safe), axis=1)[:, None]",
            f"{name} = peak",
        ]
    if op in _EXTREME:
        largest = op.removeprefix("a")
        found = f"tl.{largest}(x, axis=1)[:, None]"
        if not is_float:
            return [f"x = {block}", f"{name} = tl.{largest}imum({name}, {found})"]
        return [
            f"x = {block}",
            "wrong = tl.sum(tl.where(x != x, x, 0.0), axis=1)[:, None]",  # NaN where one is
            f"{name} = tl.{largest}imum({name}, {found} + wrong, {NAN})",
        ]
    return [f"{name} += tl.sum({block}, axis=1)[:, None]"]
