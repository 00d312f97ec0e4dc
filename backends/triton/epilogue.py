"""GEMMs with a pointwise epilogue: the generated operators run on the accumulator before the store.

The text is the `gemm` template with three insertions: parameters for the other operands, their
loads, and the operators. A projection and its residual add become one kernel, and the product is
never written and read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsc.backends.triton.pointwise import Region, expression, widen
from dsc.ir import views
from dsc.ir.dims import Dim
from dsc.ir.views import View

MARK = "    # A fused region's operators go here.\n"


@dataclass(frozen=True, slots=True)
class Epilogue:
    """A region over the tile; value `position` of its inputs is the accumulator.

    `operands` are the other inputs in order: a view, its stride over rows and over columns.
    """

    region: Region
    position: int
    operands: tuple[tuple[View, Dim, Dim], ...]

    @property
    def numbers(self) -> list[int]:
        """The region's numbers of `operands`."""
        return [k for k in range(len(self.region.inputs)) if k != self.position]


def gemm_source(template: str, epilogue: Epilogue) -> tuple[str, str]:
    """The module name and text of `gemm` with an epilogue."""
    region = epilogue.region
    names = [f"e{number}" for number in epilogue.numbers]
    extra = "".join(f"    {name},\n    {name}_m,\n    {name}_n,\n" for name in names)
    lines = ["keep = (m[:, None] < M) & (n[None, :] < N)", f"v{epilogue.position} = acc"]
    for number, name in zip(epilogue.numbers, names, strict=True):
        at = f"{name} + m[:, None].to(tl.int64) * {name}_m + n[None, :] * {name}_n"
        lines.append(f"v{number} = tl.load({at}, mask=keep, other=0){widen(region.inputs[number])}")
    for number, step in enumerate(region.steps, start=len(region.inputs)):
        lines.append(f"v{number} = {expression(region, step, '(BLOCK_M, BLOCK_N)')}")
    lines.append(f"acc = v{region.results[0]}")
    body = "".join(f"    {line}\n" for line in lines)
    ops = _ops(region)
    digest = hashlib.sha256((extra + body).encode()).hexdigest()[:8]
    function = f"gemm_{ops}_{digest}"
    head, _, rest = template.partition("@triton.jit\ndef gemm(\n")
    kernel = "@triton.jit\ndef gemm(\n" + rest.partition("\n\n\n@triton.jit")[0] + "\n"
    kernel = kernel.replace("    c,\n", f"    c,\n{extra}", 1).replace(MARK, body, 1)
    kernel = kernel.replace("def gemm(", f"def {function}(", 1)
    return function, head + kernel


def _ops(region: Region) -> str:
    named = [s.op for s in region.steps if s.op not in ("full", "cast")]
    return "_".join(dict.fromkeys(named))[:40].rstrip("_") or "cast"


def arguments(epilogue: Epilogue | None) -> dict[str, View | Dim]:
    """The parameters that an epilogue adds to the launch."""
    given: dict[str, View | Dim] = {}
    if epilogue is not None:
        for number, (view, row, column) in zip(epilogue.numbers, epilogue.operands, strict=True):
            given |= {f"e{number}": view, f"e{number}_m": row, f"e{number}_n": column}
    return given


def tile_operands(
    inputs: Sequence[View], shape: tuple[Dim, ...]
) -> tuple[tuple[View, Dim, Dim], ...] | None:
    """Operands as (view, row stride, column stride) over a result of `shape` folded to rows.

    `None` when one does not fold: a broadcast in the middle of the leading axes.
    """
    found = []
    for view in inputs:
        wide = views.expand(view, shape)
        folded = views.fold(wide, len(shape) - 1)
        if folded is None:
            return None
        found.append((wide, folded[1], wide.strides[-1]))
    return tuple(found)
