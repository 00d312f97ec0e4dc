"""What `dsc diff` draws and says, against places worked out by hand and by a second way."""

from __future__ import annotations

import json
import random
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsc.diff import layout, svg
from dsc.diff.compare import EntryDiff, Layer, _merged, _pairs
from dsc.diff.layout import Vertex, draw
from dsc.diff.lines import Line, Row, align, lines_of, with_moves
from dsc.diff.measure import Timing, _median, read_profile
from dsc.diff.page import Cell, cells, change, columns, cost_rows, cost_sums, marked, spell
from dsc.diff.svg import Block, Timeline, live_line, part_marks, picture, rectangles, timeline
from dsc.errors import UsageError
from dsc.ir.dims import symbol
from dsc.ir.parser import parse_graph, parse_program
from dsc.runtime.plan import ARENA, INPUT, Buffer, EntryPlan, Launch, Ref

# --- the drawing ----------------------------------------------------------------------------------


def test_a_diamond_with_an_edge_past_it_is_drawn_to_scale() -> None:
    """Margins of 14, gaps of 18, ranks 34 high and 26 apart; the third path is 4 wide."""
    widths = {"a": 50.0, "b": 60.0, "c": 40.0, "d": 50.0}
    edges = [("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"), ("a", "d")]
    drawing = draw([Vertex(k, w) for k, w in widths.items()], edges)
    assert (drawing.width, drawing.height) == (14 + 60 + 18 + 40 + 18 + 4 + 14, 182)
    middle = pytest.approx((44 + 112 + 152) / 3)  # of b, c and the path
    assert {k: (drawing.boxes[k][0] + w / 2, drawing.boxes[k][1]) for k, w in widths.items()} == {
        "a": (middle, 14), "b": (44, 74), "c": (112, 74), "d": (middle, 134),
    }  # fmt: skip
    assert len(drawing.paths) == 5
    assert drawing.paths[-1] == (
        "a", "d", [(middle, 48), (152, 74), (152, 108), (middle, 134)],
    )  # fmt: skip


def test_what_is_not_connected_stands_side_by_side() -> None:
    drawing = draw([Vertex("a", 50), Vertex("b", 61), Vertex("c", 40)], [])
    assert drawing.boxes == {"a": (14, 14), "b": (82, 14), "c": (161, 14)}
    assert (drawing.width, drawing.height) == (215, 62)
    centres = layout._places(layout._Layers([["a", "b"]], {"a": 50.0, "b": 30.0}))
    assert centres == {"a": -49 + 25, "b": 49 - 15}


def test_the_first_rank_keeps_its_order_and_the_next_follows() -> None:
    edges = [("a", "y"), ("b", "x")]
    drawing = draw([Vertex(key, 30) for key in "abxy"], edges)
    assert [drawing.boxes[key][0] for key in "abyx"] == [14, 62, 14, 62]


def test_paths_of_a_value_past_a_rank_are_one_until_they_part() -> None:
    vertices = [Vertex(key, 30) for key in "abcd"]
    drawing = draw(vertices, [("a", "b"), ("b", "c"), ("c", "d"), ("a", "c"), ("a", "d")])
    paths = {(a, b): points for a, b, points in drawing.paths}
    assert paths["a", "c"][:3] == paths["a", "d"][:3]
    assert len(paths["a", "d"]) == 6


def test_what_sinks_stands_right_above_the_first_that_it_feeds() -> None:
    vertices = [Vertex("w", 30, sinks=True), Vertex("u", 30), Vertex("idle", 30, sinks=True)]
    vertices += [Vertex(key, 30) for key in "abc"]
    edges = [("a", "b"), ("b", "c"), ("w", "c"), ("u", "c"), ("w", "d"), ("c", "d")]
    drawing = draw([*vertices, Vertex("d", 30)], edges)
    rank = {key: (y - 14) / 60 for key, (_, y) in drawing.boxes.items()}
    assert rank == {"a": 0, "b": 1, "c": 2, "d": 3, "w": 1, "u": 0, "idle": 0}


