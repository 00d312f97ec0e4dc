"""GEMMs with a pointwise epilogue: the generated operators run on the accumulator before the store.

The text is the `gemm` template with three insertions: parameters for the other operands, their
loads, and the operators. A projection and its residual add become one kernel, and the product is
never written and read again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dsc.backends.triton.pointwise import applied, literal, rounded, wide_type, widen
from dsc.ir.dims import Dim
from dsc.ir.region_columns import PRODUCT, ColumnStep
from dsc.ir.region_steps import Lines, Literal, NoKernel, Read
from dsc.ir.types import DType
from dsc.ir.views import View

MARK = "    # A fused region's operators go here.\n"


class Epilogue:
    """Steps over the tile of a product of element type `dtype`; the `result`-th is stored.

    Raises `NoKernel` for an operand whose rows no stride tells apart.
    """

    def __init__(self, steps: Sequence[ColumnStep], result: int, dtype: DType) -> None:
        self.names: dict[Lines, str] = {}
        self.lines = ["keep = (m[:, None] < M) & (n[None, :] < N)"]
        self.lines.append(f"v{PRODUCT + 1} = {rounded('acc', dtype)}")
        for step in steps:
            made = applied(step, [self._read(x) for x in step.reads])
            self.lines.append(f"v{step.number + 1} = {made}")
        self.lines.append(f"acc = v{result + 1}")
        named = [s.op for s in steps if s.op != "cast"]
        self.title = "_".join(dict.fromkeys(named))[:40].rstrip("_") or "cast"
        self.arguments: dict[str, View | Dim] = {}
        """The parameters that it adds to a launch."""
        for lines, name in self.names.items():
            row, column = tile_strides(lines)
            self.arguments |= {name: lines.view, f"{name}_m": row, f"{name}_n": column}

    def _read(self, read: Read) -> str:
        """The name or number of what a step reads."""
        source = read.source
        if isinstance(source, Literal):
            return f"tl.full((1, 1), {literal(source.value, read.dtype)}, {wide_type(read.dtype)})"
        if not isinstance(source, Lines):
            return f"v{source + 1}"
        if source not in self.names:
            name = self.names[source] = f"e{len(self.names)}"
            at = f"{name} + m[:, None].to(tl.int64) * {name}_m + n[None, :] * {name}_n"
            self.lines.append(f"x_{name} = tl.load({at}, mask=keep, other=0){widen(read.dtype)}")
        return f"x_{self.names[source]}"


def tile_strides(lines: Lines) -> tuple[Dim, Dim]:
    """Strides over the rows and over the columns of a tile."""
    if lines.lead > 1:
        raise NoKernel("rows that are not evenly spaced")
    return lines.rows[0][1] if lines.rows else 0, lines.inner[0]


def gemm_source(template: str, epilogue: Epilogue) -> tuple[str, str]:
    """The module name and text of `gemm` with an epilogue."""
    extra = "".join(f"    {name},\n" for name in epilogue.arguments)
    body = "".join(f"    {line}\n" for line in epilogue.lines)
    digest = hashlib.sha256((extra + body).encode()).hexdigest()[:8]
    function = f"gemm_{epilogue.title}_{digest}"
    head, _, rest = template.partition("@triton.jit\ndef gemm(\n")
    kernel = "@triton.jit\ndef gemm(\n" + rest.partition("\n\n\n@triton.jit")[0] + "\n"
    kernel = kernel.replace("    c,\n", f"    c,\n{extra}", 1).replace(MARK, body, 1)
    kernel = kernel.replace("def gemm(", f"def {function}(", 1)
    return function, head + kernel
