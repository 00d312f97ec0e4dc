"""A checkpoint in FP8 and its twin in bf16: what is written, what is refused, what is left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dsc
from dsc.cli import build_app, main
from dsc.errors import CheckpointError, ConfigError, DscError, FileError, UsageError
from dsc.files import size_of
from dsc.frontends.convert import Form
from dsc.frontends.huggingface import load_checkpoint, read_config
from dsc.ir.arrays import Array, array_of
from dsc.ir.safetensors import SafetensorsFile, open_safetensors
from dsc.models.configs import TINY_CHECKPOINT
from dsc.runtime import shards
from dsc.runtime.packing import damaged
from tests.family import small
from tests.frontends.test_huggingface import FP8, FP8_CONFIG, Tensors, save

E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
KEPT = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
LINEAR = "model.layers.0.self_attn.o_proj.weight"
SCALES = LINEAR + "_scale_inv"
to_bf16 = partial(dsc.convert, to="bf16")
to_fp8 = partial(dsc.convert, to="fp8")


@dataclass(frozen=True)
class Folders:
    """The tiny model in FP8, in bf16 made of that, and in FP8 again made of this."""

    fp8: Path
    bf16: Path
    again: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Convert there and back; the second time in several files."""
    made = tmp_path_factory.mktemp("converted")
    to_bf16(FP8, made / "bf16")
    to_fp8(made / "bf16", made / "again", max_shard_size="4MB")
    return Folders(FP8, made / "bf16", made / "again")


def arrays(folder: Path) -> dict[str, Array]:
    """All tensors of a checkpoint."""
    source = open_safetensors(folder)
    return {key: source.array(key) for key in source.types}


def same(a: Array, b: Array) -> bool:
    """Whether two arrays are one bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def spread(scales: Array, shape: tuple[int, ...]) -> Array:
    """The scale of each element in blocks of 128 x 128."""
    rows, columns = (np.arange(extent) // 128 for extent in shape)
    return scales[rows[:, None], columns]


def raw_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- what is written -----------------------------------------------------------------------------


def test_bf16_is_code_times_scale_rounded_once(tiny: Folders) -> None:
    stored, made = arrays(tiny.fp8), arrays(tiny.bf16)
    assert made.keys() == {key for key in stored if not key.endswith("_scale_inv")}
    for key, found in made.items():
        expected = stored[key]
        if expected.dtype == ml_dtypes.float8_e4m3fn:
            scales = spread(stored[key + "_scale_inv"], expected.shape)
            expected = (expected.astype(np.float32) * scales).astype(ml_dtypes.bfloat16)
        assert same(found, expected), key


def test_fp8_that_was_made_of_bf16_comes_back_bit_for_bit(tiny: Folders) -> None:
    before, after = arrays(tiny.fp8), arrays(tiny.again)
    assert before.keys() == after.keys()
    assert [key for key, each in before.items() if not same(each, after[key])] == []


def test_fp8_is_as_near_as_its_codes_can_be(tiny: Folders) -> None:
    """Half a step of e4m3, and that of bf16; some weight comes within a tenth of that."""
    exact, made, stored = arrays(TINY_CHECKPOINT), arrays(tiny.bf16), arrays(tiny.again)
    most = 0.0
    for key in (key.removesuffix("_scale_inv") for key in stored if key.endswith("_scale_inv")):
        x, y = exact[key].astype(np.float32), made[key].astype(np.float32)
        scales = spread(stored[key + "_scale_inv"], x.shape)
        bound = np.maximum(abs(x) * 2**-4, scales * 2**-10) + abs(y) * 2**-8
        most = max(most, float((abs(x - y) / bound).max()))
    assert 0.9 < most <= 1


def test_folders_are_whole_checkpoints(tiny: Folders) -> None:
    for folder, count in ((tiny.bf16, 1), (tiny.again, 4)):
        shards = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert sorted(path.name for path in folder.iterdir()) == sorted(KEPT + shards)
        for name in ("generation_config.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (FP8 / name).read_bytes()
        files = {name: SafetensorsFile.open(folder / name) for name in shards}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        held = {key: name for name, file in files.items() for key in file.entries}
        assert index["weight_map"] == held
        entries = [entry for file in files.values() for entry in file.entries.values()]
        assert index["metadata"]["total_size"] == sum(e.end - e.begin for e in entries)
        assert all(entry.begin % entry.dtype.itemsize == 0 for entry in entries)
    sizes = [(tiny.again / name).stat().st_size for name in shards]
    assert max(sizes) < 4.1e6
    before, plain = raw_config(FP8), raw_config(tiny.bf16)
    assert raw_config(tiny.again) == before
    assert plain == {k: v for k, v in before.items() if k != "quantization_config"}


def test_transformers_computes_with_bf16_what_fp8_computes_here(tiny: Folders) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny.bf16, experts_implementation="eager")
    ours: Any = load_checkpoint(FP8).stock()
    ids = torch.arange(40).reshape(2, 20) * 7
    with torch.no_grad():
        expected, found = ours(ids).logits, loaded(ids).logits
    assert found.dtype == BF16
    assert torch.equal(found, expected)


def folder_of(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A checkpoint of one layer with these tensors, enough of them for a conversion."""
    folder.mkdir()
    return save(folder, small(num_hidden_layers=1), tensors, **config)