@pytest.mark.parametrize("inwards", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_tree_has_no_crossing(inwards: bool, seed: int) -> None:
    """Of 1, 3, 6 and 12 vertices a rank, which come in any order."""
    chance, sizes = random.Random(seed), (1, 3, 6, 12)
    ranks = [[(depth, i) for i in range(size)] for depth, size in enumerate(sizes)]
    edges = [
        ((depth, i * sizes[depth] // sizes[depth + 1]), (depth + 1, i))
        for depth in range(3) for i in range(sizes[depth + 1])
    ]  # fmt: skip
    for rank in ranks:
        chance.shuffle(rank)
    if inwards:
        ranks, edges = ranks[::-1], [(b, a) for a, b in edges]
    drawing = draw([Vertex(key, 30) for rank in ranks for key in rank], list(edges))
    x = {key: place[0] for key, place in drawing.boxes.items()}
    for a, b in edges:
        for c, d in edges:
            assert a[0] != c[0] or (x[a] - x[c]) * (x[b] - x[d]) >= 0


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(-90, 90)), min_size=1, max_size=7))
def test_a_rank_settles_where_the_sum_of_squares_is_least(vertices: list[tuple[int, int]]) -> None:
    """Starts less what stands before them must not fall: isotonic regression, by its formula."""
    widths: dict[Any, float] = {i: float(width) for i, (width, _) in enumerate(vertices)}
    near: dict[Any, list[Any]] = {i: [f"above {i}"] for i in widths}
    centres: dict[Any, float] = {f"above {i}": float(at) for i, (_, at) in enumerate(vertices)}
    layout._settle(list(widths), widths, centres, near)
    before = [0.0, *accumulate(w + layout.GAP for w in widths.values())]
    wanted = [at - width / 2 - before[i] for i, (width, at) in enumerate(vertices)]
    for i in range(len(wanted)):
        least = max(
            min(sum(wanted[a : b + 1]) / (b + 1 - a) for b in range(i, len(wanted)))
            for a in range(i + 1)
        )
        assert centres[i] - widths[i] / 2 == pytest.approx(least + before[i], abs=1e-6)


# --- pictures of a layer and of an arena ----------------------------------------------------------

LAYER = parse_graph("""graph g(%x: f32[B,4], @model.layers.1.up.weight: f32[4,4]) {
  %a = exp %x : f32[B,4] loc "model.layers.0.pre"
  %y = linear %a, @model.layers.1.up.weight : f32[B,4] loc "model.layers.1.mlp"
  %z = silu %y : f32[B,4] loc "model.layers.1.mlp"
  %r = add %z, %a : f32[B,4] loc "model.layers.1.mlp"
  %n = neg %z : f32[B,4] loc "model.norm"
  return %r, %n
}""")


def test_a_layer_is_drawn_with_what_comes_in_and_what_others_read() -> None:
    """Texts are 6.3 a character and 16 besides; all but the inner edge cross the border."""
    drawn = picture(LAYER, "model.layers.1", frozenset({"z"}))
    said = [(box.family, box.lines, round(box.width, 1), box.y) for box in drawn.boxes]
    assert said == [
        ("pill", ("a",), 22.3, 14),
        ("gemm", ("linear", "@up"), 53.8, 74),
        ("pointwise changed", ("silu", "f32[B,4]"), 66.4, 134),
        ("pointwise", ("add", "f32[B,4]"), 66.4, 194),
        ("pill", ("z",), 22.3, 194),
        ("pill", ("r",), 22.3, 254),
    ]
    assert [outer for _, outer in drawn.paths] == [True, False, False, True, True, True]
    assert drawn.boxes[2].title == '%z = silu %y : f32[B,4] loc "model.layers.1.mlp"'
    assert drawn.boxes[0].title == ""
    assert drawn.height == 5 * 34 + 4 * 26 + 28
    assert drawn.width == pytest.approx(max(b.x + b.width for b in drawn.boxes) + 14, abs=16)


