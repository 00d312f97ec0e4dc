"""Run this artifact on an NVIDIA GPU: python run.py "a prompt". It needs numpy and tokenizers."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Collection, Mapping
from ctypes import CDLL, addressof, byref, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"run.py: {missing}; pip install numpy tokenizers")

from dsc.runtime.standalone import NUMPY, Array, Compiled, number

NUMBERS = {"i32": c_int32, "i64": c_int64}


class Device:
    """The first CUDA device, its primary context, and its default stream."""

    def __init__(self) -> None:
        try:
            self.cuda = CDLL("libcuda.so.1")
        except OSError as missing:
            raise RuntimeError(f"there is no driver of an NVIDIA GPU: {missing}") from None
        context, device, value = c_void_p(), c_int(), c_int()
        self("cuInit", 0)
        self("cuDeviceGet", byref(device), 0)
        self("cuDevicePrimaryCtxRetain", byref(context), device)
        self("cuCtxSetCurrent", context)
        self.arch = "sm_"
        for attribute in (75, 76):  # compute capability, major and minor
            self("cuDeviceGetAttribute", byref(value), attribute, device)
            self.arch += str(value.value)

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call the driver. Raises RuntimeError where it fails."""
        status = getattr(self.cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def memory(self, size: int) -> int:
        """Memory of so many bytes."""
        pointer = c_uint64()
        self("cuMemAlloc_v2", byref(pointer), c_size_t(max(size, 1)))
        return pointer.value

    def upload(self, pointer: int, array: Array) -> None:
        """Copy an array to the device."""
        host = c_void_p(array.ctypes.data)
        self("cuMemcpyHtoD_v2", c_uint64(pointer), host, c_size_t(array.nbytes))

    def kernel(self, path: pathlib.Path, symbol: str, shared: int) -> c_void_p:
        """A kernel of a binary."""
        module, function = c_void_p(), c_void_p()
        self("cuModuleLoadData", byref(module), path.read_bytes())
        self("cuModuleGetFunction", byref(function), module, symbol.encode())
        self("cuFuncSetAttribute", function, 8, shared)  # more than 48 KB are got by asking alone
        return function


class Model(Compiled):
    """The model in a folder, with the KV cache of one sequence on the device."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        """Load the kernels and upload the weights."""
        self.device = Device()
        place = pathlib.Path(folder) / "triton" / self.device.arch
        if not place.is_dir():
            raise ValueError(f"compiled for other GPUs; give --target cuda:{self.device.arch}")
        super().__init__(folder, f"triton/{self.device.arch}/plan.json")
        self.records: Any = json.loads((place / "kernels.json").read_text())
        self.kernels = {
            name: self.device.kernel(place / facts["file"], facts["symbol"], facts["shared"])
            for name, facts in self.records.items()
        }
        self.sizes = {"B": 1, "C": self.context + self.chunk}
        largest = {**self.sizes, "S": self.chunk, "L": self.chunk}
        needed = buffer_sizes(self.plan["entries"].values(), largest)
        self.at = {label: self.device.memory(size) for label, size in needed.items()}
        content, places = self.weights()
        uploaded = self.device.memory(len(content))
        self.device.upload(uploaded, content)
        self.at |= {buffer_label("weight", n): uploaded + at for n, at in places.items()}
        self.launches: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        """The logits of a step; the caches are written on the device."""
        plan, key = self.plan["entries"][entry], (sizes["S"], sizes["L"])
        if key not in self.launches:
            self.launches[key] = [self._launch(plan, x, sizes) for x in plan["launches"]]
        for name, array in tokens.items():
            self.device.upload(self.at[buffer_label("input", name)], array)
        for *launch, _ in self.launches[key]:
            self.device("cuLaunchKernel", *launch)
        dtype, dims = next((d, s) for name, d, s, _ in plan["outputs"] if name == "logits")
        logits = np.empty([number(d, sizes) for d in dims], NUMPY[dtype])
        source = c_uint64(self.at[buffer_label("output", "logits")])
        host = c_void_p(logits.ctypes.data)
        self.device("cuMemcpyDtoH_v2", host, source, c_size_t(logits.nbytes))
        return logits

    def _launch(self, plan: Any, launch: Any, sizes: Mapping[str, int]) -> tuple[Any, ...]:
        """What the driver is told of a launch, and the arguments, which must live as long."""
        facts, arguments = self.records[launch["kernel"]], list[Any]()
        kinds = self.plan["meta"]["kernels"][launch["kernel"]]["signature"].values()
        kinds = [kind for kind in kinds if kind != "constexpr"]
        for kind, argument in zip(kinds, launch["arguments"], strict=True):
            if kind in NUMBERS:
                arguments.append(NUMBERS[kind](number(argument, sizes)))
            else:
                buffer, _, _, offset = argument
                region, name, _, start = plan["buffers"][buffer]
                base = self.at[buffer_label(region, name)] + start
                arguments.append(c_uint64(base + number(offset, sizes)))
        hidden = facts["parameters"] - len(arguments)  # Triton's own, which are null
        arguments += [c_uint64(0) for _ in range(hidden)]
        table = (c_void_p * len(arguments))(*map(addressof, arguments))
        grid = (*(number(d, sizes) for d in launch["grid"]), 1, 1)[:3]
        how = (facts["warps"] * 32, 1, 1, facts["shared"], None, table, None)
        return (self.kernels[launch["kernel"]], *grid, *how, arguments)


def buffer_sizes(entries: Collection[Any], largest: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the arena, inputs and outputs, in which a step of any entry has room."""
    needed = {"arena": max(entry["arena_bytes"] for entry in entries)}
    for region, name, size, _ in (buffer for entry in entries for buffer in entry["buffers"]):
        label = buffer_label(region, name)
        if region in ("input", "output"):
            needed[label] = max(needed.get(label, 0), number(size, largest))
    return needed


def buffer_label(region: str, name: str) -> str:
    """What a buffer's memory is known by: all that lie in the arena share it."""
    return region if region == "arena" else f"{region} {name}"
