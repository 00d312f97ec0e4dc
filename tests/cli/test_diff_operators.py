"""`dsc diff --run`: the error is where it is made, and behind it only what has come together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dsc
from dsc.diff.operators import Off, operators, same_inputs
from dsc.errors import UsageError
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.passes.quantize_weights import QuantizeWeights
from dsc.rewrite.base import PassReport
from tests.runtime.test_session import small_lm

from .conftest import Invoke

BEFORE = parse_program("""program "p" {stage=CANONICAL}
symbols {N=[1,8]}
weights {
  @a : f32[64,64] = source "a" : f32[64,64]
  @b : f32[64,64] = source "b" : f32[64,64]
}
graph main(%x: f32[N,64]) {
  %y = linear %x, @a : f32[N,64]
  %z = silu %y : f32[N,64]
  %w = linear %z, @b : f32[N,64]
  %v = neg %w : f32[N,64]
  return %v
}
""")


def test_an_operator_adds_what_it_makes_of_the_same_inputs() -> None:
    after = QuantizeWeights(codes="i4", keep=("b",)).run(BEFORE, PassReport())
    found = operators((BEFORE, after), ("main", "main"))
    assert [found[0].name, found[0].op] == ["y", "linear"]
    by_name = {each.name: each for each in found}
    assert by_name.keys() == {"y", "z", "w", "v"}
    assert 1e-4 < by_name["y"].added.sums.calc_diff < 1e-1
    assert by_name["y"].added.most == by_name["y"].come.most > 0
    for name in ("z", "w", "v"):
        assert by_name[name].added.most == 0
        assert by_name[name].come.sums.calc_diff > 1e-4


def test_equal_programs_add_nothing() -> None:
    for each in operators((BEFORE, BEFORE), ("main", "main")):
        assert (each.added.most, each.come.most) == (0, 0)


def test_two_models_are_told_apart_before_they_run() -> None:
    other = parse_program(print_program(BEFORE).replace("%x", "%u"))
    with pytest.raises(UsageError, match=r"input u is .*none.*two models"):
        operators((BEFORE, other), ("main", "main"))


def test_caches_of_other_sizes_hold_the_same_and_indices_lie_in_both() -> None:
    """An entry whose caches grow beside one that writes them in place."""
    text = """program "p" {{stage=CANONICAL}}
symbols {{}}
graph main(%past: f32[2,{rows},4], %new: f32[2,3,4], %lengths: i64[2]) {{
  %c = cache_write %past, %new, %lengths : f32[2,{rows},4]
  return %c
}}
"""
    few, many = (parse_program(text.format(rows=rows)) for rows in (9, 40))
    for pair in ((few, many), (many, few)):
        one, two = same_inputs(pair, ("main", "main"), 0)
        assert torch.equal(one["lengths"], two["lengths"])
        assert int(one["lengths"].max()) <= 6
        assert torch.equal(one["past"][:, :9], two["past"][:, :9])
        operators(pair, ("main", "main"))


def test_figures_are_those_of_their_definitions() -> None:
    x, y = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, -2.5, 3.0])
    off = Off.between(x, y).as_dict()
    assert off["max"] == 0.5
    assert off["calc_diff"] == pytest.approx(1 - 2 * float(x @ y) / float(x @ x + y @ y))
    assert off["relative"] == pytest.approx((0.25 / 14) ** 0.5)


def test_the_command_runs_operators_and_code_of_two_artifacts(
    invoke: Invoke, tmp_path: Path
) -> None:
    sides = {"plain": {}, "coded": {"quant": "int4"}}
    for name, options in sides.items():
        compiled = dsc.compile(
            small_lm(),
            backend="reference",
            max_context=32,
            prefill_chunk=8,
            **options,  # type: ignore[arg-type]
        )
        compiled.save(tmp_path / name)
    page = tmp_path / "page.html"
    given = ("diff", str(tmp_path / "plain"), str(tmp_path / "coded"), "--run", "--no-error")
    said = json.loads(invoke(*given, "--json", "-o", str(page)).stdout)
    for entry in said["entries"].values():
        errors = [each["added"]["calc_diff"] for each in entry["operators"]]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1e-5
        assert entry["kernels"]["logits"]["calc_diff"] > 1e-6
        last = next(x for x in entry["operators"] if x["value"] == "logits")
        assert last["accumulated"]["max"] > 0
    assert "The error that operators add" in page.read_text()
    shown = invoke(*given).stdout
    assert "the error that operators add" in shown
    assert "compiled: logits calc_diff" in shown


def test_what_is_too_wide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc.diff.operators.WIDEST", 10)
    with pytest.raises(UsageError, match="too wide to interpret"):
        operators((BEFORE, BEFORE), ("main", "main"))
