"""Stock transformers, eager, with its fastest experts (`grouped_mm`)."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Mapping
from typing import Any

NEEDS = {"transformers": ("transformers", "torch")}
CHUNK = 512


def torch_units() -> str:
    """What torch computes with, and what it finds of units for bf16, bytes and tiles."""
    import torch

    asked = {
        "bf16": "_is_avx512_bf16_supported", "vnni": "_is_vnni_supported",
        "tiles": "_is_amx_tile_supported",
    }  # fmt: skip
    found = [name for name, f in asked.items() if getattr(torch.cpu, f, bool)()]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *found])


def give_back() -> None:
    """Return what loading took beside the weights to the system, where its C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Engine:
    """A model of `AutoModelForCausalLM` with a growing cache."""

    experts = "grouped_mm"

    def __init__(self, options: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(options["threads"])
        torch.manual_seed(0)
        torch.set_grad_enabled(False)
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            options["folder"],
            dtype=getattr(torch, options.get("dtype", "bfloat16")),
            experts_implementation=self.experts,
        ).eval()
        self.load_seconds = time.perf_counter() - start
        give_back()
        self.units = torch_units()
        self.vocabulary = int(options["vocabulary"])

    def ids(self, batch: int, count: int) -> Any:
        """Random tokens."""
        import torch

        return torch.randint(3, self.vocabulary, (batch, count))

    def new_cache(self, rows: int) -> Any:
        """An empty cache; it grows."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.model.config)

    def forward(self, model: Any, ids: Any, cache: Any, at: int) -> float:
        """Seconds of a step over new tokens, of which `at` are in the cache."""
        import torch

        positions = torch.arange(at, at + ids.shape[1])[None].expand(len(ids), -1)
        start = time.perf_counter()
        model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return time.perf_counter() - start

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt into an empty cache."""
        return self.fill(self.model, self.new_cache(tokens), batch, tokens)

    def fill(self, model: Any, cache: Any, batch: int, tokens: int) -> float:
        """Process a prompt by chunks."""
        seconds = 0.0
        for at in range(0, tokens, CHUNK):
            ids = self.ids(batch, min(CHUNK, tokens - at))
            seconds += self.forward(model, ids, cache, at)
        return seconds

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the cache."""
        self.batch, self.at = batch, context
        self.cache = None  # the cache before must go first
        self.cache = self.new_cache(context + room)
        self.fill(self.model, self.cache, batch, context)

    def steps(self, count: int) -> list[float]:
        """Seconds of decode steps."""
        seconds = []
        for _ in range(count):
            seconds.append(
                self.forward(self.stepper(), self.ids(self.batch, 1), self.cache, self.at)
            )
            self.at += 1
        return seconds

    def stepper(self) -> Any:
        """What decodes."""
        return self.model
