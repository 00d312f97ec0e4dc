"""Tuning: the search space of plans, the search against planted times, and what becomes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsc import kept
from dsc.backends.triton import choices
from dsc.backends.triton.blocks import AnyTile, tile_json
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.tuning import apart, others, rounds
from dsc.hardware import Gpu
from dsc.ir.index_ranges import giving_indices
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.sampled import giving_ids
from dsc.runtime import artifact
from dsc.runtime.plan import Plan
from dsc.runtime.tuned import Tuned
from tests.backends.test_triton_driver import SOURCE, built

TARGET = "cuda:sm_90"


class Bench:
    """A fake card, a folder for what is kept, and an artifact in `folder / "out"`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.planted = folder / "planted"
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler for the fake driver")
        (folder / "driver").mkdir()
        built(compiler, SOURCE, folder / "driver" / "libcuda.so.1")

    def run(self, card: str = "fake", **plan: Any) -> subprocess.CompletedProcess[str]:
        """Run `tuned_artifact`; without a card where it has no name."""
        environment = {
            **os.environ, "DSC_TUNE": "1", "FAKE_CUDA_LOG": str(self.folder / "log"),
            "FAKE_CUDA_PLANTED": str(self.planted), "FAKE_CUDA_NAME": card,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "XDG_STATE_HOME": str(self.folder / "state"),
            **({"LD_LIBRARY_PATH": str(self.folder / "driver")} if card else {}),
        }  # fmt: skip
        line = [sys.executable, "-m", "tests.backends.tuned_artifact", str(self.folder)]
        return subprocess.run(
            [*line, json.dumps(plan)], env=environment, capture_output=True, text=True, check=False
        )

    def told(self, **plan: Any) -> Any:
        """The JSON that a run prints."""
        done = self.run(**plan)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def plan(self) -> LaunchProgram:
        """The artifact's plan."""
        place = self.out / "triton" / "sm_90" / "plan.json"
        return LaunchProgram.of(Plan.from_json(place.read_bytes()))

    @property
    def program(self) -> Program:
        """What the artifact's plan was lowered from."""
        text = (self.out / "program.dsc").read_text()
        return giving_ids(giving_indices(parse_program(text)))

    def kernels(self, choices: Mapping[str, AnyTile]) -> set[str]:
        """The kernels that a plan with other tiles has beside the artifact's."""
        made = lower_program(self.program, TARGET, choices=choices)[0]
        return made.kernels.keys() - self.plan.kernels.keys()

    def files(self) -> dict[str, bytes]:
        """What lies in the artifact."""
        return {
            str(p.relative_to(self.out)): p.read_bytes() for p in self.out.rglob("*") if p.is_file()
        }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    found = Bench(tmp_path_factory.mktemp("tuning"))
    done = found.run(compile=True)
    assert done.returncode == 0, done.stderr
    return found


def choice(bench: Bench, begins: str) -> tuple[str, AnyTile, str]:
    """A choice of the decode step by how its key begins, its first other tile, and that kernel."""
    keys = (k for x in bench.plan.entries["decode"].launches for k in x.choices)
    key = next(key for key in keys if key.startswith(begins))
    tile = bench.plan.choices[key].others[0]
    (kernel,) = bench.kernels({key: tile})
    return key, tile, kernel


TUNE = ["tune", "--entry", "decode", "--json"]


