"""The lean run time: a library's functions and mapped weights, with no compiler and no torch.

`import tvm` would load the compiler and hundreds of megabytes; TVM's run-time library and
`tvm_ffi` are enough to run what was compiled.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dsc.errors import ArtifactError, BackendUnavailable


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


def load_library(path: Path, threads: int | None) -> Any:
    """The functions of a library by name. `threads` counts when no pool was started before."""
    wanted = threads or len(os.sched_getaffinity(0))
    os.environ.setdefault("TVM_NUM_THREADS", str(wanted))
    runtime_library()
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


class MappedWeights:
    """A safetensors file mapped into memory: addresses of its tensors by name."""

    def __init__(self, path: Path) -> None:
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r")
        length = int(self.bytes[:8].view("<u8")[0])
        if length > len(self.bytes) - 8:
            raise ArtifactError("the weights file is damaged: its header is cut", str(path))
        header: Mapping[str, Any] = json.loads(self.bytes[8 : 8 + length].tobytes())
        self.start = 8 + length
        self.offsets = {
            name: entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__"
        }

    def addresses(self, names: Sequence[str]) -> list[int]:
        """The addresses of the named tensors. Raises `ArtifactError` for one that is missing."""
        missing = [name for name in names if name not in self.offsets]
        if missing:
            raise ArtifactError(f"the weights file lacks {', '.join(missing[:5])}")
        base = self.bytes.ctypes.data + self.start
        return [base + self.offsets[name] for name in names]
