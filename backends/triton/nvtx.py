"""Named spans for the vendors' profilers: an entry, its layers and their operators.

Nsight Systems and rocprof show what is pushed and popped around launches, through the libraries
that come with their tools: `nvtxRangePushA` of NVTX, `roctxRangePushA` of ROCtx. `DSC_NVTX=1` asks
for it. A captured graph is one span to them, so launches are queued one by one then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from dsc.backends.triton.driver import ReadyLaunch
from dsc.errors import BackendUnavailable
from dsc.ir.layers import layer_of
from dsc.runtime.plan import Launch
from dsc.settings import switched

LIBRARIES = {
    "cuda": (("libnvToolsExt.so.1", "libnvToolsExt.so"), "nvtxRangePushA", "nvtxRangePop"),
    "hip": (("libroctx64.so.4", "libroctx64.so"), "roctxRangePushA", "roctxRangePop"),
}
"""By kind of device the libraries, and what they call a push and a pop."""
Path = tuple[str, ...]


class Ranges:
    """A library's pushes and pops. Raises `BackendUnavailable` where it is missing."""

    def __init__(self, kind: str) -> None:
        names, push, pop = LIBRARIES[kind]
        library = _opened(names)
        self._push, self._pop = getattr(library, push), getattr(library, pop)
        self._push.argtypes = [ctypes.c_char_p]

    def queue(
        self,
        launch: Callable[[ReadyLaunch], None],
        launches: Sequence[ReadyLaunch],
        paths: Sequence[Path],
    ) -> None:
        """Queue launches, each within the spans of its path; neighbours share what they can."""
        open_: Path = ()
        for each, path in zip(launches, paths, strict=True):
            same = 0
            while same < min(len(open_), len(path)) and open_[same] == path[same]:
                same += 1
            self._move(len(open_) - same, path[same:])
            open_ = path
            launch(each)
        self._move(len(open_), ())

    def _move(self, pops: int, pushes: Sequence[str]) -> None:
        for _ in range(pops):
            self._pop()
        for name in pushes:
            self._push(name.encode())


def wanted() -> bool:
    """Whether the user asked for spans. Raises `UsageError` for a value that is neither."""
    return switched("DSC_NVTX", on="1", off="0", unset=False)


def path_of(entry: str, launch: Launch) -> Path:
    """The spans that a launch lies in: the entry, the layer or part of the model, the operator."""
    return (entry, layer_of(launch.loc), launch.op or launch.kernel)


def _opened(names: Sequence[str]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    hint = "install the vendor's profiling tools, or leave DSC_NVTX unset"
    raise BackendUnavailable(f"DSC_NVTX=1 needs {names[0]}", hint)
