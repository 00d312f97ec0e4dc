"""What each operator demands of the extents around it, for `shrink`.

The dim names of an operator's signature say most of it: equal names are equal extents. What they
cannot say, the declaration's trait `demand` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc.ir.dims import Dim, Sym, parse_dim, terms
from dsc.ir.extents import Extent, System
from dsc.ir.op import OpDef, lookup
from dsc.ir.sized import Shape, Sized


def dim_attrs(op: str, attrs: Mapping[str, Any]) -> list[str]:
    """The names of the given attributes that hold extents."""
    kinds = {a.name: a.kind for a in lookup(op).attrs}
    return [name for name in attrs if kinds.get(name) in ("dim", "dims", "extent")]


def demand(call: Sized) -> None:
    """State in the system what the operator of `call` demands."""
    definition = lookup(call.op)
    _by_signature(call, definition)
    if definition.traits.demand is not None:
        definition.traits.demand(call)
    elif any(o.pattern.dims == ("...",) for o in definition.operands):
        _by_value(call)


def _by_signature(call: Sized, definition: OpDef) -> None:
    """Equate the extents that one name of the signature stands for."""
    for name, value in call.attrs.items():
        if isinstance(value, int) and not isinstance(value, bool):
            call.dims[name] = call.extents.get(name, Extent.number(value))
    later: list[tuple[str, Extent]] = []
    patterns = {o.name: o.pattern.dims for o in definition.operands}
    pairs = [(patterns[name.partition("[")[0]], shape) for name, shape in call.ins.items()]
    pairs += zip((r.dims for r in definition.results), call.outs, strict=False)
    for dims, shape in pairs:
        if dims != ("...",):
            _name_dims(call, dims, shape, later)
    for operand, names in definition.without.items():
        if operand not in call:
            for name, text in names.items():
                extent = _expression(parse_dim(text), call.dims)
                assert extent is not None, f"{call.op}: {text} is not bound"
                call.system.equate(call.dims.setdefault(name, extent), extent)
    for text, extent in later:
        wanted = _expression(parse_dim(text), call.dims)
        if wanted is not None:
            call.system.equate(wanted, extent)


def _name_dims(
    call: Sized, dims: tuple[str, ...], shape: Shape, later: list[tuple[str, Extent]]
) -> None:
    star = next((i for i, d in enumerate(dims) if d.startswith("*")), None)
    if star is not None:
        end = len(shape) - (len(dims) - star - 1)
        middle = shape[star:end]
        call.same(call.dims.setdefault(dims[star], middle), middle)
        dims, shape = dims[:star] + dims[star + 1 :], shape[:star] + shape[end:]
    for text, extent in zip(dims, shape, strict=True):
        if not text.isidentifier():
            later.append((text, extent))
        else:
            call.system.equate(call.dims.setdefault(text, extent), extent)


def _expression(dim: Dim, named: Mapping[str, Any]) -> Extent | None:
    total = Extent.number(0)
    for monomial, coefficient in terms(dim).items():
        term = Extent.number(coefficient)
        for atom in monomial:
            if not isinstance(atom, str) or atom not in named:
                return None
            term = term * named[atom]
        total = total + term
    return total


def _by_value(call: Sized) -> None:
    """For an operator that nothing is known of: equal dims around it stay equal."""
    first: dict[Dim, Extent] = {}
    for t, shape in [*call.given(), *zip(call.results, call.outs, strict=True)]:
        for dim, extent in zip(t.shape, shape, strict=True):
            call.system.equate(first.setdefault(dim, extent), extent)


def sizes_of(value: Any, system: System, label: str = "") -> Any:
    """Extents for the dims of an attribute: one, or a list."""
    if isinstance(value, tuple):
        return [sizes_of(v, system, label) for v in value]
    assert isinstance(value, (int, Sym))
    return system.extent(value, label)
