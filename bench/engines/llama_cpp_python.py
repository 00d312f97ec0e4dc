"""llama.cpp through llama-cpp-python's low-level functions, latent cache; bf16, Q8_0 or Q4_0."""

from __future__ import annotations

import ctypes
import random
import re
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

NEEDS = {"llama.cpp": ("llama_cpp", "gguf")}
CHUNK = 512


class Engine:
    """Converts the checkpoint once into the cache folder, then maps it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        llama_cpp: Any = import_module("llama_cpp.llama_cpp")
        from bench.gguf_file import convert

        folder = Path(options["folder"])
        quant = options["quant"]
        ending = "" if quant == "none" else f"-{quant}"
        path = Path(options["cache"]) / f"{folder.name}{ending}.gguf"
        self.compile_seconds = 0.0
        if not path.is_file():
            start = time.perf_counter()
            convert(folder, path, quant)
            self.compile_seconds = time.perf_counter() - start
        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        start = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        self.load_seconds = time.perf_counter() - start
        told = llama_cpp.llama_print_system_info().decode()
        self.units = ", ".join(re.findall(r"(\w+) = 1\b", told))
        self.threads, self.vocabulary = options["threads"], int(options["vocabulary"])
        self.buffer = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.context: Any = None
        self.random = random.Random(0)

    def open(self, batch: int, rows: int) -> None:
        """A context with room for so many tokens of each sequence."""
        if self.context is not None:
            self.lib.llama_free(self.context)
        found = self.lib.llama_context_default_params()
        found.n_ctx = batch * (-(-rows // 256) * 256)
        found.n_batch = found.n_ubatch = CHUNK
        found.n_seq_max = batch
        found.n_threads = found.n_threads_batch = self.threads
        found.no_perf = True
        found.kv_unified = batch == 1
        self.context = self.lib.llama_init_from_model(self.model, found)
        if not self.context:
            raise RuntimeError(f"llama.cpp opens no context of {found.n_ctx} tokens")

    def decode(self, places: list[tuple[int, int]], wanted: list[bool]) -> float:
        """Seconds of one call over random tokens at (sequence, position)."""
        batch = self.buffer
        batch.n_tokens = len(places)
        for i, (sequence, position) in enumerate(places):
            batch.token[i] = self.random.randrange(3, self.vocabulary)
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, sequence
            batch.logits[i] = wanted[i]
        start = time.perf_counter()
        status = self.lib.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.lib.llama_get_logits_ith(self.context, len(places) - 1)
        return time.perf_counter() - start

    def fill(self, batch: int, tokens: int) -> float:
        """Process a prompt of each sequence by chunks."""
        seconds = 0.0
        for sequence in range(batch):
            for at in range(0, tokens, CHUNK):
                places = [(sequence, p) for p in range(at, min(at + CHUNK, tokens))]
                wanted = [False] * (len(places) - 1) + [True]
                seconds += self.decode(places, wanted)
        return seconds

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt into empty caches."""
        self.open(batch, tokens)
        return self.fill(batch, tokens)

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the caches."""
        self.open(batch, context + room)
        self.batch, self.at = batch, context
        self.fill(batch, context)

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        seconds = []
        for _ in range(count):
            places = [(sequence, self.at) for sequence in range(self.batch)]
            seconds.append(self.decode(places, [True] * self.batch))
            self.at += 1
        return seconds
