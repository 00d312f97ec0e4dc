"""dsc: an artifact for the tvm backend, or its ONNX model run by ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = {"dsc": ("tvm",), "onnxruntime": ("onnxruntime",)}
BACKENDS = {"dsc": "tvm", "onnxruntime": "onnxruntime"}


def units(model: Any) -> str:
    """What an artifact's code needs of a processor, or ONNX Runtime's version and providers."""
    meta = getattr(model.executable, "meta", {})
    if "cpu_needs" in meta:
        tiles = ["tiles"] if meta.get("tiles") else []
        return ", ".join([meta["cpu"], *meta["cpu_needs"], *tiles])
    runtime = import_module("onnxruntime")
    return ", ".join([runtime.__version__, *runtime.get_available_providers()])


class Engine:
    """Compiles once into the cache folder, then loads."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        import dsc

        backend = BACKENDS[options["engine"]]
        limits = {"max_batch": options["max_batch"], "max_context": options["max_context"]}
        quant = options["quant"]
        ending = "" if quant == "none" else f"-{quant}"
        name = f"{Path(options['folder']).name}-{backend}{ending}-{limits['max_batch']}"
        given = {} if quant == "none" else {"quant": quant}  # what another commit may not know
        place = Path(options["cache"]) / f"{name}-{limits['max_context']}-{options['commit']}"
        self.compile_seconds = 0.0
        if not place.is_dir():
            start = time.perf_counter()
            asked = {"backend": backend, "prefill_chunk": 512, **limits, **given}
            dsc.compile(options["folder"], **asked).save(place)
            self.compile_seconds = time.perf_counter() - start
        start = time.perf_counter()
        self.model = dsc.load(place, trust=True, threads=options["threads"])
        self.load_seconds = time.perf_counter() - start
        self.units = units(self.model)
        self.vocabulary = int(options["vocabulary"])
        self.session: Any = None
        self.random = np.random.default_rng(0)

    def ids(self, batch: int, count: int) -> Any:
        """Random tokens."""
        return self.random.integers(3, self.vocabulary, (batch, count), dtype=np.int64)

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt into empty caches."""
        session = self.model.session(max_batch=batch, max_context=tokens)
        ids = self.ids(batch, tokens)
        start = time.perf_counter()
        session.prefill(ids)
        return time.perf_counter() - start

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the caches."""
        self.batch = batch
        self.session = None  # the caches before must go first
        self.session = self.model.session(max_batch=batch, max_context=context + room)
        self.session.prefill(self.ids(batch, context))

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        seconds = []
        for row in self.ids(count, self.batch):
            start = time.perf_counter()
            self.session.decode(row)
            seconds.append(time.perf_counter() - start)
        return seconds
