"""Products: one GEMM text with four slots, and the kernel that what stands in them makes.

The *prologue* is what is done to rows of x before they are multiplied, the *loader* makes numbers
of a weight's elements, the *sum* adds products up, the *epilogue* goes over the finished tile. A
slot says lines at places of a template and brings parameters. Places of products, of which a
template has those that somebody fills there:

    columns   behind `n` and `fits`: which columns a tile has, where that is another than a run
    at        in place of where rows of x begin
    start     before the walk along k: what a slot keeps while it walks
    x         in place of the load of x [BLOCK_M, BLOCK_K]
    rows      x has been loaded
    w         in place of the load of w [BLOCK_K, BLOCK_N]
    sum       in place of the product that is added to acc f32[BLOCK_M, BLOCK_N]
    part      in place of a row's products with a tile of columns, where matrix units have no use
    tile      behind the walk and the bias, before acc is stored at columns n of rows m

Names in scope are those of the template: m, n, k, live, fits, M, N, K, x, w, x_at, w_at, acc, and
`matrix`, the number of the batch or of the expert. What a slot names itself carries its own prefix.
Readers of caches have `pages` and `values` (`lower/cached.py`), `quantise_rows` has `codes`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsc.backends.triton.context import Given
    from dsc.ir.dims import Dim

_MARK = re.compile(r"^(?P<indent> *)(?P<line>.*?) *#: (?P<place>\w+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Slot:
    """Lines by place, the parameters that they read by name, and a word for the kernel's name.

    An epilogue that makes one column of two `halves` the tile. `touched` are bytes by parameter
    where lines move less than a view has. `row` is what a prologue calls the rows that it takes.
    """

    title: str = ""
    lines: Mapping[str, Sequence[str]] = field(default_factory=dict)
    arguments: Mapping[str, Given] = field(default_factory=dict)
    halves: bool = False
    touched: Mapping[str, Dim] = field(default_factory=dict)
    row: str = ""

    def then(self, other: Slot) -> Slot:
        """Both, one after the other at each place."""
        places = dict.fromkeys([*self.lines, *other.lines])
        return Slot(
            "_".join(filter(None, (self.title, other.title))),
            {p: (*self.lines.get(p, ()), *other.lines.get(p, ())) for p in places},
            {**self.arguments, **other.arguments},
            self.halves or other.halves,
            {**self.touched, **other.touched},
            self.row,
        )


PLAIN = Slot()
"""What the template says: numbers, added up and stored."""


@dataclass(frozen=True)
class Slots:
    """What stands in the four slots of a product."""

    prologue: Slot = PLAIN
    loader: Slot = PLAIN
    sum: Slot = PLAIN
    epilogue: Slot = PLAIN

    @property
    def filled(self) -> tuple[Slot, ...]:
        """The slots that say something, in the order in which their lines stand at a place."""
        each = (self.loader, self.sum, self.prologue, self.epilogue)
        return tuple(slot for slot in each if slot.lines)

    @property
    def touched(self) -> dict[str, Dim]:
        """Bytes by parameter of what they move in part."""
        return {name: size for slot in self.filled for name, size in slot.touched.items()}

    @property
    def arguments(self) -> dict[str, Given]:
        """All parameters that they bring. Raises `ValueError` where two bring one of a name."""
        given = [pair for slot in self.filled for pair in slot.arguments.items()]
        if len(dict(given)) < len(given):
            raise ValueError(f"slots bring {[name for name, _ in given]}, and not each name once")
        return dict(given)


ALL_PLAIN = Slots()


def written(template: str, function: str, slots: Slots) -> tuple[str, str]:
    """The name of a template's function with slots, which is its module's too, and its text.

    A module holds that one function, and those that it calls: their names begin with an underscore.
    Raises `ValueError` where a slot names no place of it.
    """
    head, *functions = template.split("@triton.jit\n")
    found = next(t for t in functions if t.startswith(f"def {function}("))
    called = (t for t in functions if (name := t[4 : t.index("(")])[0] == "_" and name in found)
    head = "@triton.jit\n".join((head, *called))
    places = {m["place"] for m in _MARK.finditer(found)}
    unknown = {place for slot in slots.filled for place in slot.lines} - places
    if unknown:
        raise ValueError(f"{function} has no place called {', '.join(sorted(unknown))}")

    def said(mark: re.Match[str]) -> str:
        lines = [x for slot in slots.filled for x in slot.lines.get(mark["place"], ())]
        lines = lines or ([mark["line"]] if mark["line"] else [])
        return "".join(f"{mark['indent']}{line}\n" for line in lines)

    text = _MARK.sub(said, found.rstrip() + "\n")
    extra = "".join(f"    {name},\n" for name in slots.arguments)
    text = text.replace("(\n", f"(\n{extra}", 1)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    title = "_".join(dict.fromkeys([function, *(s.title for s in slots.filled if s.title)]))
    name = f"{title[:48].rstrip('_')}_{digest}"
    return name, f"{head}@triton.jit\n{text.replace(f'def {function}(', f'def {name}(', 1)}"
