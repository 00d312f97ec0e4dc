"""Caches written in place: what is in the way, in words, and the sizes that take their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from dsc.ir.dims import Range
from dsc.ir.interface import State, Storage
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.passes.append_cache_in_place import AppendCacheInPlace
from dsc.rewrite.base import PassReport
from tests.rewrite.harness import program_of

EXPANDED = """graph main(%q: f32[B,S,2,4], %past: f32[{past},8], %new: f32[B,S,8],
  %n: i64[B]{more}) {{
  {before}
  %c = append %past, %new, %n
  %k = reshape %c {{shape=[B,{rows},2,4]}}
  %y = attention %q, %k, %k, %n {{causal=true, scale=0.5}} loc "model.layers.0"
  {after}
  return %y, %c as "present" updates %past{out}
}}"""
LATENT = """graph main(%q: f32[B,S,2,6], %qr: f32[B,S,2,4], %past: f32[B,P,6], %old: f32[B,P,4],
  %new: f32[B,S,6], %turned: f32[B,S,4], %n: i64[B], @w: f32[6]{more}) {{
  %c = append %past, %new, %n
  %r = append %old, %turned, %n
  {before}
  %y = latent_attention %q, %qr, {read}, %r, %n {{scale=0.5}} loc "model.layers.0"
  return %y, %c as "present" updates %past, %r updates %old
}}"""
GIVEN = {
    "past": "B,P",
    "rows": "P+S",
    "more": "",
    "before": "",
    "after": "",
    "out": "",
    "read": "%c",
}
RANGES = {"B": Range(1, 3), "S": Range(1, 16), "P": Range(0, 128)}


def given(
    text: str, changes: Mapping[str, str] = GIVEN, symbols: Mapping[str, Range] = RANGES
) -> Program:
    program = program_of(text.format(**{**GIVEN, **changes}), Stage.CANONICAL)
    caches = [v for v in program.entries["main"].inputs if v.name in ("past", "old")]
    states = tuple(State.of(v, f"now.{v.name}", Storage.GROWN) for v in caches)
    program = replace(program, symbols=dict(symbols))
    return program.declaring(states=states)


def done(program: Program, page: int = 0, slack: int = 512) -> tuple[Program, PassReport]:
    report = PassReport()
    return AppendCacheInPlace(slack=slack, page=page).run(program, report), report


def obstacles(program: Program, page: int = 0) -> list[tuple[str, str]]:
    """Where something is in the way, and what; nothing is rewritten then."""
    after, report = done(program, page)
    assert not report.fired
    assert after == program.at(Stage.OPTIMIZED)
    return [(where, why) for _, where, why in report.missed]


LATE = "rows are written and read at different lengths"
ROWS = "has to do with P rows and updates no declared cache"
APPENDED = "%past has not P rows, or its new rows are not like the others"
ELSEWHERE = "%past is read elsewhere as well"
ALONE = "rows of a cache are an output of their own"
REFUSED: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = {
    "another input of that extent": (
        {"more": ", %mask: f32[B,P]"}, [("", "%mask has the extent P and is no cache")]
    ),
    "a cache of more rows": (
        {"past": "B,P+1", "rows": "P+1+S"}, [("main", APPENDED)]
    ),
    "the cache itself": ({"out": ', %past as "again"'}, [("main", ELSEWHERE)]),
    "a sum over the cache": (
        {"after": '%m = mean %past {axes=[1]} loc "m"', "out": ", %m"},
        [("main", ELSEWHERE), ("m", f"mean {ROWS}")],
    ),
    "a range of that extent": (
        {"after": "%i = arange {start=0, end=P, dtype=i64}\n %m = neg %i\n %z = sum %m {axes=[0]}",
         "out": ", %z"},
        [("main", f"arange {ROWS}"),
         ("main", "sum reads rows of a cache, also those past the end")],
    ),
    "a range from there on": (
        {"after": "%m = arange {start=P, end=P+S, dtype=i64}", "out": ", %m"},
        [("main", f"arange {ROWS}")],
    ),
    "a cache that nothing updates": (
        {"more": ", %other: f32[B,P,8]", "after": "%o = append %other, %new, %n", "out": ", %o"},
        [("", "%other has the extent P and is no cache"), ("main", f"append {ROWS}"),
         ("main", ALONE)],
    ),
    "another cache, at other lengths": (
        {"more": ", %other: f32[B,P,8], %at: i64[B]", "after": "%o = append %other, %new, %at",
         "out": ", %o updates %other"},
        [("main", APPENDED), ("model.layers.0", LATE),
         ("main", APPENDED.replace("past", "other"))],
    ),
    "another cache, with other rows": (
        {"more": ", %other: f32[B,P,8], %late: f32[B,L,8]",
         "after": "%o = append %other, %late, %n", "out": ", %o updates %other"},
        [("main", APPENDED), ("main", APPENDED.replace("past", "other"))],
    ),
    "its rows once more": (
        {"out": ', %c as "copy"'}, [("main", ALONE)]
    ),
    "what is made of its rows": (
        {"after": '%m = silu %c loc "m"', "out": ", %m"}, [("m", ALONE)]
    ),
    "a sum over its rows": (
        {"after": '%m = amax %c {axes=[1]} loc "m"', "out": ", %m"},
        [("m", "amax reads rows of a cache, also those past the end")],
    ),
    "a part of its rows": (
        {"after": "%m = slice %c {axis=1, start=P, end=P+S}", "out": ", %m"},
        [("main", "slice reads rows of a cache, also those past the end")],
    ),
    "attention without lengths": (
        {"after": "%m = attention %q, %k, %k {causal=true, scale=0.5}", "out": ", %m"},
        [("main", "attention does not mask rows past the end")],
    ),
    "attention by its rows": (
        {"after": "%m = attention %k, %k, %k, %n {causal=true, scale=0.5}\n"
         " %z = sum %m {axes=[1]}", "out": ", %z"},
        [("main", "attention does not mask rows past the end"),
         ("main", "sum reads rows of a cache, also those past the end")],
    ),
    "attention to as many channels": (
        {"more": ", %keys: f32[B,8,2,4]",
         "after": "%t = permute %c {dims=[0,2,1]}\n %v = reshape %t {shape=[B,8,1,P+S]}\n"
         " %w = expand %v {shape=[B,8,2,P+S]}\n"
         " %m = attention %q, %keys, %w, %n {causal=true, scale=0.5}\n %z = sum %m {axes=[3]}",
         "out": ", %z"},
        [("main", "attention does not mask rows past the end"),
         ("main", "sum reads rows of a cache, also those past the end")],
    ),
    "attention at other lengths": (
        {"after": "%o = neg %n\n %m = attention %q, %k, %k, %o {causal=true, scale=0.5}",
         "out": ", %m"},
        [("main", LATE)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_there_is_of_a_cache_keeps_it_growing(name: str) -> None:
    changes, reasons = REFUSED[name]
    assert obstacles(given(EXPANDED, changes)) == reasons


BY_ROW = {
    "nothing else": ("", ""),
    "a view and a pointwise operator": ("%e = reshape %c {shape=[B,P+S,2,4]}\n %k = neg %e", ""),
    "a norm": ("%e = rms_norm %c, @g {eps=1e-06}\n %k = reshape %e {shape=[B,P+S,2,4]}",
               ", @g: f32[8]"),
    "a projection": ("%e = linear %c, @g\n %k = reshape %e {shape=[B,P+S,2,4]}", ", @g: f32[8,8]"),
    "two parts side by side": (
        "%a, %b = split %c {sizes=[4,4]}\n %e = concat %b, %a {axis=2}\n"
        " %k = reshape %e {shape=[B,P+S,2,4]}", ""
    ),
    "an input of the table's name": ("", ", %block_table: f32[B]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_ROW)
def test_what_works_row_by_row_may_lie_between_cache_and_attention(name: str) -> None:
    between, more = BY_ROW[name]
    plain = "%k = reshape %c {{shape=[B,{rows},2,4]}}"
    assert plain in EXPANDED
    text = EXPANDED.replace(plain, between.replace("{", "{{").replace("}", "}}") or plain)
    after, report = done(given(text, {"more": more}))
    assert report.fired == {"append": 1}, report.missed
    assert after.symbols == {"B": Range(1, 3), "S": Range(1, 16), "C": Range(1, 640)}
    assert {s.storage for s in after.interface.states} == {Storage.CONTIGUOUS}


def test_attention_over_other_keys_has_lengths_of_its_own() -> None:
    more = ", %keys: f32[B,8,2,4], %at: i64[B]"
    after = "%m = attention %q, %keys, %keys, %at {causal=true, scale=0.5}"
    program = given(EXPANDED, {"more": more, "after": after, "out": ", %m"})
    assert done(program)[1].fired == {"append": 1}


def test_caches_that_change_places_keep_growing() -> None:
    text = LATENT.replace("P,4]", "P,6]").replace("S,4]", "S,6]").replace("S,2,4]", "S,2,6]")
    swapped = text.replace("updates %past", "updates %X").replace("updates %old", "updates %past")
    program = given(swapped.replace("%X", "%old"))
    after, report = done(program)
    assert after == program.at(Stage.OPTIMIZED)
    assert not report.fired
    assert done(given(text))[1].fired == {"append": 2}


def test_a_symbol_of_another_meaning_is_in_the_way() -> None:
    both = {**RANGES, "C": Range(1, 2), "M": Range(1, 2)}
    assert obstacles(given(EXPANDED, symbols=both)) == [
        ("", "the symbol C has another meaning here")
    ]
    assert obstacles(given(LATENT, symbols=both), page=8) == [
        ("", "the symbol M has another meaning here")
    ]


def test_a_program_without_caches_goes_on_as_it_is() -> None:
    program = program_of("graph main(%x: f32[N]) { %y = neg %x\n return %y }", Stage.CANONICAL)
    after, report = done(program)
    assert after == program.at(Stage.OPTIMIZED)
    assert not report.missed


# --- pages ----------------------------------------------------------------------------------------

UNPAGED = "reads the cache {}; attention takes pages"
PAGED: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = {
    "rows that are scaled first": (
        {"before": "%s = mul %c, @w", "read": "%s"},
        [("main", "mul " + UNPAGED.format("past")), ("model.layers.0",
          "latent_attention " + UNPAGED.format("s"))],
    ),
    "a table": (
        {"more": ", %block_table: i64[B,4]"}, [("", "there is a block_table already")]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAGED)
def test_pages_are_read_by_attention_alone(name: str) -> None:
    changes, reasons = PAGED[name]
    assert obstacles(given(LATENT, changes), page=1) == reasons
    assert done(given(LATENT, changes))[1].fired == {"append": 2}, "rows need no table"


def test_rows_in_pages_are_seen_as_heads() -> None:
    after, report = done(given(EXPANDED), page=64)
    assert report.fired == {"append": 1}
    write, heads, read = after.entries["main"].nodes
    assert (write.op, heads.op, read.op) == ("cache_write", "reshape", "attention")
    assert str(heads.output.type) == "f32[N,64,2,4]"
    assert [x and x.name for x in read.inputs] == ["q", "k", "k", "n", None, "block_table"]
    scaled = given(EXPANDED, {"before": "%w = mul %q, %q"})
    assert done(scaled, page=64)[1].fired == {"append": 1}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (EXPANDED.replace("[B,{rows},2,4]", "[B,2*({rows}),1,4]"), "reshape"),
        (EXPANDED.replace("attention %q, %k, %k", "attention %q, %k, %z")
         .replace("%y = att", "%z = mul %k, %k\n  %y = att"), "mul"),
    ],
)  # fmt: skip
def test_rows_that_are_seen_otherwise_are_not_in_pages(text: str, why: str) -> None:
    found = obstacles(given(text), page=64)
    assert any(reason.startswith(f"{why} reads the cache past") for _, reason in found), found


@pytest.mark.parametrize(
    ("past", "page", "slack", "pages", "blocks"),
    [
        (128, 64, 512, 6, 10), (129, 64, 512, 9, 11), (127, 64, 0, 6, 2), (64, 64, 1, 3, 2),
        (0, 64, 63, 3, 1), (0, 1, 0, 3, 1), (0, 64, 64, 3, 2),
    ],
)  # fmt: skip
def test_pages_are_as_many_as_the_rows_need(
    past: int, page: int, slack: int, pages: int, blocks: int
) -> None:
    """For three sequences of `past` rows; a sequence's blocks have room for the slack too."""
    program = given(LATENT, symbols={**RANGES, "P": Range(0, past)})
    after, report = done(program, page, slack)
    assert report.fired == {"append": 2}
    assert after.symbols == {
        "B": Range(1, 3), "S": Range(1, 16), "N": Range(1, pages), "M": Range(1, blocks)
    }  # fmt: skip
    assert [str(v.type) for v in after.entries["main"].inputs[2:5]] == [
        "i64[B,M]", f"f32[N,{page},6]", f"f32[N,{page},4]"
    ]  # fmt: skip
    assert {s.storage for s in after.interface.states} == {Storage.PAGED}


def test_one_sequence_of_a_fixed_batch_has_pages_for_itself() -> None:
    text = LATENT.replace("[B,", "[1,").replace("[B]", "[1]")
    after, _ = done(given(text, symbols={"S": Range(1, 16), "P": Range(0, 100)}), page=16, slack=12)
    assert after.symbols == {"S": Range(1, 16), "N": Range(1, 7), "M": Range(1, 7)}
