"""Sessions and artifacts that share a card: within its memory, and with graphs of their own."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.backends.triton.device import DeviceExecutable
from dsc.backends.triton.driver import DriverError
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.memory import Memory
from dsc.backends.triton.timer import FILL_BYTES, Timer
from dsc.errors import BackendUnavailable, MemoryLimitError
from dsc.ir.program import Program
from dsc.runtime.plan import Plan
from dsc.runtime.session import Session
from tests.backends.test_triton import CHUNK, CONTEXT, FakeDriver, write_artifact, write_records
from tests.backends.test_triton import model as model  # the fixture


@pytest.fixture(scope="module")
def artifact(model: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_artifact(model, tmp_path_factory.mktemp("card"))
    place = folder / "triton/sm_90"
    write_records(LaunchProgram.of(Plan.from_json((place / "plan.json").read_bytes())), place)
    return folder


def opened(
    model: Program, artifact: Path, beside: FakeDriver | None = None
) -> tuple[DeviceExecutable, FakeDriver]:
    """The artifact on a card of its own, or on that of another driver."""
    driver = FakeDriver(beside)
    weights = artifact / "weights/model.safetensors"
    return DeviceExecutable(artifact / "triton/sm_90", weights, model, driver), driver


@pytest.fixture
def limited() -> Iterator[None]:
    yield
    dsc.set_memory_limit("cuda", None)


def started(executable: DeviceExecutable, model: Program, batch: int = 2) -> Session:
    session = Session(executable, model, batch, CONTEXT, CHUNK)
    session.prefill([[1, 2, 3]] * batch)
    return session


def held(driver: FakeDriver) -> int:
    """Bytes on a driver's card."""
    return sum(map(len, driver.blocks.values()))


@pytest.mark.usefixtures("limited")
def test_all_artifacts_and_sessions_share_one_limit(model: Program, artifact: Path) -> None:
    first, card = opened(model, artifact)
    second, _ = opened(model, artifact, card)
    sessions = [started(first, model), started(second, model)]
    full = held(card)
    dsc.set_memory_limit("cuda", (full + 1000) / 1e6)
    with pytest.raises(MemoryLimitError, match=r"a cache of .*limit is .*held now: ") as refusal:
        started(second, model)
    assert "smaller max_batch or max_context" in str(refusal.value)
    assert held(card) == full, "what was refused holds nothing"
    sessions[1].decode([4, 4])
    del sessions[0]
    gc.collect()
    kept = started(second, model)
    assert held(card) <= full + 1000, "caches of a session that is gone went first"
    kept.decode([5, 5])
    first.close()
    second.close()
    assert held(card) == 0


def test_executables_of_one_artifact_share_its_weights(model: Program, artifact: Path) -> None:
    """Who uploaded them may go first; a file that was written anew is another."""
    weights = artifact / "weights/model.safetensors"
    first, card = opened(model, artifact)
    size = held(card)
    assert size > 0.9 * weights.stat().st_size
    second, _ = opened(model, artifact, card)
    assert held(card) == size
    assert first._weights == second._weights
    first.close()
    assert held(card) == size
    started(second, model).decode([4, 4])
    weights.touch()
    third, _ = opened(model, artifact, card)
    assert third._weights.keys() == second._weights.keys()
    assert third._weights != second._weights
    second.close()
    third.close()
    assert held(card) == 0


def test_a_full_card_is_told_with_what_is_free(model: Program, artifact: Path) -> None:
    executable, driver = opened(model, artifact)
    session = started(executable, model)
    driver.room = held(driver) + 100
    with pytest.raises(MemoryLimitError, match=r"the GPU has 0\.0 MB free of"):
        started(executable, model)
    del session
    gc.collect()
    started(executable, model).decode([1, 1])
    executable.close()


def test_each_session_has_its_graphs(model: Program, artifact: Path) -> None:
    executable, driver = opened(model, artifact)
    sessions = [started(executable, model), started(executable, model)]
    for token in range(4):
        for session in sessions:
            session.decode([token, token])
    assert driver.captures == 2
    assert driver.replays == 2 * 3
    executable.close()


def test_a_number_of_rows_serves_several_batches(model: Program, artifact: Path) -> None:
    executable, _ = opened(model, artifact)
    found = [executable.rows(n) for n in (1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 64)]
    assert found == [1, 2, 3, 4, 8, 8, 12, 32, 32, 48, 64]
    executable.close()


@pytest.mark.usefixtures("limited")
def test_what_timing_takes_is_within_the_limit(model: Program, artifact: Path) -> None:
    """Caches of an executable that is closed are not given back once more."""
    closed, _ = opened(model, artifact)
    started(closed, model)
    closed.close()
    gc.collect()
    executable, driver = opened(model, artifact)
    before = held(driver)
    dsc.set_memory_limit("cuda", (before + 1000) / 1e6)
    with pytest.raises(MemoryLimitError, match=r"what is copied of .*limit is "):
        executable.copy_speed()
    assert held(driver) == before


def test_a_copy_is_of_half_where_two_of_the_whole_do_not_fit() -> None:
    """What was taken for the whole is given back before."""

    class Clocked(FakeDriver):
        def event(self) -> Any:
            return None

        def record(self, event: Any) -> None:
            return

        def seconds(self, start: Any, end: Any) -> float:
            return 1.0

    driver = Clocked()
    driver.room = 2 * FILL_BYTES
    timer = Timer(Memory(driver, "bench", lambda: None))
    assert timer.copy_speed(2 * FILL_BYTES) == 2 * FILL_BYTES
    assert held(driver) == 0


def test_a_driver_that_is_too_old_for_a_binary_is_said_so(model: Program, artifact: Path) -> None:
    class Older(FakeDriver):
        def load(self, *given: Any) -> Any:
            raise DriverError("cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE")

    driver, place = Older(), artifact / "triton/sm_90"
    with pytest.raises(BackendUnavailable, match="does not take k: cuModuleLoadData") as refusal:
        DeviceExecutable(place, artifact / "weights/model.safetensors", model, driver)
    assert "install a newer driver" in str(refusal.value)
    assert held(driver) == 0
