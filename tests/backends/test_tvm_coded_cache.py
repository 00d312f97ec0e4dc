"""Latent caches in codes on tvm: what is written, byte by byte, and attention over it.

Both are compared with the interpreter, which places the nearest codes and reads their numbers. Rows
that nobody has written hold NaN, so that one which is seen shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.backends.tvm import machine as machines
from dsc.backends.tvm.machine import machine_for
from dsc.ir.dims import evaluate
from dsc.ir.formats import pack_state
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.paging import scattered
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType
from dsc.rewrite.verify import relative_difference
from dsc.runtime.executable import Executable
from dsc.targets import parse_target
from tests.backends.tiles import modelled

pytest.importorskip("tvm")
TOLERANCE = {"f32": 1e-5, "bf16": 2e-2}
ROOM, PAGES = 1210, 9
NAN = 0xFF


@dataclass(frozen=True)
class Case:
    """Attention, absorbed or expanded, over a cache in codes, after a step wrote new rows."""

    op: str
    codes: str
    dtype: str
    heads: int
    c: int
    r: int
    page: int = 0
    one: bool = False
    group: int = 128

    @property
    def name(self) -> str:
        """What tests call it."""
        return "_".join(str(v) for v in vars(self).values())

    @property
    def text(self) -> str:
        """The entry."""
        kind = f"{self.codes}{{1x{self.group},f32,behind}}"
        slots = f"N,{self.page}" if self.page else "B,C"
        s, h, f = 1 if self.one else "S", self.heads, self.dtype
        table, paged = ("%block_table: i64[B,M], ", ", %block_table") if self.page else ("", "")
        expanded = self.op == "mla_attention"
        width, made = (32, 32) if expanded else (self.c, self.c)
        kv_b = f"%kv_b: {f}[{64 * h},{self.c}], " if expanded else ""
        return f"""graph {self.name}(%q: {f}[B,{s},{h},{width}], %qr: {f}[B,{s},{h},{self.r}],
            %new: {f}[B,{s},{self.c}], %rope: {f}[{slots},{self.r}], {kv_b}{table}%lengths: i64[B],
            %past: {kind}[{slots},{self.c}]) {{
          %c = cache_write %past, %new, %lengths{paged} : {kind}[{slots},{self.c}]
          %y = {self.op} %q, %qr, %c, %rope,{" %kv_b," if expanded else ""} %lengths{paged}
            {{scale=0.1}} : {f}[B,{s},{h},{made}]
          return %y as "y", %c as "present" updates %past
        }}\n"""


CASES = [
    Case("latent_attention", "f8e4m3", "bf16", 16, 512, 64, one=True),
    Case("latent_attention", "i8", "bf16", 8, 256, 32, page=64, one=True),
    Case("latent_attention", "f8e4m3", "bf16", 4, 160, 32, page=64),
    Case("latent_attention", "i8", "bf16", 4, 96, 32),
    Case("mla_attention", "f8e4m3", "bf16", 2, 512, 32, page=64),
    Case("mla_attention", "i8", "bf16", 3, 64, 32),
    Case("latent_attention", "f8e4m3", "f32", 5, 150, 6, one=True),
    Case("latent_attention", "i8", "f32", 3, 20, 6, page=32, one=True, group=16),
    Case("latent_attention", "f8e4m3", "f32", 3, 20, 6),
    Case("mla_attention", "i8", "f32", 3, 150, 6, page=64),
    Case("mla_attention", "f8e4m3", "bf16", 3, 30, 6),
]
SIZES = [(1, 1, 130), (3, 5, 77)]
"""Sequences, new tokens, and tokens that the longest has already."""
LONG = (1, 1, 1200)
"""Several tiles for each share of the context."""


def program(cases: list[Case]) -> Program:
    """An entry a case."""
    symbols = "symbols {B=[0,4], C=[1,2048], M=[1,8], N=[1,16], S=[0,8]}\n"
    text = f'program "t" {{stage=OPTIMIZED}}\n{symbols}' + "".join(case.text for case in cases)
    return pipeline.apply(parse_program(text), ["own_outputs"])


def compiled(made: Program, target: str, folder: Path) -> Executable:
    """The program's kernels."""
    emission = get("tvm").emit(made, EmitOptions((parse_target(target),)))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return get("tvm").load(folder, {"meta": emission.meta, "weights": None}, made)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    return compiled(program(CASES), "cpu", tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Executable:
    return compiled(program(CASES[::2]), "cpu:x86-64", tmp_path_factory.mktemp("portable"))


def inputs(
    case: Case, graph: Graph, sizes: tuple[int, int, int], unwritten: int = NAN
) -> dict[str, torch.Tensor]:
    """Sequences of different lengths, rows of all sizes, one of zeros."""
    batch, new, past = sizes
    generator = torch.Generator().manual_seed(past)
    env = {"B": batch, "S": new, "C": ROOM, "N": PAGES, "M": 3 if case.page == 64 else 5}
    given = {}
    for value in graph.inputs:
        shape = [evaluate(d, env) for d in value.type.shape]
        if value.type.dtype.is_float:
            x = torch.randn(shape, generator=generator)
            given[value.name] = x.to(DType(case.dtype).torch)
    given["kv_b" if "kv_b" in given else "q"] *= case.c**-0.5
    lengths = [max(0, past - 30 * b) for b in range(batch)]
    given["lengths"] = torch.tensor(lengths, dtype=torch.int64)
    kind = next(v.type for v in graph.inputs if v.name == "past")
    rows = torch.randn(batch, past, case.c, generator=generator)
    rows *= 4 * torch.rand(batch, past, 1, generator=generator)
    rows[:, 1:2] = 0
    held = pack_state(rows, kind.with_shape(tuple(rows.shape))).parts[0]
    for b, length in enumerate(given["lengths"].tolist()):
        held[b, length:] = unwritten
    slots = (PAGES, case.page) if case.page else (batch, ROOM)
    state = torch.full((*slots, held.shape[-1]), unwritten, dtype=torch.uint8)
    if not case.page:
        state[:, :past] = held
        return given | {"past": state}
    pages = torch.randperm(PAGES, generator=generator)[: env["M"] * batch]
    table = torch.full((batch, env["M"]), -1)
    for b, length in enumerate(given["lengths"].tolist()):
        needed = -(-(length + new) // case.page)
        table[b, :needed], pages = pages[:needed], pages[needed:]
    scattered(state, table, held, torch.zeros(batch, dtype=torch.int64))
    return given | {"past": state, "block_table": table}


def check(case: Case, executable: Executable, sizes: tuple[int, int, int]) -> None:
    """The same rows as the interpreter's, bit for bit, and nearly the same attention."""
    graph = executable.program.entries[case.name]
    given = inputs(case, graph, sizes)
    seen = inputs(case, graph, sizes, unwritten=0)  # the interpreter multiplies what it masks
    y, _ = run_graph(graph, [seen[v.name] for v in graph.inputs])
    _, present = run_graph(graph, [given[v.name].clone() for v in graph.inputs])
    got = executable.run(case.name, given)
    assert torch.equal(got["present"], present)
    assert not got["y"].isnan().any()
    assert relative_difference(y, got["y"]) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_cache_in_codes_is_what_the_interpreter_makes_of_it(
    case: Case, loaded: Executable
) -> None:
    for sizes in (*SIZES, LONG) if case is CASES[0] else SIZES:
        check(case, loaded, sizes)


@pytest.mark.parametrize("case", CASES[:1] + CASES[3:5] + CASES[6:7], ids=lambda case: case.name)
def test_no_tokens_write_nothing_and_a_number_that_no_code_says_makes_its_group_nan(
    case: Case, loaded: Executable
) -> None:
    graph = loaded.program.entries[case.name]
    given = inputs(case, graph, (0, 0, 40))
    assert loaded.run(case.name, given)["y"].numel() == 0
    given = inputs(case, graph, (1, 2, 40))
    given["new"][0, 0, 5] = float("inf")
    wanted = given["past"].clone()
    got = loaded.run(case.name, given)
    same = (got["present"] == wanted).flatten(0, 1).all(-1)
    assert int((~same).sum()) == given["new"].shape[1]
    before = given | {"past": wanted}
    _, present = run_graph(graph, [before[v.name].clone() for v in graph.inputs])
    assert torch.equal(got["present"], present)
    if case.op == "latent_attention":
        assert got["y"][..., : case.group].isnan().all()


def test_tiles_read_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model of AMX: one token over a cache in pages."""
    host, case = machine_for(parse_target("cpu")), CASES[1]
    if host.vectors < 32:
        pytest.skip("this CPU has no AVX-512, which kernels with tiles are made for")
    modelled(monkeypatch, replace(host, tiles=True, byte_tiles=True), tmp_path)
    check(case, compiled(program([case]), "cpu", tmp_path), SIZES[1])


def test_codes_are_widened_without_tables_and_without_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = machine_for(parse_target("cpu"))
    if not host.bf16:
        pytest.skip("this CPU has no kernels of its own for bf16")
    chosen = replace(host, pairs=False, narrows=False, vbmi=False)
    monkeypatch.setattr(machines, "machine_for", lambda target: chosen)
    run = compiled(program(CASES[:2]), "cpu", tmp_path)
    for case in CASES[:2]:
        check(case, run, SIZES[1])


@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_any_cpu_reads_and_writes_codes(case: Case, portable: Executable) -> None:
    check(case, portable, SIZES[1])
