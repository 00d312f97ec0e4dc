"""Starting ranks and seeing who is missing, over processes, stores and transports that are made up.

`test_ranks.py` does the same with real ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsc
from dsc.errors import RankError, UsageError
from dsc.ir.ranks import entered
from dsc.runtime import collectives, launch
from dsc.runtime.collectives import Place, ProcessGroup

ROOT = str(Path(dsc.__file__).resolve().parent.parent)


@pytest.mark.parametrize(
    ("cores", "ranks", "threads"),
    [(8, 2, "4"), (8, 3, "2"), (2, 4, "1"), (None, 1, "1"), (1, 1, "1")],
)
def test_a_rank_has_its_place_and_its_share_of_the_cores(
    cores: int | None, ranks: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    wanted = {
        "OMP_NUM_THREADS": threads, "DSC_LAUNCHED": "1", "PYTHONPATH": ROOT,
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert launch.environment(1, ranks, 29500) == wanted
    own = {"OMP_NUM_THREADS": "7", "PYTHONPATH": "/mine", "HOME": "/home", "RANK": "9"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    path = f"{ROOT}{os.pathsep}/mine"
    assert launch.environment(1, ranks, 29500) == wanted | own | {"RANK": "1", "PYTHONPATH": path}


def test_the_line_runs_the_same_python() -> None:
    line = launch.command(["generate", "out"])
    assert line == [sys.executable, "-c", "from dsc.cli import main; main()", "generate", "out"]


class Process:
    """A process that ends with each of these codes, one a look; the last one stays."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = list(codes)

    def poll(self) -> int | None:
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

    @property
    def returncode(self) -> int | None:
        return self.codes[0]


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return what is slept, which takes no time but moves the clock."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, monotonic=lambda: 100.0 + sum(slept))
    monkeypatch.setattr(launch, "time", clock)
    return slept


@pytest.mark.parametrize(
    ("running", "first", "looks"),
    [
        ([Process(0), Process(0)], None, 1),
        ([Process(None, 0), Process(None, None, 0)], None, 3),
        ([Process(None, None, 0), Process(None, 3)], 1, 2),
        ([Process(4), Process(3)], 0, 1),
        ([Process(4), Process(0), Process(-9)], 2, 1),
        ([Process(1), Process(-11), Process(-9)], 1, 1),
    ],
)
def test_the_first_that_fails_is_found_and_a_killed_one_before_those_that_noticed(
    running: Any, first: int | None, looks: int, naps: list[float]
) -> None:
    assert launch._first_failure(running) == first
    assert len(naps) == looks - 1


def test_ranks_are_waited_for_until_all_have_ended_or_the_limit_is_over(naps: list[float]) -> None:
    def waited(limit: float | None, *running: Any) -> int:
        naps.clear()
        launch._wait(running, limit)
        return len(naps)

    assert waited(None, Process(0), Process(3)) == 0
    assert waited(None, Process(0), *[Process(*[None] * 50, 0)]) == 50
    assert waited(1.0, Process(0), *[Process(*[None] * 5, 0)]) == 5
    assert 1.0 < launch.POLL * waited(1.0, Process(0), Process(None)) < 1.0 + 2.5 * launch.POLL


@pytest.mark.parametrize(
    ("code", "first", "shown"), [(3, 0, ""), (3, 1, "words of 1"), (-9, 1, "words of 1")]
)
def test_the_words_of_another_rank_are_shown_and_a_signal_is_named(
    code: int, first: int, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [tmp_path / "0", tmp_path / "1"]
    for rank, log in enumerate(logs):
        log.write_text(f"words of {rank}")
    running: Any = [Process(0), Process(0)]
    running[first] = Process(code)
    if code > 0:
        assert launch._report(first, running, logs) == code
    else:
        with pytest.raises(RankError, match=f"rank {first} was killed by SIGKILL"):
            launch._report(first, running, logs)
    assert capsys.readouterr().err == shown


# --- meeting --------------------------------------------------------------------------------------

WHERE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, Place(1, 2, "there", 29500, False)),
        ({"RANK": "0"}, Place(0, 2, "there", 29500, True)),
        ({"MASTER_PORT": "1"}, Place(1, 2, "there", 1, False)),
        ({"MASTER_PORT": "65535"}, Place(1, 2, "there", 65535, False)),
        ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, Place(0, 2, "there", 29500, False)),
        ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}, Place(0, 2, "there", 29500, True)),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        ({"RANK": "3"}, "RANK is 3 and WORLD_SIZE 2"),
        ({"RANK": "", "MASTER_ADDR": ""}, "lacks RANK, MASTER_ADDR"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'; a number is needed"),
    ],
)
def test_a_place_is_read_of_the_environment(changed: dict[str, str], found: Place | str) -> None:
    if isinstance(found, Place):
        assert collectives.place(WHERE | changed) == found
    else:
        with pytest.raises(UsageError, match=found):
            collectives.place(WHERE | changed)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"MASTER_PORT": "1"}, False),
    ],
)
def test_who_has_a_rank_or_a_number_of_them_was_launched(
    environment: Mapping[str, str], said: bool
) -> None:
    assert collectives.launched(environment) == said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, 25.0), ("0.5", 0.5), ("999999", 999999.0), ("0", 0), ("1e6", 0), ("nan", 0), ("x", 0)],
)
def test_a_limit_is_a_positive_number_of_seconds(text: str | None, seconds: float) -> None:
    given = {} if text is None else {"LIMIT": text}
    if seconds:
        assert collectives._seconds(given, "LIMIT", 25.0) == seconds
    else:
        with pytest.raises(UsageError, match=f"LIMIT is '{text}'"):
            collectives._seconds(given, "LIMIT", 25.0)


