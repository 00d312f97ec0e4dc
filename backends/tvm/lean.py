"""The lean run time: a library's functions and mapped weights, with no compiler and no torch.

`import tvm` would load the compiler and hundreds of megabytes; TVM's run-time library and
`tvm_ffi` are enough to run what was compiled.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsc.errors import ArtifactError, BackendUnavailable, UsageError
from dsc.runtime.standalone import mapped_weights


@cache
def runtime_library() -> ctypes.CDLL:
    """TVM's run-time library, made visible to the libraries that are loaded after it."""
    spec = find_spec("tvm")
    origin = Path(spec.origin) if spec is not None and spec.origin else Path()
    path = origin.parent / "lib" / "libtvm_runtime.so"
    if not path.is_file():
        raise BackendUnavailable(
            "libtvm_runtime.so is not in the installed tvm package",
            hint="pip install 'apache-tvm>=0.27,<0.28'",
        )
    import tvm_ffi  # noqa: F401  (its library must be loaded first)

    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@cache
def tiles_allowed() -> bool:
    """Whether this process may use the CPU's tile registers; asks the operating system for it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0]
    except OSError:
        return False
    if not {"amx_tile", "amx_bf16"} <= set(flags.split()):
        return False
    return int(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # asm/prctl.h of Linux, x86-64


def load_library(path: Path, threads: int | None) -> Any:
    """The functions of a library by name. The thread pool will have room for `threads`."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault(POOL_SIZE, str(max(threads or 0, cores)))
    runtime_library()
    import tvm_ffi

    with private_copy(path) as own:
        return tvm_ffi.load_module(str(own))


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
        if getattr(_applied, "threads", None) == self:
            return
        import tvm_ffi

        configure = tvm_ffi.get_global_func("runtime.config_threadpool")
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
            configure(_OWN_CORE if self.pin else _ANY_CORE, wanted, cores)
        _applied.threads = self
        found = int(tvm_ffi.get_global_func("runtime.NumThreads")())
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
