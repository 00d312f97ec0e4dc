"""What the machine is: processor, memory, GPUs. Read from the system, never through torch.

Asking a GPU driver for its devices costs milliseconds this way, and a machine without a driver
answers at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
# The vector extensions that the kernels of dsc make use of, as Linux spells them.
_EXTENSIONS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, cuda.h


@dataclass(frozen=True, slots=True)
class Cpu:
    """The host: `cores` are those this process may use, `memory` is in bytes (0: unknown)."""

    name: str
    machine: str
    cores: int
    memory: int
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. `target` is how dsc names what to compile for it: `cuda:sm_90`."""

    name: str
    target: str
    memory: int


@cache
def cpu() -> Cpu:
    """Describe the host processor."""
    fields = processor()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        name=fields.get("model name") or platform.processor() or "unknown",
        machine=platform.machine(),
        cores=_usable_cores(),
        memory=_memory(),
        extensions=tuple(name for name in _EXTENSIONS if name in flags),
    )


@cache
def gpus() -> tuple[Gpu, ...]:
    """List the GPUs whose driver answers, NVIDIA's first."""
    return (*_nvidia(), *_amd())


_FLEETING = frozenset({"cpu MHz", "bogomips", "BogoMIPS"})


def processor() -> dict[str, str]:
    """What Linux tells of the first processor, by field, but for its speed at the moment."""
    if not _CPUINFO.is_file():
        return {}
    first, _, _ = _CPUINFO.read_text(errors="replace").partition("\n\n")
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    return {key: value for key, value in fields.items() if key not in _FLEETING}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _nvidia() -> tuple[Gpu, ...]:
    """Ask the CUDA driver; no context is created."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_nvidia_device(driver, index) for index in range(count.value))


def _nvidia_device(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(), f"cuda:sm_{major.value}{minor.value}", memory.value)


def _amd() -> tuple[Gpu, ...]:
    """Read the kernel driver's topology; a node without a gfx version is a processor."""
    if not _KFD_NODES.is_dir():
        return ()
    nodes = sorted(_KFD_NODES.iterdir(), key=lambda node: node.name.zfill(4))
    found = (_amd_device(node) for node in nodes)
    return tuple(gpu for gpu in found if gpu is not None)


def _amd_device(node: Path) -> Gpu | None:
    try:
        lines = (node / "properties").read_text().splitlines()
        banks = [path.read_text().splitlines() for path in node.glob("mem_banks/*/properties")]
    except OSError:
        return None
    version = int(_properties(lines).get("gfx_target_version", "0"))
    if version == 0:
        return None
    memory = sum(int(_properties(bank).get("size_in_bytes", "0")) for bank in banks)
    arch = gfx_name(version)
    return Gpu(f"AMD {arch}", f"hip:{arch}", memory)


def _properties(lines: list[str]) -> dict[str, str]:
    return {key: value for key, _, value in (line.partition(" ") for line in lines)}


def gfx_name(version: int) -> str:
    """Spell the kernel driver's version number as the compiler does.

    >>> gfx_name(90402), gfx_name(90500), gfx_name(90010)
    ('gfx942', 'gfx950', 'gfx90a')
    """
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"
