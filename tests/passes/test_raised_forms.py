"""Norms, rotations, experts and shared experts beyond the evidence of their rules."""

from __future__ import annotations

from typing import Any

import pytest

from dsc.ir.dims import symbol
from dsc.ir.types import DType
from dsc.passes import _gated_experts
from dsc.passes._gated_experts import BATCHED, DENSE, GROUPED
from dsc.passes.merge_shared_expert import SharedExpert, _layer
from dsc.passes.raise_activation import _FAST, _FORM, _GELU, Activation
from dsc.passes.raise_experts import Experts
from dsc.passes.raise_rms_norm import RmsNorm, _norm
from dsc.passes.raise_rope import _PARTIAL, _ROTATED, Rope
from dsc.rewrite import lift
from tests.passes.test_forms import raised, stays
from tests.rewrite.harness import compare, fire, run_example

# --- norms ----------------------------------------------------------------------------------------


def test_a_norm_is_over_the_last_axis_by_its_number_too() -> None:
    raised(RmsNorm(), _norm(axis="2"), "rms_norm", {"eps": 1e-05})


NORMS = {
    "both axes": (_norm(axis="1,2"), "the mean is not over the last axis alone"),
    "one weight for all": (
        _norm().replace("@w: f32[8]", "@w: f32[1]"), "the weight is not one value a channel"
    ),
    "a weight a row": (
        _norm().replace("@w: f32[8]", "@w: f32[1,8]"), "the weight is not one value a channel"
    ),
    "a narrower result": (
        _norm(scaled="mul %x, %r\n  %nn = cast %n {dtype=bf16}", weighted="@w, %nn").replace(
            "@w: f32", "@w: bf16"
        ),
        "the result has another element type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_what_is_no_norm_stays(name: str) -> None:
    text, reason = NORMS[name]
    stays(RmsNorm(), text, reason)


# --- activations ----------------------------------------------------------------------------------

ACTIVATED = {
    "by tanh": (_GELU.format(**_FORM), "gelu_tanh"),
    "by tanh in 16 bits": (_GELU.format(**_FORM | {"type": "bf16"}), "gelu_tanh"),
    "by tanh, wide": (_GELU.format(**_FORM).replace("B,4]", "B,4096]"), "gelu_tanh"),
    "by tanh as FastGELU has it": (_FAST, "gelu_tanh"),
    "by erf": (
        "graph g(%x: f32[B,4]) { %c = full {dtype=f32, shape=[], value=1.4142135623730951}\n"
        " %b = div %x, %c\n %e = erf %b\n %one = full {dtype=f32, shape=[], value=1.0}\n"
        " %d = add %e, %one\n %a = mul %d, %x\n"
        " %half = full {dtype=f32, shape=[], value=0.5}\n %y = mul %a, %half\n return %y }",
        "gelu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATED)
def test_an_activation_is_told_by_what_it_computes(name: str) -> None:
    text, op = ACTIVATED[name]
    before, after, report = fire(Activation(), text)
    assert report.fired == {"Activation": 1}
    assert [n.op for n in after.entries["main"].nodes] == [op]
    wanted, got = (run_example(p, Activation().sample, 0) for p in (before, after))
    assert not compare(wanted, got, 2e-2 if "bf16" in text else 1e-5)


# --- rotations ------------------------------------------------------------------------------------

HEADED = _ROTATED.format(head="3,", second="%l")
FLAT = (
    _ROTATED.format(head="", second="%l")
    .replace("[B,1,S,1]", "[B,S,1]")
    .replace("axis=3", "axis=2")
)
AFTER = (
    _ROTATED.format(head="", second="%l")
    .replace("B,S,4", "B,S,3,4")
    .replace("[B,1,S,1]", "[B,S,1,1]")
)
WIDE = HEADED.replace("%x: f32", "%o: bf16").replace(
    "  %a = ", "  %x = cast %o {dtype=f32}\n  %a = "
).replace("return %y", "%z = cast %y {dtype=bf16}\n  return %z")  # fmt: skip
PAIR = (
    HEADED.replace("S,4]", "S,2]")
    .replace("f32[2]", "f32[1]")
    .replace("end=2", "end=1")
    .replace("start=2, end=4", "start=1, end=2")
)
TURNED = {
    "heads first": (HEADED, 1.25),
    "no heads": (FLAT, 1.25),
    "heads last": (AFTER, 1.25),
    "one head": (_ROTATED.format(head="1,", second="%l"), 1.25),
    "in 16 bits": (WIDE, 1.25),
    "one pair of channels": (PAIR, 1.25),
    "no factor": (HEADED.replace("1.25", "1.0"), 1.0),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_rotation_is_one_operator(name: str) -> None:
    text, scale = TURNED[name]
    layout = "interleaved" if text is PAIR else "half"
    found = raised(Rope(), text, "rope", {"layout": layout, "scale": scale})
    assert [str(x) for x in found.operands[1:]] == ["%p", "@inv_freq"]
    assert (found.output.type.dtype is DType.bf16) == (text is WIDE), "its casts are gone"


PARTLY = _PARTIAL.format(head="3,", second="%l", rest="4, end=6")
REST = {
    "the rest in its place": (PARTLY, 4),
    "in 16 bits": (
        PARTLY.replace("%w: f32", "%o: bf16").replace(
            "  %x = ", "  %w = cast %o {dtype=f32}\n  %x = ").replace(
            "return %z", "%out = cast %z {dtype=bf16}\n  return %out"), 4,
    ),
    "only what turns in 32 bits": (
        PARTLY.replace("%w: f32", "%w: bf16").replace("%x = slice", "%s = slice").replace(
            "  %r = ", "  %i = cast %y {dtype=bf16}\n  %r = ").replace("concat %y", "concat %i"
            ).replace("  %a =", "  %x = cast %s {dtype=f32}\n  %a ="), 4,
    ),
    "other columns behind": (PARTLY.replace("start=4, end=6", "start=3, end=5"), 0),
    "columns of another value": (
        PARTLY.replace("%w: f32[B,3,S,6]", "%w: f32[B,3,S,6], %v2: f32[B,3,S,6]").replace(
            "slice %w {axis=3, start=4", "slice %v2 {axis=3, start=4"), 0,
    ),
    "the rest in front": (PARTLY.replace("concat %y, %r", "concat %r, %y"), 0),
    "read before they are joined": (PARTLY.replace("return %z", "return %z, %y"), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", REST)
def test_columns_that_do_not_turn_are_the_operators_where_they_stay(name: str) -> None:
    text, dims = REST[name]
    found = raised(Rope(), text, "rope", {"layout": "half", "scale": 1.25, "dims": dims})
    assert found.output.type.shape[-1] == (6 if dims else 4)


NONE = "products with sines and cosines that form no rotation of one value"
STILL = {
    "positions in 32 bits": (HEADED.replace("i64[B,S]", "i32[B,S]"), NONE),
    "positions of three axes": (HEADED.replace("i64[B,S]", "i64[B,S,1]"), NONE),
    "positions that are no integers": (
        HEADED.replace("i64[B,S]", "f32[B,S]").replace("%b = cast %a", "%b = abs %a").replace(
            "abs %a {dtype=f32}", "abs %a"), "",
    ),
    "frequencies that are computed": (HEADED.replace("@inv_freq", "%inv_freq"), ""),
    "frequencies of two axes": (HEADED.replace("@inv_freq: f32[2]", "@inv_freq: f32[1,2]"), NONE),
    "frequencies that are integers": (
        HEADED.replace("@inv_freq: f32[2]", "@n: i64[2]").replace(
            "%c = mul %b, @inv_freq", "%f = cast @n {dtype=f32}\n  %c = mul %b, %f"
        ), NONE,
    ),
    "two sets of frequencies": (
        HEADED.replace("@inv_freq: f32[2]", "@inv_freq: f32[2], @other: f32[2]").replace(
            "%sin = sin %t", "%o = mul %b, @other\n  %q = concat %o, %o {axis=3}\n  %sin = sin %q"
        ), NONE,
    ),
    "a frequency a channel": (
        HEADED.replace("f32[2]", "f32[4]").replace("concat %c, %c", "concat %c"),
        "the sizes do not fit: rope("
    ),
    "something else is added": (
        HEADED.replace("@inv_freq", "%z: f32[B,3,S,4], @inv_freq", 1).replace(
            "add %d, %e", "add %d, %z"
        ), NONE,
    ),
    "two axes of heads": (_ROTATED.format(head="3,1,", second="%l").replace(
        "[B,1,S,1]", "[B,1,1,S,1]").replace("axis=3", "axis=4"), NONE),
    "both by the cosine": (
        _ROTATED.format(head="3,", second="%k"), "at position 0 it is no multiple of x"
    ),
    "halves that change places": (
        HEADED.replace("concat %n, %u", "concat %v, %u"),
        "it is rope in none of the layouts interleaved, deinterleave, half (",
    ),
    "turned the other way": (
        HEADED.replace("add %d, %e", "sub %d, %e"), "it is rope in none of the layouts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STILL)
def test_what_is_no_rotation_stays(name: str) -> None:
    text, reason = STILL[name]
    stays(Rope(), text, reason)
    if reason not in ("", NONE):
        assert len(fire(Rope(), text)[2].missed) == 1, "both products lead to one proof"


# --- experts --------------------------------------------------------------------------------------

DENSELY = DENSE.format(act="silu", gated="mul %u, %g").replace("B,S", "N")


def apart(first: str, second: str) -> str:
    """The gate and up rows of weights of their own, transposed or not."""
    return (
        DENSELY.replace("@gu: f32[5,6,4]", "@gate: f32[5,3,4], @up: f32[5,3,4]")
        .replace("%d = permute @gu {dims=[0,2,1]}", f"%d = permute @{first} {{dims=[0,2,1]}}\n"
                 f"  %dd = permute @{second} {{dims=[0,2,1]}}")
        .replace("%f, %g = split %e {axis=2, sizes=[3,3]}", "%f = matmul %c, %d\n"
                 "  %g = matmul %c, %dd")
        .replace("  %e = matmul %c, %d\n", "")
    )  # fmt: skip


SPELT = {
    "every expert": DENSELY,
    "gate first": apart("gate", "up"),
    "up first": apart("up", "gate"),
    "rows by expert": GROUPED,
    "weights looked up": BATCHED,
}


@pytest.mark.parametrize("name", SPELT)
def test_experts_are_one_operator(name: str) -> None:
    found = raised(Experts(), SPELT[name], "experts", {"act": "silu"})
    shapes = [str(x.type.shape) for x in found.operands[3:]]
    assert shapes == ["(5, 6, 4)", "(5, 4, 3)"]


@pytest.mark.parametrize(("big", "shrunk"), [(60, False), (59, True)])
def test_only_experts_of_many_elements_are_proved_at_reduced_widths(
    big: int, shrunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The down weights are 5 x 4 x 3; a token's two experts must stay apart when experts go."""
    asked: list[tuple[Any, ...]] = []

    def small(*given: Any) -> dict[int, int]:
        asked.append(given)
        return {}

    monkeypatch.setattr(_gated_experts, "BIG", big)
    monkeypatch.setattr(lift, "shrunk_sizes", small)
    raised(Experts(), DENSELY, "experts", {"act": "silu"})
    sizes = ({"e": 5, "i": 3, "d": 4}, [2 * symbol("i")], {"e": 2})
    assert asked == ([sizes] if shrunk else [])


MORE = "the experts read more than tokens, choices and weights"
OTHERS = {
    "the up rows come first": (
        DENSELY.replace("%f, %g = split", "%g, %f = split"), "it is no sum of gated experts ("
    ),
    "weights in another shape": (
        DENSELY.replace("%w: f32[N,2]", "%w: f32[2,N]").replace(
            "%b = scatter %a, %idx, %w",
            "%wt = permute %w {dims=[1,0]}\n  %b = scatter %a, %idx, %wt",
        ), "tokens, choices and weights differ in shape",
    ),
    "a norm of the tokens": (
        DENSELY.replace("mul %j, %l", "mul %j, %j"), MORE
    ),
    "another activation": (
        DENSELY.replace("silu %f", "tanh %f"), "it is no sum of gated experts ("
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_sum_of_experts_stays(name: str) -> None:
    text, reason = OTHERS[name]
    stays(Experts(), text, reason)


# --- a shared expert ------------------------------------------------------------------------------

SHARED = {
    "its rows are half an expert's": (_layer(2), "2 rows are no multiple of an expert's 4"),
    "its rows are one more": (_layer(5), "5 rows are no multiple of an expert's 4"),
    "another activation": (_layer(act="gelu"), "the experts' activation is gelu, not silu"),
    "its weights are read elsewhere": (_layer(more=", @u"), "a weight is also read elsewhere (@u"),
    "the stack is read elsewhere": (_layer(more=", @gu"), "a weight is also read elsewhere (@gu"),
    "a router of fewer": (
        _layer().replace("@r: f32[3,6]", "@r: f32[2,6]"),
        "the stack holds other experts than the router's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_expert_that_does_not_fit_stays(name: str) -> None:
    text, reason = SHARED[name]
    stays(SharedExpert(), text, reason)


@pytest.mark.parametrize(("rows", "count"), [(4, 1), (8, 2), (12, 3)])
def test_a_shared_expert_is_as_many_as_its_rows_make(rows: int, count: int) -> None:
    found = raised(SharedExpert(), _layer(rows), "experts", {"act": "silu"})
    assert [x.type.shape[0] for x in found.operands[3:]] == [3 + count] * 2
    raised(SharedExpert(), _layer(rows), "route", {"shared": count, "top_k": 2, "scale": 2.0})


def test_an_expert_joins_those_that_every_token_has_already() -> None:
    text = _layer(4).replace("@gu: f32[3,", "@gu: f32[4,").replace("@dn: f32[3,", "@dn: f32[4,")
    raised(SharedExpert(), text.replace("scale=2.0", "shared=1"), "route", {"shared": 2})
