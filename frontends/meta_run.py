"""Watch a module run once on the `meta` device, where a tensor has a shape and no data.

What is noted is every ATen operation with its operands, and the start and end of every member of a
`nn.ModuleList`. Operands are tensors known by identity, so the data flow is exact. A 671B model at
full depth runs 12k operations, in one and a half seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Irregular(Exception):
    """The model cannot be put together from single layers; it must be traced whole."""


@dataclass
class Event:
    """An operation, or the start or end of a member of a ModuleList (`place` = its index)."""

    what: str
    given: Any
    returned: Any
    place: int = -1


@dataclass
class Run:
    """What happened. Everything is kept, so that no two tensors ever have one identity.

    `lists` gives the length of every ModuleList of two members or more, outer ones first.
    """

    inputs: dict[str, Tensor]
    weights: dict[str, Tensor]
    lists: dict[str, int]
    events: list[Event] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()


class _Recorder(TorchDispatchMode):
    """Notes every ATen operation."""

    def __init__(self, run: Run) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        self.run.events.append(Event(str(func), (args, kwargs or {}), returned))
        return returned


def watch(module: nn.Module, inputs: Mapping[str, Tensor]) -> Run:
    """Run the module on tensors of the shapes of `inputs`, its positional arguments in order.

    Its own parameters and buffers are replaced for the run. Raises `Irregular` where the module
    needs data, as a branch on a value does.
    """
    weights = {
        name: torch.empty_like(tensor, device="meta", requires_grad=False)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    lists = {
        path: members
        for path, members in module.named_modules()
        if isinstance(members, nn.ModuleList) and len(members) > 1
    }
    run = Run(
        {name: tensor.to("meta") for name, tensor in inputs.items()},
        weights,
        {path: len(members) for path, members in lists.items()},
    )
    with ExitStack() as hooks, torch.no_grad():
        for path, members in lists.items():
            for index, member in enumerate(members):
                _note_calls(run, hooks, path, index, member)
        try:
            # Modelling code asks whether it is being exported, and does other things if so.
            from torch._export.utils import _compiling_state_context

            with _compiling_state_context(), _Recorder(run):
                arguments = tuple(run.inputs.values())
                results = torch.func.functional_call(module, weights, arguments)
        except Exception as problem:
            first = str(problem).partition("\n")[0]
            raise Irregular(f"does not run on meta: {type(problem).__name__}: {first}") from problem
    run.results = tuple(tensors_in(results))
    return run


def _note_calls(run: Run, hooks: ExitStack, path: str, index: int, member: nn.Module) -> None:
    def starts(_: nn.Module, args: Any, kwargs: Any) -> None:
        run.events.append(Event(f"start {path}", (args, kwargs), None, index))

    def ends(_: nn.Module, args: Any, kwargs: Any, returned: Any) -> None:
        run.events.append(Event(f"end {path}", None, returned, index))

    hooks.callback(member.register_forward_pre_hook(starts, with_kwargs=True).remove)
    hooks.callback(member.register_forward_hook(ends, with_kwargs=True).remove)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)