@pytest.mark.parametrize(
    ("weight", "said"),
    [("model.layers.1.up.weight", "@up"), ("mlp.experts.w", "@experts.w"), ("w", "@w")],
)
def test_a_weight_is_called_by_the_end_of_its_name(weight: str, said: str) -> None:
    assert svg._tail(weight) == said


def test_long_words_are_cut() -> None:
    assert svg._short("x" * 34) == "x" * 34
    assert svg._short("x" * 35) == "x" * 33 + "…"


ARENA_OF_THREE = Timeline(
    (
        Block("a", 0, 128, 0, 1, "model.layers.0"),
        Block("b", 128, 64, 1, 2, ""),
        Block("c", 0, 1, 3, 3, ""),
    ),
    {0: "model.layers.0", 2: "model.norm.with.a.name"},
    steps=4, size=1040, lower_bound=192,
)  # fmt: skip


def test_an_arena_is_drawn_to_scale() -> None:
    """1080 wide for four steps, 260 high for 1040 bytes: offsets go up from the bottom."""
    assert [*ARENA_OF_THREE.scales] == [270, 0.25]
    assert [each[:4] for each in rectangles(ARENA_OF_THREE)] == [
        (0, 260 - 32, 540, 32),
        (270, 260 - 32 - 16, 540, 16),
        (810, pytest.approx(259.4), 270, 0.6),
    ]
    title = next(rectangles(ARENA_OF_THREE))[4]
    assert title == "%a 128 B at 0, steps 0 to 1 model.layers.0"
    line = live_line(ARENA_OF_THREE)
    assert line == "M0 260.00V228.00H270.00V212.00H540.00V244.00H810.00V259.75H1080.00"


def test_a_part_is_named_where_there_is_room() -> None:
    assert [*part_marks(ARENA_OF_THREE)] == [(0, "model.layers.0"), (540, "model.norm.with.a.name")]
    long = Timeline((), {0: "abcde", 9: "abcdef", 19: "ab"}, steps=1000, size=1, lower_bound=0)
    assert long.width == 4000
    assert [*part_marks(long)] == [(0, ""), (36, ""), (76, "ab")]


@pytest.mark.parametrize(("count", "titled"), [(2500, True), (2501, False)])
def test_a_great_many_rectangles_have_no_titles(count: int, titled: bool) -> None:
    blocks = tuple(Block("a", 0, 64, 0, 0, "") for _ in range(count))
    assert bool(next(rectangles(Timeline(blocks, {}, 1, 64, 64)))[4]) == titled


def test_a_plan_is_read_at_the_largest_sizes() -> None:
    program = parse_program("""program "p" {stage=CANONICAL}
symbols {B=[1,40]}
graph main(%x: f32[B]) {
  %y = exp %x : f32[B] loc "model.layers.0"
  %z = neg %y : f32[B] loc "model.norm"
  return %z
}""")
    size = 4 * symbol("B")
    buffers = (Buffer(INPUT, "x", size), Buffer(ARENA, "", size, 64), Buffer(ARENA, "t", 64, 0))
    launches = (
        Launch("k", (Ref(0, "r", size), Ref(1, "w", size)), node="y", loc="elsewhere"),
        Launch("k", (Ref(1, "r", size), Ref(2, "s", 64)), node="z", loc="here"),
        Launch("k", (), node="", loc="model.layers.0.again"),
    )
    plan = EntryPlan((), (), buffers, launches, arena_bytes=256, lower_bound=224)
    found = timeline(program, "main", plan)
    assert found == Timeline(
        (Block("y", 64, 192, 0, 1, "elsewhere"), Block("t", 0, 64, 1, 1, "here")),
        {0: "model.layers.0", 1: "model.norm"},
        steps=3, size=256, lower_bound=224,
    )  # fmt: skip


