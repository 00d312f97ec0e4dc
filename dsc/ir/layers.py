"""The parts of a model, told apart by the module paths of its nodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, TypeVar

from dsc.ir.graph import Graph, Node

T = TypeVar("T")
_NUMBERED = re.compile(r"(?:.*?\.)?(?:layers|h|blocks|block)\.\d+(?=\.|$)")
"""Layers in a module path, by the words that models have for their list."""


def by_layer(graph: Graph) -> dict[str, list[Node]]:
    """The nodes of each part of a model, by the module path that tells parts apart."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        found.setdefault(layer_of(home(node)), []).append(node)
    return found


def home(node: Node) -> str:
    """The module path under which a node counts: its own.

    A region over several layers lies in none of them; it counts where its first node does that
    lies in one.
    """
    if node.body is None or _NUMBERED.match(node.loc):
        return node.loc
    return next((n.loc for n in node.body.nodes if _NUMBERED.match(n.loc)), node.loc)


def layer_number(loc: str) -> int | None:
    """The number of the layer that a module path lies in.

    >>> layer_number("model.layers.3.self_attn"), layer_number("transformer.h.2.attn.1")
    (3, 2)
    >>> layer_number("model.norm"), layer_number("model.embeddings.0")
    (None, None)
    """
    found = _NUMBERED.match(loc)
    return int(found[0].rpartition(".")[2]) if found else None


def layer_of(loc: str) -> str:
    """The part of a model that a module path lies in: its numbered layer, or the path itself.

    >>> layer_of("model.layers.3.self_attn.q_a_proj"), layer_of("model.norm"), layer_of("")
    ('model.layers.3', 'model.norm', 'elsewhere')
    """
    found = _NUMBERED.match(loc)
    return found[0] if found else loc or "elsewhere"


def runs(parts: Iterable[T], name: Callable[[T], str], key: Callable[[T], Any]) -> list[list[T]]:
    """Parts of a model in order, neighbours together that are layers with equal keys."""

    def same(part: T) -> tuple[Any, str]:
        return key(part), "" if layer_number(name(part)) is not None else name(part)

    return [list(run) for _, run in groupby(parts, same)]
