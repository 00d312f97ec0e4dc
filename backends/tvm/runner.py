"""Run this artifact: python run.py "a prompt". It needs numpy, tokenizers and apache-tvm.

Of TVM only the run-time library is loaded. Text is greedy; its end is told on standard error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"run.py: {missing}; pip install numpy tokenizers apache-tvm")

from dsc.runtime.standalone import NUMPY, TOKENS, Array, Compiled, lacking, mapped_weights, number


class Model(Compiled):
    """The model in a folder, with the KV cache of one sequence."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        """Load the library, map the weights and allocate the cache."""
        super().__init__(folder)
        self.meta = self.manifest["meta"]
        threads = self.meta["threads"] or len(os.sched_getaffinity(0))
        os.environ.setdefault("TVM_NUM_THREADS", str(threads))
        lacks = lacking(self.meta["cpu_needs"])
        if lacks:
            needs = f"{self.meta['cpu']} and needs {', '.join(lacks)}, which this CPU lacks"
            sys.exit(f"this model was compiled for {needs}; compile it on this machine")
        if self.meta["tiles"]:  # Linux saves tiles of those who ask
            if ctypes.CDLL(None).syscall(158, 0x1023, 18):  # arch_prctl(ARCH_REQ_XCOMP_PERM)
                sys.exit("this model was compiled for a CPU with AMX; compile it on this machine")
        self.functions = self._library()
        self.content, places = mapped_weights(self.folder / self.manifest["weights"])
        base = self.content.ctypes.data
        self.addresses = [base + places[name] for name in self.meta["weights"]]
        self.steps = np.fromfile(self.folder / "tvm" / "steps.bin", dtype=np.int64)
        entries = self.plan["entries"].values()
        self.arena = np.empty(max(e["arena_bytes"] for e in entries) + 64, np.uint8)
        inputs = next(iter(entries))["inputs"]
        self.sizes = {"B": 1, "C": self.context + self.chunk}
        self.caches = self.pages()
        for name, dtype, dims, _ in inputs:
            if name not in (*TOKENS, *self.caches):
                shape = [number(d, self.sizes) for d in dims]
                self.caches[name] = np.zeros(shape, NUMPY[dtype])

    def _library(self) -> Any:
        package = importlib.util.find_spec("tvm")
        if package is None or package.origin is None:  # a folder tvm/ beside this script is none
            raise ImportError("there is no package tvm; pip install apache-tvm")
        modules: dict[str, Any] = sys.modules
        modules.setdefault("torch", None)  # tvm_ffi would load it where it is, for nothing
        import tvm_ffi

        library = pathlib.Path(package.origin).parent / "lib" / "libtvm_runtime.so"
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        with tempfile.TemporaryDirectory() as own:  # a known path would give what it held before
            copy = shutil.copy(self.folder / "tvm" / "kernels.so", own)
            return tvm_ffi.load_module(copy)

    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        """The logits of a step; the caches are written in place."""
        facts, plan = self.meta["entries"][entry], self.plan["entries"][entry]
        arrays, results = {**self.caches, **tokens}, dict[str, Array]()
        for name, dtype, dims, buffer in plan["outputs"]:
            region, state, *_ = plan["buffers"][buffer]
            if region == "input":
                results[name] = arrays[state]
            else:
                results[name] = np.empty([number(d, sizes) for d in dims], NUMPY[dtype])
        values = {**sizes, "zero": 0, "self": 0, "status": 0}
        values["arena"] = -(-self.arena.ctypes.data // 64) * 64
        values |= {f"input:{name}": a.ctypes.data for name, a in arrays.items()}
        values |= {f"output:{name}": a.ctypes.data for name, a in results.items()}
        given = [values[slot] for slot in facts["slots"]]
        table = np.array(given + [0] * facts["derived"] + self.addresses, dtype=np.int64)
        wrong = self.functions[entry](table.ctypes.data, self.steps.ctypes.data + facts["steps_at"])
        if wrong:
            _, name, what = facts["checks"][wrong - 1]
            raise ValueError(f"{name}: {what}")
        return results["logits"]
