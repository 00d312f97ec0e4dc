"""One step of a causal language model, in the form that is traced: caches in, caches out.

Every model reaches the tracer with the same signature (see `CausalLMStep.forward`). Models of
`models/` have it already; `CausalLMStep` gives it to a stock transformers model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsc.frontends.config import ModelConfig
from dsc.frontends.instantiate import trace_by_kind
from dsc.frontends.torch_export import trace
from dsc.ir.dims import Range
from dsc.ir.program import TOKEN_INPUTS, Program
from dsc.ir.types import DType, TensorType
from dsc.models.v3 import append, visible


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


def example_inputs(
    config: ModelConfig,
    extents: Extents = Extents(),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Inputs of one step: random ids and caches, every sequence with a full past.

    Returns input_ids i64[B,S], positions i64[B,S], lengths i64[B], logits_at i64[B,L], then a
    latent [B,P,c] and a rope key [B,P,r] a layer. Drawn on the CPU, so equal on every device.
    """
    batch, new, past, logits = extents.batch, extents.new, extents.past, extents.logits
    random = torch.Generator().manual_seed(seed)

    def integers(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=random)

    tokens = [
        integers(config.vocab_size, batch, new),
        torch.arange(past, past + new).expand(batch, new).contiguous(),
        torch.full((batch,), past, dtype=torch.int64),
        integers(new, batch, logits),
    ]
    caches = [
        torch.randn(batch, past, width, generator=random).to(dtype)
        for _ in range(config.num_hidden_layers)
        for width in (config.kv_lora_rank, config.qk_rope_head_dim)
    ]
    return tuple(tensor.to(device) for tensor in (*tokens, *caches))


def dynamic_shapes(config: ModelConfig) -> dict[str, Any]:
    """Which axes `torch.export` keeps symbolic: B, S, P and L, shared by all inputs."""
    batch, new, past, logits = (torch.export.Dim(name) for name in "BSPL")
    cache = {0: batch, 1: past}
    return {
        "input_ids": {0: batch, 1: new},
        "positions": {0: batch, 1: new},
        "lengths": {0: batch},
        "logits_at": {0: batch, 1: logits},
        "past": (cache,) * (2 * config.num_hidden_layers),
    }


def input_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of a step's inputs, in order: `input_ids`, ..., `past.0.latent`, `past.0.rope`, ..."""
    return (*TOKEN_INPUTS, *_names_per_layer("past", config))


def output_names(config: ModelConfig) -> tuple[str, ...]:
    """Names of a step's outputs, in order: `logits`, `present.0.latent`, `present.0.rope`, ..."""
    return ("logits", *_names_per_layer("present", config))


def cache_names(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """Pairs (output, input) of a step's caches: what goes in as past comes out as present."""
    outputs, inputs = _names_per_layer("present", config), _names_per_layer("past", config)
    return tuple(zip(outputs, inputs, strict=True))


def _names_per_layer(prefix: str, config: ModelConfig) -> list[str]:
    layers = range(config.num_hidden_layers)
    return [f"{prefix}.{layer}.{part}" for layer in layers for part in ("latent", "rope")]


def trace_step(
    module: nn.Module,
    config: ModelConfig,
    dtype: DType,
    symbols: Mapping[str, Range],
    *,
    whole: bool = False,
) -> Program:
    """Trace one step of `module` to a program with the entry `step`.

    One layer of each kind is traced and the others are written down, where that is sound (see
    `instantiate.py`); with `whole`, every layer is traced, about half a second each.
    """
    device = next(module.parameters()).device

    def traced(part: nn.Module, depth: int) -> Program:
        part_config = config.model_copy(update={"num_hidden_layers": depth})
        return trace(
            part,
            example_inputs(part_config, device=device, dtype=dtype.torch),
            name="step",
            dynamic_shapes=dynamic_shapes(part_config),
            input_names=input_names(part_config),
            output_names=output_names(part_config),
            symbols=symbols,
            aliases=cache_names(part_config),
        )

    if whole:
        return traced(module, config.num_hidden_layers)
    inputs = example_inputs(config, device="meta", dtype=dtype.torch)
    return trace_by_kind(module, inputs, input_names(config), output_names(config), traced)


def parameter_types(module: nn.Module) -> dict[str, TensorType]:
    """Name and type of all that a checkpoint must supply: parameters and persistent buffers."""
    return {
        name: TensorType(DType.of(tensor.dtype), tuple(tensor.shape))
        for name, tensor in module.state_dict().items()
    }


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give all parameters the compute dtype, in place; buffers keep theirs.

    `Module.to` would round the router's correction bias and the rope frequencies, which stay fp32
    in every published model.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module


class CausalLMStep(nn.Module):
    """A stock `DeepseekV2ForCausalLM` or `DeepseekV3ForCausalLM` behind the step's signature.

    The two submodules keep their names, so parameters and traced module paths read as in the
    checkpoint (`model.layers.3.self_attn.kv_b_proj.weight`).

    transformers itself appends to a cache by concatenation and masks by row number: it knows no
    `lengths`. Left alone, the step is exact where `lengths[b] == P` for every b. With `ragged` the
    step brings its own cache, which writes at `lengths`, and its own mask, both as in
    `models/v3.py`; then sequences of different lengths share a batch, and every row of the
    signature means what it says. Either way the modelling code is stock.
    """

    def __init__(self, causal_lm: nn.Module, *, ragged: bool = False) -> None:
        super().__init__()
        self.model = cast(nn.Module, causal_lm.model)
        self.lm_head = cast(nn.Module, causal_lm.lm_head)
        self.ragged = ragged

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        logits_at: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            input_ids: new tokens, i64[B,S].
            positions: their positions, i64[B,S].
            lengths: tokens already cached, i64[B].
            logits_at: which of the S new tokens' logits are wanted, i64[B,L].
            past: latent [B,P,c] and rope key [B,P,r] of every layer.

        Returns:
            logits [B,L,vocab], then latent [B,P+S,c] and rope key [B,P+S,r] of every layer.
        """
        cache = _cache_of(past, lengths if self.ragged else None)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=visible(past[0], input_ids, lengths) if self.ragged else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        rows = logits_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        logits = self.lm_head(hidden.gather(1, rows))
        present = [part.squeeze(1) for layer in cache.layers for part in (layer.keys, layer.values)]
        return logits, *present


def _cache_of(past: Sequence[Tensor], lengths: Tensor | None) -> Any:
    """Flat caches [B,P,*] as a `DynamicCache` of pairs [B,1,P,*]: latent as key, rope as value.

    The layers are filled by hand: `DynamicLayer.update` would concatenate each past to an empty
    1-D tensor first, which is a node of noise a cache in the trace. With `lengths` they write at
    those rows instead of behind the last one.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class AppendingLayer(DynamicLayer):  # type: ignore[misc]
        keys: Tensor
        values: Tensor

        def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys, self.values = _append(self.keys, key), _append(self.values, value)
            return self.keys, self.values

    def _append(cache: Tensor, new: Tensor) -> Tensor:
        assert lengths is not None
        return append(cache.squeeze(1), new.squeeze(1), lengths).unsqueeze(1)

    cache = DynamicCache()
    for latent, rope in zip(past[0::2], past[1::2], strict=True):
        layer = DynamicLayer() if lengths is None else AppendingLayer()
        layer.dtype, layer.device, layer.is_initialized = latent.dtype, latent.device, True
        layer.keys, layer.values = latent.unsqueeze(1), rope.unsqueeze(1)
        cache.layers.append(layer)
    return cache
