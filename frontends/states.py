"""Which states a stock model keeps between steps: found by running it, not declared.

A model runs twice on `meta` with a cache of its own kind, for 2 sequences of 3 tokens and for 3 of
13 in two steps, and the tensors that its cache layers hold then are compared: the axis that went
from 2 to 3 is the batch, the one that went from 3 to 13 counts tokens, the others are widths. That
takes a second and knows no model by name: keys and values of any heads, the latents of MLA, the
keys of an indexer, states of convolutions and recurrences, layers that share what another keeps.

Sliding layers crop what they keep. Here they keep all rows, since the mask holds the window. What
grows by a rule of its own is refused.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dsc.errors import UnsupportedArchitecture
from dsc.frontends.registries import replaced
from dsc.frontends.signature import LayerState, Signature
from dsc.frontends.stock import HINT
from dsc.ir.limits import BATCH, PAST
from dsc.ir.types import DType

NAMES = {"keys": "key", "values": "value", "indexer_keys": "indexer_key"}
"""What a tensor of a cache layer is called in a step's signature; others keep their own names."""
_RUNS = ((2, (3,)), (3, (4, 9)))
"""Sequences, and the tokens of each step; 13 tokens in the end are no multiple of 2, 3 or 4."""
Grow = Callable[[Tensor | None, Tensor], Tensor]
"""Rows [B,P,w] of the past, if there are any, and new ones [B,S,w], as rows [B,P+S,w]."""


MISSING = {
    "indexer": "it attends to what an indexer chooses of the past",
    "conv": "its layers carry states of convolutions and recurrences",
    "recurrent": "its layers carry recurrent states",
}
"""Why dsc cannot run a decoder, by how the names of such states begin."""


def signature_of(module: nn.Module) -> Signature:
    """The signature of a stock causal LM.

    Raises `UnsupportedArchitecture` as `discover` does, and for states that are no keys and values.
    """
    config: Any = module.config
    states = discover(module)
    for s in states:
        if s.part not in ("keys", "values") or not s.per_token:
            kind = re.split(r"[_\[]", s.part)[0]
            why = MISSING.get(kind, f"its layers keep {s.part}")
            raise UnsupportedArchitecture(
                f"{type(module).__name__}: {why}, which dsc does not compute",
                f"layer {s.layer}",
                HINT,
            )
    return Signature(states, config.vocab_size)


def discover(module: nn.Module) -> tuple[LayerState, ...]:
    """What each layer of a stock causal LM keeps, in order of layers.

    Raises:
        UnsupportedArchitecture: it keeps nothing, or something whose growth is no row a token, or
            does not run as a decoder of tokens alone.
    """
    first, second = (_run(module, batch, steps) for batch, steps in _RUNS)
    found = []
    for index, (short, long) in enumerate(zip(first, second, strict=True)):
        before, after = dict(_tensors(short)), dict(_tensors(long))
        if before.keys() != after.keys():
            raise UnsupportedArchitecture(
                f"layer {index} of {type(module).__name__} keeps {_listed(after.keys())} by a rule"
                " of its own, which dsc does not know",
                hint=HINT,
            )
        found += [
            _state(module, index, long, part, before[part], after[part])
            for part in after
            if after[part].dim()
        ]
    if not found:
        raise UnsupportedArchitecture(
            f"{type(module).__name__} returns no cache of earlier tokens: it is no decoder that"
            " dsc can run step by step",
            hint=HINT,
        )
    return tuple(_named(module, found))


def _state(
    module: nn.Module, index: int, layer: Any, part: str, short: Tensor, long: Tensor
) -> LayerState:
    """A tensor that a layer keeps, from what it was after either run."""
    (few, steps), (many, longer) = _RUNS
    batch, tokens = (few, many), (sum(steps), sum(longer))
    shape: list[int | str] = []
    for sizes in zip(short.shape, long.shape, strict=True):
        if sizes == batch and BATCH not in shape:
            shape.append(BATCH)
        elif sizes == tokens:
            shape.append(PAST)
        elif sizes[0] == sizes[1]:
            shape.append(sizes[0])
        else:
            raise UnsupportedArchitecture(
                f"layer {index} of {type(module).__name__} keeps {part} of {sizes[0]} and"
                f" {sizes[1]} entries after {tokens[0]} and {tokens[1]} tokens: a rule of its own,"
                " which dsc does not know",
                hint=HINT,
            )
    heads = getattr(layer, "heads", {}).get(part, 0)
    dtype = DType.of(long.dtype)
    return LayerState(index, NAMES.get(part, part), part, tuple(shape), dtype, heads)