def test_the_faster_tile_is_taken_and_what_is_wrong_spills_or_fails_is_not(bench: Bench) -> None:
    before, (out, kept) = bench.files(), (bench.out, bench.folder / "kept")
    shutil.copytree(out, kept)
    faster = choice(bench, "latent ")
    wrong, spilled = choice(bench, "gemm bf16 bf16 m=4 n=60"), choice(bench, "route rows=4")
    refused, slower = choice(bench, "gemm bf16 bf16 add"), choice(bench, "experts_hidden")
    bench.planted.write_text(
        f"{faster[2]} 0.5\n{wrong[2]} 0.1 wrong\n{spilled[2]} 0.1\n{refused[2]} 0.1\n"
        f"{slower[2]} 1.98\n"
    )
    (out / "mine.txt").write_text("stays")
    weights = (out / "weights/model.safetensors").stat().st_ino
    planted: dict[str, Any] = {"spilled": [spilled[2]], "refused": [refused[2]]}

    killed = bench.run(run=TUNE, kill=True, **planted)
    assert killed.returncode == 9, killed.stderr
    assert {**before, "mine.txt": b"stays"} == bench.files(), "a kill leaves what was there"
    shutil.rmtree(bench.folder / "cache")

    told = bench.told(run=TUNE, **planted)
    assert [x["key"] for x in told["taken"]] == [faster[0]]
    assert told["taken"][0]["share"] == pytest.approx(0.25, abs=0.01)
    assert told["changed"]
    assert told["card"] == "fake 0"
    why = {(x["key"]): x["why"] for x in told["dropped"]}
    assert why.keys() == {wrong[0], spilled[0], refused[0]}
    assert why[wrong[0]].startswith("other results in decode")
    assert why[spilled[0]] == "spills 8 bytes"
    assert why[refused[0]] == "does not compile: no"
    assert all(step["after_us"] < step["before_us"] for step in told["steps"])
    assert bench.plan.choices[faster[0]].taken == faster[1]
    artifact.read(out, trust=True)
    assert "triton, cuda:sm_90 tuned on fake 0" in bench.run(run=["inspect"]).stdout
    assert (out / "weights/model.safetensors").stat().st_ino == weights
    assert (out / "mine.txt").read_text() == "stays"
    assert json.loads((out / "triton/sm_90/tuned.json").read_text())["taken"] == told["taken"]
    held = {p.stem for p in (out / "triton/sm_90").glob("*.cubin")} - {"multiply"}
    assert bench.plan.kernels.keys() <= held
    assert not list(bench.folder.glob(".out.*")), "what the killed one left is gone"

    again = bench.told(
        again=[("fake", {}), ("fake", {"tune": False}), ("another", {})], card="fake"
    )
    note = "1 tiles are those that `dsc tune` measured on fake 0; --no-tune: none"
    assert again[0] == [(out / "plan.json").read_text(), [note]], "the next compile takes it"
    assert again[1] == again[2] == [before["plan.json"].decode(), []]
    shutil.rmtree(out)
    kept.rename(out)


def test_a_card_without_triton_measures_what_was_compiled_before(bench: Bench) -> None:
    faster = choice(bench, "latent ")
    bench.planted.write_text(f"{faster[2]} 0.5\n")
    refused = bench.run(run=TUNE, no_triton=True)
    assert refused.returncode == 2
    assert "there is no Triton here" in refused.stderr
    assert "dsc tune --prepare" in refused.stderr
    key, tile, spilled = choice(bench, "route rows=4")
    prepare = ["tune", "--prepare", *TUNE[1:]]
    (made,) = bench.told(run=prepare, card="", spilled=[spilled])["prepared"]
    assert made["kernels"] > 20
    (dropped,) = made["dropped"]
    assert dropped == {"key": key, "tile": tile_json(tile), "why": "spills 8 bytes"}
    nowhere = bench.run(run=TUNE, card="")
    assert nowhere.returncode == 2
    assert "no GPU here runs these kernels: they are for cuda:sm_90, here is none" in nowhere.stderr
    idle = bench.told(run=[*TUNE, "--budget", "0"], no_triton=True)
    assert idle["not_tried"] > 20
    assert not idle["changed"]
    told = bench.told(run=TUNE, no_triton=True)
    assert [x["key"] for x in told["taken"]] == [faster[0]]
    assert not (bench.out / "triton/sm_90/space").exists(), "it is of no more use"


def test_a_tile_that_the_card_refuses_is_dropped_and_a_card_that_ends_ends_it(bench: Bench) -> None:
    failing = choice(bench, "latent ")
    bench.planted.write_text(f"{failing[2]} 1 fails\n")
    before = bench.files()
    told = bench.told(run=TUNE)
    (dropped,) = told["dropped"]
    assert dropped["key"] == failing[0]
    assert dropped["why"] == "the card refuses it: cuLaunchKernel: FAKE_ERROR"
    assert told["tried"] > 20
    assert told["why_not"] == "no tile is faster"
    bench.planted.write_text(f"{failing[2]} 1 ends\n")
    done = bench.run(run=TUNE)
    assert done.returncode == 2
    assert "the card answers no more: cuLaunchKernel: FAKE_ERROR" in done.stderr
    assert bench.files() == before


