"""An ATen graph cut into what is compiled and what runs eagerly around it.

A node that has no translation runs eagerly, as do those that depend on the data; all others are
gathered into as few regions as the order allows. A view or a size costs nothing, so it belongs to
no side: it is made again wherever somebody reads it.

    %a = exp %x      level 0   region
    %u = svd %a      level 1   eager
    %b = neg %a      level 0   region
    %c = add %b, %u  level 2   region
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from dsc.frontends.fx_import import GETITEM, SYMBOLIC_NUMBERS


@dataclass(frozen=True)
class Part:
    """Nodes that run together, in order: compiled, or one after the other by PyTorch."""

    compiled: bool
    nodes: tuple[fx.Node, ...]


def parts(graph: fx.Graph, eager: Collection[fx.Node]) -> list[Part]:
    """The parts of a functional graph in the order in which they run.

    `eager` are the nodes that are not to be compiled. Eager nodes that draw random numbers or have
    effects keep their order.
    """
    levels: dict[fx.Node, int] = {}
    found: dict[int, list[fx.Node]] = {}
    ordered = 0
    for node in graph.nodes:
        level = max((levels[n] for n in node.all_input_nodes), default=-1)
        if node.op != "call_function" or is_free(node, eager):
            levels[node] = level
            continue
        if str(node.target) == GETITEM:  # goes with the node whose result it is a part of
            levels[node] = level
            found[level].append(node)
            continue
        parity = int(node in eager)
        level = max(level, 0)
        level += level % 2 != parity
        if parity and _has_effects(node):
            ordered = level = max(level, ordered)
        levels[node] = level
        found.setdefault(level, []).append(node)
    return [Part(level % 2 == 0, tuple(found[level])) for level in sorted(found)]


def needed_by(nodes: Iterable[fx.Node], eager: Collection[fx.Node]) -> set[fx.Node]:
    """The views and sizes that these nodes read, directly or through others."""
    seen: set[fx.Node] = set()
    pending = [n for node in nodes for n in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in seen and is_free(node, eager):
            seen.add(node)
            pending += node.all_input_nodes
    return seen


def is_free(node: fx.Node, eager: Collection[fx.Node]) -> bool:
    """Whether a node computes no element: a size, a view, or a part of several results of one."""
    if node.op != "call_function" or node in eager:
        return False
    if is_number(node):
        return all(is_free(n, eager) or n.op == "placeholder" for n in node.all_input_nodes)
    if str(node.target) == GETITEM:
        return is_free(node.all_input_nodes[0], eager)
    return is_view(node)


def is_number(node: fx.Node) -> bool:
    """Whether the result is a number of Python's, maybe symbolic."""
    return isinstance(node.meta.get("val"), (*SYMBOLIC_NUMBERS, int, float, bool))


def is_view(node: fx.Node) -> bool:
    """Whether the operator's result shares memory with an operand by its schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return any(a.alias_info is not None for a in schema.arguments)


def _has_effects(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or node.is_impure()
