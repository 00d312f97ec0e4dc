"""`dsc diff`: what differs, what it costs, how far apart results are; the page loads nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

import dsc
from dsc.cli.diff import _print_entry
from dsc.diff import layout
from dsc.diff.compare import compare, shrunk_together
from dsc.diff.lines import Line, align, lines_of, with_moves
from dsc.diff.measure import read_profile
from dsc.diff.page import change, page
from dsc.diff.sides import Side, open_side
from dsc.diff.svg import _curve, timeline
from dsc.errors import ArtifactError, FileError, ParseError, UsageError
from dsc.ir.layers import by_layer, home
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.weights import MetaSource
from dsc.passes.absorb_mla import AbsorbMla
from dsc.passes.specialise_entries import SpecialiseEntries
from dsc.rewrite.base import PassReport
from dsc.runtime.profiler import Event, Profiler
from tests.backends import canonical_lm as family
from tests.runtime.test_session import small_lm

from .conftest import Invoke

DATA = Path(__file__).resolve().parent.parent / "data"
SMALL = DATA / "small_lm.dsc"


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compile of the small model: its dumps, and the artifact in `out`."""
    folder = tmp_path_factory.mktemp("dumps")
    compiled = dsc.compile(
        small_lm(), backend="tvm", max_context=32, prefill_chunk=8, dump_dir=folder
    )
    compiled.save(folder / "out")
    dsc.compile(small_lm(), backend="reference", max_context=32, prefill_chunk=8).save(
        folder / "slow"
    )
    return folder


def lines(*texts: str) -> list[Line]:
    return [Line(text) for text in texts]


def kinds(before: list[Line], after: list[Line]) -> list[str]:
    return [row.kind for row in align(before, after)]


# --- lines ----------------------------------------------------------------------------------------


def test_a_changed_line_faces_its_former_self() -> None:
    before = lines("%a = exp %x : f32[4]", "%c = append %p, %a : f32[8]", "%d = neg %c : f32[8]")
    after = lines(
        "%a = exp %x : f32[4]", "%c = cache_write %p, %a : f32[9]", "%d = neg %c : f32[8]"
    )
    rows = align(before, after)
    assert [r.kind for r in rows] == ["same", "changed", "same"]
    assert [r.before for r in rows] == before
    assert [r.after for r in rows] == after


def test_a_renaming_is_no_change_and_a_swap_is() -> None:
    before = lines("%a = exp %x : f32[4]", "%b = neg %y : f32[4]", "%c = sub %a, %b : f32[4]")
    after = lines("%k = exp %x : f32[4]", "%l = neg %y : f32[4]", "%m = sub %k, %l : f32[4]")
    assert kinds(before, after) == ["renamed"] * 3
    after[2] = Line("%m = sub %l, %k : f32[4]")
    assert kinds(before, after) == ["renamed", "renamed", "changed"]


def test_every_line_is_shown_once_and_in_order() -> None:
    before = lines("%a = exp %x : f32[4]", "%b = neg %a : f32[4]", "%c = cos %b : f32[4]")
    after = lines("%z = tanh %x : f32[2]", "%y = erf %z : f32[2]")
    rows = align(before, after)
    assert [r.before for r in rows if r.before] == before
    assert [r.after for r in rows if r.after] == after
    assert {r.kind for r in rows} == {"both", "removed"}


def test_a_region_reads_its_weights_under_their_own_names() -> None:
    text = """graph g(%x: f32[B,4], @w: f32[4,4]) {
      %y = linear %x, @w : f32[B,4]
      %z = silu %y : f32[B,4]
      return %z
    }"""
    plain = parse_graph(text)
    fused = parse_graph("""graph g(%x: f32[B,4], @w: f32[4,4]) {
      %z = fused %x, @w {body=graph body(%x: f32[B,4], %w1: f32[4,4]) {
        %y = linear %x, %w1 : f32[B,4]
        %z = silu %y : f32[B,4]
        return %z
      }} : f32[B,4]
      return %z
    }""")
    rows = align(lines_of(plain.nodes), lines_of(fused.nodes))
    assert [r.kind for r in rows] == ["added", "same", "same", "added", "added"]


