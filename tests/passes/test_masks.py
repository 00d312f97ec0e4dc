"""What masks let through, in words: causal by lengths, from the end or the start, or not at all."""

from __future__ import annotations

import pytest

from dsc.ir.graph import Weight
from dsc.passes import _masks
from dsc.passes._masks import Causal, classify
from dsc.rewrite.rule import Reject
from dsc.rewrite.scope import Scope
from tests.rewrite.harness import program_of

FROM_END = "%i = arange {start=P, end=P+S, dtype=i64}\n %c = reshape %i {shape=[S,1]}"
FROM_START = FROM_END.replace("start=P, end=P+S", "start=0, end=S")
BY_LENGTHS = """%l = reshape %lengths {shape=[B,1,1]}
 %i = arange {start=0, end=S, dtype=i64}
 %d = reshape %i {shape=[S,1]}
 %c = add %l, %d"""
SEEN = "%m = le %j, %c"
WINDOW = """%s = le %j, %c
 %w = full {{shape=[], value={width}, dtype=i64}}
 %f = sub %c, %w
 %g = gt %j, %f
 %m = logical_and %s, %g"""
ADDED = """%s = le %j, %c
 %z = full {{shape=[], value=0.0, dtype=f32}}
 %h = full {{shape=[], value={hidden}, dtype=f32}}
 %m = where %s, %z, %h"""
HEADS = """%a = le %j, %c
 %b = {second} %j, %c
 %ra = reshape %a {{shape=[{batch},1,S,P+S]}}
 %rb = reshape %b {{shape=[{batch},1,S,P+S]}}
 %m = concat %ra, %rb {{axis={axis}}}"""


def found(
    rows: str, mask: str, *, inverse: bool = False, inputs: str = "%lengths: i64[B]"
) -> Causal | Reject:
    """How the value `%m` of a graph of up to 10 cached and 4 new rows is read."""
    program = program_of(
        f'program "p" {{stage=TRACED}} symbols {{B=[1,2], P=[0,10], S=[1,4]}}'
        f" graph g({inputs}) {{ %j = arange {{start=0, end=P+S, dtype=i64}}\n {rows}\n {mask}\n"
        " return %m }"
    )
    graph = program.entries["main"]
    (value,) = (v for v in graph.values() if v.name == "m")
    return classify(Scope(program, graph), value, inverse)


def why(given: Causal | Reject) -> str:
    assert isinstance(given, Reject)
    return given.reason


@pytest.mark.parametrize(
    ("rows", "lengths", "from_start"),
    [(FROM_END, None, False), (FROM_START, None, True), (BY_LENGTHS, "lengths", False)],
)
def test_causal_masks_are_told_apart(rows: str, lengths: str | None, from_start: bool) -> None:
    batch = "B" if lengths else "1"
    shown = [
        found(rows, SEEN),
        found(rows, "%m = gt %j, %c", inverse=True),
        *(
            found(rows, HEADS.format(second="le", axis=axis, batch=batch))
            for axis in ((1,) if lengths else (0, 1))
        ),
        *(found(rows, ADDED.format(hidden=h)) for h in ("-inf", -10000.0)),
        found(rows, ADDED.format(hidden="-inf"), inverse=True),
    ]
    for each in shown:
        assert isinstance(each, Causal), each
        assert (each.lengths and each.lengths.name, each.from_start) == (lengths, from_start)


@pytest.mark.parametrize(
    ("rows", "mask", "reason"),
    [
        (FROM_END, "%m = lt %j, %c", "row 2: it is neither causal nor a window nor chunks"),
        (BY_LENGTHS, "%m = gt %j, %c", "hides row 0 at row"),
        (FROM_END, "%n = add %j, %j\n %m = le %n, %c", "hides row 2 at row 2"),
        (FROM_END, "%n = neg %j\n %m = le %n, %c", "shows row 3 at row 2"),
        (FROM_END, ADDED.format(hidden=-9999.0), "the mask adds a bias to what it shows"),
        (FROM_END, HEADS.format(second="lt", axis=1, batch=1), "the mask differs between heads"),
        (FROM_END, HEADS.format(second="lt", axis=0, batch=1), "hides row 2 at row 2"),
        (FROM_END, WINDOW.format(width=0), "hides row"),
        (
            FROM_END,
            WINDOW.format(width=4).replace("%s, %g", "%g, %s").replace("gt", "ne"),
            "hides row 0 at row 4",
        ),
    ],
)
def test_what_is_not_causal_is_told_with_the_rows(rows: str, mask: str, reason: str) -> None:
    assert reason in why(found(rows, mask))


@pytest.mark.parametrize(("width", "seen"), [(13, False), (14, True), (15, True)])
def test_a_window_counts_where_the_longest_context_reaches_beyond_it(
    width: int, seen: bool
) -> None:
    """Of 14 rows a window of 14 hides none, one of 13 the first from the last."""
    assert found(FROM_END, WINDOW.format(width=width)) == Causal(None, window=0 if seen else width)