def test_alone_nobody_is_met() -> None:
    assert collectives.join(WHERE | {"RANK": "0", "WORLD_SIZE": "1"}).size == 1
    group: Any = ProcessGroup(Place(0, 2, "", 1, True), None, None, 1.0)
    with entered(group):
        assert collectives.join({}) is group


class Store(dict[str, str]):
    """What ranks told one another. `late` comes key by key, one a look that finds nothing new."""

    late: list[str]

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> str:
        return self.setdefault(key, value)


def test_who_waits_says_for_whom_each_time_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, slept = Store({"hello/0": "a"}), [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += 0.5
        if slept[0] in (4.0, 5.5):
            store[f"hello/{1 if slept[0] == 4.0 else 2}"] = "b"

    for name in collectives.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: 100.0 + slept[0])
    monkeypatch.setattr(collectives, "time", clock)
    found = collectives._wait_for(store, "hello", 3, 8.0, "rank 0 at x:1")
    assert found == [b"a", b"b", b"b"]
    assert capsys.readouterr().err.splitlines() == [
        "dsc: rank 0 at x:1 waits for ranks 1, 2 of 3, for 6 s more",
        "dsc: rank 0 at x:1 waits for rank 2 of 3, for 4 s more",
    ]
    for key, waiting in (("facts", ""), ("hello", "")):
        slept[0] = 10.0
        assert collectives._wait_for(store, "hello", 3, 0.0, waiting) == found
        with pytest.raises(RankError, match=r"ranks 0, 1, 2, 3 did not come within 2 s") as told:
            collectives._wait_for(store, f"{key}/other", 4, 2.0, waiting)
        assert slept[0] == 12.5
        assert told.value.hint == "start all 4 ranks, each with its own RANK"
    assert capsys.readouterr().err == ""


