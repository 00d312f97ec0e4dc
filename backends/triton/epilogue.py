"""GEMMs with a pointwise epilogue: the generated operators run on the accumulator before the store.

The text is the `gemm` template with three insertions: parameters for the other operands, their
loads, and the operators. A projection and its residual add become one kernel, and the product is
never written and read again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dsc.backends.triton.pointwise import Region, expression, widen
from dsc.ir.dims import Dim
from dsc.ir.views import View

MARK = "    # A fused region's operators go here.\n"


@dataclass(frozen=True, slots=True)
class Epilogue:
    """A region over the tile; value 0 is the accumulator.

    `operands` are the other inputs in order: a view, its stride over rows and over columns.
    """

    region: Region
    operands: tuple[tuple[View, Dim, Dim], ...]


def gemm_source(template: str, epilogue: Epilogue) -> tuple[str, str]:
    """The module name and text of `gemm` with an epilogue."""
    region = epilogue.region
    names = [f"e{number}" for number in range(1, len(region.inputs))]
    extra = "".join(f"    {name},\n    {name}_m,\n    {name}_n,\n" for name in names)
    lines = ["keep = (m[:, None] < M) & (n[None, :] < N)", "v0 = acc"]
    for number, name in enumerate(names, start=1):
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
        for number, (view, row, column) in enumerate(epilogue.operands, start=1):
            given |= {f"e{number}": view, f"e{number}_m": row, f"e{number}_n": column}
    return given
