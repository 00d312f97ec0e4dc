"""The files of an ONNX artifact: how weights are cut into several, what models may read, names."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

import dsc
from dsc.backends.base import EmitOptions
from dsc.backends.onnxruntime.check import check
from dsc.backends.onnxruntime.external_data import check_external, external_tensors
from dsc.backends.onnxruntime.graph import static
from dsc.errors import ArtifactError, UsageError
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import DictSource
from dsc.runtime import artifact
from dsc.runtime.packing import others
from tests.backends.onnx_artifacts import BACKEND, conversation, executable, loaded
from tests.run_module import run_module

LIMIT = 20_000
MODEL, WEIGHTS = "onnx/prefill.onnx", "onnx/model.safetensors"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """Return a copy to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "a"))


def opened(path: Path) -> ModelProto:
    """Return a model without its weights."""
    return onnx.load(str(path), load_external_data=False)


def said(tensor: TensorProto) -> dict[str, str]:
    """Return what a tensor says of its place."""
    return {entry.key: entry.value for entry in tensor.external_data}


# --- several files --------------------------------------------------------------------------------


def test_weights_go_into_files_of_limited_size(lm: Program, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    runs = executable(lm, out, max_shard_size=LIMIT)
    index = json.loads((out / "onnx/model.safetensors.index.json").read_text())
    files = sorted((out / "onnx").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {path.name for path in files}
    for path in files:
        names = [name for name, file in index["weight_map"].items() if file == path.name]
        whole = sum(static(lm.weights[name].type.nbytes) for name in names)
        assert whole <= LIMIT or len(names) == 1
    assert f"{len(files):05d}.safetensors" in files[0].name
    assert "`onnx/model-*.safetensors`" in (out / "README.md").read_text()
    found = check(out)
    assert found.failure == ""
    assert found.sizes["weights"] == sum(path.stat().st_size for path in files)
    assert artifact.check_hashes(out) > len(files)
    assert others(lm, out / artifact.read(out).manifest["weights"]) == []
    ours, one = conversation(runs, lm), loaded(exported)
    for step, wanted in zip(ours, conversation(one, lm), strict=True):
        assert torch.equal(step, wanted)
    with files[1].open("r+b") as damaged:
        damaged.seek(-70, os.SEEK_END)
        damaged.write(b"damaged!")
    with pytest.raises(ArtifactError, match=files[1].name):
        artifact.check_hashes(out)


def test_a_size_that_is_none_is_said(lm: Program) -> None:
    with pytest.raises(UsageError, match="no size of a file"):
        BACKEND.emit(lm, EmitOptions(extra={"max_shard_size": "much"}))


def test_large_tensors_start_on_pages_and_small_ones_do_not(tmp_path: Path) -> None:
    """Of each it is told where it lies before it is written, and without being written."""
    sizes = {"a": 5, "b": 600, "c": 7}
    weights = "".join(
        f'\n  @{n} : f32[{size},512] = source "{n}" : f32[{size},512]' for n, size in sizes.items()
    )
    text = f"""program "p" {{stage=CANONICAL}}
    symbols {{N=[1,8]}}
    weights {{{weights}
    }}
    graph main(%x: f32[N,512]) {{
      %p = linear %x, @a : f32[N,5]
      %q = linear %x, @b : f32[N,600]
      %r = linear %x, @c : f32[N,7]
      return %p as "p", %q as "q", %r as "r"
    }}
    """
    tensors = {name: torch.randn(size, 512) for name, size in sizes.items()}
    program = parse_program(text, DictSource(tensors))
    runs = executable(program, tmp_path / "a")
    places = {x.name: said(x) for x in opened(tmp_path / "a/onnx/main.onnx").graph.initializer}
    offsets = {name: int(places[name]["offset"]) for name in sizes}
    assert offsets["b"] % (1 << 16) == 0
    assert offsets["a"] % (1 << 16) == 0  # the header ends where a page does
    assert offsets["c"] % (1 << 16)
    x = torch.randn(3, 512)
    for result, name in zip("pqr", sizes, strict=True):
        found = runs.run("main", {"x": x})[result]
        torch.testing.assert_close(found, x @ tensors[name].mT, atol=1e-4, rtol=0)
    assert check(tmp_path / "a").failure == ""


def test_a_graph_without_weights_passes_the_checker_over_a_sparse_file(
    lm: Program, exported: Path, tmp_path: Path
) -> None:
    emission = BACKEND.emit(lm, EmitOptions())
    out = artifact.write(
        tmp_path / "a", lm, emission, backend="onnxruntime", targets=("cpu",), report={},
        with_weights=False,
    )  # fmt: skip
    assert (out / MODEL).read_bytes() == (exported / MODEL).read_bytes()
    with pytest.raises(ArtifactError, match="without weights"):
        loaded(out)
    places = [said(x) for x in opened(out / MODEL).graph.initializer if x.external_data]
    assert {x["location"] for x in places} == {"model.safetensors"}
    with (out / WEIGHTS).open("wb") as sparse:
        sparse.truncate(max(int(x["offset"]) + int(x["length"]) for x in places))
    onnx.checker.check_model(str(out / MODEL), full_check=True)


# --- what a model reads ---------------------------------------------------------------------------

Attack = Callable[[ModelProto, Path], None]


def place(**wanted: str) -> Attack:
    """Give the first tensor that lies in a file another place."""

    def attack(model: ModelProto, _: Path) -> None:
        tensor = next(x for x in model.graph.initializer if x.external_data)
        del tensor.external_data[:]
        for key, value in wanted.items():
            tensor.external_data.add(key=key, value=value)

    return attack


def moved(key: str, value: str) -> Attack:
    """Say something else of where the first tensor lies."""

    def attack(model: ModelProto, _: Path) -> None:
        tensor = next(x for x in model.graph.initializer if x.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return attack


def overlapping(model: ModelProto, _: Path) -> None:
    """Have two tensors of one size read the same bytes."""
    one, two = (x for x in model.graph.initializer if x.name.endswith("input_layernorm.weight"))
    two.external_data.MergeFrom(one.external_data)
    del two.external_data[: len(one.external_data)]


def secret(name: str = "secret") -> TensorProto:
    """Return a tensor that reads a file of the machine."""
    tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    return tensor


def in_an_attribute(model: ModelProto, _: Path) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["secret"], value=secret()))


def in_a_branch(model: ModelProto, _: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], [secret()])
    outer = helper.make_graph([helper.make_node("If", [], [], then_branch=inner)], "outer", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=outer))


