"""The products that quantising changes: what is kept, or not, as one.

A weight may be read by several products, and a product may read several weights, as experts do: a
kernel takes all of its weights in codes or none. So weights that some product reads together stay
together, and what belongs to them all is one `Product`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import cast

from dsc.ir.graph import Node, Weight
from dsc.ir.program import Program
from dsc.ir.weights import Source, WeightExpr, sources

SHOWN = 3
"""Modules that the name of a product lists, at most."""


@dataclass(frozen=True)
class Product:
    """Weights that quantising turns into `codes`, and the patterns of `keep` that keep them.

    `stored` are their expressions in the format. `nbytes` is what they take so, `plain_bytes` as
    they were, in `plain`. `finer` is the same in more bits, where there is such.
    """

    name: str
    keep: tuple[str, ...]
    codes: tuple[str, ...]
    stored: Mapping[str, WeightExpr]
    elements: int
    nbytes: int
    plain_bytes: int
    plain: str = ""
    finer: Product | None = None


def with_finer(products: Iterable[Product], finer: Iterable[Product]) -> list[Product]:
    """The products, each with the one over the same weights in more bits."""
    known = {frozenset(each.stored): each for each in finer}

    def paired(product: Product) -> Product:
        other = known.get(frozenset(product.stored))
        between = other is not None and product.nbytes < other.nbytes < product.plain_bytes
        return replace(product, finer=other) if between else product

    return list(map(paired, products))


def find_products(before: Program, after: Program) -> list[Product]:
    """What quantising made of a program's weights, in the order in which entries read them."""
    stored = {
        name: expr.args[0] for name, expr in after.weights.items()
        if expr is not before.weights[name] and not isinstance(expr, Source)
    }  # fmt: skip
    groups: dict[str, list[str]] = {}
    for node in (node for graph in before.entries.values() for node in graph.nodes):
        together = weights_of(node, stored)
        merged = list(dict.fromkeys(n for x in together for n in groups.get(x, [x])))
        groups |= dict.fromkeys(merged, merged)
    keys = {name: _keys(name, before.weights[name]) for name in stored}
    found = {id(names): names for names in groups.values()}.values()
    return [_product(before, names, stored, keys) for names in found]


def weights_of(node: Node, among: Mapping[str, object]) -> list[str]:
    """Which of some weights a node reads."""
    return [x.name for x in node.operands if isinstance(x, Weight) and x.name in among]


def _product(
    program: Program,
    names: list[str],
    stored: Mapping[str, WeightExpr],
    keys: Mapping[str, list[str]],
) -> Product:
    own = [key for name in names for key in keys[name]]
    plain = [program.weights[name].type for name in names]
    kinds = [stored[name].type for name in names]
    return Product(
        name=called(own),
        keep=_patterns(names, keys),
        codes=tuple(dict.fromkeys(str(t.dtype) for t in kinds)),
        stored={name: stored[name] for name in names},
        elements=sum(cast(int, t.numel) for t in plain),
        nbytes=sum(cast(int, t.nbytes) for t in kinds),
        plain_bytes=sum(cast(int, t.nbytes) for t in plain),
        plain=" ".join(dict.fromkeys(str(t.dtype) for t in plain)),
    )


def called(keys: Iterable[str]) -> str:
    """What the modules of some tensors are called together.

    >>> called(["a.q.weight", "a.k.weight"]), called(["m.0.up", "m.1.up"]), called(["head.weight"])
    ('a.{q,k}', 'm', 'head')
    """
    paths = [_path(key) for key in keys]
    shared = _shared(paths)
    rest = list(dict.fromkeys(path[len(shared)] for path in paths if len(path) > len(shared)))
    base = ".".join(shared)
    if not rest or (base and all(part.isdigit() for part in rest)):
        return base
    shown = ",".join([*rest[:SHOWN], *("…" for _ in rest[SHOWN : SHOWN + 1])])
    inner = shown if len(rest) == 1 else f"{{{shown}}}"
    return f"{base}.{inner}" if base else inner


def _patterns(names: list[str], keys: Mapping[str, list[str]]) -> tuple[str, ...]:
    """What keeps these weights and no other: their module, or a tensor of each."""
    own = [key for name in names for key in keys[name]]
    module = ".".join(_shared([_path(key) for key in own]))
    others = (key for name, each in keys.items() if name not in names for key in (name, *each))
    if module and not any(key == module or key.startswith(f"{module}.") for key in others):
        return (module,)
    return tuple(keys[name][0] for name in names)


def _keys(name: str, expr: WeightExpr) -> list[str]:
    return [source.key for source in sources(expr)] or [name]


def _path(key: str) -> list[str]:
    return key.removesuffix(".weight").split(".")


def _shared(paths: list[list[str]]) -> list[str]:
    """The beginning that all paths have."""
    columns = zip(*paths, strict=False)
    return [column[0] for column in takewhile(lambda each: len({*each}) == 1, columns)]
