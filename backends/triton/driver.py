"""The part of the CUDA driver that running a compiled artifact takes, through ctypes.

Nothing here needs the CUDA toolkit, torch, triton or the rest of dsc, for run.py holds it too:
`libcuda` comes with the GPU's driver. Names and meanings of the calls are those of the CUDA Driver
API reference.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Argument: TypeAlias = "ctypes._SimpleCData[int]"

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_UNITS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_CAPTURING = range(900, 910)  # CUDA_ERROR_STREAM_CAPTURE_*: the caller captures; nothing was done
_STATIC_SHARED = 48 * 1024  # above this a kernel must ask for its shared memory


class DriverError(RuntimeError):
    """A call of the driver that failed, or that is not made any more."""


class NoDevice(DriverError):
    """There is no GPU here that a driver answers for."""


class OutOfMemory(DriverError):
    """The device has no room for what was asked."""


@dataclass(frozen=True, slots=True)
class Function:
    """A kernel on the device and how it is launched.

    A `dependent` one waits itself for the launch before it, and may begin earlier.
    """

    handle: ctypes.c_void_p
    threads: int
    shared: int
    parameters: int
    dependent: bool = False


@dataclass(frozen=True, slots=True)
class ReadyLaunch:
    """A kernel call in the form that the driver takes; `arguments` keeps what `pointers` name."""

    function: Function
    grid: tuple[int, int, int]
    arguments: Sequence[Argument]
    pointers: object


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig: grid, block, shared memory, stream, attributes."""

    _fields_ = (
        ("sizes", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_EARLY = _Attribute(6)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY.value[0] = 1


class Driver:
    """The driver's first device, its primary context, and one stream."""

    kind = "cuda"
    lanes = 32
    static_shared = _STATIC_SHARED
    over = ""
    """Why nothing runs on it any more: that it was closed, or the call that failed."""

    def __init__(self) -> None:
        self._open()
        self._modules: list[ctypes.c_void_p] = []
        try:
            _declare(self._cuda)
            self.activate()
            self._stream = ctypes.c_void_p()
            self._check("cuStreamCreate", ctypes.byref(self._stream), 1)
        except BaseException:
            self._let_go()
            raise

    def _open(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise NoDevice("there is no driver of an NVIDIA GPU on this machine") from None
        if self._cuda.cuInit(0) != 0:
            raise NoDevice("the CUDA driver does not start")
        count = ctypes.c_int()
        self._check("cuDeviceGetCount", ctypes.byref(count))
        if count.value < 1:
            raise NoDevice("there is no CUDA device")
        self._device = ctypes.c_int()
        self._check("cuDeviceGet", ctypes.byref(self._device), 0)
        self._context = ctypes.c_void_p()
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def begin(self) -> None:
        """Activate it for work. Raises `DriverError` once it was closed or a call has failed.

        What a failed call leaves in memory nobody knows. Where there was no room, or a stream is
        captured that does not allow it, nothing failed.
        """
        if self.over:
            raise DriverError(f"nothing runs here any more ({self.over})")
        self.activate()

    def activate(self) -> None:
        """Make the context this thread's: what follows may come from another than `__init__`'s."""
        self._check("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Unload the kernels and let the context go; the caller has freed its memory."""
        self.over = self.over or "it was closed"
        with contextlib.ExitStack() as every:  # whatever fails of them
            every.callback(self._let_go)
            every.callback(self._check, "cuStreamDestroy_v2", self._stream)
            for module in self._modules:
                every.callback(self._check, "cuModuleUnload", module)
            self._modules = []

    def _let_go(self) -> None:
        self._check("cuDevicePrimaryCtxRelease_v2", self._device)

    @property
    def arch(self) -> str:
        """The architecture of the device: `sm_90`."""
        return f"sm_{self._fact(_COMPUTE_MAJOR)}{self._fact(_COMPUTE_MINOR)}"

    @property
    def units(self) -> int:
        """How many multiprocessors the device has, or 0 where that is not told."""
        return self._fact(_UNITS)

    def _fact(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._check("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def load(
        self,
        image: bytes,
        symbol: str,
        warps: int,
        shared: int,
        parameters: int,
        dependent: bool = False,
    ) -> Function:
        """A kernel of a cubin. Raises `DriverError` when the device does not take the binary."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(module), image)
        self._modules.append(module)
        self._check("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
        if shared > self.static_shared:
            self._check("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
        return Function(function, warps * self.lanes, shared, parameters, dependent)

    def allocate(self, size: int) -> int:
        """Device memory of at least one byte, which the driver aligns to 256.

        Raises `OutOfMemory`.
        """
        pointer = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(pointer), max(size, 1))
        return pointer.value

    def memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self._check("cuMemFree_v2", pointer)

    def upload(self, target: int, source: int, size: int) -> None:
        """Copy host memory at `source` to the device, after earlier launches."""
        if size:
            self._check("cuMemcpyHtoDAsync_v2", target, source, size, self._stream)

    def download(self, target: int, source: int, size: int) -> None:
        """Copy device memory at `source` to the host, after earlier launches."""
        if size:
            self._check("cuMemcpyDtoHAsync_v2", target, source, size, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy device memory, after earlier launches."""
        if size:
            self._check("cuMemcpyDtoDAsync_v2", target, source, size, self._stream)

    def clear(self, target: int, size: int) -> None:
        """Fill device memory with zeros, after earlier launches."""
        if size:
            self._check("cuMemsetD8Async", target, 0, size, self._stream)

    def prepare(
        self, function: Function, grid: tuple[int, int, int], arguments: Sequence[Argument]
    ) -> ReadyLaunch:
        """A launch to queue many times. Parameters past `arguments` are Triton's, all null."""
        hidden = [ctypes.c_uint64(0) for _ in range(function.parameters - len(arguments))]
        values = [*arguments, *hidden]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        return ReadyLaunch(function, grid, values, pointers)

    def launch(self, launch: ReadyLaunch, stream: int | None = None) -> None:
        """Queue a kernel, on the driver's stream or on a caller's."""
        function = launch.function
        place = self._stream if stream is None else ctypes.c_void_p(stream)
        if function.dependent:
            sizes = (*launch.grid, function.threads, 1, 1, function.shared)
            config = _Config((ctypes.c_uint * 7)(*sizes), place, ctypes.pointer(_EARLY), 1)
            given = (function.handle, launch.pointers, None)
            self._check("cuLaunchKernelEx", ctypes.byref(config), *given)
            return
        self._check(
            "cuLaunchKernel", function.handle, *launch.grid, function.threads, 1, 1,
            function.shared, place, launch.pointers, None,
        )  # fmt: skip

    def capture(self, launches: Sequence[ReadyLaunch]) -> ctypes.c_void_p:
        """Launches as one graph, which `replay` queues at once. Runs nothing."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuStreamBeginCapture_v2", self._stream, _CAPTURE_THREAD_LOCAL)
        try:
            for launch in launches:
                self.launch(launch)
            self._check("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            flags = ctypes.c_uint64(0)
            self._check("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, flags)
        finally:
            if graph.value is None:  # a launch has failed
                self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            if graph.value is not None:
                self._check("cuGraphDestroy", graph)
        return ready

    def replay(self, graph: ctypes.c_void_p) -> None:
        """Queue a captured graph."""
        self._check("cuGraphLaunch", graph, self._stream)

    def forget(self, graph: ctypes.c_void_p) -> None:
        """Let a captured graph go."""
        self._check("cuGraphExecDestroy", graph)

    def event(self) -> ctypes.c_void_p:
        """A mark that `record` queues."""
        event = ctypes.c_void_p()
        self._check("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        return event

    def record(self, event: ctypes.c_void_p) -> None:
        """Queue a mark: it holds the device's time once all that was queued before is done."""
        self._check("cuEventRecord", event, self._stream)

    def seconds(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """What lies between two marks that the device has passed."""
        milliseconds = ctypes.c_float()
        self._check("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return milliseconds.value / 1e3

    def drop(self, event: ctypes.c_void_p) -> None:
        """Let a mark go."""
        self._check("cuEventDestroy_v2", event)

    def synchronise(self) -> None:
        """Wait for everything queued; an error of an earlier kernel is raised here."""
        self._check("cuStreamSynchronize", self._stream)

    def _check(self, call: str, *arguments: object) -> None:
        status = getattr(self._cuda, call)(*arguments)
        if status != 0:
            told = f"{call}: {self._error(status)}"
            if status == _OUT_OF_MEMORY:
                raise OutOfMemory(told)
            if status not in _CAPTURING:
                self.over = self.over or told
            raise DriverError(told)

    def _error(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._cuda.cuGetErrorName(status, ctypes.byref(name))
        return (name.value or b"unknown error").decode()


def _declare(cuda: ctypes.CDLL) -> None:
    """Argument types of the calls whose arguments ctypes would narrow to 32 bits."""
    word, size, u32, pointer = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
    cuda.cuMemAlloc_v2.argtypes = [ctypes.POINTER(word), size]
    cuda.cuMemFree_v2.argtypes = [word]
    cuda.cuMemcpyHtoDAsync_v2.argtypes = [word, pointer, size, pointer]
    cuda.cuMemcpyDtoHAsync_v2.argtypes = [pointer, word, size, pointer]
    cuda.cuMemcpyDtoDAsync_v2.argtypes = [word, word, size, pointer]
    cuda.cuMemsetD8Async.argtypes = [word, ctypes.c_ubyte, size, pointer]
    cuda.cuLaunchKernel.argtypes = [
        pointer, u32, u32, u32, u32, u32, u32, u32, pointer, ctypes.POINTER(pointer), pointer,
    ]  # fmt: skip
    cuda.cuLaunchKernelEx.argtypes = [
        ctypes.POINTER(_Config), pointer, ctypes.POINTER(pointer), pointer,
    ]  # fmt: skip
    cuda.cuCtxSetCurrent.argtypes = [pointer]
    cuda.cuStreamSynchronize.argtypes = [pointer]
    cuda.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    cuda.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    cuda.cuModuleUnload.argtypes = [pointer]
    cuda.cuStreamDestroy_v2.argtypes = [pointer]
    cuda.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
