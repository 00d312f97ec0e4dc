"""Views: which become fewer, into what, and which stay; all compute the same."""

from __future__ import annotations

from typing import Any

import pytest

from dsc.ir.graph import Node
from dsc.passes import _splits, _views
from tests.rewrite.harness import compare, fire, run_example


def line(node: Node) -> str:
    """A node without its types, and without attributes that are as declared."""
    attrs = ", ".join(
        f"{key}={list(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in node.attrs.items()
        if not isinstance(value, float) and (key, value) not in (("axis", -1), ("step", 1))
    )
    return f"{node.op} {' '.join(map(str, node.operands))} {attrs}".strip()


NUMBERS = """%one = full {shape=[], value=1.0, dtype=f32}
 %nought = full {shape=[], value=0.0, dtype=f32}
 %two = full {shape=[], value=2.0, dtype=f32}
 %ones = full {shape=[1,3], value=1.0, dtype=f32}
 """
NEUTRAL = ("", "div %x, %one", "mul %x, %one", "mul %one, %x", "add %x, %nought",
           "add %nought, %x", "sub %x, %nought")  # fmt: skip
TELLING = ("div %one, %x", "div %x, %two", "mul %x, %nought", "add %x, %one", "sub %nought, %x",
           "sub %x, %one", "mul %two, %x", "add %x, %z", "mul %x, %ones")  # fmt: skip


@pytest.mark.parametrize("what", NEUTRAL[1:] + TELLING)
def test_what_changes_nothing_is_left_out(what: str) -> None:
    head = "%x: f32[2]" if "ones" not in what else "%x: f32[2,1]"
    text = f"graph g({head}, %z: f32[2]) {{ {NUMBERS}%y = {what}\n %u = neg %y\n return %u }}"
    before, after, report = fire(_views.DropNeutral(), text)
    assert report.fired == ({"DropNeutral": 1} if what in NEUTRAL else {})
    (last,) = (n for n in after.entries["main"].nodes if n.op == "neg")
    assert str(last.operands[0]) == ("%x" if what in NEUTRAL else "%y")
    found = [run_example(p, _views.DropNeutral().sample, 0) for p in (before, after)]
    assert not compare(found[0], found[1], 0.0)


IDENTITIES = {
    "reshape %x {shape=[2,3]}": True, "permute %x {dims=[0,1]}": True,
    "permute %q {dims=[1,0]}": False, "cast %x {dtype=f32}": True, "cast %x {dtype=f16}": False,
    "slice %x {axis=0, start=0, end=2}": True, "slice %x {axis=0, start=0, end=1}": False,
    "slice %o {axis=0, start=0, end=1, step=2}": True, "expand %x {shape=[2,3]}": True,
    "expand %o {shape=[2,3]}": False, "concat %x {axis=1}": True, "concat %x, %x {axis=1}": False,
    "concat %x, %e {axis=1}": True, "concat %e, %x {axis=1}": False,
    "split %x {axis=1, sizes=[3]}": True,
}  # fmt: skip


@pytest.mark.parametrize("what", IDENTITIES)
def test_a_view_that_shows_all_in_order_is_left_out(what: str) -> None:
    head = "%x: f32[2,3], %q: f32[3,3], %o: f32[1,3], %e: f32[2,0]"
    _, after, report = fire(_views.DropIdentity(), f"graph g({head}) {{ %y = {what}\n return %y }}")
    assert report.fired == ({"DropIdentity": 1} if IDENTITIES[what] else {})
    assert len(after.entries["main"].nodes) == (not IDENTITIES[what])


LOSSLESS = [("bool", "i64"), ("bool", "f16"), ("f16", "f32"), ("bf16", "f32"), ("f32", "f64")]
LOSSY = [("bf16", "f16"), ("f16", "bf16"), ("f32", "f16"), ("i64", "f32"), ("i32", "i64"),
         ("i32", "f64"), ("f32", "i64")]  # fmt: skip


