"""`dsc opt --explain PASS` names the condition that failed, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc.errors import UsageError

from .conftest import Invoke

DATA = Path(__file__).resolve().parent.parent / "data"

NORM = """graph step(%x: f32[8,8], %z: f32[8,8]) {{
  %s = square {squared}
  %m = mean %s {{axes=[{axis}], keepdims=true}}
  %e = full {{dtype=f32, shape=[], value=1e-06}}
  %a = add %m, %e
  %r = {root} %a
  %n = mul %x, %r
  %y = mul @w, %n : f32[8,8] loc "model.layers.3.input_layernorm"
  return %y
}}"""
HOLE = """graph step(%q: f32[B,2,S,4], %k: f32[B,2,S+P,4], %v: f32[B,2,S+P,4]) {
  %i = arange {start=P, end=S+P, dtype=i64}
  %c = reshape %i {shape=[S,1]}
  %j = arange {start=0, end=S+P, dtype=i64}
  %m = le %j, %c
  %width = full {shape=[], value=1, dtype=i64}
  %d = sub %c, %width
  %g = ne %j, %d
  %h = logical_and %m, %g
  %mask = expand %h {shape=[B,1,S,S+P]}
  %y = sdpa %q, %k, %v, %mask {scale=0.5} : f32[B,2,S,4] loc "model.layers.1.self_attn"
  return %y
}"""
MLA = """graph decode(%qn: f32[B,1,2,4], %qr: f32[B,1,2,2], %c: f32[B,P,6], %r: f32[B,P,2],
  %n: i64[B], %kv_b: f32[14,6]) {
  %twice = add %kv_b, %kv_b
  %o = mla_attention %qn, %qr, %c, %r, %twice, %n {scale=0.5} : f32[B,1,2,3] loc "model.layers.0"
  return %o
}"""


def explained(invoke: Invoke, folder: Path, name: str, graph: str, stage: str = "TRACED") -> str:
    head = f'program "p" {{stage={stage}}}\nsymbols {{B=[1,4], S=[1,8], P=[0,32]}}\n'
    weights = 'weights { @w : f32[8] = source "w" : f32[8]\n}\n' if "@w" in graph else ""
    path = folder / "p.dsc"
    path.write_text(head + weights + graph)
    done = invoke("opt", str(path), "--explain", name)
    assert done.exit_code == 0
    return done.stdout


def test_where_it_fired_is_told(invoke: Invoke, tmp_path: Path) -> None:
    text = NORM.format(squared="%x", axis=1, root="rsqrt")
    told = explained(invoke, tmp_path, "raise_rms_norm", text)
    assert "fired   RmsNorm once: model.layers.3.input_layernorm" in told
    assert "missed" not in told


def test_a_norm_over_another_axis(invoke: Invoke, tmp_path: Path) -> None:
    text = NORM.format(squared="%x", axis=0, root="rsqrt")
    told = explained(invoke, tmp_path, "raise_rms_norm", text)
    assert "missed  RmsNorm at model.layers.3.input_layernorm:" in told
    assert "the mean is not over the last axis alone (%x: f32[8,8])" in told
    assert "| %y = mul @w, %n : f32[8,8]" in told


@pytest.mark.parametrize(
    ("changes", "part", "words"),
    [
        (
            {"squared": "%z"},
            "6 of 7",
            "x must be one value, it is %x in one place and %z in another",
        ),
        ({"root": "exp"}, "5 of 6", "%r is made by exp, not by rsqrt"),
    ],
)
def test_a_pattern_of_which_a_part_is_there(
    changes: dict[str, str], part: str, words: str, invoke: Invoke, tmp_path: Path
) -> None:
    text = NORM.format(**{"squared": "%x", "axis": 1, "root": "rsqrt", **changes})
    told = explained(invoke, tmp_path, "raise_rms_norm", text)
    assert f"{part} parts fit" in told
    assert words in told


def test_the_best_near_miss_comes_first(invoke: Invoke, tmp_path: Path) -> None:
    wrong_axis = NORM.format(squared="%x", axis=0, root="rsqrt").splitlines()
    second = [
        line.replace("%", "%b.")
        .replace("%b.x", "%x")
        .replace("%b.z", "%z")
        .replace("layers.3", "layers.4")
        for line in NORM.format(squared="%z", axis=1, root="rsqrt").splitlines()[1:-2]
    ]
    text = "\n".join([wrong_axis[0], *second, *wrong_axis[1:-2], "  return %y, %b.y", "}"])
    told = explained(invoke, tmp_path, "raise_rms_norm", text)
    assert 0 < told.index("layers.3") < told.index("layers.4")


def test_a_mask_of_another_kind_is_named(invoke: Invoke, tmp_path: Path) -> None:
    told = explained(invoke, tmp_path, "raise_attention", HOLE)
    assert "missed  Attention at model.layers.1.self_attn" in told
    assert "neither causal nor a window nor chunks (%mask: bool[B,1,S,P+S])" in told
    assert "| %mask = expand %h" in told


def test_absorption_of_what_is_computed(invoke: Invoke, tmp_path: Path) -> None:
    told = explained(invoke, tmp_path, "absorb_mla", MLA, "CANONICAL")
    assert "missed  absorb at model.layers.0:" in told
    assert "kv_b is computed, not a weight" in told
    assert "| %twice = add %kv_b, %kv_b" in told


def test_absorption_of_another_entry(invoke: Invoke) -> None:
    told = invoke("opt", str(DATA / "small_lm.dsc"), "--explain", "absorb_mla").stdout
    assert (
        "entry step keeps the expanded form: only decode_few, decode, extend are absorbed" in told
    )


def test_a_pass_at_the_wrong_stage(invoke: Invoke, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage CANONICAL, this one is at TRACED") as told:
        explained(invoke, tmp_path, "absorb_mla", HOLE)
    assert (told.value.hint or "").endswith("hoist_select_rows,specialise_entries,absorb_mla")


def test_nothing_alike_and_no_such_pass(invoke: Invoke, tmp_path: Path) -> None:
    assert "nothing here looks like" in explained(invoke, tmp_path, "raise_swiglu", HOLE)
    with pytest.raises(UsageError, match="no pass is called 'nonsense'"):
        explained(invoke, tmp_path, "nonsense", HOLE)