def test_a_line_that_stands_elsewhere_is_nochange() -> None:
    """Moved past another, within a layer and into the next one; a changed one is a change."""
    before = lines("%a = exp %x : f32[4]", "%b = neg %x : f32[4]", "%c = sub %a, %b : f32[4]")
    known: dict[str, str] = {}
    texts = {
        "0": align(before, [before[1], before[0]], known),
        "1": align([], [before[2], Line("%d = cos %x : f32[4]")], known),
    }
    found = with_moves(texts, known)
    assert not any(row.differs for row in found["0"])
    assert [(row.sides[1], row.differs) for row in found["1"]] == [
        ("moved", False), ("added", True),
    ]  # fmt: skip
    changed = Line("%b = neg %y : f32[4]")
    rows = with_moves({"": align(before, [changed, before[0], before[2]])}, {})[""]
    assert sum(row.differs for row in rows) == 2


# --- the comparison -------------------------------------------------------------------------------


def test_stages_of_a_dump(dumps: Path) -> None:
    found = compare(open_side(f"{dumps}/specialise_entries"), open_side(f"{dumps}/absorb_mla"))
    decode = next(e for e in found.entries if e.name == "decode")
    assert 0 < (decode.error or 0) < 1e-5
    assert "agree" in found.agreement
    assert decode.totals[1]["nodes"] == decode.totals[0]["nodes"] + 2
    rows = [r for each in decode.rows.values() for r in each]
    added = [r.after.text.split()[2] for r in rows if r.kind == "added" and r.after]
    assert added == ["einsum", "latent_attention"]
    (changed,) = (r for r in rows if r.kind == "changed")
    assert changed.before is not None
    assert changed.before.text.startswith("%o = mla_attention")
    assert found.unpaired == ((), ())


