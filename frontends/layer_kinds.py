"""Which decoder layers of a model are the same layer over other weights.

Two layers are of one kind when nothing that a tracer could see tells them apart:

- what they *are*: the same classes, parameter and buffer names, shapes and element types, and
  plain attributes (`eps`, a sliding window), all but `layer_idx`;
- what they *do*: the same operations in the same order, on their own weights, on the output of the
  layer before, on their own caches, or on the same shared values.

The second is watched, not read from source: the whole model runs once on meta (`meta_run.py`). So a
layer that divides by its own index, or that its parent hands another mask, is of another kind
although its attributes are equal. The run also finds the decoder stack by meaning: the
`nn.ModuleList` whose members run once each, in order, each on what the one before returned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsc.frontends.meta_run import Event, Irregular, Run, tensors_in, watch

CACHE = re.compile(r"(past|present)\.(\d+)\.(.+)")
"""How inputs and outputs of a step name the caches: `past.3.latent`, `present.3.rope`."""

INDEX = "layer_idx"
"""The attribute by which a transformers layer knows its place, and finds its cache."""

SEVERAL = -1
Key = tuple[Any, ...]
Token = tuple[Key, int | None]
"""What a tensor is, and the one layer it belongs to (`None`: to all, `SEVERAL`: to no single)."""


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a module: `path` of the ModuleList, and the kind of every layer.

    Kinds count up in order of first use. The first layer is always of its own: it reads the
    embedding, and only a later layer shows how one reads another. Three dense layers and three
    MoE layers are (0, 1, 1, 2, 2, 2). `behaviour` holds a digest of what each layer does, `tail`
    one of what is done with the last one's result.
    """

    path: str
    kinds: tuple[int, ...]
    behaviour: tuple[str, ...]
    tail: str

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first layer of each kind."""
        return tuple(self.kinds.index(kind) for kind in range(max(self.kinds) + 1))


def layer_kinds(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> LayerStack:
    """Find the decoder stack of `module` and the kind of each layer.

    `inputs` are those of one step at full depth; only their shapes and element types matter.
    Raises `Irregular` where there is no such stack or the module cannot run on `meta`.
    """
    run = watch(module, dict(zip(input_names, inputs, strict=True)))
    if len(run.results) != len(output_names):
        raise Irregular(f"{len(run.results)} outputs for {len(output_names)} names")
    path, taken, given = _chained(run)
    layers = module.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    behaviour, tail = _Behaviour(path, taken, given, run).digests(len(layers), output_names)
    seen: dict[Any, int] = {}
    kinds = [
        seen.setdefault((index == 0, _structure(layer), done), len(seen))
        for index, (layer, done) in enumerate(zip(layers, behaviour, strict=True))
    ]
    return LayerStack(path, tuple(kinds), behaviour, tail)


# What a layer is.


def _structure(layer: nn.Module) -> tuple[Any, ...]:
    """Classes, parameters, buffers and plain attributes of a layer and all inside it."""
    found = []
    for name, part in layer.named_modules():
        state = dict(vars(part))
        tensors = [
            (kind, key, None if t is None else (t.dtype, tuple(t.shape), t.requires_grad))
            for kind in ("_parameters", "_buffers")
            for key, t in state.pop(kind).items()
        ]
        state.pop("_modules")
        state.pop(INDEX, None)
        plain = tuple((key, _plain(value)) for key, value in sorted(state.items()))
        found.append((name, type(part), tuple(tensors), plain))
    return tuple(found)


def _plain(value: Any) -> Any:
    """An attribute as a key: by value where that is safe, else by identity."""
    if isinstance(value, (bool, int, float, str, bytes, torch.dtype, type(None))):
        return type(value), repr(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_plain(v) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(repr, map(_plain, value))))
    if isinstance(value, Mapping):
        return type(value), tuple((repr(k), _plain(v)) for k, v in value.items())
    if isinstance(value, partial):
        return partial, tuple(map(_plain, (value.func, value.args, value.keywords)))
    return type(value), id(value)


# What a layer does.


def _chained(run: Run) -> tuple[str, int, int]:
    """The outermost list whose members chain; which argument takes, which result gives the chain.

    Arguments and results are counted as tensors, in order.
    """
    for path, count in run.lists.items():
        calls = [e for e in run.events if e.what in (f"start {path}", f"end {path}")]
        order = [(e.what.partition(" ")[0], e.place) for e in calls]
        if order != [(what, k) for k in range(count) for what in ("start", "end")]:
            continue
        links = [
            {
                (taken, given)
                for taken, argument in enumerate(tensors_in(after.given))
                for given, result in enumerate(tensors_in(before.returned))
                if argument is result
            }
            for before, after in zip(calls[1:-1:2], calls[2::2], strict=True)
        ]
        if common := set.intersection(*links):
            return path, *min(common)
    raise Irregular("no list of modules whose outputs chain")


class _Behaviour:
    """Turns the events of a run into one digest a layer, equal for layers that do the same.

    Every tensor gets a token: what it is, and the layer it belongs to. A layer's own weights,
    caches and intermediate values look alike in all layers, shared values are one and the same. A
    layer that reads what belongs to another one, its stream apart, is `Irregular`.
    """

    def __init__(self, path: str, taken: int, given: int, run: Run) -> None:
        self.run, self.taken, self.given = run, taken, given
        self.start, self.end = f"start {path}", f"end {path}"
        own_weight = re.compile(re.escape(path) + r"\.(\d+)\.(.+)")
        self.tokens: dict[int, Token] = {}
        for name, tensor in run.inputs.items():
            cache = CACHE.fullmatch(name)
            shared: Token = ("input", name), None
            self.tokens[id(tensor)] = (("past", cache[3]), int(cache[2])) if cache else shared
        for name, tensor in run.weights.items():
            own = own_weight.fullmatch(name)
            shared = ("weight", name), None
            self.tokens[id(tensor)] = (("weight", own[2]), int(own[1])) if own else shared

    def digests(self, count: int, output_names: Sequence[str]) -> tuple[tuple[str, ...], str]:
        """What each layer does, with what its caches become; what the other outputs are."""
        digests = [hashlib.sha256() for _ in range(count)]
        layer: int | None = None
        steps = 0
        for number, event in enumerate(self.run.events):
            if event.what == self.start:
                layer, steps = event.place, 0
                self.tokens[id(list(tensors_in(event.given))[self.taken])] = ("stream",), layer
            elif event.what == self.end:
                digests[event.place].update(repr(self._seen(event.returned, event.place)).encode())
                self.tokens[id(list(tensors_in(event.returned))[self.given])] = ("tail",), layer
                layer = None
            elif event.what.startswith(("start ", "end ")):
                continue
            elif layer is None:
                self._outside(number, event)
            else:
                done = event.what, self._seen(event.given, layer)
                self._made(event, ("made", steps), layer)
                digests[layer].update(repr((done, self._seen(event.returned, layer))).encode())
                steps += 1
        others = []
        for name, tensor in zip(output_names, self.run.results, strict=True):
            key, owner = self._token(tensor)
            if cache := CACHE.fullmatch(name):
                grown = cache[3], self._seen(tensor, int(cache[2]))
                digests[int(cache[2])].update(repr(grown).encode())
            elif owner is not None and (key[0] != "tail" or owner != count - 1):
                raise Irregular(f"{name} reads more of a layer than its result")
            else:
                others.append((name, self._seen(tensor, owner)))
        return tuple(digest.hexdigest() for digest in digests), _digest(others)

    def _outside(self, number: int, event: Event) -> None:
        """An operation outside all layers: its results belong to the layer that it reads from."""
        read = [self._token(t) for t in tensors_in(event.given)]
        owners = {owner for _, owner in read} - {None} or {None}
        if len(owners) > 1:
            self._made(event, ("mixed", number), SEVERAL)
            return
        (owner,) = owners
        is_tail = all(key[0] == "tail" for key, reads in read if reads is not None)
        kind = "shared" if owner is None else "tail" if is_tail else "beside"
        self._made(event, (kind, _digest(event.what, self._seen(event.given, owner))), owner)

    def _made(self, event: Event, key: Key, owner: int | None) -> None:
        for index, tensor in enumerate(tensors_in(event.returned)):
            self.tokens[id(tensor)] = (*key, index), owner

    def _token(self, tensor: Tensor) -> Token:
        known = self.tokens.get(id(tensor))
        if known is not None:
            return known
        if tensor.device.type == "meta":
            raise Irregular("a layer reads a tensor of unknown origin")
        return ("constant", repr(tensor.tolist())), None

    def _seen(self, given: Any, layer: int | None) -> Any:
        """Arguments as a layer sees them: tensors by token, the rest by value."""
        if isinstance(given, Tensor):
            key, owner = self._token(given)
            if owner not in (None, layer):
                raise Irregular(f"layer {layer} reads what belongs to layer {owner}: {key}")
            return owner is None, key, str(given.dtype), tuple(given.shape)
        if isinstance(given, (list, tuple)):
            return [self._seen(x, layer) for x in given]
        if isinstance(given, Mapping):
            return [(str(k), self._seen(x, layer)) for k, x in given.items()]
        if isinstance(given, (bool, int, float, str, type(None), *_ATEN_CONSTANTS)):
            return type(given).__name__, repr(given)
        return type(given).__name__


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


_ATEN_CONSTANTS = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex)
