"""Caches in pages: the same logits as contiguous ones, whatever pages the sequences hold."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import dsc
from bench.random_calls import Kind, run
from dsc import pipeline
from dsc.errors import UnsupportedOperator, UsageError
from dsc.ir.analyses import cost
from dsc.ir.dims import evaluate
from dsc.ir.graph import Graph
from dsc.ir.paging import BLOCK_TABLE, PAGE, takes_pages
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType
from dsc.ir.verifier import verify
from dsc.passes.append_cache_in_place import AppendCacheInPlace
from dsc.report import cache_bytes
from dsc.rewrite.base import PassReport
from dsc.rewrite.verify import compare_programs
from dsc.runtime.limit import step_work
from dsc.runtime.pages import NONE, PagePool
from dsc.runtime.session import Session
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.backends.test_tvm import RUN, largest_error
from tests.passes.test_raise_models import stored
from tests.rewrite.harness import program_of
from tests.runtime.test_session import small_lm
from tests.test_report import v3 as v3  # the fixture

CONTEXT, CHUNK = 200, 24
BACKENDS = ["reference", "tvm"]
IN_PAGES = AppendCacheInPlace(page=PAGE)
V3_BYTES = 61 * (512 + 64) * 2


@cache
def compiled(model: str, backend: str, layout: str) -> dsc.CompiledModel:
    """A model of one V3 or V2 layer, or of several by hand, for contexts of four pages."""
    program = canonical_lm(Sizes(), 4, CONTEXT) if model == "hand" else stored(model)
    most = {"B": 4, "S": 32, "L": 32, "P": CONTEXT}
    symbols = {k: replace(v, hi=most.get(k, v.hi)) for k, v in program.symbols.items()}
    program = replace(program, symbols=symbols)
    return dsc.compile(
        program, backend=backend, cache=layout, max_batch=4, max_context=CONTEXT,
        prefill_chunk=CHUNK,
    )  # fmt: skip


def vocabulary(model: dsc.CompiledModel) -> int:
    found = model.session()._vocab
    assert found is not None
    return found


def shuffled(session: Session, seed: int) -> Session:
    """The session, with the pages of its pool in another order."""
    assert session._pool is not None
    random.Random(seed).shuffle(session._pool._free)
    return session


def generate(session: Session, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Logits of a ragged prompt in chunks, of steps of decoding, and of a second prompt."""
    lengths = [ids.shape[1], 3, ids.shape[1] - 7]
    found = [session.prefill(ids, lengths=lengths)]
    for i in range(steps):
        found.append(session.decode(ids[:, i % ids.shape[1]]))
    return [*found, session.prefill(ids[:, :9], all_logits=True)]


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        *((m, "reference") for m in ("v3", "v2_greedy", "hand")),
        ("hand", "tvm"),
        ("v2_greedy", "tvm"),
    ],
)
def test_pages_give_the_logits_of_contiguous_caches(model: str, backend: str) -> None:
    """The second sequence decodes over its first page's border, the others into their third."""
    if backend == "tvm":
        pytest.importorskip("tvm")
    oracle = compiled(model, "reference", "contiguous")
    ids = torch.randint(0, vocabulary(oracle), (3, 70), generator=torch.Generator().manual_seed(0))
    session = shuffled(compiled(model, backend, "paged").session(3), 1)
    wanted, got = generate(oracle.session(3), ids, 66), generate(session, ids, 66)
    assert session.lengths == [145, 78, 138]
    assert max(largest_error(a, b) for a, b in zip(got, wanted, strict=True)) < 2e-5
    assert session._pool is not None
    assert [len(b) for b in session._pool.blocks] == [3, 2, 3]


def test_the_order_of_pages_changes_no_bit() -> None:
    ids = torch.randint(0, 50, (3, 70), generator=torch.Generator().manual_seed(2))
    sessions = [shuffled(compiled("hand", "reference", "paged").session(3), s) for s in range(3)]
    first, *others = [generate(s, ids, 4) for s in sessions]
    tables = {tuple(map(tuple, s._pool.blocks)) for s in sessions if s._pool is not None}
    assert len(tables) == 3
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_reset_gives_pages_back_and_what_they_held_is_not_seen() -> None:
    session = compiled("hand", "reference", "paged").session(2)
    ids = torch.randint(0, 50, (2, 90), generator=torch.Generator().manual_seed(3))
    first = session.prefill(ids[:, :5])
    assert session._pool is not None
    assert session._pool.used == 2
    session.prefill(ids)
    assert session._pool.used == 4
    session.reset()
    assert (session._pool.used, session.lengths) == (0, [])
    assert torch.equal(session.prefill(ids[:, :5]), first)


