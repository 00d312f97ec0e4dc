"""Run this artifact on a GPU: python run.py "a prompt". It needs numpy and tokenizers."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Collection, Mapping
from ctypes import c_int32, c_int64, c_uint64
from typing import Any

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"run.py: {missing}; pip install numpy tokenizers")

from dsc.backends.triton.driver import Driver, NoDevice, ReadyLaunch
from dsc.backends.triton.hip import HipDriver
from dsc.runtime.standalone import NUMPY, Array, Compiled, mapped_weights, number

NUMBERS = {"i32": c_int32, "i64": c_int64}
DRIVERS: Mapping[str, type[Driver]] = {"sm_": Driver, "gfx": HipDriver}
"""By how names of architectures begin."""


class Model(Compiled):
    """The model in a folder, with the KV cache of one sequence on the device."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        """Load the kernels and upload the weights."""
        self.device = device_for(pathlib.Path(folder) / "triton")
        place = pathlib.Path(folder) / "triton" / self.device.arch
        super().__init__(folder, f"triton/{self.device.arch}/plan.json")
        self.kernels = {
            name: self.device.load(
                (place / facts["file"]).read_bytes(), facts["symbol"], facts["warps"],
                facts["shared"], facts["parameters"], facts.get("dependent", False),
            )
            for name, facts in json.loads((place / "kernels.json").read_text()).items()
        }  # fmt: skip
        self.sizes = {"B": 1, "C": self.context + self.chunk}
        tables = self.pages()
        largest = {**self.sizes, "S": self.chunk, "L": self.chunk}
        needed = buffer_sizes(self.plan["entries"].values(), largest)
        self.at = {label: self.device.allocate(size) for label, size in needed.items()}
        content, places = mapped_weights(self.folder / self.manifest["weights"])
        uploaded = self.device.allocate(len(content))
        self.device.upload(uploaded, content.ctypes.data, content.nbytes)
        self.at |= {buffer_label("weight", n): uploaded + at for n, at in places.items()}
        for name, table in tables.items():
            target = self.at[buffer_label("input", name)]
            self.device.upload(target, table.ctypes.data, table.nbytes)
            self.device.synchronise()
        self.launches: dict[tuple[int, int], list[ReadyLaunch]] = {}

    def run(self, entry: str, sizes: Mapping[str, int], tokens: dict[str, Array]) -> Array:
        """The logits of a step; the caches are written on the device."""
        plan, key = self.plan["entries"][entry], (sizes["S"], sizes["L"])
        if key not in self.launches:
            plain = [x for x in plan["launches"] if x["op"] != "sample"]  # tokens are chosen here
            every = (self._launch(plan, x, sizes) for x in plain)
            self.launches[key] = [x for x in every if 0 not in x.grid]
        for name, array in tokens.items():
            target = self.at[buffer_label("input", name)]
            self.device.upload(target, array.ctypes.data, array.nbytes)
        for launch in self.launches[key]:
            self.device.launch(launch)
        dtype, dims = next((d, s) for name, d, s, _ in plan["outputs"] if name == "logits")
        logits = np.empty([number(d, sizes) for d in dims], NUMPY[dtype])
        source = self.at[buffer_label("output", "logits")]
        self.device.download(logits.ctypes.data, source, logits.nbytes)
        self.device.synchronise()
        return logits

    def _launch(self, plan: Any, launch: Any, sizes: Mapping[str, int]) -> ReadyLaunch:
        """A launch as the driver takes it."""
        arguments = list[Any]()
        kinds = self.plan["meta"]["kernels"][launch["kernel"]]["signature"].values()
        kinds = [kind for kind in kinds if kind != "constexpr"]
        for kind, argument in zip(kinds, launch["arguments"], strict=True):
            if kind in NUMBERS:
                arguments.append(NUMBERS[kind](number(argument, sizes)))
            else:
                buffer, _, _, offset = argument[:4]
                region, name, _, start = plan["buffers"][buffer]
                base = self.at[buffer_label(region, name)] + start
                arguments.append(c_uint64(base + number(offset, sizes)))
        x, y, z = (*(number(d, sizes) for d in launch["grid"]), 1, 1)[:3]
        return self.device.prepare(self.kernels[launch["kernel"]], (x, y, z), arguments)


def device_for(folder: pathlib.Path) -> Driver:
    """A GPU of this machine that the folder has binaries for. Raises ValueError."""
    there, refusals = {path.name for path in folder.iterdir()}, list[str]()
    for prefix, kind in DRIVERS.items():
        if not any(name.startswith(prefix) for name in there):
            continue
        try:
            device = kind()
        except NoDevice as missing:
            refusals.append(str(missing))
            continue
        if device.arch in there:
            return device
        refusals.append(f"compiled for other GPUs; give --target {device.kind}:{device.arch}")
        device.close()
    raise ValueError("; ".join(refusals))


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