class Work:
    """A message on its way: it arrives, or fails with these words."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.waits: list[timedelta] = []

    def wait(self, limit: timedelta) -> None:
        self.waits.append(limit)
        if self.problem:
            raise RuntimeError(self.problem)


class Transport:
    """Notes what is sent and received, with tags; some peers are gone, others silent."""

    def __init__(self, gone: tuple[int, ...] = (), silent: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.works: list[Work] = []
        self.gone, self.silent = gone, silent

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self.note("recv", tensors, peer, tag)

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self.note("send", tensors, peer, tag)

    def note(self, what: str, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        assert tensors[0].dtype == torch.uint8
        self.calls.append((what, peer, tag))
        words = {"Connection reset": self.gone, "Timed out waiting": self.silent}
        self.works.append(Work(next((w for w, p in words.items() if peer in p), "")))
        return self.works[-1]


def group(rank: int, size: int, transport: Transport, store: Store | None = None) -> ProcessGroup:
    return ProcessGroup(Place(rank, size, "", 1, False), store, transport, 5.0)


def test_messages_are_numbered_for_each_pair_and_empty_ones_are_not_sent() -> None:
    transport = Transport()
    ours = group(1, 3, transport)
    x, empty = torch.zeros(3), torch.zeros(0)
    wanted = {0: x, 2: empty}
    assert ours.exchange("all_gather", {0: x, 2: x}, wanted) == wanted
    ours.exchange("all_gather", {0: empty, 2: x}, {0: x})
    assert transport.calls == [
        ("recv", 0, 1), ("send", 0, 1), ("send", 2, 1), ("recv", 0, 2), ("send", 2, 2),
    ]  # fmt: skip
    assert all(len(w.waits) == 1 for w in transport.works)
    assert all(timedelta(0) < w.waits[0] <= timedelta(seconds=5) for w in transport.works)


def test_who_only_sends_waits_for_the_oldest_beyond_so_many() -> None:
    transport = Transport()
    ours = group(0, 2, transport)
    most = collectives._MOST_LEAVING
    for number in range(most + 2):
        ours.exchange("send", {1: torch.zeros(1)}, {})
        waited = [len(w.waits) for w in transport.works]
        surplus = max(0, number + 1 - most)
        assert waited == [1] * surplus + [0] * (number + 1 - surplus)


@pytest.mark.parametrize(
    ("gone", "silent", "words"),
    [
        ((2,), (), "rank 2 died: the connection closed at all_reduce (seen by rank 1)"),
        ((), (0,), "rank 0 did not come to all_reduce within 5 s (seen by rank 1)"),
        ((), (2, 3), "ranks 2, 3 did not come to all_reduce within 5 s (seen by rank 1)"),
        ((3,), (2,), "rank 3 died: the connection closed at all_reduce (seen by rank 1)"),
    ],
)
def test_who_is_lost_is_named(gone: tuple[int, ...], silent: tuple[int, ...], words: str) -> None:
    ours = group(1, 4, Transport(gone, silent))
    x = torch.zeros(1)
    with pytest.raises(RankError) as told:
        ours.exchange("all_reduce", {0: x, 2: x, 3: x}, {0: x, 2: x, 3: x})
    assert told.value.args[0].splitlines()[0] == words or words in str(told.value)
    who = words.split(" d")[0]
    assert told.value.hint == f"see what {who} printed last, then start all ranks again"


def test_a_rank_that_stopped_because_another_was_lost_is_not_blamed() -> None:
    store, x = Store(), torch.zeros(1)
    with pytest.raises(RankError, match="rank 3 died"):
        group(1, 4, Transport(gone=(3,)), store).exchange("send", {3: x}, {3: x})
    assert json.loads(store["lost"]) == [3]
    with pytest.raises(RankError, match="rank 3 died"):
        group(2, 4, Transport(gone=(1,)), store).exchange("send", {1: x}, {1: x})
    with pytest.raises(RankError, match="rank 1 died"):
        group(3, 4, Transport(gone=(1,)), store).exchange("send", {1: x}, {1: x})
    with pytest.raises(RankError, match="rank 0 died"):
        group(2, 4, Transport(gone=(0,)), store).exchange("send", {0: x}, {0: x})


def test_texts_are_shared_and_the_rank_that_holds_them_leaves_last() -> None:
    store = Store({"facts/0": "a", "facts/2": "c"})
    assert group(1, 3, Transport(), store).share("facts", "b") == ["a", "b", "c"]
    assert store["facts/read/1"] == ""
    ours = group(0, 3, Transport(), store)
    ours.timeout = 0.05
    with pytest.raises(RankError, match="rank 2 did not come"):
        ours.share("facts", "a")
    store["facts/read/2"] = ""
    assert ours.share("facts", "a") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("facts", "lines"),
    [
        ([{"seed": "1"}, {"seed": "1"}, {"seed": "1"}], []),
        ([{"seed": "1"}, {"seed": "2"}, {"seed": "2"}], ["seed: 1 on rank 0, 2 on ranks 1, 2"]),
        ([{"seed": "1"}, {"seed": "2"}], ["seed: 2 on rank 1, 1 on rank 0"]),
        (
            [{"a": "1", "b": "x"}, {"a": "2"}, {"a": "3", "b": "x"}],
            ["a: 2, 3 on ranks 1, 2, 1 on rank 0", "b: nothing on rank 1, x on ranks 0, 2"],
        ),
    ],
)
def test_ranks_are_compared_with_most_of_them(
    facts: list[dict[str, str]], lines: list[str]
) -> None:
    store = Store({f"facts/all/{rank}": json.dumps(each) for rank, each in enumerate(facts)})
    store |= {f"facts/all/read/{rank}": "" for rank in range(len(facts))}
    with entered(group(0, len(facts), Transport(), store)):
        if not lines:
            collectives.agree("all", facts[0])
            return
        with pytest.raises(RankError) as told:
            collectives.agree("all", facts[0])
    assert str(told.value).splitlines()[1 : 1 + len(lines)] == lines


def test_a_digest_depends_on_where_each_part_ends() -> None:
    assert collectives.digest("ab", "c") != collectives.digest("a", "bc")
    assert collectives.digest("ab") == collectives.digest(b"ab") != collectives.digest("ab", "")
    assert len(collectives.digest()) == 16