def _named(module: nn.Module, states: Sequence[LayerState]) -> Iterator[LayerState]:
    """Keys and values of one head that are a latent and its rope key are called so."""
    config: Any = module.config
    pair = [getattr(config, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim")]
    widths: dict[int, dict[str, Any]] = {}
    for s in states:
        widths.setdefault(s.layer, {})[s.part] = s.shape[-1] if s.heads == 1 else None
    for s in states:
        own = widths[s.layer]
        latent = None not in pair and [own.get("keys"), own.get("values")] == pair
        called = {"keys": "latent", "values": "rope"}.get(s.part) if latent else None
        yield replace(s, name=called) if called else s


def _run(module: nn.Module, batch: int, steps: Sequence[int]) -> list[Any]:
    """The cache layers of a model on `meta` after some steps. Raises `UnsupportedArchitecture`."""
    named = (*module.named_parameters(), *module.named_buffers())
    weights = {name: torch.empty_like(t, device="meta") for name, t in named}
    start = 0
    cache = own_cache(module.config, _after)
    try:
        with untouched(module), torch.no_grad(), replaced(), torch.device("meta"):
            for new in steps:
                arguments = {
                    "input_ids": torch.empty(batch, new, dtype=torch.int64),
                    **positions_for(module, torch.arange(start, start + new).expand(batch, new)),
                    cache_argument(module): cache,
                    "use_cache": True,
                }
                torch.func.functional_call(module, weights, (), arguments)
                start += new
    except UnsupportedArchitecture:
        raise
    except Exception as problem:
        first = str(problem).strip().partition("\n")[0]
        why = f"does not run as a decoder of tokens with a cache: {first:.200}"
        if any(hasattr(layer, "conv_states") for layer in cache.layers):
            why = f"cannot be compiled: {MISSING['conv']}, which dsc does not compute"
        elif isinstance(problem, NotImplementedError):
            why = "cannot be compiled: what it computes depends on values, not on sizes alone"
        raise UnsupportedArchitecture(f"{type(module).__name__} {why}", hint=HINT) from problem
    return list(cache.layers)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Take back what a run leaves in a module: attributes that are tensors of another device."""
    before = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)


def _after(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], dim=1)


def cache_argument(module: nn.Module) -> str:
    """What a causal LM calls the cache that it takes."""
    names = inspect.signature(module.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


def positions_for(module: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """Positions, for a model that takes them."""
    takes = inspect.signature(module.forward).parameters
    return {"position_ids": positions} if "position_ids" in takes else {}


def own_cache(config: Any, grow: Grow) -> Any:
    """A stock cache for this configuration whose layers keep all rows, as `grow` adds them.

    The classes of the layers stay, since modelling code asks for them. Raises
    `UnsupportedArchitecture` for a layer that adds rows in a way of its own.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            _keep_all(layer, grow)
    return cache


def _keep_all(layer: Any, grow: Grow) -> None:
    """Have a cache layer add rows by `grow`; `rows` then holds its keys and values as rows.

    `heads` says in how many heads the rows of each are seen.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if type(layer).update not in (DynamicLayer.update, DynamicSlidingWindowLayer.update):
        raise UnsupportedArchitecture(
            f"{type(layer).__name__} adds to its cache in a way of its own, unknown to dsc",
            hint=HINT,
        )
    layer.rows, layer.heads = {}, {}

    def update(keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        layer.is_initialized = True
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.heads = {"keys": keys.shape[1], "values": values.shape[1]}
        for part, new in (("keys", keys), ("values", values)):
            layer.rows[part] = grow(layer.rows.get(part), rows_of(new))
        layer.keys, layer.values = (
            heads_of(layer.rows[part], layer.heads[part]) for part in ("keys", "values")
        )
        return layer.keys, layer.values

    def cached() -> int:
        return layer.rows["keys"].shape[1] if layer.rows else 0

    layer.update = update
    layer.get_seq_length = cached
    layer.get_mask_sizes = lambda new: (cached() + new, 0)


def rows_of(x: Tensor) -> Tensor:
    """Keys or values of heads [B,H,S,d] as rows [B,S,H*d]."""
    return x.squeeze(1) if x.shape[1] == 1 else x.transpose(1, 2).flatten(2)


def heads_of(rows: Tensor, heads: int) -> Tensor:
    """Rows [B,T,H*d] seen as heads [B,H,T,d]."""
    if heads == 1:
        return rows.unsqueeze(1)
    split: Tensor = rows.unflatten(2, (heads, rows.shape[2] // heads))
    return split.transpose(1, 2)


def _tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """What a cache layer holds: keys and values as rows, all else as it stands."""
    state = dict(vars(layer))
    rows = state.pop("rows", {})
    yield from rows.items()
    for name, value in state.items():
        if name.startswith("_") or (name in NAMES and name in rows):
            continue
        if isinstance(value, Tensor):
            yield name, value
        items = value.items() if isinstance(value, dict) else ()
        yield from ((f"{name}[{key}]", t) for key, t in items if isinstance(t, Tensor))


def _listed(parts: Any) -> str:
    return ", ".join(re.sub(r"_", " ", str(part)) for part in parts) or "nothing"
