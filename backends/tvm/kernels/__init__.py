"""The kernels (README.md says which file does what), and the table from operator to lowering."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import cast

from dsc.backends.tvm.launch import Launch
from dsc.backends.tvm.machine import Machine
from dsc.ir.graph import Node
from dsc.ir.kernels import Cpp, Formula, Lowering
from dsc.ir.op import kernel_of, named
from dsc.ir.traits import Role

Lower = Callable[[Node, Machine], Launch]

LOWERINGS = {
    **dict.fromkeys(sorted(named(Role.POINTWISE, Role.REDUCTION, Role.ROTATION)), "region:lower"),
    "linear": "region:lower",
    "cache_write": "region:lower",
    "attention": "attention:lower",
    "mla_attention": "attention:lower_mla",
    "latent_attention": "attention:lower_latent",
    "route": "route:lower",
    "experts": "experts:lower",
    "dispatch": "grouped:lower_dispatch",
    "grouped_linear": "region:lower",
    "combine": "grouped:lower_combine",
    **dict.fromkeys(("permute", "expand", "slice", "split", "concat", "stack"), "movement:lower"),
    **dict.fromkeys(("take", "embedding", "select_rows"), "movement:lower_take"),
    "gather": "movement:lower_gather",
    "append": "movement:lower_append",
    "full": "movement:lower_full",
    "arange": "movement:lower_arange",
    **dict.fromkeys(("argmax", "cumsum", "topk"), "scans:lower"),
    "matmul": "contract:lower_matmul",
    "einsum": "contract:lower_einsum",
    "fused": "region:lower",
}
"""Operator to `module:function` in this package. Others have the kernel that they bring along."""


def lowering(op: str) -> Lower | None:
    """The function that lowers nodes of operator `op`, or `None`."""
    place = LOWERINGS.get(op)
    if place is not None:
        return _loaded(place)
    match kernel_of(op, "tvm"):
        case Formula():
            return _loaded("region:lower")
        case Cpp() as source:
            return partial(_loaded("cpp:lower"), source=source)
        case Lowering(function):
            return cast(Lower, function)
    return None


@cache
def _loaded(place: str) -> Callable[..., Launch]:
    module, _, name = place.partition(":")
    found: Callable[..., Launch] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