def test_caches_in_pages_are_compared_at_the_same_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page has 64 rows, which are not the context of the side without pages."""

    def side(cache: str) -> Side:
        model = dsc.compile(small_lm(), backend="reference", max_context=32, cache=cache)
        return open_side(str(model.save(tmp_path / cache)))

    found = compare(side("contiguous"), side("paged"), run=False)
    decode = next(e for e in found.entries if e.name == "decode")
    assert decode.at == ({"B": 1, "P": 32, "S": 1}, {"B": 1, "M": 1, "N": 1, "S": 1})
    _print_entry(Console(width=120), decode)
    assert "decode (B=1 P=32 S=1 → B=1 M=1 N=1 S=1)" in capsys.readouterr().out


def test_one_entry_before_three_after_fixes_what_a_decode_fixes(dumps: Path) -> None:
    one, three = (open_side(f"{dumps}/{x}") for x in ("hoist_select_rows", "specialise_entries"))
    found = compare(one, three)
    assert [e.name for e in found.entries] == ["step → decode", "step → extend", "step → prefill"]
    decode = found.entries[0]
    assert decode.at[0] == decode.at[1]
    assert {r.kind for rows in decode.rows.values() for r in rows} == {"same"}
    assert decode.error == 0.0


def test_a_wrong_program_shows_its_error(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.dsc"
    wrong.write_text(SMALL.read_text().replace("scale=0.5", "scale=0.25"))
    found = compare(open_side(str(SMALL)), open_side(str(wrong)))
    (entry,) = found.entries
    assert (entry.error or 0) > 1e-3
    assert max(entry.errors, key=entry.errors.__getitem__) == "logits"
    assert entry.errors["present.0.latent"] == 0.0


def test_artifacts_use_their_own_weights(dumps: Path) -> None:
    found = compare(open_side(str(dumps / "slow")), open_side(str(dumps / "out")))
    assert "the artifacts' weights" in found.agreement
    assert "agree" in found.agreement


def test_programs_that_have_nothing_in_common(tmp_path: Path) -> None:
    other = tmp_path / "other.dsc"
    other.write_text(
        'program "o" {stage=CANONICAL}\ngraph main(%x: f32[4]) {\n %y = exp %x\n return %y\n}\n'
    )
    found = compare(open_side(str(SMALL)), open_side(str(other)))
    assert "x was not there before" in found.agreement
    page(found)


def test_programs_too_wide_to_interpret_shrink_together() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "random_source", MetaSource)
        wide = family.canonical_lm(family.Sizes(vocab=129280, hidden=4096, inner=9216))
    first = SpecialiseEntries().run(wide, PassReport())
    second = AbsorbMla().run(first, PassReport())
    small = shrunk_together(first, second)
    assert [v.type for v in small[0].entries["decode"].inputs] == [
        v.type for v in small[1].entries["decode"].inputs
    ]
    found = compare(Side("a", first, first), Side("b", second, second))
    assert found.agreement.startswith("shrunk form: 12 runs of decode, extend, prefill agree")


# --- the command ----------------------------------------------------------------------------------


def test_the_terminal_and_the_page(invoke: Invoke, dumps: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    line = ("diff", str(dumps / "slow"), str(dumps / "out"), "-o", str(out), "--trust", "--measure")
    text = invoke(*line, "--context", "8").stdout
    assert "decode (B=1" in text
    assert "max error" in text
    assert " ms" in text
    assert "cache_write" in out.read_text()
    with pytest.raises(UsageError, match="exists already"):
        invoke(*line)


def test_json_is_one_document(invoke: Invoke, dumps: Path) -> None:
    line = ("diff", f"{dumps}/specialise_entries", f"{dumps}/absorb_mla", "--json", "--no-error")
    found = json.loads(invoke(*line).stdout)
    assert found["agreement"] == "not run"
    assert set(found["entries"]) == {"decode", "extend", "prefill"}
    assert found["entries"]["decode"]["layers"][0]["after"]["flops"] > 0


def test_mistakes_are_told(invoke: Invoke, dumps: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing at"):
        invoke("diff", str(tmp_path / "a"), str(SMALL))
    with pytest.raises(UsageError, match="holds the stages input, merge_shared_expert"):
        open_side(str(dumps / "nonsense"))
    with pytest.raises(UsageError, match="is no artifact"):
        invoke("diff", str(tmp_path), str(SMALL))
    garbage = tmp_path / "x.dsc"
    garbage.write_text("graph ???")
    with pytest.raises(ParseError):
        invoke("diff", str(garbage), str(SMALL))
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "dsc.json").write_text("{}")
    with pytest.raises(ArtifactError):
        invoke("diff", str(tmp_path / "y"), str(SMALL))
    line = ("diff", str(SMALL), str(SMALL), "--measure", "--profiles", "a", "b")
    with pytest.raises(UsageError, match="both give times"):
        invoke(*line)


# --- times ----------------------------------------------------------------------------------------


def test_profiles_give_medians_by_entry_and_layer(tmp_path: Path) -> None:
    profiler = Profiler()
    for start, factor in ((0.0, 1), (10.0, 2), (20.0, 9)):
        profiler.events.append(Event("decode", "entry", start, 0.004 * factor))
        profiler.events.append(
            Event("linear", "step", start, 0.001 * factor, loc="model.layers.1.mlp.up_proj")
        )
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(path)
    timing = read_profile(path, ["decode", "prefill"])["decode"]
    assert timing.milliseconds == pytest.approx(8.0)
    assert timing.layers == {"model.layers.1": pytest.approx(2.0)}
    with pytest.raises(UsageError, match="no run of any entry"):
        read_profile(path, ["prefill", "extend"])
    path.write_text('{"traceEvents": [7]}')
    with pytest.raises(UsageError, match="no trace of ours"):
        read_profile(path, ["decode"])
    with pytest.raises(FileError, match="cannot read"):
        read_profile(tmp_path / "none", ["decode"])


# --- the page -------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks nesting, and collects what could load or run something."""

    VOID = frozenset({"meta", "br", "!doctype"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bad: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.bad += [tag] if tag in ("script", "link", "img", "iframe", "object", "use") else []
        for name, value in attrs:
            local = (value or "").startswith("#")
            self.bad += [name] if name in ("src", "xlink:href") or name.startswith("on") else []
            self.bad += [f"{name}={value}"] if name == "href" and not local else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.bad.append(f"</{tag}>")


def read_page(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def test_the_page_is_whole_and_loads_nothing(dumps: Path) -> None:
    text = page(compare(open_side(f"{dumps}/absorb_mla"), open_side(f"{dumps}/own_outputs")))
    reader = read_page(text)
    assert not reader.bad
    assert not reader.open
    assert reader.count["svg"] >= 3 * 4  # three entries: two graphs, two timelines each
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import|https?:", text)


def test_a_path_starts_where_it_was_drawn_from() -> None:
    assert _curve([(1, 2), (1, 5), (3, 9)]) == "M1.0 2.0V5.0C1.0 7.0 3.0 7.0 3.0 9.0"
    assert _curve([(4, 2), (6, 4)]).startswith("M4.0 2.0C")


def test_the_page_escapes_what_comes_from_files(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    text = SMALL.read_text().replace(
        "%y = linear %of, @wo", f"%y = linear %of, @wo : f32[B,S,8] loc {json.dumps(evil)}"
    )
    program = parse_program(text)
    side = Side(f"{evil}.dsc", program, program)
    made = page(compare(side, open_side(str(SMALL)), run=False))
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert not read_page(made).bad


def test_the_timeline_shows_a_plan_without_overlap(dumps: Path) -> None:
    program = open_side(f"{dumps}/own_outputs").text
    found = timeline(program, "decode")
    assert found is not None
    assert 0 < found.lower_bound <= found.size
    assert max(b.offset + b.size for b in found.blocks) == found.size
    blocks = found.blocks
    for i, a in enumerate(blocks):
        for b in blocks[:i]:
            together = a.first <= b.last and b.first <= a.last
            overlap = a.offset < b.offset + b.size and b.offset < a.offset + a.size
            assert not (together and overlap), (a, b)


def test_what_a_fusion_gathers_is_not_marked_but_the_region_is(dumps: Path) -> None:
    """Operators keep their lines in a region and past it; only regions have a frame."""
    before, after = (open_side(f"{dumps}/{stage}") for stage in ("merge_projections", "fuse"))
    text = page(compare(before, after, run=False))
    marked = re.findall(r'<g class="(\w+) changed">', text)
    assert marked
    assert set(marked) == {"fused"}
    assert 'class="old removed"' not in text


def test_more_regions_are_neither_good_nor_bad() -> None:
    assert "less" in change("nodes", 25, 13)
    assert "more" in change("flops", 10, 20)
    shown = change("regions", 0, 16)
    assert "16" in shown
    assert "more" not in shown


def test_a_region_over_two_layers_counts_in_the_first() -> None:
    graph = parse_graph("""graph g(%x: f32[B,4], @w: f32[4]) {
      %s, %n = fused %x, @w {body=graph body(%x: f32[B,4], %w: f32[4]) {
        %s = add %x, %x : f32[B,4] loc "model.layers.3.mlp"
        %n = rms_norm %s, %w {eps=1e-06} : f32[B,4] loc "model.norm"
        return %s, %n
      }} : f32[B,4], f32[B,4] loc "model"
      return %s, %n
    }""")
    assert list(by_layer(graph)) == ["model.layers.3"]
    assert home(graph.nodes[0]) == "model.layers.3.mlp"


def test_a_narrow_page_has_one_column(dumps: Path) -> None:
    """Below 800 px texts and pictures stand under each other; what is wide scrolls by itself."""
    text = page(compare(open_side(f"{dumps}/absorb_mla"), open_side(f"{dumps}/fuse"), run=False))
    narrow = text[text.index("@media (max-width: 800px)") : text.index("</style>")]
    assert re.search(r"table\.text td \{ display: block; width: 100%; \}", narrow)
    assert re.search(r"\.gap, [^{]*\.new\.same[^{]*\{ display: none; \}", narrow)
    assert ".pair { grid-template-columns: minmax(0, 1fr); }" in narrow
    costs = re.findall(r'(<div class="wide">)?<table class="costs">', text)
    assert costs
    assert all(costs)
    cells = re.findall(r'<td class="([\w ]+)"', text)
    assert {"old same", "new same", "old gap", "new added"} <= set(cells)
    assert len([c for c in cells if c.startswith("old")]) == len(cells) / 2


# --- the drawing ----------------------------------------------------------------------------------


def test_a_drawing_flows_down_and_nothing_overlaps() -> None:
    vertices = [layout.Vertex(i, 40.0 + 7 * (i % 5)) for i in range(40)]
    edges: list[tuple[layout.Key, layout.Key]] = [
        (i, j) for j in range(40) for i in {j // 2, j // 3, j - 1} if 0 <= i < j
    ]
    edges = [(a, b) for a, b in edges if a != b]
    drawing = layout.draw(vertices, edges)
    width = {v.key: v.width for v in vertices}
    for start, end, points in drawing.paths:
        assert drawing.boxes[start][1] + layout.HEIGHT < drawing.boxes[end][1]
        assert [y for _, y in points] == sorted(y for _, y in points)
    places = sorted((y, x, x + width[k]) for k, (x, y) in drawing.boxes.items())
    for (y0, _, right), (y1, left, _) in pairwise(places):
        assert y0 != y1 or right <= left + 1e-6
    assert all(0 <= x and x + width[k] <= drawing.width for k, (x, _) in drawing.boxes.items())


def test_a_straight_chain_is_drawn_straight() -> None:
    vertices = [layout.Vertex(i, 50.0) for i in range(4)]
    drawing = layout.draw(vertices, [(0, 1), (1, 2), (2, 3)])
    assert len({round(x, 3) for x, _ in drawing.boxes.values()}) == 1
    assert layout.draw([], []).boxes == {}
