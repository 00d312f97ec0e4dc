"""The machine is read from the system's own files; what is absent is no error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dsc import hardware
from dsc.targets import KNOWN


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Forget what was read, before and after."""
    hardware.cpu.cache_clear()
    hardware.gpus.cache_clear()
    yield
    hardware.cpu.cache_clear()
    hardware.gpus.cache_clear()


def test_this_machine_has_a_processor() -> None:
    found = hardware.cpu()
    assert found.cores >= 1
    assert found.memory > 2**28


def test_extensions_are_the_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor\t: 0\nFeatures\t: fp asimd bf16x asimddp\n\nprocessor\t: 1\nFeatures\t: sve\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert hardware.cpu().extensions == ("asimd", "asimddp")


def test_a_system_without_those_files_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CPUINFO", Path("/nonexistent"))
    monkeypatch.setattr(hardware, "_KFD_NODES", Path("/nonexistent"))
    assert hardware.cpu().extensions == ()
    assert hardware._amd() == ()


def test_amd_gpus_are_the_nodes_with_a_gfx_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, version in (("0", "0"), ("1", "90402"), ("2", "90500")):
        (tmp_path / node / "mem_banks" / "0").mkdir(parents=True)
        (tmp_path / node / "properties").write_text(f"simd_count 4\ngfx_target_version {version}\n")
        (tmp_path / node / "mem_banks" / "0" / "properties").write_text("size_in_bytes 1024\n")
    monkeypatch.setattr(hardware, "_KFD_NODES", tmp_path)
    found = hardware._amd()
    assert [gpu.target for gpu in found] == ["hip:gfx942", "hip:gfx950"]
    assert [gpu.memory for gpu in found] == [1024, 1024]
    assert {gpu.target.partition(":")[2] for gpu in found} == set(KNOWN["hip"])


@pytest.mark.gpu
def test_a_gpu_names_a_target() -> None:
    for gpu in hardware.gpus():
        kind, _, arch = gpu.target.partition(":")
        assert kind in KNOWN
        assert arch.startswith(("sm_", "gfx"))
        assert gpu.memory > 2**30