# --- words and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("flops", 9_999, "9999"),
        ("flops", 10_000, "10.00 k"),
        ("flops", 999_999, "1000.00 k"),
        ("flops", 1_000_000, "1.00 M"),
        ("flops", 1_500_000_000, "1.50 G"),
        ("parameters", 2_500_000_000_000, "2.50 T"),
        ("nodes", 0, "0"),
        ("read_bytes", 1_500, "1.5 kB"),
        ("milliseconds", 1.23456, "1.235"),
    ],
)
def test_a_measure_is_spelled_by_what_it_measures(key: str, value: float, said: str) -> None:
    assert spell(key, value) == said


@pytest.mark.parametrize(
    ("key", "before", "after", "wanted"),
    [
        ("nodes", 3, 3, ("3", "", "")),
        ("nodes", 3, 2, ("3", "2", "less")),
        ("nodes", 2, 3, ("2", "3", "more")),
        ("nodes", None, 3, ("-", "3", "")),
        ("nodes", 3, None, ("3", "-", "")),
        ("nodes", None, None, ("-", "", "")),
        ("parameters", 1, 2, ("1", "2", "")),
        ("flops", 1_000_001, 1_000_002, ("1.00 M", "", "")),
    ],
)
def test_a_change_is_two_numbers_and_whether_it_is_less(
    key: str, before: float | None, after: float | None, wanted: tuple[str, str, str]
) -> None:
    found = change(key, before, after)
    assert tuple(found) == wanted
    assert str(found) == (f"{wanted[0]} → {wanted[1]}" if wanted[1] else wanted[0])


def test_of_a_changed_line_the_words_that_differ_are_marked() -> None:
    before = Line("%c = append %p, %a : f32[8]", 1, "model.layers.0.mlp.up")
    after = Line("%c = write %p, %a : f32[9]", 0, "model.layers.0")
    left, right = cells(Row("changed", before, after), "model.layers.0")
    assert left == Cell(
        "changed",
        [("%c = ", False), ("append", True), (" %p, %a : f32[", False), ("8", True), ("]", False)],
        1,
        "mlp.up",
    )
    assert [word for word, differs in right.words if differs] == ["write", "9"]
    assert (right.depth, right.place) == (0, "")
    longer, shorter = Line("%a = f %x, %y"), Line("%a = f %x")
    words = [each.words for each in cells(Row("changed", longer, shorter), "")]
    assert words == [[("%a = f %x", False), (", %y", True)], [("%a = f %x", False)]]


@pytest.mark.parametrize("kind", ["same", "renamed", "both"])
def test_other_lines_are_not_marked(kind: str) -> None:
    left, right = cells(Row(kind, Line("%a = f"), Line("%b = g")), "")
    assert (left.words, right.words) == ([("%a = f", False)], [("%b = g", False)])
    alone = cells(Row("added", None, Line("%b = g")), "")
    assert alone == (Cell("gap"), Cell("added", [("%b = g", False)]))


def test_marked_are_the_results_of_lines_of_their_own() -> None:
    """Not of what is the same elsewhere, and not of what lies in a region."""
    rows = [
        Row("changed", Line("%a, %b = f"), Line("%c = f")),
        Row("renamed", Line("%d = f"), Line("%e = f")),
        Row("removed", Line("%g = f"), None),
        Row("removed", Line("%h = f"), None, (True, False)),
        Row("added", None, Line("%i = f", depth=1)),
        Row("added", None, Line("%j = f")),
    ]
    assert [*map(sorted, marked(rows))] == [["a", "b", "g"], ["c", "j"]]


