"""What an artifact stores is held against its source: a broken scale is named, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from bench.quantised_folders import LAYOUTS, config_of, stored
from dsc.cli import main
from dsc.errors import CheckpointError
from dsc.ir.program import Program
from dsc.ir.safetensors import SafetensorsFile
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, Source, WeightExpr, apply
from dsc.runtime.packing import others, pack
from tests.family import small
from tests.frontends.test_codes import WIDE, folder, tensors_of

W = Source("w", TensorType(DType.f32, (300, 64)))


def quantised(codes: DType, scales: DType, block: tuple[int, int]) -> WeightExpr:
    made = apply("block_scales", W, block=block, codes=codes, dtype=scales)
    return apply(
        "scaled", apply("block_codes", W, made, block=block, codes=codes), made, block=block
    )


WEIGHTS = {
    "int4": quantised(DType.i4, DType.f16, (1, 32)),
    "int8": quantised(DType.i8, DType.f16, (1, 32)),
    "fp8": quantised(DType.f8e4m3, DType.f32, (128, 32)),
    "plain": apply("cast", W, dtype=DType.bf16),
}


def break_last(path: Path, name: str) -> tuple[int, ...]:
    """Turn a bit of the last element of a tensor in a file; its place."""
    entry = SafetensorsFile.open(path).entries[name]
    data = bytearray(path.read_bytes())
    data[entry.end - 1] ^= 0x04
    path.write_bytes(data)
    return tuple(size - 1 for size in entry.shape)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_broken_value_is_named_with_its_place_and_nothing_else_is(
    kind: str, tmp_path: Path
) -> None:
    source = DictSource({"w": torch.randn(300, 64, generator=torch.Generator().manual_seed(0))})
    program = Program("p", {}, {"a.weight": WEIGHTS[kind], "b": W}, source=source)
    path = tmp_path / "weights"
    pack(program, path)
    assert others(program, path) == []
    end = "" if kind == "plain" else ".scale"
    place = break_last(path, f"a.weight{end}")
    (found,) = others(program, path)
    assert (found.tensor, found.at, found.count) == (f"a.weight{end}", place, 1)
    assert found.found != found.expected
    assert f"a.weight{end} is {found.found} at {list(place)}, {found.expected}" in str(found)


def test_all_that_differs_is_counted_over_blocks(tmp_path: Path) -> None:
    wide = Source("x", TensorType(DType.f32, (3, 1 << 19)))
    values = torch.zeros(3, 1 << 19)
    path = tmp_path / "weights"
    pack(Program("p", {}, {"x": wide}, source=DictSource({"x": values})), path)
    other = values.clone()
    other[0, 5], other[2, 7] = 1.0, 2.0
    (found,) = others(Program("p", {}, {"x": wide}, source=DictSource({"x": other})), path)
    assert (found.at, found.found, found.expected, found.count) == ((0, 5), 0.0, 1.0, 2)


def test_a_file_of_other_tensors_is_refused(tmp_path: Path) -> None:
    source = DictSource({"w": torch.zeros(300, 64)})
    path = tmp_path / "weights"
    pack(Program("p", {}, {"a": WEIGHTS["int8"]}, source=source), path)
    for wanted in ({"b": W}, {"a": WEIGHTS["int4"]}):
        with pytest.raises(CheckpointError, match="does not hold it as"):
            others(Program("p", {}, wanted, source=source), path)


def test_a_folder_as_given_is_compared_with_its_own_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = small(**WIDE), LAYOUTS["ct-int4-zeros"]
    raw = config.model_dump(exclude_none=True)
    made, _ = stored(tensors_of(config), layout, 16)
    given = folder(tmp_path / "model", config_of(raw, layout, 16), made)
    out = tmp_path / "out"
    dsc.compile(given, backend="reference").save(out)

    def verified(*options: str) -> Any:
        monkeypatch.setattr("sys.argv", ["dsc", "verify", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    status, told = verified(str(out), "--weights")
    assert (status, "bit for bit" in told.out) == (0, True)
    (path,) = (out / "weights").iterdir()
    names = SafetensorsFile.open(path).entries
    name = next(n for n in names if n.endswith("experts.down_proj.scale"))
    break_last(path, name)
    status, told = verified(str(out), "--weights")
    assert (status, name in told.err) == (1, True)
    status, told = verified(str(out), "--hashes")
    assert (status, f"the hash of {name}" in told.err) == (2, True)


def test_weights_are_those_of_an_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["dsc", "verify", "m.py", "--weights"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
