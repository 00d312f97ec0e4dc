"""Masks, attention and experts of stock modelling code, as the tracer wants them.

transformers looks all three up by name in registries. While a step runs, the entries that stock
models ask for are ours, and what was there comes back after it:

* a mask says which cache rows a token sees: the model's own function of batch, head, query and row
  (causal, a window, chunks, ALiBi's too), asked at the row `lengths[b] + s` that token s is
  written to. So sequences of different lengths share a batch;
* attention keeps grouped heads grouped. Softcaps and sinks are written out, since no operator of
  torch knows them;
* experts multiply the weights that each token chose, which holds for any width, takes biases and
  any gate, and looks at no data.

The names stay (`sdpa`, `eager`, `grouped_mm`, ...): modelling code branches on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dsc.errors import UnsupportedArchitecture
from dsc.frontends.stock import ATTENTION, EXPERTS


@contextmanager
def replaced(lengths: Tensor | None = None) -> Iterator[None]:
    """Have stock models take our masks, attention and experts.

    `lengths` i64[B] are the rows that each sequence has cached; without them rows are counted as
    transformers counts them, from the first one of the cache that is not there yet.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = _Masks(lengths)
    with ExitStack() as stack:
        for registry, entries in (
            (ALL_MASK_ATTENTION_FUNCTIONS, {ATTENTION: masks.shown, "eager": masks.added}),
            (ALL_ATTENTION_FUNCTIONS, {ATTENTION: masks.attention, "eager": masks.attention}),
            (ALL_EXPERTS_FUNCTIONS, dict.fromkeys((EXPERTS, "batched_mm", "eager"), experts)),
        ):
            stack.enter_context(_overlaid(registry, entries))
        yield


@contextmanager
def _overlaid(registry: Any, entries: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put entries over those that all instances of a registry share, and what was there back."""
    shared: dict[str, Any] = type(registry)._global_mapping
    before = dict(shared)
    shared.update(entries)
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)


class _Masks:
    """The masks of one step, and attention under them."""

    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths = lengths
        self.added_of: list[tuple[Tensor, Tensor]] = []
        """Masks of numbers that were given out, and what they show."""

    def shown(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Tensor] | None = None,
        device: Any = "cpu",
        **_: Any,
    ) -> Tensor:
        """Which of `kv_length` rows each of the new tokens sees, bool [B,1,S,T]."""
        assert mask_function is not None, "transformers gives the pattern of every mask"
        batch = torch.arange(batch_size, device=device)[:, None, None, None]
        head = torch.arange(1, device=device)[None, :, None, None]
        new = torch.arange(q_length, device=device)
        if self.lengths is None:
            _check_causal(mask_function)
            own_row = (new + q_offset).expand(batch_size, q_length)
        else:
            own_row = self.lengths.unsqueeze(-1) + new
        rows = torch.arange(kv_length, device=device)[None, None, None, :] + kv_offset
        mask = mask_function(batch, head, own_row[:, None, :, None], rows)
        return mask.expand(batch_size, 1, q_length, kv_length)

    def added(self, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
        """The same mask as numbers to add, for code that adds them itself."""
        mask = self.shown(*args, **kwargs)
        nothing = torch.zeros((), dtype=dtype, device=mask.device)
        numbers = torch.where(mask, nothing, torch.finfo(dtype).min)
        self.added_of.append((numbers, mask))
        return numbers

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention of queries [B,H,S,d] to keys [B,G,T,d] and values [B,G,T,v], as [B,S,H,v].

        `softcap` bounds scores by tanh (Gemma 2), `s_aux` are logits of sinks, one a head, which
        take weight and give nothing (gpt-oss); `position_bias` is added to the scores (ALiBi).
        """
        mask = next((m for added, m in self.added_of if added is attention_mask), attention_mask)
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is None and s_aux is None:
            if position_bias is not None:
                mask = _biased(position_bias, mask)
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        else:
            out = spelled_out(query, key, value, mask, scale, softcap, s_aux, position_bias)
        return out.transpose(1, 2).contiguous(), None


def _check_causal(mask_function: Callable[..., Tensor]) -> None:
    """Raise `UnsupportedArchitecture` for a pattern that shows token 0 a later one."""
    first, later = (torch.full((1, 1, 1, 1), row, device="cpu") for row in (0, 1))
    try:
        sees = mask_function(first, first, first, later)
    except (IndexError, RuntimeError):
        return  # it reads tensors of its own
    if not sees.is_meta and bool(sees.any()):
        raise UnsupportedArchitecture("its tokens see later ones: it is an encoder, no decoder")


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A mask of numbers: the bias where something is seen."""
    if mask is None:
        return bias
    if mask.dtype != torch.bool:
        return bias + mask
    return torch.where(mask, bias, torch.finfo(bias.dtype).min)


def spelled_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention with a softcap or sinks, softmax in fp32: [B,H,S,v]."""
    groups = key.shape[1]
    grouped = query.unflatten(1, (groups, query.shape[1] // groups))
    scores = torch.einsum("bgrsd,bgtd->bgrst", grouped, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.unflatten(1, (groups, -1))
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask.unsqueeze(1), scores, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.unsqueeze(1)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores.float(), -1)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.einsum("bgrst,bgtv->bgrsv", weights.to(value.dtype), value).flatten(1, 2)


def experts(module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What the chosen experts make of tokens x [N,h], summed by weights [N,k]: [N,h].

    `module` is a stock experts class: stacked weights `[E,rows,columns]`, or `is_transposed`
    `[E,columns,rows]`, with `has_bias`, with its own gate between the two products.
    """
    tokens, chosen = index.shape
    flat = index.reshape(-1)
    repeated = x.unsqueeze(1).expand(tokens, chosen, x.shape[-1]).reshape(-1, x.shape[-1])
    name = "gate_up_proj" if module.has_gate else "up_proj"
    hidden = _chosen_linear(module, name, repeated, flat)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    out = _chosen_linear(module, "down_proj", hidden, flat)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * weights.reshape(-1).unsqueeze(-1)
    return out.reshape(tokens, chosen, out.shape[-1]).sum(1).to(x.dtype)


def _chosen_linear(module: Any, name: str, x: Tensor, index: Tensor) -> Tensor:
    """Row r of x [R,i] times the weights of expert `index[r]`: [R,o]."""
    weights = getattr(module, name)[index]
    if not module.is_transposed:
        weights = weights.transpose(1, 2)
    out = torch.bmm(x.unsqueeze(1), weights).squeeze(1)
    if module.has_bias:
        out = out + getattr(module, name + "_bias")[index]
    return out