# --- pairs, layers and times ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "pairs"),
    [
        (["a", "b"], ["b", "a", "c"], [("b", "b"), ("a", "a")]),
        (["a"], ["x", "y"], [("a", "x"), ("a", "y")]),
        (["x", "y"], ["a"], [("x", "a"), ("y", "a")]),
        (["a", "b"], ["x", "y"], []),
        ([], ["x"], []),
        (["x"], [], []),
    ],
)
def test_entries_are_paired_by_name_or_with_the_only_one(
    before: list[str], after: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert _pairs(before, after) == pairs


def test_layers_of_both_sides_keep_their_order() -> None:
    assert _merged(["a", "b", "d"], ["a", "c", "d", "e"]) == ["a", "b", "c", "d", "e"]
    assert _merged([], ["a"]) == _merged(["a"], []) == ["a"]


def test_a_run_of_equal_layers_is_one_line_with_the_mean_of_its_times() -> None:
    def layer(name: str, flops: float, times: tuple[float, float]) -> Layer:
        sides = ({"nodes": 2, "flops": flops, "milliseconds": each} for each in times)
        return Layer(name, next(sides), next(sides), ((), ()))

    layers = (
        layer("model.layers.0", 8.0, (1.0, 4.0)),
        layer("model.layers.1", 8.0, (3.0, 5.0)),
        layer("model.layers.2", 9.0, (1.0, 1.0)),
        Layer("model.norm", {}, {"nodes": 1, "flops": 1.0}, ((), ())),
    )
    program = parse_program('program "p" {stage=CANONICAL}\ngraph main(%x: f32[1]) { return %x }')
    totals = ({"nodes": 6, "flops": 25.0}, {"nodes": 7, "flops": 26.0, "milliseconds": 10.0})
    entry = EntryDiff(
        ("main", "step"), (program, program), ({}, {}), totals, layers, {}, (None, None)
    )
    assert columns(entry) == [("nodes", "nodes"), ("flops", "flop"), ("milliseconds", "ms")]
    assert [(name, len(run), [*map(str, found)]) for name, run, found in cost_rows(entry)] == [
        ("model.layers.{0..1} (2, each)", 2, ["2", "8", "2.000 → 4.500"]),
        ("model.layers.2", 1, ["2", "9", "1.000"]),
        ("model.norm", 1, ["- → 1", "- → 1", "-"]),
    ]
    assert [*map(str, cost_sums(entry))] == ["6 → 7", "25 → 26", "- → 10.000"]
    assert entry.name == "main → step"
    assert entry.error is None


def test_times_are_medians_in_milliseconds_and_absent_layers_took_none() -> None:
    runs = [(0.004, {"a": 0.001}), (0.002, {"a": 0.003, "b": 0.002}), (0.009, {"a": 0.002})]
    assert _median(runs) == Timing(4.0, {"a": 2.0, "b": 0.0})


def test_a_trace_is_cut_by_the_runs_of_entries(tmp_path: Path) -> None:
    """Microseconds; a step at a run's beginning is in it, one at its end is not."""

    def event(name: str, cat: str, start: float, taken: float, **args: str) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": taken, "args": args}

    steps = [
        event("a", "step", 1000, 500, loc="model.layers.0.mlp"),
        event("a", "step", 1500, 250, loc="model.layers.0.attn"),
        event("b", "step", 1999, 125, loc="model.norm"),
        event("c", "kernel", 1200, 900, loc="model.layers.0"),
        event("a", "step", 2000, 500, loc="model.layers.0.mlp"),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [event("decode", "entry", 1000, 1000), *steps]}))
    (entry,) = read_profile(path, ["decode", "prefill"]).items()
    assert entry[0] == "decode"
    assert entry[1].milliseconds == pytest.approx(1)
    assert entry[1].layers == pytest.approx({"model.layers.0": 0.75, "model.norm": 0.125})
    path.write_text(json.dumps({"traceEvents": steps}))
    (alone,) = read_profile(path, ["decode"]).values()
    assert alone.milliseconds == pytest.approx(1.375)
    assert alone.layers == pytest.approx({"model.layers.0": 1.25, "model.norm": 0.125})
    with pytest.raises(UsageError, match="no run of any entry"):
        read_profile(path, ["decode", "prefill"])


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "kinds"), [("f32[4]", ["both", "renamed"]), ("f32[5]", ["both", "changed"])]
)
def test_one_value_in_the_place_of_another_is_known_by_its_type(
    type_: str, kinds: list[str]
) -> None:
    before = [Line("%a = exp %x : f32[4]"), Line("%c = neg %a : f32[4]")]
    after = [Line(f"%z = tanh %y : {type_}"), Line("%d = neg %z : f32[4]")]
    assert [row.kind for row in align(before, after)] == kinds
    known = {"%a": "%old"}
    align(before[:1], after[:1], known)
    assert known["%a"] == ("%z" if type_ == "f32[4]" else "%old")