def plain(*shape: int, scale: float = 1.0) -> Tensors:
    """A linear in bf16 beside what stays as it is."""
    random = torch.Generator().manual_seed(len(shape))
    return {
        LINEAR: (torch.randn(shape, generator=random) * scale).to(BF16),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 5, generator=random).to(BF16),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(4, generator=random),
        "model.layers.1.eh_proj.weight": torch.ones(2, 2, dtype=BF16),
        "model.embed_tokens.weight": torch.ones(3, 4, dtype=BF16),
    }


def test_scales_may_be_powers_of_two(tmp_path: Path) -> None:
    """The least that keep every number in range; then the second trip changes nothing."""
    first, back, last = (tmp_path / name for name in ("first", "back", "last"))
    to_fp8(folder_of(tmp_path / "in", plain(200, 150)), first, scale_fmt="ue8m0")
    assert raw_config(first)["quantization_config"]["scale_fmt"] == "ue8m0"
    stored = arrays(first)
    x = np.abs(arrays(tmp_path / "in")[LINEAR].astype(np.float32))
    least = np.array([[x[:128, :128].max(), x[:128, 128:].max()],
                      [x[128:, :128].max(), x[128:, 128:].max()]]) / 448  # fmt: skip
    assert same(stored[SCALES], np.exp2(np.ceil(np.log2(least))).astype(np.float32))
    to_bf16(first, back)
    to_fp8(back, last, scale_fmt="ue8m0")
    assert all(same(each, arrays(last)[key]) for key, each in stored.items())


def test_only_what_published_checkpoints_have_in_fp8_becomes_fp8(tmp_path: Path) -> None:
    stacked = "model.layers.0.mlp.experts.gate_up_proj"
    made = plain(8, 8) | {stacked: torch.randn(2, 130, 140), "lm_head.weight": torch.ones(3, 4)}
    to_fp8(folder_of(tmp_path / "in", made), tmp_path / "out")
    found = arrays(tmp_path / "out")
    assert found.keys() == made.keys() | {SCALES, stacked + "_scale_inv"}
    assert found[stacked + "_scale_inv"].shape == (2, 2, 2)
    assert {key for key, x in found.items() if x.dtype.itemsize == 1} == {LINEAR, stacked}
    other = read_config(tmp_path / "out")[1].facts.quantization_config
    assert other is not None
    assert other.block == (128, 128)


E8M0 = torch.float8_e8m0fnu
READ: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "exponents alone": ({}, torch.tensor([[0.5, 2.0], [4.0, 0.25]]).to(E8M0)),
    "other blocks": ({"weight_block_size": [200, 64]}, torch.tensor([[0.3, 1.7, 0.9]])),
    "one in all": ({"weight_block_size": None}, torch.tensor(0.7)),
}


