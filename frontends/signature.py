"""What one step of a causal language model takes and gives: its states, as data.

A step takes `input_ids`, `positions`, `lengths`, `logits_at` and the states of all layers, and
gives `logits` and the states after it. Which states a model has is found by running it
(`states.py`).

States of tokens are rows: keys of h heads of width d are `[B,P,h*d]`, seen as heads inside the
step alone. So caches of all kinds are stored, paged and moved alike. Latents of MLA are called
`past.N.latent` and `past.N.rope`, other keys and values `past.N.key` and `past.N.value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsc.ir.lazy import torch
from dsc.ir.limits import BATCH, PAST, STEP, WANTED
from dsc.ir.program import TOKEN_INPUTS
from dsc.ir.types import DType


@dataclass(frozen=True)
class Extents:
    """Concrete sizes for one trace: batch, new tokens, past rows, wanted logits.

    The defaults are pairwise different and none is 0 or 1, which `torch.export` would freeze into
    the graph.
    """

    batch: int = 2
    new: int = 5
    past: int = 7
    logits: int = 3


@dataclass(frozen=True)
class LayerState:
    """One tensor that a layer keeps between steps.

    Args:
        layer: whose it is.
        name: what it is called in `past.N.name`.
        part: where transformers' cache layer has it: `keys`, `values`, `conv_states[0]`, ...
        shape: its sizes, with "B" for the batch and "P" for the rows of tokens.
        dtype: its element type.
        heads: of keys and values, in how many heads a row is seen; 0 for what is no row of heads.
    """

    layer: int
    name: str
    part: str
    shape: tuple[int | str, ...]
    dtype: DType
    heads: int = 0

    @property
    def per_token(self) -> bool:
        """Whether it has a row for each token of the past."""
        return PAST in self.shape

    def sizes(self, batch: int, past: int) -> tuple[int, ...]:
        """Its shape for so many sequences with so many rows."""
        known = {BATCH: batch, PAST: past}
        return tuple(known[size] if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class Signature:
    """The states of all layers in order, and how many ids there are."""

    states: tuple[LayerState, ...]
    vocab_size: int

    def _names(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{s.layer}.{s.name}" for s in self.states)

    def input_names(self) -> tuple[str, ...]:
        """Names of a step's inputs: `input_ids`, ..., `past.0.key`, `past.0.value`, ..."""
        return (*TOKEN_INPUTS, *self._names("past"))

    def output_names(self) -> tuple[str, ...]:
        """Names of a step's outputs: `logits`, `present.0.key`, `present.0.value`, ..."""
        return ("logits", *self._names("present"))

    def cache_names(self) -> tuple[tuple[str, str], ...]:
        """Pairs (output, input) of the states: what goes in as past comes out as present."""
        return tuple(zip(self._names("present"), self._names("past"), strict=True))

    def example_inputs(
        self,
        extents: Extents = Extents(),
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> tuple[torch.Tensor, ...]:
        """Inputs of one step: random ids and states, every sequence with a full past.

        Returns input_ids i64[B,S], positions i64[B,S], lengths i64[B], logits_at i64[B,L], then
        the states, in `dtype` where one is given. Drawn on the CPU, so equal on every device.
        """
        batch, new, past, logits = extents.batch, extents.new, extents.past, extents.logits
        if torch.device(device).type == "meta":
            return self._on_meta(extents, dtype)
        random = torch.Generator().manual_seed(seed)

        def integers(limit: int, *shape: int) -> torch.Tensor:
            return torch.randint(limit, shape, generator=random)

        tokens = [
            integers(self.vocab_size, batch, new),
            torch.arange(past, past + new).expand(batch, new).contiguous(),
            torch.full((batch,), past, dtype=torch.int64),
            integers(new, batch, logits),
        ]
        states = [
            torch.randn(s.sizes(batch, past), generator=random).to(dtype or s.dtype.torch)
            for s in self.states
        ]
        return tuple(tensor.to(device) for tensor in (*tokens, *states))

    def _on_meta(self, extents: Extents, dtype: torch.dtype | None) -> tuple[torch.Tensor, ...]:
        batch, new, past, logits = extents.batch, extents.new, extents.past, extents.logits
        tokens = [(batch, new), (batch, new), (batch,), (batch, logits)]
        return (
            *(torch.empty(shape, dtype=torch.int64, device="meta") for shape in tokens),
            *(
                torch.empty(s.sizes(batch, past), dtype=dtype or s.dtype.torch, device="meta")
                for s in self.states
            ),
        )

    def dynamic_shapes(self) -> dict[str, Any]:
        """Which axes `torch.export` keeps symbolic: B, S, P and L, shared by all inputs."""
        names = (BATCH, STEP, PAST, WANTED)
        batch, new, past, logits = (torch.export.Dim(name) for name in names)
        known = {BATCH: batch, PAST: past}
        return {
            "input_ids": {0: batch, 1: new},
            "positions": {0: batch, 1: new},
            "lengths": {0: batch},
            "logits_at": {0: batch, 1: logits},
            "past": tuple(
                {axis: known[size] for axis, size in enumerate(s.shape) if isinstance(size, str)}
                for s in self.states
            ),
        }

    def only(self, layers: Sequence[int]) -> Signature:
        """That of a model of these layers alone, which then count from 0."""
        places = {layer: place for place, layer in enumerate(layers)}
        kept = (replace(s, layer=places[s.layer]) for s in self.states if s.layer in places)
        return replace(self, states=tuple(sorted(kept, key=lambda s: s.layer)))