def test_results_are_held_at_the_batch_of_each_step(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    done = bench.run(compile=True, batch=6)
    assert done.returncode == 0, done.stderr
    few = {key for x in bench.plan.entries["decode_few"].launches for key in x.choices}
    wrong = choice(bench, "gemm bf16 bf16 m=6 ")
    assert wrong[0] not in few, "it is of steps of more than 4 sequences alone"
    bench.planted.write_text(f"{wrong[2]} 0.1 wrong\n")
    told = bench.told(run=TUNE)
    assert {x["key"]: x["why"][:29] for x in told["dropped"]} == {
        wrong[0]: "other results in decode of 6:"
    }


def test_a_few_wrong_positions_are_wrong_results() -> None:
    expected = np.random.default_rng(0).normal(size=(32, 50)).astype(np.float32)
    near = expected * 1.001
    assert not others(near, expected, 0.05)
    spoiled, missing = near.copy(), near.copy()
    spoiled[:4] = spoiled[4:8]
    assert not others(spoiled, expected, 0.05), "routers at a tie"
    spoiled[:6] = spoiled[6:12]
    assert others(spoiled, expected, 0.05) == "19% of the positions are far off"
    missing[3, 7] = np.nan
    assert others(missing, expected, 0.05) == "logits that are no numbers"
    assert others(near * 2, expected, 0.05) == "1 of the logits' norm"


def test_kernels_of_another_triton_or_of_other_sources_are_not_tuned(bench: Bench) -> None:
    for verb in (TUNE, ["tune", "--prepare"]):
        done = bench.run(run=verb, triton="9.9")
        assert done.returncode == 2
        assert "its kernels were made by Triton 3." in done.stderr
        assert "here is 9.9" in done.stderr
    place = bench.out / "triton/kernels/gemm.py"
    text = place.read_text()
    opened = artifact.read(bench.out, trust=True)
    changed = {"triton/kernels/gemm.py": f"# another\n{text}".encode()}
    artifact.rewrite(opened, Tuned({}, changed))
    done = bench.run(run=[*TUNE, "--trust"])
    artifact.rewrite(
        artifact.read(bench.out, trust=True), Tuned({}, {k: text.encode() for k in changed})
    )
    assert done.returncode == 2
    assert "plan or kernels are not those that this version" in done.stderr


@pytest.mark.parametrize("data", ['{"k": {"m": 1}}', '{"k": "m"}', '["k"]', "{", '{"k": {"x": 1}}'])
def test_what_is_kept_and_is_no_tile_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    monkeypatch.setattr(kept, "get", lambda *_: data.encode())
    assert choices.kept_tiles(Gpu("fake", TARGET, 10**9), "3.5") == {}


def test_an_entry_that_is_none_is_refused(bench: Bench) -> None:
    done = bench.run(run=["tune", "--entry", "decod"])
    assert done.returncode == 2
    assert "there is no entry 'decod'" in done.stderr


def test_rounds_try_each_tile_once_and_never_two_of_one_launch(bench: Bench) -> None:
    plan = bench.plan
    tried = [(key, tile) for each in rounds(plan) for key, tile in each.items()]
    assert len(tried) == len(set(tried))
    assert set(tried) == {(k, tile) for k, c in plan.choices.items() for tile in c.others}
    for each in rounds(plan):
        for entry in plan.entries.values():
            assert all(len(each.keys() & set(x.choices)) <= 1 for x in entry.launches)
    most = max(len(c.others) for c in plan.choices.values())
    assert len(rounds(plan)) <= most + 2


def test_a_tile_tells_of_its_own_launches_alone(bench: Bench) -> None:
    base = bench.plan
    key, tile, kernel = choice(bench, "latent ")
    other = lower_program(bench.program, TARGET, choices={key: tile})[0]
    found = apart(base, other, [key])
    assert found is not None
    for name, places in found[key].items():
        launches = other.entries[name].launches
        assert [i for i, x in enumerate(launches) if x.kernel == kernel] == list(places)
    assert apart(base, other, ["another"]) is None
