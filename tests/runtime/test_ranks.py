"""Several ranks as processes: the same numbers as one, and every way to fail ends with a name.

Processes are few, have limits, and are killed at the end whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import pytest
import torch

import dsc
from dsc import pipeline
from dsc.cli import main
from dsc.errors import ArtifactError, RankError, UsageError
from dsc.frontends.load import Loaded, load_program
from dsc.generation import generate
from dsc.ir.interpreter import run_graph
from dsc.ir.op import lookup, named
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from dsc.ir.ranks import ThreadRank, at_rank, current, entered, run_ranks
from dsc.ir.ranks import _Post as Post
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.weights import random_source, sources
from dsc.runtime import collectives, launch, sharded
from dsc.runtime.session import Session
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.runtime.ranks import steps

T = TypeVar("T")
LIMIT = 100.0
"""Seconds after which a process of a test is killed."""
DEATH = 30.0
"""Seconds in which the other ranks must have ended after one was killed."""


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(root: Path) -> Loaded:
    """The trained tiny checkpoint in fp32, traced once."""
    return load_program(root / "models" / "tiny-v3", dtype=DType.f32, max_context=512)


@pytest.fixture(scope="module")
def tiny(loaded: Loaded) -> Program:
    """It, canonical."""
    return pipeline.apply(loaded.program, list(pipeline.RAISE))


@pytest.fixture(scope="module")
def tiny_ranks(loaded: Loaded, tiny: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its artifact for two ranks, made by the command."""
    out = tmp_path_factory.mktemp("tiny") / "out"
    ready = replace(loaded, program=tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsc.frontends.load.load_program", lambda *_, **__: ready)
        with pytest.raises(SystemExit) as ended:
            main(["compile", "models/tiny-v3", "--backend", "reference", "--ranks", "2",
                  "--parallel", "tp+ep", "-o", str(out), "--json"])  # fmt: skip
    assert ended.value.code == 0
    return out


def compiled(program: Program, backend: str = "reference", **options: object) -> dsc.CompiledModel:
    found: dsc.CompiledModel = dsc.compile(
        program,
        backend=backend,
        max_context=512,
        **options,  # type: ignore[arg-type]
    )
    return found


def small() -> Program:
    return canonical_lm(Sizes(heads=4, vocab=2000, experts=8, groups=4), max_context=512)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model for two ranks."""
    return compiled(small(), ranks=2).save(tmp_path_factory.mktemp("small") / "out")


# --- processes ------------------------------------------------------------------------------------


def environment(rank: int, port: int, **changed: str) -> dict[str, str]:
    found = launch.environment(rank, 2, port) | {"OMP_NUM_THREADS": "1"}
    return found | {"DSC_RENDEZVOUS_TIMEOUT": "60"} | changed


@contextmanager
def started(
    lines: Sequence[Sequence[str]], **changed: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process a rank, each with its own line; none outlives the block."""
    port = launch.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, *line],
            env=environment(rank, port, **changed),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, line in enumerate(lines)
    ]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.communicate()


def task(*words: object) -> list[str]:
    return ["-m", "tests.runtime.ranks", *map(str, words)]


def ended(process: subprocess.Popen[str], limit: float = LIMIT) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=limit)
    return process.returncode, out, err


def over_gloo(ranks: int, function: Callable[[collectives.ProcessGroup], T]) -> list[T]:
    """`function(group)` in one thread a rank, connected over TCP as processes would be."""
    port = launch.free_port()

    def one(rank: int) -> T:
        where = collectives.Place(rank, ranks, "127.0.0.1", port, rank == 0)
        group = collectives.connect(where, timeout=10.0, rendezvous=20.0)
        with entered(group):
            found = function(group)
        group.share("end", "")  # the store lives in rank 0
        return found

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


# --- the same numbers -----------------------------------------------------------------------------