def test_a_body_is_indented_and_its_place_told_apart() -> None:
    graph = parse_graph("""graph g(%x: f32[B,4]) {
      %z = fused %x {body=graph body(%x: f32[B,4]) {
        %y = exp %x : f32[B,4] loc "model.layers.0.mlp"
        return %y
      }} : f32[B,4] loc "model.layers.0"
      return %z
    }""")
    found = [(line.depth, line.loc) for line in lines_of(graph.nodes)]
    assert found == [(0, ""), (1, "model.layers.0.mlp"), (1, ""), (0, "model.layers.0")]
    line = Line("%a, %b = split %x {sizes=[1,2]} : f32[1], f32[2]", loc="m")
    assert (line.results, line.names, line.place) == (("%a", "%b"), "%a,%b", "split m")
    assert (line.skeleton, line.type) == (
        "%, % = split % {sizes=[1,2]} : f32[1], f32[2] m", "f32[1], f32[2]",
    )  # fmt: skip
    last = Line("return %y")
    assert (last.results, last.names) == ((), "return %y")


@pytest.mark.parametrize(
    ("row", "sides", "differs"),
    [
        (Row("same", Line("a"), Line("a")), ("same", "same"), False),
        (Row("renamed", Line("a"), Line("b")), ("renamed", "renamed"), False),
        (Row("changed", Line("a"), Line("b")), ("changed", "changed"), True),
        (Row("both", Line("a"), Line("b")), ("removed", "added"), True),
        (Row("both", Line("a"), Line("b"), (True, False)), ("moved", "added"), True),
        (Row("both", Line("a"), Line("b"), (False, True)), ("removed", "moved"), True),
        (Row("both", Line("a"), Line("b"), (True, True)), ("moved", "moved"), False),
        (Row("removed", Line("a"), None), ("removed", "gap"), True),
        (Row("removed", Line("a"), None, (True, False)), ("moved", "gap"), False),
        (Row("added", None, Line("a")), ("gap", "added"), True),
    ],
)
def test_a_row_says_what_happened_to_each_line(
    row: Row, sides: tuple[str, str], differs: bool
) -> None:
    assert (row.sides, row.differs) == (sides, differs)


@given(st.lists(st.sampled_from("abcde")), st.lists(st.sampled_from("abcde")))
def test_every_line_of_both_texts_is_shown_once_in_order(left: str, right: str) -> None:
    """Lines face each other where a kind says so, and none stands alone beside a gap."""
    before, after = ([Line(f"%{c} = {c} : f32[4]") for c in side] for side in (left, right))
    rows = align(before, after)
    assert [row.before for row in rows if row.before] == before
    assert [row.after for row in rows if row.after] == after
    for row in rows:
        assert (row.kind == "removed") == (row.after is None)
        assert (row.kind == "added") == (row.before is None)
        assert (row.kind in ("same", "renamed")) == (
            row.before is not None and row.after is not None and row.before == row.after
        )
    for first, second in pairwise(rows):
        assert {first.kind, second.kind} != {"removed", "added"}


def test_a_line_moves_once_and_only_to_what_says_the_same() -> None:
    texts = {
        "0": [Row("removed", Line("%a = f"), None), Row("removed", Line("%a = f"), None)],
        "1": [Row("added", None, Line("%b = f")), Row("removed", Line("return"), None)],
        "2": [Row("added", None, Line("%c = f")), Row("added", None, Line("return"))],
        "3": [Row("added", None, Line("%b = f")), Row("added", None, Line("%b = f"))],
    }
    found = with_moves(texts, {"%a": "%b"})
    assert {name: [row.moved for row in rows] for name, rows in found.items()} == {
        "0": [(True, False), (True, False)],
        "1": [(False, True), (False, False)],
        "2": [(False, False), (False, False)],
        "3": [(False, True), (False, False)],
    }