@pytest.mark.parametrize(("of", "through"), LOSSLESS + LOSSY)
def test_a_cast_back_is_left_out_where_nothing_was_lost(of: str, through: str) -> None:
    text = f"graph g(%x: {of}[B]) {{ %y = cast %x {{dtype={through}}}\n %z = cast %y {{dtype=TO}}"
    text += "\n return %z }"
    _, _, report = fire(_views.CastBackAndForth(), text.replace("TO", of))
    if (of, through) in LOSSLESS:
        assert report.fired == {"CastBackAndForth": 1}
    else:
        (missed,) = report.missed
        assert missed[2] == f"{through} does not hold every {of} (%x: {of}[B])"
    _, _, elsewhere = fire(_views.CastBackAndForth(), text.replace("TO", "f8e4m3"))
    assert [why for _, _, why in elsewhere.missed] == [f"the casts do not lead back (%x: {of}[B])"]


X = "%x: f32[4,B,6]"
A, B2, C = "%a: f32[2,B,6]", "%b: f32[2,B,6]", "%c: f32[4,B,3]"


def slices(*parts: tuple[int, ...], swap: bool = False) -> str:
    """Slices %p and %q of %x by axis, start, end and step."""
    names = "qp" if swap else "pq"
    made = [
        f"%{n} = slice %x {{axis={axis}, start={start}, end={end}, step={step[0] if step else 1}}}"
        for n, (axis, start, end, *step) in zip(names, parts, strict=False)
    ]
    shown = "%p, %q" if len(parts) > 1 else "%p"
    return f"graph g({X}, @w: f32[4,6]) {{ " + "\n ".join(made) + f"\n return {shown} }}"


def writes(first: str, second: str, more: str = "") -> str:
    return f"""graph g({X}, {A}, {B2}, {C}{more}) {{ %d = slice_scatter %x, {first}
      %y = slice_scatter %d, {second}
      return %y }}"""


