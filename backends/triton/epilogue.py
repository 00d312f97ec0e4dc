"""The epilogue of a product: generated operators run on the accumulator before the store.

A projection and its residual add become one kernel, and the product is never written and read
again. Operators that read the product at a second place (swiglu of a merged gate|up) get it from
the same tile: of its columns every other one is then a column from there, so that a thread has both
side by side, and the tile is taken apart before they run. Of rows that are taken by an index (the
residual of those whose logits are wanted) each is read where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsc.backends.triton.pointwise import applied, literal, rounded, wide_type, widen
from dsc.backends.triton.prologue import Taken
from dsc.backends.triton.slots import Slot
from dsc.ir.dims import Dim, product
from dsc.ir.region_columns import PRODUCT, Family
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read
from dsc.ir.types import DType

if TYPE_CHECKING:
    from dsc.backends.triton.context import Given

NOTHING: Mapping[int, Taken] = {}
_PAIRED = (
    "u = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N) // 2",
    "n = u + tl.arange(0, BLOCK_N) % 2 * (N // 2)",
    "fits = u < N // 2",
)
_APART = (
    "acc, beside = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))",
    "n = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)",
    "fits = n < N // 2",
)


class Epilogue:
    """The steps of a family of columns, over the tile of a product of element type `dtype`.

    `columns` is how many the product has. Raises `NoKernel` for another family than a tile's
    columns, and for an operand whose rows no stride tells apart. `taken` are, by the buffer that
    stands for it, rows that nobody has taken yet.
    """

    def __init__(
        self, family: Family, columns: Dim, dtype: DType, taken: Mapping[int, Taken] = NOTHING
    ) -> None:
        paired = bool(family.shifts)
        width = columns // 2 if paired else columns
        halves = not paired or (family.shifts == (width,) and width * 2 == columns)
        if family.start or family.walk != ((width, 1),) or not halves:
            raise NoKernel("an epilogue on other columns than a tile's, or than two halves")
        if len(family.writes) > 1:
            raise NoKernel("several results of a product")
        ((result, target),) = family.writes
        self.half = int(width) if paired else 0  # type: ignore[arg-type]
        self.out, self.out_strides = target.view, tile_strides(target)
        self.names: dict[Lines, str] = {}
        self.taken = taken
        self.lines = [*(_APART if paired else ()), "keep = live[:, None] & fits[None, :]"]
        self.lines.append(f"{self._step(PRODUCT, 0)} = {rounded('acc', dtype)}")
        if paired:
            self.lines.append(f"{self._step(PRODUCT, self.half)} = {rounded('beside', dtype)}")
        for step in family.steps:
            made = applied(step, [self._read(x, step.shift) for x in step.reads])
            self.lines.append(f"{self._step(step.number, step.shift)} = {made}")
        self.lines.append(f"acc = {self._step(result, 0)}")
        named = [s.op for s in family.steps if s.op != "cast"]
        title = "_".join(dict.fromkeys(named))[:40].rstrip("_") or "cast"
        arguments: dict[str, Given] = {}
        touched: dict[str, Dim] = {}
        for lines, name in self.names.items():
            row, column = tile_strides(lines)
            arguments |= {name: lines.view, f"{name}_m": row, f"{name}_n": column}
            if (later := taken.get(lines.view.buffer)) is not None:
                touched[name] = product(lines.view.shape) * lines.view.dtype.itemsize
                arguments |= {name: later.source, **later.lines(f"{name}_row")[1]}
        places = {"tile": self.lines} | ({"columns": _PAIRED} if paired else {})
        self.slot = Slot(title, places, arguments, paired, touched)

    def _step(self, number: int, shift: int) -> str:
        """The name of a step's value at a shift; the product is one."""
        return f"v{number + 1}{'b' if shift else ''}"

    def _read(self, read: Read, shift: int) -> str:
        """The name or number of what a step at a shift reads."""
        source = read.source
        if isinstance(source, Literal):
            return f"tl.full((1, 1), {literal(source.value, read.dtype)}, {wide_type(read.dtype)})"
        if not isinstance(source, Lines):
            return self._step(source, shift + read.shift)
        if source not in self.names:
            name = self.names[source] = f"e{len(self.names)}"
            later, row = self.taken.get(source.view.buffer), "m"
            if later is not None:
                row = f"{name}_row"
                self.lines += later.lines(row)[0]
            at = f"{name} + {row}[:, None].to(tl.int64) * {name}_m + n[None, :] * {name}_n"
            self.lines.append(f"x_{name} = tl.load({at}, mask=keep, other=0){widen(read.dtype)}")
        return f"x_{self.names[source]}"


def tile_strides(lines: Lines) -> tuple[Dim, Dim]:
    """Strides over the rows and over the columns of a tile."""
    if lines.lead > 1:
        raise NoKernel("rows that are not evenly spaced")
    return lines.rows[0][1] if lines.rows else 0, lines.inner[0]
