"""The four slots of a product's text: what they may say, and that the kernel does it."""

from __future__ import annotations

import pytest

from dsc.backends.triton.context import template
from dsc.backends.triton.effects import access
from dsc.backends.triton.slots import ALL_PLAIN, Slot, Slots, written

GEMM = template("gemm")


@pytest.mark.parametrize("function", ["gemm", "grouped_gemm"])
def test_every_place_takes_lines_and_defaults_give_way(function: str) -> None:
    normed = {"start": ["s = 0"], "rows": ["x = x * 2"]} if function == "gemm" else {}
    slots = Slots(
        prologue=Slot("p", normed),
        loader=Slot("l", {"w": ["w = tl.load(codes + k)"]}, {"codes": 1}),
        sum=Slot("s", {"sum": ["acc += x"], "tile": ["acc = acc + 1"]}),
        epilogue=Slot("e", {"columns": ["n = n"], "tile": ["acc = -acc"]}),
    )
    name, text = written(GEMM, function, slots)
    assert name.startswith(f"{function}_l_s_{'p_' if normed else ''}e_")
    assert "#:" not in text.partition("@triton.jit")[2]
    assert "tl.dot" not in text
    lines = [line.strip() for line in text.splitlines()]
    said = ["n = n", *(line for place in normed.values() for line in place)]
    said += ["w = tl.load(codes + k)", "acc += x", "acc = acc + 1", "acc = -acc"]
    places = [lines.index(x) for x in said]
    assert places == sorted(places), "a sum is whole before an epilogue goes over it"
    kinds = access(text, name)
    assert (kinds["codes"], kinds["b"], kinds["c"]) == ("r", "r", "w")


def test_without_slots_the_text_is_the_template() -> None:
    _, text = written(GEMM, "gemm", ALL_PLAIN)
    assert [x for x in text.splitlines() if "tl.dot" in x] == [
        '        acc = tl.dot(x, w, acc, input_precision="ieee")'
    ]
    compile(text, "gemm", "exec")


def test_a_place_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="gemm has no place called middle"):
        written(GEMM, "gemm", Slots(sum=Slot("s", {"middle": ["acc = acc"]})))


def test_other_lines_make_another_module() -> None:
    names = {written(GEMM, "gemm", Slots(epilogue=Slot("e", {"tile": [f"acc += {i}"]})))[0]
             for i in range(3)}  # fmt: skip
    assert len(names) == 3


def test_two_slots_bring_no_parameter_of_one_name() -> None:
    one = Slot("s", {"tile": ["acc += scale"]}, {"scale": 1})
    with pytest.raises(ValueError, match="not each name once"):
        written(GEMM, "gemm", Slots(prologue=one, epilogue=one))