@pytest.mark.parametrize("name", READ)
def test_scales_of_other_kinds_are_read(name: str, tmp_path: Path) -> None:
    more, scales = READ[name]
    codes = plain(200, 150)[LINEAR].to(E4M3)
    tensors = {LINEAR: codes, SCALES: scales, "model.layers.0.self_attn.k_scale": torch.ones(1)}
    config = {"quantization_config": FP8_CONFIG | more}
    told = to_bf16(folder_of(tmp_path / "in", tensors, **config), tmp_path / "out")
    block = more.get("weight_block_size", (128, 128)) or (200, 150)
    wide = scales.float().reshape(scales.shape or (1, 1))
    each = wide[torch.arange(200) // block[0]][:, torch.arange(150) // block[1]]
    found = arrays(tmp_path / "out")
    assert found.keys() == {LINEAR}
    expected = (codes.float() * each).to(BF16)
    assert same(found[LINEAR], array_of(expected))
    assert (told.tensors, told.converted) == (1, 1)
    assert "k_scale" in told.notes[0]


def test_other_files_stay_and_are_told(tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", plain(8, 8))
    for name in ("modeling.py", "README.md", "tokenizer_config.json", "chat_template.jinja"):
        (given / name).write_text("{}")
    told = to_fp8(given, tmp_path / "out")
    assert {"tokenizer_config.json", "chat_template.jinja"} <= told.files.keys()
    assert told.files.keys() == {path.name for path in (tmp_path / "out").iterdir()}
    assert "not copied: README.md, modeling.py" in told.notes


# --- what is refused -----------------------------------------------------------------------------

COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"all": {
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}}}}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
NAN = float("nan")


def fp8(**changes: torch.Tensor | None) -> Tensors:
    """A weight in FP8 with its scales; `weight` and `scales` replace them, `None` leaves out."""
    held = {"weight": torch.ones(200, 150).to(E4M3), "scales": torch.ones(2, 2)} | changes
    named = {LINEAR: held["weight"], SCALES: held["scales"], "model.norm.weight": torch.ones(3)}
    return {key: tensor for key, tensor in named.items() if tensor is not None}


