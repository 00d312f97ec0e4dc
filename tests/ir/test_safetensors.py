"""The safetensors reader: equal to the reference reader on good files, firm on all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dsc.errors import CheckpointError, UsageError
from dsc.ir.arrays import tensor_of
from dsc.ir.safetensors import INDEX_FILE, SafetensorsFile, open_safetensors
from dsc.ir.types import DType, TensorType
from dsc.models.configs import TINY_CHECKPOINT

SHARDED = Path(__file__).parents[1] / "data" / "tiny-v3-fp8"
Header = dict[str, Any]


def raw(header: object, data: bytes = b"") -> bytes:
    """A file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("folder", [TINY_CHECKPOINT, SHARDED], ids=["single", "sharded"])
def test_equal_to_the_reference_reader(folder: Path) -> None:
    source = open_safetensors(folder)
    seen = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as reference:
            for key in reference.keys():
                seen.add(key)
                expected = reference.get_tensor(key)
                found = source.load(key)
                assert source.types[key] == TensorType(DType.of(expected.dtype), expected.shape)
                assert found.dtype == expected.dtype
                assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), key
    assert set(source.types) == seen


def test_loads_are_views_of_one_mapping() -> None:
    """No copy: two loads give the same memory, and a slice lies inside it."""
    source = open_safetensors(TINY_CHECKPOINT)
    whole = source.load("lm_head.weight")
    assert source.load("lm_head.weight").data_ptr() == whole.data_ptr()
    part = tensor_of(source.array("lm_head.weight", slice(5, 9)))
    assert torch.equal(part, whole[5:9])
    assert part.data_ptr() == whole[5:9].data_ptr()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 2049)])
def test_a_slice_must_lie_in_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(UsageError, match="lm_head"):
        open_safetensors(TINY_CHECKPOINT).array("lm_head.weight", slice(start, stop))


def test_empty_scalar_and_unaligned_tensors(tmp_path: Path) -> None:
    data = bytes([7]) + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {
        "odd": tensor("F32", [2], [1, 9]),
        "byte": tensor("U8", [], [0, 1]),
        "none": tensor("BF16", [0, 4], [9, 9]),
    }
    (tmp_path / "model.safetensors").write_bytes(raw(header, data))
    source = open_safetensors(tmp_path)
    assert source.load("odd").tolist() == [1.5, -2.0]
    assert source.load("odd").data_ptr() % 4 == 0
    assert source.load("byte").item() == 7
    assert source.load("none").shape == (0, 4)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "only 0 bytes"),
    "no header": (b"\x10\x00\x00", "only 3 bytes"),
    "header longer than the file": (b"\xff" * 8 + b"{}", "claims"),
    "header of nothing": (raw(b""), "claims 0 bytes"),
    "cut in the header": (raw({"a": tensor()})[:40], "cut short"),
    "not JSON": (raw(b"xx"), "not valid JSON"),
    "not UTF-8": (raw(b"\xff\xff"), "no UTF-8 text"),
    "an array": (raw([]), "expected a JSON object"),
    "deep": (raw(b"[" * 100_000), "nested too deeply"),
    "a name twice": (raw(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "tensor is a list": (raw({"a": []}), "must be an object"),
    "unknown dtype": (raw({"a": tensor("F7")}, b"0" * 24), "unknown dtype 'F7'"),
    "dtype is a list": (raw({"a": tensor(["F32"])}, b"0" * 24), "unknown dtype"),
    "negative extent": (raw({"a": tensor(shape=[-2, -3])}, b"0" * 24), "shape is no list"),
    "extent is true": (raw({"a": tensor(shape=[True, 6])}, b"0" * 24), "shape is no list"),
    "extent is a float": (raw({"a": tensor(shape=[2.0, 3])}, b"0" * 24), "shape is no list"),
    "shape missing": (raw({"a": {"dtype": "F32"}}), "shape is no list"),
    "extent overflows": (raw({"a": tensor(shape=[1 << 60, 16])}, b"0" * 24), "shape is no list"),
    "product overflows": (raw({"a": tensor(shape=[1 << 40] * 8)}, b"0" * 24), "24 bytes for F32"),
    "too many axes": (raw({"a": tensor(shape=[1] * 9)}, b"0" * 24), "9 axes"),
    "cut in the data": (raw({"a": tensor()}, b"0" * 23), "do not lie in the file's 23 bytes"),
    "backwards": (raw({"a": tensor(offsets=[24, 0])}, b"0" * 24), "do not lie"),
    "three offsets": (raw({"a": tensor(offsets=[0, 8, 24])}, b"0" * 24), "do not lie"),
    "bytes do not fit": (raw({"a": tensor(shape=[2, 2])}, b"0" * 24), "which takes 16"),
    "overlap": (
        raw({"a": tensor(), "b": tensor(offsets=[20, 44])}, b"0" * 44),
        "bytes of a and b overlap",
    ),
}


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_safetensors(tmp_path)
    assert str(file) in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 130), value=st.integers(0, 255))