def in_a_function(model: ModelProto, _: Path) -> None:
    node = helper.make_node("Constant", [], ["secret"], value=secret())
    opsets = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("d", "f", [], ["secret"], [node], opsets))


def in_a_sparse_one(model: ModelProto, _: Path) -> None:
    values, indices = secret(), TensorProto(name="i", data_type=TensorProto.INT64, dims=[4])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))


def prepacked(model: ModelProto, _: Path) -> None:
    """Name bytes in the way of which ONNX Runtime reads a matrix that it has repacked."""
    tensor = next(x for x in model.graph.initializer if x.external_data)
    tensor.external_data.add(key="prepacked_0", value="key|999999999;64;0")


def a_pipe(_: ModelProto, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def a_link(_: ModelProto, folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "weights")
    (folder / WEIGHTS).symlink_to(folder.parent / "weights")


def a_linked_folder(_: ModelProto, folder: Path) -> None:
    shutil.move(folder / "onnx", folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")


ATTACKS: dict[str, tuple[Attack, str]] = {
    "absolute": (
        place(location="/etc/hostname"),
        "'/etc/hostname', which is no name",
    ),
    "above": (place(location="../report.json"), "is no name of a file"),
    "above and back": (place(location="../onnx/model.safetensors"), "is no name of a file"),
    "parent": (place(location=".."), "is no name of a file"),
    "none": (place(offset="0"), "'', which is no name of a file beside"),
    "memory": (
        place(location="*/_ORT_MEM_ADDR_/*", offset="64", length="4"),
        "is no name of a file",
    ),
    "unlisted": (place(location="secret"), "no file of the artifact"),
    "past the end": (moved("offset", "999999999"), "ends at byte .* which has"),
    "negative": (moved("offset", "-64"), "a shape that is none"),
    "of another kind": (prepacked, "is said 'prepacked_0'"),
    "no number": (moved("length", "1e3"), "a shape that is none"),
    "too short": (moved("length", "4"), "is 4 bytes, and its type and shape take"),
    "overlapping": (overlapping, "share bytes"),
    "in an attribute": (in_an_attribute, "is no name of a file"),
    "in a branch": (in_a_branch, "is no name of a file"),
    "in a function": (in_a_function, "is no name of a file"),
    "in a sparse one": (in_a_sparse_one, "is no name of a file"),
    "a pipe": (a_pipe, "is a pipe or a device|no regular file|has 0 bytes"),
    "a link": (a_link, "leads outside"),
    "a linked folder": (a_linked_folder, "leads outside"),
}


def reseal(folder: Path, model: bytes) -> None:
    """Have the manifest say that the model is what was exported."""
    (folder / MODEL).write_bytes(model)
    manifest = json.loads((folder / "dsc.json").read_text())
    facts = {"bytes": len(model), "sha256": hashlib.sha256(model).hexdigest()}
    manifest["files"][MODEL] = facts
    (folder / "dsc.json").write_bytes(artifact.sealed(manifest))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_that_reads_what_is_not_its_own_is_refused(name: str, copy: Path) -> None:
    """By `dsc.load`, by `--check` and by run.py, in one sentence."""
    attack, words = ATTACKS[name]
    (copy.parent / "secret").write_text("secret")
    (copy / "onnx" / "secret").write_text("secret")
    model = opened(copy / MODEL)
    before = model.SerializeToString()
    attack(model, copy)
    if model.SerializeToString() != before:
        reseal(copy, model.SerializeToString())
    with pytest.raises(ArtifactError, match=words) as refused:
        _ = dsc.load(copy).executable
    assert "\n" not in refused.value.what
    if "link" in name or name == "a pipe":
        with pytest.raises(ArtifactError, match=words):
            check(copy)
        return
    found = check(copy)
    assert found.findings[-1].question == "external data"
    assert found.failure
    with pytest.raises(ValueError, match=words):
        run_module(copy).Model(copy)._session(MODEL)


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-3], lambda x: b"\x3a\xff\xff\xff\xff\x7f" + x, lambda _: b"\x0b" * 9]
)
def test_what_is_no_model_is_refused(copy: Path, damage: Callable[[bytes], bytes]) -> None:
    reseal(copy, damage((copy / MODEL).read_bytes()))
    with pytest.raises(ArtifactError, match="is no ONNX model, or is damaged"):
        _ = dsc.load(copy).executable