FORMS: dict[str, tuple[type[Any], str, list[str]]] = {
    "halves of the first axis": (
        _splits.SlicesToSplit, slices((0, 0, 1), (0, 1, 4)), ["split %x axis=0, sizes=['1', '3']"]
    ),
    "halves of the last axis": (
        _splits.SlicesToSplit, slices((2, 0, 2), (-1, 2, 6)), ["split %x sizes=['2', '4']"]
    ),
    "the later half first": (
        _splits.SlicesToSplit, slices((0, 1, 4), (0, 0, 1), swap=True),
        ["split %x axis=0, sizes=['1', '3']"],
    ),
    "a split of a permuted axis": (
        _splits.SplitBeforePermute,
        f"graph g({X}) {{ %t = permute %x {{dims=[2,0,1]}}\n"
        " %p, %q = split %t {axis=1, sizes=[1,3]}\n return %p, %q }",
        ["split %x axis=0, sizes=['1', '3']", "permute %split dims=['2', '0', '1']",
         "permute %split_1 dims=['2', '0', '1']"],
    ),
    "a split of what was the last axis": (
        _splits.SplitBeforePermute,
        f"graph g({X}) {{ %t = permute %x {{dims=[2,0,1]}}\n"
        " %p, %q = split %t {axis=0, sizes=[1,5]}\n return %p, %q }",
        ["split %x sizes=['1', '5']", "permute %split dims=['2', '0', '1']",
         "permute %split_1 dims=['2', '0', '1']"],
    ),
    "the last axis by number": (
        _splits.SplitOfLastAxis,
        f"graph g({X}) {{ %p, %q = split %x {{axis=2, sizes=[1,5]}}\n return %p, %q }}",
        ["split %x sizes=['1', '5']"],
    ),
    "two writes": (
        _splits.ScatterToConcat,
        writes("%a {axis=0, start=0, end=2}", "%b {axis=-3, start=2, end=4}"),
        ["concat %a %b axis=0"],
    ),
    "two writes, the later half first": (
        _splits.ScatterToConcat,
        writes("%a {axis=0, start=2, end=4}", "%b {axis=0, start=0, end=2}"),
        ["concat %b %a axis=0"],
    ),
    "a write at the start": (
        _splits.WriteToConcat,
        f"graph g({X}, {A}) {{ %y = slice_scatter %x, %a {{axis=0, start=0, end=2}}\n return %y }}",
        ["slice %x axis=0, end=4, start=2", "concat %a %slice axis=0"],
    ),
    "a write at the end": (
        _splits.WriteToConcat,
        f"graph g({X}, {A}) {{ %y = slice_scatter %x, %a {{axis=0, start=2, end=4}}\n return %y }}",
        ["slice %x axis=0, end=2, start=0", "concat %slice %a axis=0"],
    ),
    "a write in the middle": (
        _splits.WriteToConcat,
        f"graph g({X}, {A}) {{ %y = slice_scatter %x, %a {{axis=0, start=1, end=3}}\n return %y }}",
        ["slice %x axis=0, end=1, start=0", "slice %x axis=0, end=4, start=3",
         "concat %slice %a %slice_1 axis=0"],
    ),
    "axes that only pass one of extent 1": (
        _views.PermuteToReshape,
        "graph g(%x: f32[4,1,B,1]) { %y = permute %x {dims=[1,0,3,2]}\n return %y }",
        ["reshape %x shape=['1', '4', '1', 'B']"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_views_become_fewer(name: str) -> None:
    rule, text, lines = FORMS[name]
    before, after, report = fire(rule(), text)
    assert report.fired == {rule.__name__: 1}, report.missed
    assert sorted(map(line, after.entries["main"].nodes)) == sorted(lines)
    found = [run_example(p, rule().sample, 1) for p in (before, after)]
    assert not compare(found[0], found[1], 0.0)


STAY: dict[str, tuple[type[Any], str]] = {
    "a gap": (_splits.SlicesToSplit, slices((0, 0, 1), (0, 2, 4))),
    "the end is left out": (_splits.SlicesToSplit, slices((0, 0, 1), (0, 1, 3))),
    "the start is left out": (_splits.SlicesToSplit, slices((0, 1, 2), (0, 2, 4))),
    "one slice alone": (_splits.SlicesToSplit, slices((0, 0, 1))),
    "all of it": (_splits.SlicesToSplit, slices((0, 0, 4), (0, 1, 4))),
    "slices along two axes": (_splits.SlicesToSplit, slices((0, 0, 2), (2, 2, 6))),
    "every second at first": (_splits.SlicesToSplit, slices((0, 0, 2, 2), (0, 2, 4))),
    "every second at last": (_splits.SlicesToSplit, slices((0, 0, 2), (0, 2, 4, 2))),
    "the axis before the last": (
        _splits.SplitOfLastAxis,
        "graph g(%x: f32[B,6,6]) { %p, %q = split %x {axis=1, sizes=[1,5]}\n return %p, %q }",
    ),
    "the last axis, as it is written": (
        _splits.SplitOfLastAxis,
        f"graph g({X}) {{ %p, %q = split %x {{sizes=[1,5]}}\n return %p, %q }}",
    ),
    "two writes that overlap": (
        _splits.ScatterToConcat,
        writes("%a {axis=0, start=0, end=2}", "%b {axis=0, start=1, end=3}"),
    ),
    "two writes to one place": (
        _splits.ScatterToConcat,
        writes("%a {axis=0, start=2, end=4}", "%b {axis=0, start=2, end=4}"),
    ),
    "three axes turn round": (
        _views.PermuteToReshape,
        "graph g(%x: f32[4,1,B]) { %y = permute %x {dims=[2,1,0]}\n return %y }",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_other_views_stay(name: str) -> None:
    rule, text = STAY[name]
    before, after, report = fire(rule(), text)
    assert after is before
    assert not report.fired
