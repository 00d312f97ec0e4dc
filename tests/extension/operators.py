"""Two operators, a kernel in TIR and one in C++, and the rule that raises the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import dsc
from dsc.backends.tvm import tir
from dsc.extend import Cpp, Formula, Role, Traits
from dsc.rewrite.pattern import Names, Pattern
from dsc.rewrite.rule import Facts, Match, Result, RewriteBuilder, Rule

squared_relu = dsc.register_op(
    "squared_relu(x: T[*n]; scale: float = 1.0) -> T[*n]",
    Traits(Role.POINTWISE, flops=lambda call: 3 * call["x"].numel),
    reference=lambda x, scale: (x.float().relu().square() * scale).to(x.dtype),
    doc="scale * max(x, 0)^2 (So et al. 2021).",
    example="f32[2,3] {scale=0.5}",
    kernels={"tvm": Formula(lambda x, scale: tir.relu(x) * tir.relu(x) * tir.number(scale, x))},
)
row_spread = dsc.register_op(
    "row_spread(x: T[*n, d]) -> T[*n]",
    Traits(Role.OTHER, flops=lambda call: 2 * call["x"].numel),
    reference=lambda x: x.amax(-1) - x.amin(-1),
    doc="The largest less the smallest element of each row.",
    example="f32[2,3]",
    kernels={
        "tvm": Cpp(
            """#include <algorithm>
            extern "C" void row_spread(const float *x, float *y, long rows, long width) {
                for (; rows-- > 0; x += width) {
                    auto [low, high] = std::minmax_element(x, x + width);
                    *y++ = *high - *low;
                }
            }""",
            "row_spread",
            sizes=("*n", "d"),
        )
    },
)


class SquaredRelu(Rule):
    """square(relu(x))  ==>  squared_relu(x)."""

    tolerance = 1e-6
    examples = ("graph g(%x: f32[B,4]) { %r = relu %x\n %y = square %r\n return %y }",)
    near_misses: ClassVar[Mapping[str, str]] = {
        "it is read": "graph g(%x: f32[4]) { %r = relu %x\n %y = square %r\n return %y, %r }"
    }

    def pattern(self, p: Names) -> Pattern:
        return p.square(p.relu(p.x))

    def rewrite(self, b: RewriteBuilder, m: Match, facts: Facts) -> Result:
        return b.call("squared_relu", m.x)


dsc.register_rule(SquaredRelu())