def field(tag: int, data: bytes) -> bytes:
    """Return a field of bytes, its tag and size in five bytes each."""
    numbers = ([x >> 7 * i & 127 | 128 * (i < 4) for i in range(5)] for x in (tag, len(data)))
    return b"".join(map(bytes, numbers)) + data


@pytest.mark.parametrize("high", [0, 1, 4])
def test_a_tag_has_no_bits_that_readers_take_differently(copy: Path, high: int) -> None:
    """ONNX Runtime leaves out the bits beyond 32, so that it reads a tensor that nobody saw."""
    hidden = field((5 << 3 | 2) | high << 32, secret().SerializeToString())
    model = (copy / MODEL).read_bytes() + field(7 << 3 | 2, hidden)
    reseal(copy, model)
    with pytest.raises(ArtifactError, match="damaged" if high else "is no name of a file"):
        _ = dsc.load(copy).executable


def test_numbers_of_a_fixed_width_are_no_dims() -> None:
    """What stands in a field in another form than its own is not read by ONNX Runtime either."""
    tensor = TensorProto(name="t", data_type=TensorProto.UINT8, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights")
    data = tensor.SerializeToString() + bytes([1 << 3 | 1, *[0] * 8])
    (found,) = external_tensors(field(7 << 3 | 2, field(5 << 3 | 2, data)))
    assert found["bytes"] == 4


def test_graphs_in_graphs_end(tmp_path: Path) -> None:
    """Of an attribute, a node and a graph each is the only field of what is around it."""
    data = b""
    for _ in range(100):
        for key in (b"\x32", b"\x2a", b"\x0a"):
            data = (
                key + len(data).to_bytes(1) + data
                if len(data) < 128
                else key + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
            )
    (tmp_path / "m.onnx").write_bytes(
        b"\x3a" + bytes([len(data) & 127 | 128, len(data) >> 7]) + data
    )
    with pytest.raises(ValueError, match="graphs in graphs"):
        check_external(tmp_path, "m.onnx", ["m.onnx"])


def test_a_model_of_another_format_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime tells its own from ONNX's by the name alone."""
    (tmp_path / "m.ort").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'m\.ort' is not called \.onnx"):
        check_external(tmp_path, "m.ort", ["m.ort"])


def test_a_model_that_is_no_file_of_the_artifact_is_refused(copy: Path) -> None:
    shutil.copy(copy / MODEL, copy.parent / "evil.onnx")
    manifest = json.loads((copy / "dsc.json").read_text())
    manifest["meta"]["models"]["prefill"] = "../evil.onnx"
    (copy / "dsc.json").write_bytes(artifact.sealed(manifest))
    with pytest.raises(ArtifactError, match=r"'../evil.onnx' is no file of the artifact"):
        _ = dsc.load(copy).executable


def test_what_onnx_reads_is_what_is_looked_at(exported: Path) -> None:
    """Names and places, by onnx's own reader."""
    model = opened(exported / MODEL)
    wanted = {x.name: said(x) for x in model.graph.initializer if x.external_data}
    found = {x["name"]: x for x in external_tensors((exported / MODEL).read_bytes())}
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert {k: str(tensor[k]) for k in ("location", "offset", "length")} == wanted[name]
    check_external(exported, MODEL, [MODEL, WEIGHTS])


def test_the_links_of_a_hub_snapshot_are_followed(
    lm: Program, exported: Path, tmp_path: Path
) -> None:
    """`<repo>/snapshots/<revision>/onnx/file` is a link into `<repo>/blobs/`, by design."""
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in exported.rglob("*") if p.is_file()):
        shutil.copy(path, blobs / str(number))
        link = snapshot / path.relative_to(exported)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    session = dsc.load(snapshot).session()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(session.prefill(ids), dsc.load(exported).session().prefill(ids))
    new, zero = np.array([[3, 4]]), np.zeros((1, 1), np.int64)
    logits = run_module(snapshot).Model(snapshot).step(new, new - 3, zero[0], zero)
    assert np.isfinite(logits).all()