def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference relative to max(1, |logit|max)."""
    scale = max(1.0, wanted.abs().max().item())
    return (found.double() - wanted.double()).abs().max().item() / scale


def test_two_processes_equal_one_rank_on_tiny_v3(
    tiny: Program, tiny_ranks: Path, tmp_path: Path
) -> None:
    """TP = 2 and EP = 2 in fp32: prefill and 4 decode steps within 1e-5 of one rank."""
    wanted = steps(compiled(tiny))
    with started([task("logits", tiny_ranks, tmp_path)] * 2) as running:
        for process in running:
            code, _, err = ended(process)
            assert code == 0, err
    first, second = (torch.from_numpy(np.load(tmp_path / f"{r}.npy")) for r in range(2))
    assert first.shape == wanted.shape == (27, 2048)
    assert torch.equal(first, second), "ranks agree bit for bit"
    assert off_by(first, wanted) <= 1e-5
    assert off_by(first + 3e-5 * wanted.abs().max(), wanted) > 1e-5, "the bound can be broken"


@pytest.mark.parametrize(("ranks", "parallel"), [(2, "tp"), (2, "ep"), (4, "tp+ep")])
def test_every_way_to_share_equals_one_rank_on_tiny_v3(
    tiny: Program, ranks: int, parallel: str
) -> None:
    wanted = steps(compiled(tiny))
    shared = compiled(tiny, ranks=ranks, parallel=parallel)

    def one(rank: int) -> torch.Tensor:
        return steps(_Loaded(shared, rank))  # type: ignore[arg-type]

    found = run_ranks(ranks, one)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert off_by(found[0], wanted) <= 1e-5


class _Loaded:
    """One rank of a compiled model, interpreted where it is."""

    def __init__(self, model: dsc.CompiledModel, rank: int) -> None:
        from dsc.backends.reference import ReferenceExecutable

        self.program = at_rank(model.program, rank)
        self.executable = ReferenceExecutable(self.program)

    def session(self, max_batch: int, max_context: int) -> Session:
        return Session(self.executable, self.program, max_batch, max_context)


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("tvm", marks=pytest.mark.slow), "null"]
)
def test_other_backends_run_between_collectives(backend: str, tmp_path: Path) -> None:
    out = compiled(small(), backend, ranks=2).save(tmp_path / "out")
    models = [dsc.load(out / f"rank_{rank}", trust=True) for rank in range(2)]
    assert not (out / "rank_0" / "run.py").exists(), "which would know one process only"
    for each in models:
        assert each.executable is not None
    found = run_ranks(2, lambda rank: steps(models[rank]))
    assert torch.equal(found[0], found[1])
    wanted = steps(compiled(small()))
    assert found[0].shape == wanted.shape
    assert backend == "null" or off_by(found[0], wanted) <= 1e-5


def test_the_command_generates_as_one_rank_would(tiny_ranks: Path, tiny: Program) -> None:
    """`dsc generate --ranks 2`: starts the ranks, of which rank 0 alone prints."""
    assert sorted(p.name for p in tiny_ranks.iterdir()) == ["dsc.json", "rank_0", "rank_1"]
    line = launch.command(["generate", str(tiny_ranks), "--prompt", "In the beginning",
                           "--max-new-tokens", "6", "--ranks", "2"])  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    tokenizer = dsc.load(tiny_ranks / "rank_0", trust=True).tokenizer
    ids = tokenizer.encode("In the beginning").ids
    tokens = list(generate(compiled(tiny).session(max_batch=1), ids, 6))
    assert done.stdout == tokenizer.decode(tokens) + "\n"


# --- failures -------------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_others_and_is_named(artifact: Path) -> None:
    with started([task("forever", artifact)] * 2) as running:
        stdout: IO[str] | None = running[0].stdout
        assert stdout is not None
        assert stdout.readline() == "decoding\n"
        running[1].send_signal(signal.SIGKILL)
        start = time.monotonic()
        code, _, err = ended(running[0], DEATH)
        assert time.monotonic() - start < DEATH
    assert code == 1
    assert "rank 1 died" in err
    assert any(f"closed at {op} of" in err for op in named(Role.COLLECTIVE)), err
    assert "model.layers" in err or "lm_head" in err, "and where in the model"


def test_a_rank_that_hangs_is_named_after_the_limit(artifact: Path) -> None:
    with started([task("forever", artifact)] * 2, DSC_COLLECTIVE_TIMEOUT="4") as running:
        stdout: IO[str] | None = running[0].stdout
        assert stdout is not None
        assert stdout.readline() == "decoding\n"
        running[1].send_signal(signal.SIGSTOP)
        code, _, err = ended(running[0], DEATH)
    assert code == 1
    assert "rank 1 did not come to all_" in err
    assert "within 4 s" in err


def test_different_weights_are_named(artifact: Path, tmp_path: Path) -> None:
    other = small()
    keys = {s.key: s.type for e in other.weights.values() for s in sources(e)}
    changed = Program(**{**vars(other), "source": random_source(keys, seed=9)})
    compiled(changed, ranks=2).save(tmp_path / "other")
    mixed = tmp_path / "mixed"
    shutil.copytree(artifact, mixed)
    shutil.rmtree(mixed / "rank_1")
    shutil.copytree(tmp_path / "other" / "rank_1", mixed / "rank_1")
    with started([task("logits", mixed, tmp_path)] * 2) as running:
        for process in running:
            code, _, err = ended(process)
            assert code == 1
            assert "the ranks do not run the same thing" in err
            assert "weights: " in err
            assert "on rank 1, " in err
            assert "program" not in err


def test_different_options_are_named() -> None:
    """As `dsc generate` checks its own, here over gloo between threads."""

    def one(group: collectives.ProcessGroup) -> str:
        collectives.agree("same", {"seed": "3"})
        with pytest.raises(RankError) as caught:
            collectives.agree("options", {"seed": str(3 + group.rank // 2), "prompt": "a"})
        return str(caught.value)

    for message in over_gloo(3, one):
        assert "seed: 4 on rank 2, 3 on ranks 0, 1" in message
        assert "prompt" not in message


def test_a_rank_that_never_comes_is_named_at_once_and_at_the_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "PATIENCE", 0.05)
    where = collectives.Place(0, 4, "127.0.0.1", launch.free_port(), True)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"ranks 1, 2, 3 did not come within 0\.3 s"):
        collectives.connect(where, rendezvous=0.3)
    assert time.monotonic() - start < 10
    assert "rank 0 at 127.0.0.1" in (said := capsys.readouterr().err)
    assert said.count("waits for ranks 1, 2, 3 of 4") == 1


def test_a_rank_without_rank_0_says_that_it_waits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "PATIENCE", 0.05)
    port = launch.free_port()
    where = collectives.Place(1, 2, "127.0.0.1", port, False)
    with pytest.raises(RankError, match=r"rank 1 found nobody"):
        collectives.connect(where, rendezvous=0.3)
    assert f"rank 1 waits for rank 0 at 127.0.0.1:{port}" in capsys.readouterr().err


def test_who_starts_all_ranks_need_not_be_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collectives, "PATIENCE", 0.05)
    assert "DSC_LAUNCHED" in launch.environment(0, 2, 29500)
    monkeypatch.setenv("DSC_LAUNCHED", "1")
    where = collectives.Place(0, 2, "127.0.0.1", launch.free_port(), True)
    with pytest.raises(RankError, match="rank 1 did not come"):
        collectives.connect(where, rendezvous=0.3)
    assert capsys.readouterr().err == ""


def test_bench_starts_the_ranks_as_generate_does(artifact: Path) -> None:
    """Of which rank 0 alone prints, and all take the same steps."""
    options = "--prompt-len=8 --context=8 --tokens=2 --rounds=1 --repeats=1 --json"
    line = launch.command(["bench", str(artifact), *options.split()])
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    assert found["decode"]["steps"] == 2


def test_generate_checks_its_options(artifact: Path) -> None:
    from dsc.cli import ranks as verb

    with pytest.raises(UsageError, match="3 ranks for an artifact of 2"):
        verb.must_launch(artifact, 3)
    assert verb.must_launch(artifact, 2)
    with pytest.raises(UsageError, match="compiled for one rank, --ranks 2 asked"):
        verb.must_launch(artifact / "rank_0", 2)


@pytest.mark.parametrize("absent", collectives.VARIABLES)
def test_a_missing_variable_is_a_mistake_not_a_wait(
    artifact: Path, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(0, 29500).items():
        if name in collectives.VARIABLES:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv(absent)
    start = time.monotonic()
    with pytest.raises(UsageError, match=absent):
        dsc.load(artifact)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "2"}, "ranks count from 0"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changed: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        collectives.place(environment(0, 29500, **changed))


def test_under_torchrun_the_agent_listens() -> None:
    assert collectives.place(environment(0, 29500)).hosts
    under = environment(0, 29500, TORCHELASTIC_USE_AGENT_STORE="True")
    assert not collectives.place(under).hosts


# --- artifacts ------------------------------------------------------------------------------------


def test_each_rank_is_an_artifact_of_its_own(artifact: Path) -> None:
    from dsc.runtime import artifact as artifacts

    found = sharded.opened(artifact)
    assert found is not None
    assert found.ranks == 2
    opened = [artifacts.read(found.rank(r), trust=True) for r in range(2)]
    assert [o.manifest["rank"] for o in opened] == [0, 1]
    texts = [(found.rank(r) / "program.dsc").read_bytes() for r in range(2)]
    assert texts[0] == texts[1]
    assert artifacts.check_hashes(found.rank(1)) >= 3
    name = "model.layers.1.mlp.experts.down_proj.shard_0"
    halves = [o.program.source.load(name) for o in opened]
    assert torch.equal(torch.cat(halves), small().source.load(name.removesuffix(".shard_0")))


def test_opening_ranks_needs_ranks(artifact: Path) -> None:
    from dsc.runtime import artifact as artifacts

    with pytest.raises(UsageError, match="compiled for 2 ranks") as caught:
        dsc.load(artifact)
    assert "--ranks 2" in str(caught.value)
    with pytest.raises(ArtifactError, match="each an artifact of its own"):
        artifacts.read(artifact)
    with pytest.raises(UsageError, match="3 ranks for an artifact of 2"):
        sharded.check_ranks(sharded.opened(artifact), 3)  # type: ignore[arg-type]


def test_one_rank_alone_does_not_run(artifact: Path) -> None:
    alone = dsc.load(artifact / "rank_0", trust=True)
    with pytest.raises(UsageError, match="compiled for 2 ranks, 1 run"):
        alone.session().prefill([[1, 2, 3]])


@pytest.mark.parametrize(
    "damage", ['{"ranks": 2}', '{"ranks": "x", "folders": []}', '{"ranks": 1, "folders": [3]}']
)
def test_a_damaged_manifest_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "dsc.json").write_text(damage)
    with pytest.raises(ArtifactError, match="damaged"):
        sharded.opened(tmp_path)


# --- collectives ----------------------------------------------------------------------------------


def collective(op: str, attrs: str, x: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """The operator's result on every rank, where rank r has x + r."""
    t = f"f32[{','.join(map(str, x.shape))}]"
    graph = parse_graph(f"graph g(%x: {t}) {{\n %y = {op} %x {{{attrs}}}\n return %y\n}}")
    return run_ranks(ranks, lambda rank: run_graph(graph, [x + rank])[0])


