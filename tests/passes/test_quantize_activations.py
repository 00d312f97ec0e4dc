"""Which products take their rows as codes, and what of that is compared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsc.errors import UsageError
from dsc.ir.formats import SCALE_FMT, UE8M0
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.passes.quantize_activations import QuantizeActivations
from dsc.pipeline import PipelineOptions
from dsc.rewrite.base import PassReport

TEXT = """graph main(%x: f32[N,32], %i: i64[N,2], %r: f32[N,2], @a: i8{1x32,f16}[32,32],
    @b: i4{1x32,f16}[32,32], @c: f8e4m3{32x32,f32}[32,32], @d: f32[32,32],
    @up: i4{1x32,f16}[4,64,32], @down: i8{1x32,f16}[4,32,32], @mixed: f8e4m3{32x32,f32}[4,32,32],
    @numbers: f32[4,64,32]) {
  %1 = linear %x, @a
  %2 = linear %1, @b
  %3 = linear %2, @c
  %4 = linear %3, @d
  %5 = linear %4, @a {activations="i8:64"}
  %6 = experts %5, %i, %r, @up, @down
  %7 = experts %6, %i, %r, @up, @mixed
  %8 = experts %7, %i, %r, @numbers, @down
  return %8
}"""


def program() -> Program:
    return parse_program(TEXT, stages=(Stage.CANONICAL,))


def said(program: Program) -> list[str]:
    return [node.attrs["activations"] for node in program.entries["main"].nodes]


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        (("i8", "i4", "f8e4m3"), ["i8:32", "i8:32", "f8e4m3:128", "", "i8:64", "i8:32", "", ""]),
        (("i8",), ["i8:32", "", "", "", "i8:64", "", "", ""]),
        (("f8e4m3",), ["", "", "f8e4m3:128", "", "i8:64", "", "", ""]),
        ((), ["", "", "", "", "i8:64", "", "", ""]),
    ],
)
def test_rows_follow_the_codes_of_all_that_a_product_reads(
    weights: tuple[str, ...], wanted: list[str]
) -> None:
    report = PassReport()
    each = QuantizeActivations(weights=weights)
    done = each.run(program(), report)
    assert said(done) == wanted
    assert report.fired.get("quantise", 0) == sum(map(bool, wanted)) - 1
    assert said(each.comparable(program(), done)) == ["", "", "", "", "i8:64", "", "", ""]
    assert said(each.run(done, PassReport())) == wanted
    assert said(each.comparable(done, done)) == wanted


def test_rows_have_powers_of_two_beside_weights_that_have() -> None:
    made = parse_program(TEXT.replace("f8e4m3{32x32,f32}[32,32]", "f8e4m3{32x32,f8e8m0}[32,32]"))
    for powers, wanted in ((True, "f8e4m3:128:f8e8m0"), (False, "f8e4m3:128")):
        assert said(QuantizeActivations(powers=powers).run(made, PassReport()))[2] == wanted
    trained = replace(parse_program(TEXT), meta={SCALE_FMT: UE8M0})
    plain = said(QuantizeActivations().run(trained, PassReport()))
    found = said(QuantizeActivations(powers=True).run(trained, PassReport()))
    floats = [x.replace("f8e4m3:128", "f8e4m3:128:f8e8m0") for x in plain]
    assert found == floats != plain


def test_rows_stay_numbers_beside_integers_in_small_blocks() -> None:
    text = TEXT.replace("@a: i8{1x32,f16}", "@a: i8{1x*,f16}")
    made = QuantizeActivations(least=128).run(parse_program(text), PassReport())
    assert said(made) == ["i8:128", "", "f8e4m3:128", "", "i8:64", "", "", ""]
    for block, wanted in (("1x128,f16", "i8:128"), ("1x256,f16", "i8:128"), ("1x192,f16", ""),
                          ("1x128,f16,i8", "")):  # fmt: skip
        again = TEXT.replace("@a: i8{1x32,f16}", f"@a: i8{{{block}}}")
        assert (
            said(QuantizeActivations(least=128).run(parse_program(again), PassReport()))[0]
            == wanted
        )


@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_groups_are_refused_where_nothing_has_any(quant: str) -> None:
    for size in (32, 64):
        with pytest.raises(UsageError, match=f"group_size is {size}, and quant is {quant}"):
            PipelineOptions(quant=quant, group_size=size)
