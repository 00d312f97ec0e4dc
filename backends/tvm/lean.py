"""The lean run time: a library's functions and mapped weights, with no compiler and no torch.

`import tvm` would load the compiler and hundreds of megabytes, and `import tvm_ffi` takes torch
along where that is installed. TVM's run-time libraries are enough to run what was compiled, called
through their C interface (tvm/ffi/c_api.h).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsc.errors import ArtifactError, BackendUnavailable, UsageError
from dsc.hardware import processor
from dsc.runtime.standalone import mapped_weights

NEEDS = "apache-tvm>=0.27,<0.28"
INSTALL = f"pip install '{NEEDS}'"


class _Any(ctypes.Structure):
    """TVMFFIAny: what goes into a function and comes back."""

    _fields_ = (("kind", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Text(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def __str__(self) -> str:
        return ctypes.string_at(self.data, self.size).decode("utf-8", "replace")


_NONE, _INT, _TEXT, _OBJECT = 0, 1, 8, 64  # TVMFFITypeIndex; an object's is this or larger
_OBJECT_HEADER = 24  # sizeof(TVMFFIObject)


class Object:
    """An object of the run time, which is let go with this one; one that is a function is called.

    Arguments are whole numbers, texts and objects; results whole numbers, objects or `None`. A call
    raises `RuntimeError` for what the function raises.
    """

    def __init__(self, kind: int, handle: int) -> None:
        self._kind, self._handle = kind, handle
        self._release = weakref.finalize(self, runtime().TVMFFIObjectDecRef, _pointer(handle))
        self._release.atexit = False

    def __call__(self, *given: Any) -> Any:
        """Call the function that this object is."""
        kept = [x.encode() if isinstance(x, str) else x for x in given]
        arguments = (_Any * len(given))(*map(_argument, kept))
        result = _Any()
        call = runtime().TVMFFIFunctionCall
        if call(_pointer(self._handle), arguments, len(given), ctypes.byref(result)):
            raise RuntimeError(_raised())
        if result.kind >= _OBJECT:
            return Object(result.kind, result.value)
        return None if result.kind == _NONE else result.value


def _argument(x: Any) -> _Any:
    if isinstance(x, Object):
        return _Any(x._kind, 0, x._handle)
    if isinstance(x, bytes):
        return _Any(_TEXT, 0, ctypes.cast(ctypes.c_char_p(x), ctypes.c_void_p).value or 0)
    return _Any(_INT, 0, x)


def _pointer(handle: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(handle)


def _raised() -> str:
    """What the last call raised: its kind and its message."""
    error = ctypes.c_void_p()
    runtime().TVMFFIErrorMoveFromRaised(ctypes.byref(error))
    told = Object(_OBJECT, error.value or 0)
    kind, message = (_Text * 2).from_address(told._handle + _OBJECT_HEADER)
    return f"{kind}: {message}"


@cache
def runtime() -> ctypes.CDLL:
    """TVM's C interface. Its libraries are visible to those that are loaded later."""
    loaded = []
    for package, name in (("tvm_ffi", "libtvm_ffi.so"), ("tvm", "libtvm_runtime.so")):
        spec = find_spec(package)
        origin = Path(spec.origin) if spec is not None and spec.origin else Path()
        path = origin.parent / "lib" / name
        if not path.is_file():
            raise BackendUnavailable(f"{name} is not in the installed {package} package", INSTALL)
        loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    return loaded[0]


def function(name: str) -> Object:
    """A function that the run time registers. Raises `BackendUnavailable` where there is none."""
    text, found = name.encode(), ctypes.c_void_p()
    wanted = _Text(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))
    runtime().TVMFFIFunctionGetGlobal(ctypes.byref(wanted), ctypes.byref(found))
    if not found.value:
        raise BackendUnavailable(f"the installed tvm has no {name}", INSTALL)
    return Object(_OBJECT, found.value)