def test_collectives_between_three_ranks() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    total = 3 * x + 3
    each = [x, x + 1, x + 2]
    for found in collective("all_reduce", "ranks=3", x, 3):
        assert torch.equal(found, total)
    for found in collective("all_gather", "axis=0, ranks=3", x, 3):
        assert torch.equal(found, torch.cat(each))
    scattered = collective("reduce_scatter", "axis=1, ranks=3", x, 3)
    assert torch.equal(torch.cat(scattered, 1), total)
    for rank, found in enumerate(collective("all_to_all", "axis=1, ranks=3", x, 3)):
        part = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(found, torch.cat([one[:, part] for one in each], 1))


def test_sums_have_the_same_bits_on_every_rank() -> None:
    x = torch.rand(257, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = collective("all_reduce", "ranks=4", x, 4)
    assert all(torch.equal(found[0], other) for other in found)


def pass_on(rank: int) -> torch.Tensor:
    """Give two numbers to the next rank of three, and take those of the one before."""
    send, recv = lookup("send").reference, lookup("recv").reference
    for number in (10.0, 20.0):
        send(torch.full((3,), rank + number), to=(rank + 1) % 3)
    got = [recv(torch.zeros(3), source=(rank - 1) % 3) for _ in range(2)]
    return torch.cat(got)


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_send_and_recv_in_a_ring(kind: str) -> None:
    if kind == "threads":
        found = run_ranks(3, pass_on)
    else:
        found = over_gloo(3, lambda group: pass_on(group.rank))
    for rank, got in enumerate(found):
        before = (rank - 1) % 3
        assert got.tolist() == [before + 10.0] * 3 + [before + 20.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64])
