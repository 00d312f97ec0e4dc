"""AMD's HIP run time, called as the CUDA driver is: names and meanings are those of the HIP API.

The calls that `driver` makes have siblings there with the same arguments, but for how a device is
chosen, what it tells of itself, and how errors are named. `libamdhip64` comes with ROCm.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

from dsc.backends.triton.driver import Driver, DriverError, NoDevice

LIBRARIES = ("libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5")
SIBLINGS = {
    "cuModuleLoadData": "hipModuleLoadData",
    "cuModuleUnload": "hipModuleUnload",
    "cuModuleGetFunction": "hipModuleGetFunction",
    "cuMemAlloc_v2": "hipMalloc",
    "cuMemFree_v2": "hipFree",
    "cuMemGetInfo_v2": "hipMemGetInfo",
    "cuMemcpyHtoDAsync_v2": "hipMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync_v2": "hipMemcpyDtoHAsync",
    "cuMemcpyDtoDAsync_v2": "hipMemcpyDtoDAsync",
    "cuMemsetD8Async": "hipMemsetD8Async",
    "cuLaunchKernel": "hipModuleLaunchKernel",
    "cuStreamCreate": "hipStreamCreateWithFlags",
    "cuStreamDestroy_v2": "hipStreamDestroy",
    "cuStreamSynchronize": "hipStreamSynchronize",
    "cuStreamBeginCapture_v2": "hipStreamBeginCapture",
    "cuStreamEndCapture": "hipStreamEndCapture",
    "cuGraphInstantiateWithFlags": "hipGraphInstantiateWithFlags",
    "cuGraphLaunch": "hipGraphLaunch",
    "cuGraphDestroy": "hipGraphDestroy",
    "cuGraphExecDestroy": "hipGraphExecDestroy",
    "cuEventCreate": "hipEventCreateWithFlags",
    "cuEventRecord": "hipEventRecord",
    "cuEventElapsedTime": "hipEventElapsedTime",
    "cuEventDestroy_v2": "hipEventDestroy",
    "cuFuncSetAttribute": "hipFuncSetAttribute",
    "cuCtxSetCurrent": "hipCtxSetCurrent",
}
"""Calls of HIP by those of CUDA."""
ABSENT = 801
"""hipErrorNotSupported: what CUDA alone does, which no plan for HIP asks for."""
_PROPERTIES = ("hipGetDevicePropertiesR0600", "hipGetDeviceProperties")
_PROPERTIES_BYTES = 1 << 13
"""More than the structure has in any version; of it the architecture's name alone is read."""


class _AsCuda:
    """The library, whose calls go by CUDA's names."""

    def __init__(self, hip: ctypes.CDLL) -> None:
        self.hip = hip

    def __getattr__(self, name: str) -> Callable[..., int]:
        if name not in SIBLINGS:
            return lambda *_: ABSENT
        found: Callable[..., int] = getattr(self.hip, SIBLINGS[name])
        return found


class HipDriver(Driver):
    """HIP's first device, and one stream. Raises `NoDevice`."""

    kind = "hip"
    lanes = 64
    static_shared = 1 << 30  # a kernel asks for nothing: all of a unit's is its to use

    def _open(self) -> None:
        self._hip = _library()
        self._cuda: Any = _AsCuda(self._hip)
        if self._hip.hipInit(0) != 0:
            raise NoDevice("the HIP run time does not start")
        count = ctypes.c_int()
        if self._hip.hipGetDeviceCount(ctypes.byref(count)) != 0 or count.value < 1:
            raise NoDevice("there is no HIP device")
        self._device = ctypes.c_int(0)

    def activate(self) -> None:
        """Make the device this thread's."""
        if self._hip.hipSetDevice(self._device) != 0:
            raise NoDevice("the HIP device does not answer")

    def _let_go(self) -> None:
        """The primary context stays: other libraries of the process share it."""

    @property
    def arch(self) -> str:
        """The architecture of the device: `gfx942`."""
        told = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        for name in _PROPERTIES:
            call = getattr(self._hip, name, None)
            if call is not None and call(told, self._device) == 0:
                found = re.search(rb"gfx[0-9a-f]+", told.raw)
                if found is not None:
                    return found[0].decode()
        raise DriverError("the HIP run time does not tell the device's architecture")

    @property
    def units(self) -> int:
        """None are told: which number asks for them differs among versions of the run time."""
        return 0

    def _error(self, status: int) -> str:
        name: bytes | None = self._hip.hipGetErrorName(status)
        return (name or b"unknown error").decode()


def _library() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        found.hipGetErrorName.restype = ctypes.c_char_p
        return found
    raise NoDevice("there is no HIP run time on this machine")
