"""Every layout with every fault of its scales and groups: one error that names a tensor or key."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from bench.quantised_folders import LAYOUTS, Tensors
from dsc.errors import CheckpointError, ConfigError
from dsc.frontends.checked import CheckedSource
from dsc.frontends.names import map_weights
from dsc.ir.arrays import Array, tensor_of
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate
from tests.family import facts
from tests.frontends.test_codes import of_one_weight

SHAPE = (8, 64)
SCALES = ("weight_scale", "weight_scale_inv", "scales")


def read(tensors: Tensors, quantization: dict[str, Any]) -> Any:
    """The numbers of a weight w.weight, as a compile reads them."""
    source = DictSource({f"w.{name}": tensor_of(part.copy()) for name, part in tensors.items()})
    config = facts(quantization_config=quantization)
    mapped = map_weights({"w.weight": TensorType(DType.f32, SHAPE)}, source, config)
    return evaluate(mapped.weights["w.weight"], CheckedSource(source, mapped.checks))


def scales_of(tensors: Tensors) -> str:
    return next(name for name in SCALES if name in tensors)


def filled(value: float) -> Callable[[Array], Array]:
    """One scale, the last, is another number."""

    def damaged(scales: Array) -> Array:
        made = scales.copy()
        made.reshape(-1)[-1] = value
        return made

    return damaged


FAULTS: dict[str, Callable[[Array], Array | None]] = {
    "NaN": filled(np.nan),
    "infinite": filled(np.inf),
    "minus infinity": filled(-np.inf),
    "one row more": lambda x: np.resize(x, (x.shape[0] + 1, *x.shape[1:])),
    "another axis": lambda x: np.resize(x, (3, *x.shape)),
    "none at all": lambda x: x[:0],
    "whole numbers": lambda x: np.ones(x.shape, np.int32),
    "missing": lambda x: None,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fault_of_scales_is_an_error_that_names_them(layout: str, fault: str) -> None:
    tensors, quantization = of_one_weight(layout)
    read(tensors, quantization)
    key = scales_of(tensors)
    damaged = FAULTS[fault](tensors.pop(key))
    if damaged is not None:
        tensors[key] = damaged
    with pytest.raises(CheckpointError, match=rf"w\.{key}\b"):
        read(tensors, quantization)


@pytest.mark.parametrize("value", [0.0, -0.25])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_of_zero_or_below_is_a_number_that_multiplies(layout: str, value: float) -> None:
    tensors, quantization = of_one_weight(layout)
    key = scales_of(tensors)
    signs = []
    for scale in (0.25, value):
        tensors[key] = filled(scale)(tensors[key])
        signs.append(read(tensors, quantization)[-1, -1].item())
    assert signs[1] == signs[0] * value / 0.25


def keys_of_groups(told: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a quantization_config says a group's or a block's size."""
    for name, below in told.items() if isinstance(told, dict) else ():
        if name in ("group_size", "weight_block_size", "block_structure"):
            yield (*path, name)
        yield from keys_of_groups(below, (*path, name))


ABSURD = (0, -3, 1, 7, 48, 65, 10**12)
"""Of 64 columns: no size, less, one (other scales), those that do not divide them, more."""
SIZED = [n for n, each in LAYOUTS.items() if [*keys_of_groups({"": of_one_weight(n)[1]})]]


@pytest.mark.parametrize("size", ABSURD)
@pytest.mark.parametrize("layout", SIZED)
def test_a_size_of_groups_that_fits_nothing_is_an_error(layout: str, size: int) -> None:
    tensors, quantization = of_one_weight(layout)
    for *path, last in keys_of_groups(quantization):
        section = quantization
        for name in path:
            section = section[name]
        blocks = isinstance(section[last], list)
        if blocks and size > 0:
            return  # one scale is that of all of a weight, whatever blocks others have
        section[last] = [size, size] if blocks else size
    with pytest.raises((CheckpointError, ConfigError), match=r"w\.|group_size|block"):
        read(tensors, quantization)
