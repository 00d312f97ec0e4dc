"""What regions are called."""

from __future__ import annotations

import pytest

from dsc.ir.parser import parse_graph
from dsc.ir.regions import name_of


@pytest.mark.parametrize(
    ("weight", "name"),
    [
        ("model.layers.3.self_attn.o_proj.weight", "o_proj"),
        ("model.layers.3.mlp.w.weight", "mlp.w"),
        ("weight", "linear"),
    ],
)
def test_a_product_is_called_by_its_weight_and_by_one_letter_with_its_module(
    weight: str, name: str
) -> None:
    text = (
        f"graph main(%x: f32[2,8], @{weight}: f32[8,8]) {{ %y = linear %x, @{weight} return %y }}"
    )
    assert name_of(parse_graph(text).nodes[0]) == name
