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
from dsc.ir.op import added, kernel_of, traits_of
from dsc.ir.traits import Role

Lower = Callable[[Node, Machine], Launch]

ALONG_ROWS = (
    "amax",
    "amin",
    "mean",
    "sum",
    "rms_norm",
    "layer_norm",
    "softmax",
    "rope",
    "cache_write",
)
"""Operators that a region over rows has a formula for, beside pointwise ones."""
LOWERINGS = {
    **dict.fromkeys(ALONG_ROWS, "region:lower"),
    "linear": "region:lower",
    "attention": "grouped_attention:lower",
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
"""Operator to `module:function` in this package, but for the pointwise ones of dsc."""
CODED = {"cache_write": "coded_cache:lower_write"}
"""The same for operators over a cache in a format, where those are kernels of their own."""


def lowering(op: str, coded: bool = False) -> Lower | None:
    """The function that lowers nodes of operator `op`, or `None`; `coded`: over a coded cache."""
    pointwise = traits_of(op).role is Role.POINTWISE
    match kernel_of(op, "tvm"):
        case Formula() if pointwise:
            return _loaded("region:lower")
        case Cpp() as source:
            return partial(_loaded("cpp:lower"), source=source)
        case Lowering(function):
            return cast(Lower, function)
    own = pointwise and op not in added()
    place = "region:lower" if own else LOWERINGS.get(op)
    place = CODED.get(op, place) if coded else place
    return None if place is None else _loaded(place)


@cache
def _loaded(place: str) -> Callable[..., Launch]:
    module, _, name = place.partition(":")
    found: Callable[..., Launch] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found