CHUNK = """%s = le %j, %c
 %w = full {{shape=[], value={width}, dtype=i64}}
 %f = {divide} %c, %w
 %g = {divide} %j, %w
 %h = eq %f, %g
 %m = logical_and %s, %h"""
LESS = "%e = full {shape=[], value=1, dtype=i64}\n %x = sub %c, %e\n"


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize("rows", [FROM_END, FROM_START, BY_LENGTHS])
def test_how_wide_a_window_or_a_chunk_is_is_proved(rows: str, width: int) -> None:
    """A window by > and one by >= differ by a row, and chunks are none."""
    window = WINDOW.format(width=width)
    for mask, sight in (
        (window, (width, 0)),
        (window.replace("gt", "ge"), (width + 1, 0)),
        (CHUNK.format(width=width, divide="div"), (0, width) if width > 1 else (1, 0)),
    ):
        each = found(rows, mask)
        assert isinstance(each, Causal), each
        assert (each.window, each.chunk) == sight
        assert each.from_start == (rows == FROM_START)
        assert (each.lengths is None) == (rows != BY_LENGTHS)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (CHUNK.format(width=4, divide="div").replace("%f = div %c,", LESS + " %f = div %x,"),
         "hides row 4 at row 4"),
        (CHUNK.format(width=4, divide="remainder"), "hides row"),
        (WINDOW.format(width=4).replace("%j, %f", "%f, %j"), "hides row"),
    ],
)  # fmt: skip
def test_what_is_nearly_a_window_is_refused(mask: str, reason: str) -> None:
    assert reason in why(found(FROM_END, mask))


def test_a_window_too_far_out_to_be_tested_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried at 6 + 3 cached rows and 3 queries: 36 elements; so many queries never come."""
    window = WINDOW.format(width=6)
    largest = "the mask holds the constant 6, too far out to be tested"
    monkeypatch.setattr(_masks, "MAX_ELEMENTS", 35)
    assert why(found(FROM_END, window)) == largest
    monkeypatch.setattr(_masks, "MAX_ELEMENTS", 36)
    assert found(FROM_END, window) == Causal(None, window=6)


@pytest.mark.parametrize(
    ("inputs", "rows", "mask"),
    [
        ("%lengths: i64[B], %n: i64[B]", BY_LENGTHS + "\n %r = reshape %n {shape=[B,1,1]}",
         "%s = le %j, %c\n %t = lt %r, %c\n %m = logical_or %s, %t"),
        ("%lengths: i32[B]", BY_LENGTHS.replace("%l = reshape %lengths",
         "%k = cast %lengths {dtype=i64}\n %l = reshape %k"), SEEN),
        ("%lengths: i64[B,1]", BY_LENGTHS, SEEN),
        ("%lengths: i64[B], %x: f32[S,P+S]", FROM_END, "%m = neg %x"),
        ("%lengths: i64[B]", FROM_END, "%k = full {shape=[], value=2, dtype=i64}\n %m = le %j, %k"),
    ],
)  # fmt: skip
def test_a_mask_of_more_than_one_length_a_sequence_is_refused(
    inputs: str, rows: str, mask: str
) -> None:
    assert why(found(rows, mask, inputs=inputs)) == "the mask depends on more than the lengths"


FOLDED = """program "p" {{stage=TRACED}} weights {{ @m : bool[{rows},{total}] = {expr} }}
graph g(%x: f32[2]) {{ %y = neg %x return %y }}"""


def folded(rows: int, total: int, first: int, compare: str = "le") -> Causal | Reject:
    """A constant mask of queries that begin at row `first`."""
    expr = (
        f"{compare}(arange() {{start=0, end={total}, dtype=i64}}, reshape(arange()"
        f" {{start={first}, end={first + rows}, dtype=i64}}) {{shape=[{rows},1]}})"
    )
    program = program_of(FOLDED.format(rows=rows, total=total, expr=expr))
    mask = Weight("m", program.weights["m"].type)
    return classify(Scope(program, program.entries["main"]), mask)


@pytest.mark.parametrize(
    ("rows", "total", "first", "from_start"),
    [(3, 5, 2, False), (3, 5, 0, True), (3, 3, 0, False), (5, 3, 0, True), (1, 1, 0, False)],
)
def test_a_constant_mask_is_read_too(rows: int, total: int, first: int, from_start: bool) -> None:
    assert folded(rows, total, first) == Causal(None, from_start)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((3, 5, 1), "the mask hides row 2 at row 2: it is neither causal nor a window nor chunks"),
        ((3, 5, 3), "the mask shows row 3 at row 2: it is neither causal nor a window nor chunks"),
        ((5, 3, 1), "it has more rows than columns"),
    ],
)
def test_a_constant_mask_that_is_not_causal_is_told(
    given: tuple[int, int, int], reason: str
) -> None:
    assert why(folded(*given)) == reason
