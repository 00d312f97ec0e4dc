"""torch.compile of stock transformers: static cache, weights frozen, experts as `batched_mm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.engines import transformers_eager

NEEDS = {"torch.compile": ("transformers", "torch")}


class Engine(transformers_eager.Engine):
    """Compiled anew for every cache size; caches are filled by the model as it is."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self._compiled: Any = None

    def new_cache(self, rows: int) -> Any:
        """An empty cache of a fixed size."""
        from transformers.cache_utils import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=rows)

    def prefill(self, batch: int, tokens: int) -> float:
        """Seconds of a prompt through a compiled model."""
        return self.fill(self._compile("grouped_mm", False), self.new_cache(tokens), batch, tokens)

    def start(self, batch: int, context: int, room: int) -> None:
        """Fill the cache, and compile for it."""
        self._compiled = None
        self.model.set_experts_implementation("grouped_mm")
        super().start(batch, context, room)
        self._compile("batched_mm", True)
        self.steps(2)  # compiles

    def stepper(self) -> Any:
        """What decodes."""
        return self._compiled

    def _compile(self, experts: str, freeze: bool) -> Any:
        import torch
        import torch._inductor.config as inductor

        if self._compiled is None or getattr(self, "_experts", "") != experts:
            torch._dynamo.reset()
            inductor.freezing = freeze
            self.model.set_experts_implementation(experts)
            self._compiled, self._experts = torch.compile(self.model, dynamic=False), experts
        return self._compiled