def test_padding_writes_into_no_other_sequence() -> None:
    """Padding past a sequence's pages is dropped: its neighbour's page keeps every bit."""
    model = compiled("hand", "reference", "paged")
    session = model.session(2)
    ids = torch.randint(0, 50, (2, 60), generator=torch.Generator().manual_seed(4))
    session.prefill(ids)
    wide = torch.cat([ids, ids], 1)[:, :20]
    session.prefill(wide, lengths=[2, 20])  # the first has padding on rows 62 .. 79
    assert session._pool is not None
    assert session._pool.blocks == [[0], [1, 2]]
    alone = model.session(1)
    alone.prefill(ids[1:])
    wanted = alone.prefill(wide[1:])
    alone.reset()
    alone.prefill(ids[:1])
    alone.prefill(wide[:1, :2])
    assert largest_error(session.decode([1, 2])[:1], alone.decode([1])) < 2e-5
    assert wanted.shape == (1, 50)


# --- the pool -------------------------------------------------------------------------------------


def test_a_pool_grows_page_by_page_and_says_when_it_is_empty() -> None:
    pool = PagePool(4, 64)
    pool.grow([64, 1])
    assert (pool.blocks, pool.used) == ([[0], [1]], 2)
    pool.grow([65, 64])
    assert (pool.blocks, pool.used) == ([[0, 2], [1]], 3)
    assert pool.table([0, 1], 100).tolist() == [[0, 2], [1, NONE]]
    with pytest.raises(UsageError, match="2 more pages of 64 tokens are needed, 1 are free of 4"):
        pool.grow([129, 65])
    assert pool.used == 3
    pool.release()
    assert pool.used == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [16, -2])
def test_an_executable_refuses_a_wrong_block_table(backend: str, wrong: int) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
    model = compiled("hand", backend, "paged")
    session = model.session(4)
    session.prefill(torch.ones(1, 3, dtype=torch.int64))
    assert session._pool is not None
    session._pool.blocks[0][0] = wrong
    with pytest.raises(UsageError, match="input block_table holds"):
        session.decode([1])


