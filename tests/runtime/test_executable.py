"""What an executable is given and gives back, over code that is made up; and folders of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsc.errors import ArtifactError, UsageError
from dsc.ir.arrays import Array
from dsc.ir.index_ranges import PageDemand
from dsc.ir.parser import parse_program
from dsc.ir.types import DType
from dsc.runtime import sharded
from dsc.runtime.admission import Admission, Admitted, check_pages
from dsc.runtime.executable import Executable, set_threads

CACHED = """program "p" {stage=CANONICAL}
symbols {B=[1,3]}
graph main(%x: f32[B,1,2], %n: i64[B], %past: f32[B,4,2]) {
  %c = cache_write %past, %x, %n
  return %x, %c updates %past
}
"""


class Device(Executable):
    """Code whose caches live on a device; notes what it was told."""

    def __init__(self) -> None:
        self.program = parse_program(CACHED)
        self.told: list[str] = []

    def bind(self, entry: str, inputs: Mapping[str, Array]) -> Any:
        """What doubles x, and adds one to the cache."""

        def call() -> dict[str, Array]:
            self.told.append("ran")
            inputs["past"][...] += 1
            return {"x": inputs["x"] * 2, "c": inputs["past"]}

        return call

    def new_cache(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Zeros."""
        return np.zeros(shape, dtype.numpy)

    def rows(self, batch: int) -> int:
        """As many as there are."""
        return batch

    def copy(self, source: Array, target: Array) -> None:
        """Copy a part of a cache to another."""
        self.told.append("copied")

    def read_back(self, cache: Array) -> None:
        """Copy what the device holds."""
        self.told.append(f"read back {cache.shape}")

    def changed(self, cache: Array) -> None:
        """Take what the host holds."""
        self.told.append(f"changed {cache.shape}")


def given(kind: Any) -> dict[str, Any]:
    return {
        "x": kind(np.ones((1, 1, 2), np.float32)), "n": kind(np.zeros(1, np.int64)),
        "past": kind(np.zeros((1, 4, 2), np.float32)),
    }  # fmt: skip


def test_caches_of_a_device_are_told_before_and_read_back_after_a_run() -> None:
    device, inputs = Device(), given(np.asarray)
    found = device.run("main", inputs)
    assert device.told == ["changed (1, 4, 2)", "ran", "read back (1, 4, 2)"]
    assert found["c"] is inputs["past"]
    assert found["x"].tolist() == [[[2, 2]]]


def test_tensors_alone_give_tensors_and_what_was_updated_is_what_was_given() -> None:
    inputs = given(torch.from_numpy)
    found = Device().run("main", inputs)
    assert found["c"] is inputs["past"]
    assert isinstance(found["x"], torch.Tensor)
    assert inputs["past"].eq(1).all()
    mixed = given(torch.from_numpy) | {"n": [0]}
    assert isinstance(Device().run("main", mixed)["x"], np.ndarray)


def test_threads_are_set_where_there_are_any() -> None:
    with pytest.raises(UsageError, match="no threads to set"):
        set_threads(Device(), 2, None)


class Echo(Admitted):
    """Gives back its first input, and how often it was run."""

    runs = 0

    def execute(self, graph: Any, inputs: Mapping[str, Array], env: Mapping[str, int]) -> Any:
        """The input by the name of the output."""
        self.runs += 1
        return {graph.output_names[0]: next(iter(inputs.values())), "env": dict(env)}


class Looking(Echo):
    """Code that looks at values itself."""

    looks = True


TABLE = """program "p" {stage=CANONICAL}
symbols {N=[2,5]}
graph main(%x: f32[4,3], %i: i64[N]) {
  %y = take %x, %i {axis=0} : f32[N,3]
  return %x as "same", %y as "y"
}
"""


@pytest.mark.parametrize(
    ("size", "words"), [(1, "input i has 1 at axis 0"), (2, ""), (5, ""), (6, "has 6 at axis 0")]
)
def test_a_size_is_admitted_within_its_range(size: int, words: str) -> None:
    inputs: dict[str, Array] = {"x": np.zeros((4, 3), np.float32), "i": np.zeros(size, np.int64)}
    echo = Echo(parse_program(TABLE))
    if not words:
        assert echo.bind("main", inputs)()["env"] == {"N": size}
        return
    with pytest.raises(UsageError, match=words) as told:
        echo.bind("main", inputs)
    assert told.value.hint == "it was compiled for 2 to 5", "no option is for such a size"


def test_values_are_looked_at_when_a_call_runs_unless_the_code_does() -> None:
    index = np.array([0, 3], np.int64)
    inputs: dict[str, Array] = {"x": np.zeros((4, 3), np.float32), "i": index}
    echo, looking = Echo(parse_program(TABLE)), Looking(parse_program(TABLE))
    ours, theirs = echo.bind("main", inputs), looking.bind("main", inputs)
    ours()
    for wrong, shown in (([0, 4], "0 to 4"), ([-1, -1], "-1"), ([4, 4], "4")):
        index[:] = wrong
        with pytest.raises(UsageError, match=f"input i holds {shown}; each is ") as told:
            ours()
        assert told.value.hint == "0 to 3 are possible here"
        theirs()
    assert (echo.runs, looking.runs) == (1, 3)