def test_gloo_carries_every_element_type(dtype: torch.dtype) -> None:
    x = (torch.arange(12).reshape(3, 4) % 3).to(dtype)
    gather = lookup("all_gather").reference
    for found in over_gloo(2, lambda group: gather(x.T, axis=0, ranks=2)):
        assert torch.equal(found, torch.cat([x.T, x.T]))
    empty = torch.zeros(0, 4)
    assert over_gloo(2, lambda group: gather(empty, axis=0, ranks=2))[1].shape == (0, 4)


def test_alone_there_is_nobody_to_speak_to() -> None:
    assert (current().rank, current().size) == (0, 1)
    with pytest.raises(RankError, match="runs alone"):
        current().exchange("all_reduce", {1: torch.zeros(1)}, {})


def test_an_error_of_one_rank_is_the_error_of_all() -> None:
    def one(rank: int) -> None:
        if rank == 1:
            raise ZeroDivisionError("rank 1")
        current().exchange("all_reduce", {}, {1: torch.zeros(1)})

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="rank 1"):
        run_ranks(2, one)
    assert time.monotonic() - start < 5


def test_a_group_is_left_behind() -> None:
    with entered(ThreadRank(1, Post(2))):
        assert current().rank == 1
    assert current().size == 1


# --- launching ------------------------------------------------------------------------------------


def line(text: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, sys, time\nrank = os.environ['RANK']\n{text}"]


def test_launching_gives_each_its_place() -> None:
    check = "sys.exit(0 if os.environ['WORLD_SIZE'] == '3' and rank in '012' else 5)"
    assert launch.run(line(check), 3) == 0


def test_a_signal_names_the_rank_and_leaves_nobody(tmp_path: Path) -> None:
    text = f"""
open({str(tmp_path)!r} + '/' + rank, 'w').write(str(os.getpid()))
if rank == '1': os.kill(os.getpid(), 9)
time.sleep(60)"""
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        launch.run(line(text), 2, grace=1.0)
    assert time.monotonic() - start < 20
    pid = int((tmp_path / "0").read_text()) if (tmp_path / "0").exists() else None
    assert pid is None or not Path(f"/proc/{pid}").exists()


def test_the_first_failure_is_the_status_and_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    text = "if rank == '1': sys.stderr.write('no memory'); sys.exit(7)\ntime.sleep(0.5)"
    assert launch.run(line(text), 2, grace=5.0) == 7
    assert "no memory" in capfd.readouterr().err
    assert os.environ.get("RANK") is None