FP8_TOLD = {"quantization_config": FP8_CONFIG}
BAD: dict[str, tuple[Form, Tensors, dict[str, Any], type[DscError], str]] = {
    "no scales": ("bf16", fp8(scales=None), FP8_TOLD, CheckpointError, f"missing.*{SCALES}"),
    "no weight": ("bf16", fp8(weight=None), FP8_TOLD, CheckpointError, f"unexpected.*{SCALES}"),
    "another shape": (
        "bf16", fp8(scales=torch.ones(2, 3)), FP8_TOLD, CheckpointError, f"{SCALES}: expected f32"),
    "integers": (
        "bf16", fp8(scales=torch.ones(2, 2).int()), FP8_TOLD, CheckpointError, SCALES),
    "NaN": (
        "bf16", fp8(scales=torch.tensor([[1, NAN], [1, 1]])), FP8_TOLD, CheckpointError, SCALES),
    "infinity": (
        "bf16", fp8(scales=torch.full((2, 2), float("inf"))), FP8_TOLD, CheckpointError, SCALES),
    "a scale of bf16": (
        "bf16", fp8(weight=torch.ones(200, 150)), FP8_TOLD, CheckpointError, f"{LINEAR}.*not FP8"),
    "e5m2": (
        "bf16", fp8(weight=torch.ones(200, 150).to(torch.float8_e5m2), scales=None), FP8_TOLD,
        CheckpointError, f"{LINEAR}.*f8e5m2"),
    "unannounced": ("bf16", fp8(), {}, CheckpointError, "no quantization_config"),
    "nothing in FP8": ("bf16", plain(8, 8), {}, CheckpointError, "no weight to convert to bf16"),
    "GPTQ": ("bf16", plain(8, 8), {"quantization_config": GPTQ}, ConfigError, "gptq"),
    "packed": ("fp8", plain(8, 8), {"quantization_config": COMPRESSED}, ConfigError, "compressed"),
    "FP8 twice": ("fp8", fp8(), FP8_TOLD, ConfigError, "in FP8 already"),
    "FP8 in plain": ("fp8", fp8(), {}, CheckpointError, "no quantization_config"),
    "no linear": (
        "fp8", {"model.layers.0.x.weight": torch.ones(2, 2)}, {}, CheckpointError, "no weight to"),
    "a vector": ("fp8", plain(8), {}, CheckpointError, rf"{LINEAR} : bf16\[8\]"),
    "NaN to quantise": ("fp8", plain(8, 8, scale=NAN), {}, CheckpointError, "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_names_its_cause_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    to, tensors, config, error, message = BAD[name]
    given = folder_of(tmp_path / "in", tensors)
    raw = raw_config(given) | config
    (given / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=r"(?s)" + message) as refused:
        dsc.convert(given, tmp_path / "out", to)
    assert refused.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_error_names_the_weight_and_not_the_scales_that_were_to_be_written(
    tmp_path: Path,
) -> None:
    given = folder_of(tmp_path / "in", plain(8, 8, scale=NAN))
    with pytest.raises(CheckpointError, match="NaN or infinity") as refused:
        dsc.convert(given, tmp_path / "out", "fp8")
    assert refused.value.where == LINEAR


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", plain(8, 8))
    (tmp_path / "secret").write_text("{}")
    (given / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        to_fp8(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_checkpoint_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    given, out = folder_of(tmp_path / "in", plain(8, 8)), tmp_path / "out"
    to_fp8(given, out, max_shard_size=1)
    with pytest.raises(FileError, match="exists already"):
        to_fp8(given, out)
    assert len(list(out.glob("*.safetensors"))) == 6
    to_fp8(given, out, force=True)
    assert len(list(out.glob("*.safetensors"))) == 1
    (out / "notes.txt").touch()
    with pytest.raises(FileError, match=r"it holds notes\.txt"):
        to_fp8(given, out, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="it is no folder"):
        to_fp8(given, tmp_path / "file", force=True)
    for place in (given, given.parent):
        with pytest.raises(UsageError, match="would be replaced"):
            to_fp8(given, place, force=True)


@pytest.mark.parametrize("told", [{"to": "fp4"}, {"to": "fp8", "scale_fmt": "f16"}])
def test_what_is_no_form_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not known here"):
        dsc.convert(tmp_path, tmp_path / "out", **told)


@pytest.mark.parametrize("told", ["0", "GB", "-1GB", "5 XB", "1e3", 0, "0.0001kB"])
def test_what_is_no_size_is_refused(told: int | str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        size_of(told)


# --- what is left behind -------------------------------------------------------------------------


def stop_after(steps: int, how: Callable[[], None]) -> Iterator[None]:
    """Steps of progress, the last of which stops the conversion."""
    for _ in range(steps):
        yield
    how()


@pytest.mark.parametrize("steps", [0, 17, 268])
def test_what_is_interrupted_leaves_nothing(steps: int, tmp_path: Path) -> None:
    """At its first tensor, between others, at the last; the older folder stays whole."""
    folder_of(tmp_path / "in", plain(8, 8))
    to_fp8(tmp_path / "in", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    stops = stop_after(steps, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        to_bf16(FP8, tmp_path / "out", force=True, progress=lambda *_: next(stops))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("place", [20, -1], ids=["header", "data"])
def test_a_file_that_is_not_what_was_written_is_noticed(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = folder_of(tmp_path / "in", plain(8, 8))

    def on_a_bad_disk(path: Path, *told: Any) -> str:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        return damaged(path, *told)

    monkeypatch.setattr(shards, "damaged", on_a_bad_disk)
    with pytest.raises(FileError, match="not what was written there"):
        to_fp8(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", plain(200, 150))
    line = ["convert", str(given), str(tmp_path / "a"), "--to", "fp8"]
    told = CliRunner().invoke(build_app(), line).stdout
    assert told.startswith(f"{tmp_path}/a: 3 files, ")
    assert "6 tensors; 1 converted to fp8" in told
    line = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "bf16", "--json"]
    found = json.loads(CliRunner().invoke(build_app(), line).stdout)
    assert (found["to"], found["tensors"], found["converted"]) == ("bf16", 5, 1)
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())


def test_the_command_refuses_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = folder_of(tmp_path / "in", fp8(scales=None), **FP8_TOLD)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(given), str(tmp_path / "out"), "--to", "bf16"])
    assert ended.value.code == 2
    assert SCALES in capsys.readouterr().err