@cache
def tiles_allowed() -> bool:
    """Whether this process may use the CPU's tile registers; asks the operating system for it."""
    if not {"amx_tile", "amx_bf16", "amx_int8"} <= set(processor().get("flags", "").split()):
        return False
    return int(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # asm/prctl.h of Linux, x86-64


def load_library(path: Path, names: Iterable[str], threads: int | None) -> dict[str, Object]:
    """The named functions of a library. The thread pool will have room for `threads`."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault(POOL_SIZE, str(max(threads or 0, cores)))
    with private_copy(path) as own:
        library = function("ffi.ModuleLoadFromFile")(str(own))
    get = function("ffi.ModuleGetFunction")
    return {name: get(library, name, False) for name in names}


@contextmanager
def private_copy(path: Path) -> Iterator[Path]:
    """A copy of a library under a path that never was and never will be, while it is loaded.

    The dynamic linker takes a path that it knows for the library that it has: of a folder that was
    compiled anew it would give the old code. What is loaded outlives the file.
    """
    with ExitStack() as held:
        try:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="dsc-library-"))
            own = Path(folder) / path.name
            shutil.copyfile(path, own)
        except OSError as problem:
            hint = f"free some room in {tempfile.gettempdir()}, or set TMPDIR to a folder with room"
            raise BackendUnavailable(f"the library cannot be copied: {problem}", hint) from None
        yield own


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads kernels use; `pin`: workers on cores of their own, or free to move.

    Without `count` as many as the process may use, or what TVM_NUM_THREADS says. What was only a
    wish when the model was compiled (`asked` is false) yields to a smaller pool.
    """

    count: int | None = None
    pin: bool | None = None
    asked: bool = False

    def apply(self) -> None:
        """Set TVM's pool of the calling thread, if it is not set so. Raises `UsageError`.

        A pool has the size that it was started with, and takes fewer workers, not more.
        """
        known = getattr(_applied, "threads", None)
        if known is self or known == self:
            return
        configure = function("runtime.config_threadpool")
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        room = int(os.environ.get(POOL_SIZE, len(cores)))
        wanted = self.count or len(cores)
        if not self.asked:
            wanted = min(wanted, room)
        if self.pin and wanted > len(cores):
            raise UsageError(
                f"{wanted} threads cannot be pinned to {len(cores)} cores",
                hint="use fewer threads, or do not pin",
            )
        if self.pin is None:
            configure(_DEFAULT, wanted)
        else:
            listed = function("ffi.Array")(*cores)
            configure(_OWN_CORE if self.pin else _ANY_CORE, wanted, listed)
        _applied.threads = self
        found = function("runtime.NumThreads")()
        if found != wanted:
            _applied.threads = None
            raise UsageError(
                f"{wanted} threads asked, TVM's thread pool of this process has {room}",
                hint=f"ask for at most {room}, or start the process with"
                f" {POOL_SIZE}={wanted} in its environment",
            )


POOL_SIZE = "TVM_NUM_THREADS"
_DEFAULT, _OWN_CORE, _ANY_CORE = 0, -2, -3  # threading_backend.h: AffinityMode
_applied = threading.local()  # a thread that launches kernels has a pool of its own


class KeptFile:
    """A file that is read later, and is still the same when its folder has been replaced."""

    def __init__(self, path: Path) -> None:
        self._file: int | None = None
        with suppress(FileNotFoundError):
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)

    def read(self) -> bytes | None:
        """What the file holds; `None` where there was none."""
        if self._file is None:
            return None
        return os.pread(self._file, os.fstat(self._file).st_size, 0)


class MappedWeights:
    """The file of packed weights in memory: addresses of its tensors by name."""

    def __init__(self, path: Path) -> None:
        try:
            self.bytes, self.offsets = mapped_weights(path)
        except ValueError as problem:
            raise ArtifactError(str(problem), str(path)) from None

    def addresses(self, names: Sequence[str]) -> list[int]:
        """The addresses of the named tensors. Raises `ArtifactError` for one that is missing."""
        missing = [name for name in names if name not in self.offsets]
        if missing:
            raise ArtifactError(f"the weights file lacks {', '.join(missing[:5])}")
        return [self.bytes.ctypes.data + self.offsets[name] for name in names]
