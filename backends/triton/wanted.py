"""Which values products want as codes, so that what computes them makes codes at once.

A norm, or swiglu, whose rows only products read writes codes and their scales, and no numbers: of
many rows a launch less, and instead of six bytes a number (written, read, written and read as
codes) two; of few rows no product has to make codes of all rows in each tile of its columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.backends.triton.coded_rows import RowCodes
from dsc.backends.triton.context import Context, Given
from dsc.ir.dims import product
from dsc.ir.graph import Graph, Node, Value
from dsc.ir.regions import anchor_of
from dsc.ir.views import View


@dataclass(frozen=True)
class Wanted:
    """How products want a value, as rows of `width`, and whether they are all who read it."""

    rows: RowCodes
    width: int
    only: bool

    def target(self, ctx: Context, view: View) -> CodedTarget:
        """Room for the codes of a dense value."""
        count = product(view.shape) // self.width
        by_row = view.strided((count, self.width), (self.width, 1))
        return CodedTarget(self.rows, *self.rows.room(ctx, by_row), self.only)


@dataclass(frozen=True)
class CodedTarget:
    """A result as codes and scales, and as numbers too unless products alone read it."""

    rows: RowCodes
    codes: View
    scales: View
    only: bool

    def lines(
        self, row: str, column: str, group: str, block: str, keep: tuple[str, str]
    ) -> list[str]:
        """A tile x [BLOCK_M, block] of whole groups as codes, stored to `made_codes`.

        `row` [BLOCK_M], `column` [block] and `group`, the number of the tile's first, say where;
        `keep` which of the rows and of the columns there are.
        """
        size = self.rows.columns
        groups, (live, fits) = f"{block} // {size}", keep
        mask = f"mask={live}[:, None] & {fits}[None, :]"
        return [
            f"x = tl.reshape(tl.where({fits}[None, :], x, 0.0), (BLOCK_M, {groups}, {size}))",
            *self.rows.lines(axis=2),
            f"codes = tl.reshape(codes, (BLOCK_M, {block}))",
            f"row_at = ({row}).to(tl.int64)[:, None]",
            f"tl.store(made_codes + row_at * made_width + ({column})[None, :], codes, {mask})",
            f"inside = tl.sum(tl.reshape({fits}.to(tl.int32), ({groups}, {size})), axis=1) > 0",
            f"group = {group} + tl.arange(0, {groups})",
            "tl.store(made_scales + row_at * made_groups + group[None, :], row_scale,"
            f" mask={live}[:, None] & inside[None, :])",
            *([f"{live} = {live} & (tl.arange(0, BLOCK_M) < 0)"] if self.only else ()),
        ]

    def arguments(self) -> dict[str, Given]:
        """The parameters that the lines read."""
        return {
            "made_codes": self.codes, "made_scales": self.scales,
            "made_width": self.codes.shape[1], "made_groups": self.scales.shape[1],
        }  # fmt: skip


def wanted(ctx: Context, graph: Graph) -> dict[str, Wanted]:
    """By name the values of which products want codes that are made before."""
    origins: dict[str, Value] = {}
    found: dict[str, list[tuple[RowCodes, int] | None]] = {}
    for node in graph.nodes:
        moved = _same_rows(node)
        if moved is not None:
            origins[node.outputs[0].name] = origins.get(moved.name, moved)
        for x in node.operands:
            if isinstance(x, Value) and x is not moved:
                origin = origins.get(x.name, x)
                found.setdefault(origin.name, []).append(_asked(ctx, node, x, origin))
    results = {origins[x.name].name if x.name in origins else x.name for x in graph.outputs
               if isinstance(x, Value)}  # fmt: skip
    made = {}
    for name, asked in found.items():
        kinds = {each for each in asked if each is not None}
        if len(kinds) == 1:
            made[name] = Wanted(*kinds.pop(), only=None not in asked and name not in results)
    return made


def _same_rows(node: Node) -> Value | None:
    """The operand of which the first result has whole rows, or several as one, in some order."""
    if node.op not in ("dispatch", "reshape", "select_rows"):
        return None
    x, width = node.operands[0], node.outputs[0].type.shape[-1:]
    ends = [product(x.type.shape[at:]) for at in range(x.type.rank)]
    return x if isinstance(x, Value) and width and width[0] in ends else None


def _asked(ctx: Context, node: Node, x: Value, origin: Value) -> tuple[RowCodes, int] | None:
    """The codes, and how wide, that a node takes rows of `x` as, if that is all it does with it."""
    inner, name = node, x.name
    if node.body is not None:
        anchor = anchor_of(node.body.nodes)
        places = [v.name for v, y in zip(node.body.inputs, node.operands, strict=True) if y is x]
        if anchor is None or len(places) != 1:
            return None
        inner, (name,) = anchor, places
        if any(y.name == name for n in node.body.nodes if n is not anchor for y in n.operands):
            return None
    activations = inner.attrs.get("activations")
    if not activations or [y.name for y in inner.operands].count(name) != 1:
        return None
    if inner.op not in ("linear", "grouped_linear") or inner.operands[0].name != name:
        return None
    width = x.type.shape[-1]
    if not isinstance(width, int):
        return None
    codes = RowCodes.of(ctx, activations, ctx.limit(product(origin.type.shape)) // width)
    return (codes, width) if codes.shares(inner.operands[1].type) else None
