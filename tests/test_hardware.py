"""The machine is read from the system's own files; what is absent is no error."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


class Driver:
    """The CUDA driver of a machine with two GPUs; `wrong` is the call that fails."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def cuInit(self, flags: int) -> int:
        """Begin."""
        return int(self.wrong == "cuInit" or flags)

    def cuDeviceGetCount(self, count: Any) -> int:
        """How many there are."""
        count._obj.value = 2
        return int(self.wrong == "cuDeviceGetCount")

    def cuDeviceGet(self, device: Any, index: int) -> None:
        """The handle of one."""
        device._obj.value = index + 5

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        """Its name, in a buffer of so many bytes."""
        assert size == 128
        name.value = f"GPU {device.value}".encode()

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> None:
        """Its bytes."""
        memory._obj.value = device.value << 33

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: Any) -> None:
        """The parts of its compute capability: 75 and 76 in cuda.h."""
        found._obj.value = {75: 9, 76: device.value - 5}[attribute]


def test_nvidia_gpus_are_those_whose_driver_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    assert hardware._nvidia() == (
        hardware.Gpu("GPU 5", "cuda:sm_90", 5 << 33), hardware.Gpu("GPU 6", "cuda:sm_91", 6 << 33),
    )  # fmt: skip
    for wrong in ("cuInit", "cuDeviceGetCount"):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, wrong=wrong: Driver(wrong))
        assert hardware._nvidia() == ()


def test_memory_and_cores_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", pages.get)
    assert hardware._memory() == 4_096_000
    monkeypatch.setattr(os, "sysconf_names", {"SC_PAGE_SIZE": 30})
    assert hardware._memory() == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert hardware._usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert hardware._usable_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert hardware._usable_cores() == 1


def test_a_processor_is_named_and_its_speed_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "model name\t: EPYC: 9\ncpu MHz\t: 3000\nbogomips\t: 1\nflags\t: fma avx2\n\nflags: sve"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert hardware.processor() == {"model name": "EPYC: 9", "flags": "fma avx2"}
    assert (hardware.cpu().name, hardware.cpu().extensions) == ("EPYC: 9", ("avx2", "fma"))


def test_gpus_of_amd_come_by_number_with_all_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, version in (("10", "90500"), ("9", "90402"), ("11", "")):
        for bank in "01":
            (tmp_path / node / "mem_banks" / bank).mkdir(parents=True)
            (tmp_path / node / "mem_banks" / bank / "properties").write_text("size_in_bytes 512\n")
        if version:
            (tmp_path / node / "properties").write_text(f"gfx_target_version {version}\n")
    monkeypatch.setattr(hardware, "_KFD_NODES", tmp_path)
    assert hardware._amd() == (
        hardware.Gpu("AMD gfx942", "hip:gfx942", 1024),
        hardware.Gpu("AMD gfx950", "hip:gfx950", 1024),
    )


@pytest.mark.gpu
def test_a_gpu_names_a_target() -> None:
    for gpu in hardware.gpus():
        kind, _, arch = gpu.target.partition(":")
        assert kind in KNOWN
        assert arch.startswith(("sm_", "gfx"))
        assert gpu.memory > 2**30
