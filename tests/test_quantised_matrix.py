"""A sample of `bench.quant_matrix`: a type in int8, int4 and FP8 at widths that cut groups.

`python -m bench.bars quantised_types` has all types, at whole and at odd widths too, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import dsc
from bench import quant_matrix
from bench.matrix import LIMITS
from bench.quant_matrix import Drawn, drawn, held, off
from dsc.ir.ops.quant import makes_codes
from dsc.ir.weights import Apply, apply


@pytest.fixture(scope="module")
def sample() -> Iterator[Drawn]:
    """Routed experts beside a shared one."""
    with drawn("qwen2_moe", 1) as each:
        yield each


@pytest.mark.parametrize(
    ("backend", "quant"), [("tvm", "int4"), ("reference", "int8"), ("reference", "fp8")]
)
def test_a_type_in_codes_is_within_the_bounds_of_their_format(
    sample: Drawn, backend: str, quant: str
) -> None:
    found = held(sample, backend, quant)
    assert found["wrong"] == []
    assert found["coded"] == found["stored in codes"] > 0
    assert found["operators"] >= found["coded"]


def test_what_is_beyond_a_bound_is_named(sample: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dsc.compile(sample.program, backend="reference", quant="int4", **LIMITS).program
    name = next(n for n, expr in made.weights.items() if makes_codes(expr))
    assert off(name, made, made) == ""
    expr = made.weights[name]
    assert isinstance(expr, Apply)
    codes, scales = expr.args
    doubled = apply("scaled", codes, apply("add", scales, scales), block=expr.attrs["block"])
    assert "numbers beyond the bound" in off(name, made, made.with_weights({name: doubled}))
    monkeypatch.setattr(quant_matrix, "CHANCE", 0.05)
    assert any("is off by" in line for line in held(sample, "reference", "int4")["wrong"])