# --- kills ----------------------------------------------------------------------------------------

WRITING = ("os.mkdir", "os.rename", "os.chmod", "shutil.rmtree", "os.link", "os.symlink")


def forked(save: Callable[[], object], dies_at: int, told: Path) -> bool:
    """Save in a fork that dies before its n-th change of a file; whether it did.

    The paths that it was about to change go to `told`, a line each.
    """
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    log = os.open(told, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    seen = 0

    def noted(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in WRITING or event == "ctypes.dlsym":
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            path = "" if event == "ctypes.dlsym" else os.fsdecode(given[0])
            os.write(log, f"{event}\t{path}\n".encode())

    sys.addaudithook(noted)
    try:
        save()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("server", [None, "genai", "triton-server"])
def test_an_export_that_is_killed_is_whole_or_not_there(
    lm: Program, server: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before some of the changes that it makes to files, all of which are in its own folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    told, out = tmp_path / "told", tmp_path / "in" / "out"
    out.parent.mkdir()
    emission = BACKEND.emit(lm, EmitOptions(extra={"max_shard_size": LIMIT, "server": server}))

    def save() -> Path:
        return artifact.write(
            out, lm, emission, backend="onnxruntime", targets=("cpu",), report={}, force=True
        )

    assert not forked(save, -1, told)
    changes = [line.split("\t") for line in told.read_text().splitlines()]
    own = str(out.parent / ".out.")
    allowed = (own, str(out), str(tmp_path / "state"))
    outside = [path for _, path in changes if path and not path.startswith(allowed)]
    assert set(outside) <= {str(out.parent)}, "which is made where it is missing"
    for there in (True, False):
        if not there:
            shutil.rmtree(out)
        assert not forked(save, -1, told)
        count = len(told.read_text().splitlines())
        assert count > 15
        for at in (1, count // 3, count // 2, count - 1):
            if not there:
                shutil.rmtree(out, ignore_errors=True)
            assert forked(save, at, told), at
            assert not there or out.exists()
            assert not out.exists() or artifact.check_hashes(out)
    save()
    assert artifact.check_hashes(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
