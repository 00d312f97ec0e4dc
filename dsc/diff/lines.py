"""Two texts of IR side by side: which line of one is which line of the other.

Lines are paired by what they say apart from the names of values, then by the names they define,
then by operator and module. A line that differs from its partner in names alone, and consistently,
is no change: passes rename values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dsc.ir.graph import Node, Weight
from dsc.ir.printer import print_node

_VALUE = re.compile(r"%[\w.]+")
_LOC = re.compile(r' loc "((?:[^"\\]|\\.)*)"(?=$| \{)')
EQUAL = frozenset({"same", "renamed"})
"""Kinds of rows that are no change."""
UNCHANGED = EQUAL | {"moved", "gap"}
"""What may have happened to a line that is no change."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of IR: what is shown, how deep it lies, whence it comes, and what it means.

    `meaning` is what is compared: in the body of a region, weights go by their own names.
    """

    text: str
    depth: int = 0
    loc: str = ""
    meaning: str = ""

    def __post_init__(self) -> None:
        """A line means what it says, unless it is told otherwise."""
        if not self.meaning:
            object.__setattr__(self, "meaning", self.text)

    @property
    def results(self) -> tuple[str, ...]:
        """The values that the line defines."""
        left, found, _ = self.text.partition(" = ")
        return tuple(_VALUE.findall(left)) if found else ()

    @property
    def skeleton(self) -> str:
        """The line without the names of values."""
        return f"{_VALUE.sub('%', self.meaning)} {self.loc}"

    @property
    def names(self) -> str:
        """What the line defines, as a key; the line itself where that is nothing."""
        return ",".join(self.results) or self.text

    @property
    def type(self) -> str:
        """The types of what the line defines."""
        return self.text.rpartition(" : ")[2]

    @property
    def place(self) -> str:
        """Operator and module."""
        return f"{self.text.partition(' = ')[2].partition(' ')[0]} {self.loc}"


@dataclass(frozen=True, slots=True)
class Row:
    """Two lines side by side.

    `kind` is same, renamed, changed, removed, added, or both: two lines that have nothing in
    common but their height on the page. `moved` says of each that it stands elsewhere on the other
    side, and says the same there.
    """

    kind: str
    before: Line | None
    after: Line | None
    moved: tuple[bool, bool] = (False, False)

    @property
    def sides(self) -> tuple[str, str]:
        """What happened to each line: same, renamed, changed, moved, removed or added; or gap."""
        if self.kind in EQUAL or self.kind == "changed":
            return self.kind, self.kind
        before = "moved" if self.moved[0] else "removed"
        after = "moved" if self.moved[1] else "added"
        return before if self.before else "gap", after if self.after else "gap"

    @property
    def differs(self) -> bool:
        """Whether something is not the same on the other side."""
        return not UNCHANGED.issuperset(self.sides)


def lines_of(nodes: Sequence[Node]) -> list[Line]:
    """The text of some nodes, bodies of regions included."""
    lines = []
    for node in nodes:
        body = () if node.body is None else zip(node.body.inputs, node.inputs, strict=True)
        weights = {str(inner): str(x) for inner, x in body if isinstance(x, Weight)}
        for raw in print_node(node).splitlines():
            text = raw.strip()
            found = _LOC.search(text)
            if found:
                text = text[: found.start()] + text[found.end() :]
            depth = (len(raw) - len(raw.lstrip())) // 2
            meaning = _renamed(text, weights) if depth else text
            lines.append(Line(text, depth, found[1] if found else "", meaning))
    return lines


def align(
    before: Sequence[Line], after: Sequence[Line], known: dict[str, str] | None = None
) -> list[Row]:
    """Two texts side by side, in the order of both.

    `known` holds what earlier texts renamed, and is added to: old names to new ones.
    """
    keys = (lambda x: x.skeleton, lambda x: x.names, lambda x: x.place)
    known = {} if known is None else known
    rows = []
    removed: Line | None = None
    added: Line | None = None
    for x, y in _paired(before, after, keys):
        if x is None or y is None:
            rows.append(Row("removed" if x else "added", x, y))
            removed, added = x or removed, y or added
            continue
        _replace(removed, added, known)
        removed = added = None
        _rename(x, y, known)
        rows.append(Row(_kind(x, y, known), x, y))
    _replace(removed, added, known)
    return [*_packed(rows)]


def with_moves(
    texts: Mapping[str, Sequence[Row]], known: Mapping[str, str]
) -> dict[str, list[Row]]:
    """Texts by layer, with the lines marked that only stand elsewhere: in a region, or a layer.

    `known` holds old names and the new ones.
    """
    removed: dict[str, list[tuple[str, int]]] = {}
    moved: set[tuple[str, int, int]] = set()
    rows = [(name, i, row) for name, each in texts.items() for i, row in enumerate(each)]
    for name, i, row in rows:
        if row.before is not None and row.sides[0] == "removed" and row.before.results:
            removed.setdefault(_renamed(row.before.meaning, known), []).append((name, i))
    for name, i, row in rows:
        if row.after is not None and row.sides[1] == "added" and removed.get(row.after.meaning):
            moved |= {(*removed[row.after.meaning].pop(0), 0), (name, i, 1)}
    return {
        name: [
            replace(row, moved=((name, i, 0) in moved, (name, i, 1) in moved))
            for i, row in enumerate(each)
        ]
        for name, each in texts.items()
    }


def _replace(removed: Line | None, added: Line | None, known: dict[str, str]) -> None:
    """Where one thing stands in the place of another, its results do so too."""
    if removed and added and removed.type == added.type:
        _rename(removed, added, known)


def _rename(before: Line, after: Line, known: dict[str, str]) -> None:
    if len(before.results) == len(after.results):
        known.update(zip(before.results, after.results, strict=True))


def _paired(
    before: Sequence[Line], after: Sequence[Line], keys: Sequence[Callable[[Line], str]]
) -> Iterator[tuple[Line | None, Line | None]]:
    """Pairs by the first key; what it leaves between them by the other keys."""
    if not keys or not before or not after:
        yield from ((x, None) for x in before)
        yield from ((None, y) for y in after)
        return
    left, right = ([keys[0](x) for x in side] for side in (before, after))
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(before[a:b], after[c:d], strict=True)
        else:
            yield from _paired(before[a:b], after[c:d], keys[1:])


def _kind(before: Line, after: Line, known: Mapping[str, str]) -> str:
    if before.meaning == after.meaning:
        return "same"
    renamed = _renamed(before.meaning, known)
    return "renamed" if renamed == after.meaning else "changed"


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return _VALUE.sub(lambda found: names.get(found[0], found[0]), text)


def _packed(rows: Sequence[Row]) -> Iterator[Row]:
    """Removed lines and the added ones that follow them, on the same height."""
    at = 0
    while at < len(rows):
        if rows[at].kind not in ("removed", "added"):
            yield rows[at]
            at += 1
            continue
        end = at
        while end < len(rows) and rows[end].kind in ("removed", "added"):
            end += 1
        left = [r.before for r in rows[at:end] if r.before is not None]
        right = [r.after for r in rows[at:end] if r.after is not None]
        for i in range(max(len(left), len(right))):
            x = left[i] if i < len(left) else None
            y = right[i] if i < len(right) else None
            yield Row("both" if x and y else "removed" if x else "added", x, y)
        at = end
