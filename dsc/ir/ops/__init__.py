"""All operators, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from dsc.ir.op import OpDef
from dsc.ir.ops import cache, comm, core, moe, nn, pointwise, quant, sample, shape, traced


def _collect(*families: ModuleType) -> Mapping[str, OpDef]:
    found: dict[str, OpDef] = {}
    for family in families:
        for value in vars(family).values():
            if isinstance(value, OpDef):
                found[value.name] = value
    return MappingProxyType(found)


FAMILIES: Mapping[str, ModuleType] = MappingProxyType(
    {
        "pointwise": pointwise,
        "shape": shape,
        "core": core,
        "nn": nn,
        "cache": cache,
        "moe": moe,
        "sample": sample,
        "quant": quant,
        "comm": comm,
        "traced": traced,
    }
)
OPERATORS: Mapping[str, OpDef] = _collect(*FAMILIES.values())
