"""Regions over CUDA tensors: triton's kernels on the caller's stream, over the tensors' own memory.

Nothing is copied and nobody waits: addresses and the stream are handed over, and results lie in
tensors of PyTorch's own allocator. What is not dense, does not begin at 16 bytes, or is a constant
on the CPU, is made so by PyTorch, on the same stream. Indices that are inputs are looked at on the
card, before the kernels that follow them: a wrong one ends the stream there, as one of PyTorch's
own does. What reads by an index that it computes is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsc.errors import InternalError, UnsupportedOperator
from dsc.frontends.options import BACKEND_OF_CARDS
from dsc.ir.graph import Graph
from dsc.ir.index_ranges import index_ranges
from dsc.ir.types import DType
from dsc.runtime.executable import IndexSpan, Queues
from dsc.targets import KNOWN

if TYPE_CHECKING:
    from dsc.compiled import CompiledModel

ALIGNMENT = 16
"""Bytes at whose multiples kernels expect tensors to begin."""


def device_of(tensors: Sequence[Any]) -> torch.device | None:
    """The card that tensors lie on; `None` where there is none."""
    return next((x.device for x in tensors if isinstance(x, Tensor) and x.is_cuda), None)


def reason_on_card(tensors: Sequence[Tensor], backend: str | None) -> str:
    """Why a graph over CUDA tensors cannot be compiled; empty where it can."""
    devices = {x.device for x in tensors if x.dim() or x.is_cuda}
    if len(devices) > 1:
        return f"its inputs are on several devices: {', '.join(sorted(map(str, devices)))}"
    if backend not in (None, BACKEND_OF_CARDS):
        return f"its inputs are on a GPU, and the {backend} backend runs on the CPU"
    device = devices.pop()
    if device.index:
        return f"its inputs are on {device}, and kernels run on the first GPU that is visible alone"
    target = target_of(device)
    if target.partition(":")[2] not in KNOWN["cuda"]:
        return f"its inputs are on a GPU of the kind {target}, for which dsc makes no code"
    return ""


def target_of(device: torch.device) -> str:
    """What code for a card is made for: `cuda:sm_90`."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:sm_{major}{minor}"


def stream_of(device: torch.device) -> int:
    """The caller's stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def check_indices(graph: Graph) -> None:
    """Raise `UnsupportedOperator` where a graph reads or writes by an index that it computes."""
    found = index_ranges(graph, {}).computed
    if found:
        raise UnsupportedOperator(
            "it reads by an index that it computes, which nobody looks at on the GPU before",
            places=[each.reader.loc for each in found],
        )


def results(
    model: CompiledModel, names: Sequence[str], tensors: Sequence[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Queue the only entry on the caller's stream; its outputs by name."""
    executable = model.executable
    if not isinstance(executable, Queues):
        raise InternalError(f"code for {device} was loaded for another device")
    given = {n: _placed(x, device) for n, x in zip(names, tensors, strict=True)}
    (entry,) = model.program.entries
    types = {n: (tuple(x.shape), DType.of(x.dtype)) for n, x in given.items()}
    env, wanted = executable.sizes(entry, types)
    for span in executable.indices(entry, env):
        _look(given[span.input], span)
    made = {n: _empty(shape, dtype, device) for n, (shape, dtype) in wanted.items()}
    addresses = {n: x.data_ptr() for n, x in (given | made).items()}
    executable.queue(entry, env, addresses, stream_of(device))
    return made


def _placed(x: Tensor, device: torch.device) -> Tensor:
    """A tensor as kernels take it."""
    x = (x.resolve_neg() if x.is_neg() else x).to(device).contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _look(x: Tensor, span: IndexSpan) -> None:
    """Queue a look at an index, which ends the stream where a value is outside."""
    inside = ((x >= span.least) & (x <= span.most)).all()
    if span.ascending:
        values = x.reshape(-1)
        inside = inside & (values[1:] >= values[:-1]).all()
    told = f"input {span.input}: each is {span.what}, {span.least} to {span.most} here"
    torch._assert_async(inside, told)


def _empty(shape: Sequence[int], dtype: DType, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype.torch, device=device)