def test_one_wrong_byte_is_harmless(tmp_path: Path, position: int, value: int) -> None:
    """A damaged header is refused, or still describes tensors that lie in the file."""
    good = raw({"a": tensor(), "b": tensor("BF16", [4], [24, 32])}, bytes(range(32)))
    damaged = bytearray(good)
    damaged[position] = value
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(damaged)
    try:
        opened = SafetensorsFile.open(file)
    except CheckpointError:
        return
    for key, entry in opened.entries.items():
        assert entry.end <= len(good)
        assert opened.array(key).shape == entry.shape


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder of two shards and their index."""
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_by_their_index(sharded: Path) -> None:
    source = open_safetensors(sharded)
    assert sorted(source.types) == ["a", "b"]
    assert source.load("b").tolist() == [1, 1, 1]
    assert source.files["b"].path.name == "two.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../one.safetensors"}, "leaves the checkpoint folder"),
        ({"a": "/etc/passwd"}, "leaves the checkpoint folder"),
        ({"a": "sub/one.safetensors"}, "leaves the checkpoint folder"),
        ({"a": "x" * 300}, "a file name of 300 characters, .* at most 255"),
        ({"a": "ä" * 200}, "cannot be read: File name too long"),
        ({"a": "x\0y"}, "is missing"),
        ({"a": ".."}, "leaves the checkpoint folder"),
        ({"a": "absent.safetensors"}, "'absent.safetensors' is missing"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, "1 tensors .* a in two.safetensors"),
        ({"a": 3}, "file names"),
        ({"a": ["one.safetensors"]}, "file names"),
        ({}, "not empty"),
        ([], "not empty"),
    ],
)
def test_refuses_an_index_that_does_not_hold(sharded: Path, weight_map: object, words: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=words):
        open_safetensors(sharded)


def link_out(folder: Path, outside: Path) -> None:
    outside.mkdir()
    (folder / "one.safetensors").rename(outside / "one.safetensors")
    (folder / "one.safetensors").symlink_to(outside / "one.safetensors")


def link_out_of_index(folder: Path, outside: Path) -> None:
    outside.mkdir()
    (folder / INDEX_FILE).rename(outside / INDEX_FILE)
    (folder / INDEX_FILE).symlink_to(outside / INDEX_FILE)


def dangling(folder: Path, outside: Path) -> None:
    (folder / "one.safetensors").unlink()
    (folder / "one.safetensors").symlink_to(outside / "nowhere")


@pytest.mark.parametrize("attack", [link_out, link_out_of_index, dangling])
def test_refuses_links_that_lead_out(
    sharded: Path,
    tmp_path_factory: pytest.TempPathFactory,
    attack: Callable[[Path, Path], None],
) -> None:
    attack(sharded, tmp_path_factory.mktemp("outside") / "there")
    with pytest.raises(CheckpointError, match=r"leads out|leads nowhere"):
        open_safetensors(sharded)


def test_follows_the_links_of_a_hub_snapshot(tmp_path: Path) -> None:
    """`<repo>/snapshots/<revision>/file` is a link into `<repo>/blobs/`, by design."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "abcd")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/abcd"))
    assert open_safetensors(snapshot).load("a").tolist() == [1, 1]


def test_files_without_an_index_must_not_share_a_tensor(sharded: Path) -> None:
    (sharded / INDEX_FILE).unlink()
    assert sorted(open_safetensors(sharded).types) == ["a", "b"]
    save_file({"a": torch.zeros(1)}, sharded / "three.safetensors")
    with pytest.raises(CheckpointError, match=r"in one.safetensors and in three.safetensors|"
                       r"in three.safetensors and in one.safetensors"):  # fmt: skip
        open_safetensors(sharded)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04c__builtin__\neval\n")
    with pytest.raises(CheckpointError, match="run code when opened"):
        open_safetensors(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        open_safetensors(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        open_safetensors(tmp_path / "absent")