def test_sizes_are_read_anew_where_shapes_or_types_are_others() -> None:
    program = parse_program(TABLE)
    admission = Admission(program.entries["main"], program.symbols)
    x = np.zeros((4, 3), np.float32)
    first = admission.sizes({"x": x, "i": np.zeros(2, np.int64)})
    assert admission.sizes({"x": x, "i": np.ones(2, np.int64)}) is first
    assert admission.sizes({"x": x, "i": np.zeros(3, np.int64)}) == {"N": 3}
    with pytest.raises(UsageError):
        admission.sizes({"x": x, "i": np.zeros(3, np.int32)})


@pytest.mark.parametrize(
    ("lengths", "row"),
    [([0, 0], None), ([4, 8], None), ([5, 8], 0), ([4, 9], 1), ([0, 1], None), ([4, 0], None)],
)
def test_every_token_of_the_cache_needs_a_page(lengths: list[int], row: int | None) -> None:
    """Pages of 4 rows: the first sequence has one, the second two."""
    table = np.array([[0, -1, -1], [2, 1, -1]])
    demand = PageDemand("table", "lengths", 4)
    if row is None:
        check_pages(demand, table, np.array(lengths))
        assert table.min() == -1
        return
    words = f"table names no page for some of the {lengths[row]} tokens of sequence {row}"
    with pytest.raises(UsageError, match=words):
        check_pages(demand, table, np.array(lengths))


# --- folders of ranks -----------------------------------------------------------------------------


def rank_folder(folder: Path, rank: int) -> None:
    """The least artifact of a rank: the second has no weights."""
    folder.mkdir()
    weights = None if rank else "w"
    files = {"w": {"sha256": "abc", "tensors": {}}} if weights else {}
    (folder / "dsc.json").write_text(json.dumps({"files": files, "weights": weights}))


def test_a_folder_of_ranks_lists_each_by_its_hashes(tmp_path: Path) -> None:
    out = sharded.write(tmp_path / "out", 2, rank_folder, {"backend": "null", "ranks": 9})
    found = sharded.opened(out)
    assert found is not None
    assert (found.ranks, found.rank(1), found.manifest["backend"]) == (2, out / "rank_1", "null")
    hashes = [
        hashlib.sha256((found.rank(r) / "dsc.json").read_bytes()).hexdigest() for r in range(2)
    ]
    assert found.manifest["folders"] == [
        {"folder": "rank_0", "manifest": hashes[0], "weights": "abc"},
        {"folder": "rank_1", "manifest": hashes[1], "weights": "none"},
    ]
    sharded.check_ranks(found, 2)
    for asked in (1, 3):
        with pytest.raises(UsageError, match=f"{asked} ranks for an artifact of 2") as told:
            sharded.check_ranks(found, asked)
        assert told.value.where == str(out)
    same = sharded._weights_digest(found, 0)
    assert sharded._weights_digest(found, 1) == same
    (out / "rank_0" / "dsc.json").write_text('{"files": {"w": {"sha256": "x"}}, "weights": "w"}')
    assert sharded._weights_digest(found, 0) != same
    assert sharded._weights_digest(found, 1) == same
    (out / "rank_1" / "dsc.json").unlink()
    with pytest.raises(ArtifactError, match="the artifact lacks rank_1"):
        sharded._weights_digest(found, 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, "ranks"), ({"ranks": None}, "none"), ({"files": {}}, "none"), ({"ranks": 3}, "3 rank"),
        ({"ranks": 0, "folders": []}, "0 ranks, 0 folders"), ({"ranks": 1}, "1 ranks, 2 folders"),
        ({"format": 1}, "format 1"), ({"folders": [{"folder": "rank_0"}]}, "2 ranks, 1 folders"),
        ({"folders": [{"folder": "rank_1"}, {"folder": "rank_0"}]}, "2 ranks, 2 folders"),
        ({"folders": [{"folder": "rank_0"}, {"folder": "rank_1"}]}, "damaged: 'manifest'"),
    ],
)  # fmt: skip
def test_a_manifest_of_ranks_is_one_or_is_told(
    change: dict[str, Any], found: str, tmp_path: Path
) -> None:
    out = sharded.write(tmp_path / "out", 2, rank_folder, {})
    told = json.loads((out / "dsc.json").read_text()) | change
    told = {key: value for key, value in told.items() if value is not None}
    (out / "dsc.json").write_text(json.dumps(told))
    if found in ("ranks", "none"):
        assert (sharded.opened(out) is None) == (found == "none")
        return
    with pytest.raises(ArtifactError, match=found):
        sharded.opened(out)
    assert sharded.opened(tmp_path) is None