def test_the_library_refuses_wrong_pages_and_writes_nowhere_else(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder = compiled("hand", "tvm", "paged").save(tmp_path / "out")
    outcome = run(Kind("tvm", "paged", "library"), folder, 120)
    assert not outcome.bad, outcome.bad
    assert outcome.worked + outcome.refused == outcome.calls == 120
    assert {"block_table", "hole", "lengths", "size"} <= set(outcome.faults)


# --- the pass -------------------------------------------------------------------------------------


def entries(program: Program) -> Program:
    return pipeline.apply(program, ["specialise_entries", "absorb_mla"])


@pytest.mark.parametrize("page", [PAGE, 4, 2])
def test_the_pass_keeps_what_is_computed(page: int) -> None:
    before = entries(small_lm())
    after = AppendCacheInPlace(page=page).run(before, PassReport())
    verify(after)
    found = compare_programs(before, after, AppendCacheInPlace.tolerance)
    assert found.ok, found
    assert found.runs == 13
    nodes = [n for g in after.entries.values() for n in g.nodes if takes_pages(n.op)]
    assert {n.op for n in nodes} == {"cache_write", "latent_attention", "mla_attention"}
    assert all(n.get(BLOCK_TABLE) is not None for n in nodes)
    assert not any(n.op == "append" for g in after.entries.values() for n in g.nodes)


def test_a_program_in_pages_is_sharded_by_heads() -> None:
    model = canonical_lm(Sizes(heads=4, value=12), 4, CONTEXT)
    before = pipeline.apply(model, ["specialise_entries", "absorb_mla", IN_PAGES])
    each, report = pipeline.make("shard", ranks=2), PassReport()
    after = each.run(before, report)
    assert report.fired["heads"] == 2 * len(after.entries)
    found = compare_programs(before, after, each.tolerance)
    assert found.ok, found


def test_a_wrong_page_would_be_seen() -> None:
    """The check behind the pass can fail: reads through a table that is one page off."""
    before = entries(small_lm())
    after = AppendCacheInPlace(page=2).run(before, PassReport())

    def off(graph: Graph) -> Graph:
        nodes = []
        for node in graph.nodes:
            if node.op == "latent_attention":
                inputs = (*node.inputs[:4], graph.input("logits_at"), node[BLOCK_TABLE])
                nodes.append(type(node)(node.op, inputs, node.attrs, node.outputs, node.loc))
            else:
                nodes.append(node)
        return graph.with_nodes(nodes)

    assert not compare_programs(before, after.map_entries(off), AppendCacheInPlace.tolerance).ok


PLAIN = """graph main(%q: f32[B,S,2,4], %qr: f32[B,S,2,2], %c: f32[B,S,4], %r: f32[B,S,2],
  %n: i64[B], %m: i64[B], %past.latent: f32[B,P,4], %past.rope: f32[B,P,2]) {
  %latent = append %past.latent, %c, %n : f32[B,P+S,4]
  %rope = append %past.rope, %r, %n : f32[B,P+S,2]
  %o = latent_attention %q, %qr, %latent, %rope, %n {scale=0.5} : f32[B,S,2,4]
  return %o, %latent as "present.latent" updates %past.latent,
    %rope as "present.rope" updates %past.rope
}"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("return %o,", "%z = neg %latent\nreturn %o, %z,", "neg reads the cache past.latent"),
        ("return %o,", "%z = neg %past.rope\nreturn %o, %z,", "past.rope is read elsewhere"),
        ("%rope, %n {scale", "%rope, %m {scale", "written and read at different lengths"),
        (' updates %past.latent', "", "updates no declared cache"),
        ("return %o,", "%block_table = neg %c\nreturn %o,", "there is a block_table already"),
        ("%m: i64[B],", "%m: i64[B], %p: f32[P],", "%p has the extent P"),
    ],
)  # fmt: skip
def test_what_has_no_pages_stays(old: str, new: str, reason: str) -> None:
    assert old in PLAIN
    program, report = program_of(PLAIN.replace(old, new, 1), Stage.CANONICAL), PassReport()
    after = AppendCacheInPlace(page=PAGE).run(program, report)
    assert after.entries == program.entries
    assert any(reason in why for _, _, why in report.missed), report.missed


def test_a_cache_that_is_scaled_before_attention_is_refused() -> None:
    text = """graph step(%input_ids: i64[B,S], %q: f32[B,S,2,4], %n: i64[B], %past: f32[B,P,8],
      %k: f32[B,S,8]) {
      %c = append %past, %k, %n : f32[B,P+S,8]
      %h = reshape %c {shape=[B,P+S,2,4]} : f32[B,P+S,2,4]
      %z = mul %h, %h : f32[B,P+S,2,4]
      %o = attention %q, %z, %h, %n {scale=0.5, causal=true} : f32[B,S,2,4]
      return %o, %c as "present" updates %past
    }"""
    program = program_of(text, Stage.CANONICAL)
    with pytest.raises(UnsupportedOperator, match="mul reads the cache past; attention"):
        dsc.compile(program, backend="reference", cache="paged")


@pytest.mark.parametrize("backend", ["onnxruntime"])
def test_a_backend_without_pages_says_so(backend: str) -> None:
    with pytest.raises(UsageError, match=f"the {backend} backend takes no caches in pages") as it:
        dsc.compile(small_lm(), backend=backend, cache="paged")
    assert it.value.exit_code == 2


# --- figures and the artifact ---------------------------------------------------------------------


def test_the_figures_of_v3_in_pages(v3: Program) -> None:
    paged = AppendCacheInPlace(page=PAGE).run(v3, PassReport())
    assert cache_bytes(paged) == cache_bytes(v3) == V3_BYTES == 70_272
    sizes = {"B": 1, "M": 4, "N": 99, "P": 255}
    for op in ("latent_attention", "mla_attention"):
        name = "decode" if op.startswith("latent") else "prefill"
        found = [
            cost(next(n for n in each.entries[name].nodes if n.op.endswith(op)))
            for each in (v3, paged)
        ]
        rows = sizes | {"S": 1}
        first, second = [(evaluate(c.read, rows), evaluate(c.flops, rows)) for c in found]
        assert second == (first[0] + 4 * DType.i64.itemsize, first[1])
    nodes = [n for n in paged.entries["decode"].nodes if n.op == "cache_write"][:2]
    written = [evaluate(cost(n).written, {"B": 1}) for n in nodes]
    assert written == [512 * DType.bf16.itemsize, 64 * DType.bf16.itemsize]


def test_run_py_keeps_pages(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    model = compiled("hand", "tvm", "paged")
    folder = model.save(tmp_path / "out")
    line = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    session = model.session(1)
    wanted = session.prefill(torch.tensor([[3, 1, 4, 1, 5]]))
    for row in json.loads(done.stdout)[0]:
        assert largest_error(torch.tensor([row]), wanted) < 2e-5
        wanted = session.decode(wanted.argmax(-1))


def test_pages_cost_no_launch() -> None:
    """Their writes join the norms and rotations in front of them, as those in order do."""
    pytest.importorskip("tvm")
    counts = [
        {
            name: entry["launches"]
            for name, entry in compiled("hand", "tvm", way).report["entries"].items()
        }
        for way in ("paged", "contiguous")
    ]
    assert counts[0] == counts[1]


def test_the_limit_counts_every_page_that_holds_tokens() -> None:
    """At whole pages a step reads what it reads of contiguous caches, and grows as that does."""
    paged, whole = (compiled("hand", "tvm", layout).program for layout in ("paged", "contiguous"))

    def read(program: Program, rows: int) -> float:
        return sum(w.bytes for w in step_work(program, 2, 1, rows - 1))

    assert read(paged, 3 * PAGE) == pytest.approx(read(whole, 3 * PAGE), rel=0.01)
    growths = [read(program, 3 * PAGE) - read(program, PAGE) for program in (paged, whole)]
    assert growths[0] == growths[1] > 0
