"""Results of compiled code, laid out in memory as PyTorch's would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dsc.frontends import on_card
from dsc.frontends.on_card import device_of

if TYPE_CHECKING:
    from dsc.api import CompiledModel


def results(
    model: CompiledModel,
    names: Sequence[str],
    tensors: Sequence[Tensor],
    layouts: Mapping[str, Sequence[int] | None],
) -> list[Tensor]:
    """Run the only entry on inputs by position.

    `layouts` gives for each output the order of its axes in memory, outermost first; `None` where
    they lie as they are counted.
    """
    device = device_of(tensors)
    if device is not None:
        found = on_card.results(model, names, tensors, device)
    else:
        plain = (x.resolve_neg() if x.is_neg() else x for x in tensors)
        found = model.run(dict(zip(names, plain, strict=True)))
    return [
        found[name].contiguous() if dims is None else _laid_out(found[name], dims)
        for name, dims in layouts.items()
    ]


def _laid_out(x: Tensor, dims: Sequence[int]) -> Tensor:
    back = [0] * len(dims)
    for position, axis in enumerate(dims):
        back[axis] = position
    return x.permute(*dims).contiguous().permute(*back)
