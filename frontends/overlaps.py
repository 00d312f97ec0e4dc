"""Inputs that share memory, and code that changes some of them in place.

AOTAutograd makes changes in place functional for the aliases among the inputs that it sees, and
nothing guards that other calls have the same ones. Besides, PyTorch refuses to change a tensor
whose elements share memory with each other or with what the same operator reads; a functional graph
has no such scruples. So who runs code that changes its inputs looks at their memory in every call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dsc.frontends.fx_import import hint

Shared: TypeAlias = frozenset[tuple[int, int, int, int]]
"""Two inputs that may share memory, their distance in bytes, the first one's place in its storage.

An input is listed with itself where its own elements may share memory.
"""
REFUSAL = "single memory location"
"""How PyTorch says that it refuses."""


def shared(inputs: Sequence[Any]) -> Shared:
    """Which inputs may share memory, as far as the ranges of bytes tell that they span."""
    tensors = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.numel()]
    spans = sorted((*_span(x), i) for i, x in tensors)
    found = {(i, i, 0, int(x.storage_offset())) for i, x in tensors if _repeats(x)}
    for position, (begin, end, i) in enumerate(spans):
        for other, _, j in spans[position + 1 :]:
            if other >= end:
                break
            found.add((i, j, other - begin, int(inputs[i].storage_offset())))
    return frozenset(found)


def is_refused(run: Callable[..., Any], inputs: Sequence[Any]) -> bool:
    """Whether PyTorch refuses to change these inputs in place, seen on a copy of their memory."""
    mine = copy.deepcopy([x.detach() if isinstance(x, Tensor) else hint(x) for x in inputs])
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            run(*mine)
    except RuntimeError as problem:
        return REFUSAL in str(problem)
    return False


def _span(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in memory, and that behind its last."""
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _repeats(x: Tensor) -> bool:
    """Whether elements of a tensor may lie in one place, as those of an expanded one do."""
    reach = 1
    for step, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1 and step < reach:
            return True
        reach += step * (n - 1)
    return False
