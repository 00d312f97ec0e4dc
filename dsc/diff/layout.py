"""A layered drawing of one part of a graph: data flows down, crossings are few.

The classical steps (Sugiyama, Tagawa & Toda 1981): ranks by the longest path, dummies where an edge
spans ranks, order within a rank by the mean place of the neighbours, then places without overlap.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP, RANK_GAP, HEIGHT, MARGIN = 18.0, 26.0, 34.0, 14.0
DUMMY_WIDTH = 4.0
SWEEPS = 6

Key = Hashable


@dataclass(frozen=True)
class Vertex:
    """Something to draw; `sinks` draws it next to what it feeds rather than at the top."""

    key: Key
    width: float
    sinks: bool = False


@dataclass
class Drawing:
    """Places: `boxes` gives the upper left corner of each vertex, `paths` points of each edge."""

    width: float
    height: float
    boxes: dict[Key, tuple[float, float]]
    paths: list[tuple[Key, Key, list[tuple[float, float]]]]


@dataclass
class _Layers:
    """The vertices and dummies of each rank, with widths and neighbours."""

    ranks: list[list[Key]]
    widths: dict[Key, float]
    above: dict[Key, list[Key]] = field(default_factory=dict)
    below: dict[Key, list[Key]] = field(default_factory=dict)


def draw(vertices: Sequence[Vertex], edges: Sequence[tuple[Key, Key]]) -> Drawing:
    """Lay out an acyclic graph whose vertices are given in an order in which they can run."""
    if not vertices:
        return Drawing(0, 0, {}, [])
    edges = list(dict.fromkeys(edges))
    layers, chains = _with_dummies(vertices, edges, _ranks(vertices, edges))
    _order(layers)
    centres = _places(layers)
    left = min(centres[k] - w / 2 for k, w in layers.widths.items())
    right = max(centres[k] + w / 2 for k, w in layers.widths.items())
    level = {key: i for i, rank in enumerate(layers.ranks) for key in rank}

    def corner(key: Key) -> tuple[float, float]:
        x = centres[key] - layers.widths[key] / 2 - left + MARGIN
        return x, MARGIN + level[key] * (HEIGHT + RANK_GAP)

    boxes = {v.key: corner(v.key) for v in vertices}
    paths = []
    for (start, end), chain in zip(edges, chains, strict=True):
        paths.append((start, end, _points([corner(k) for k in chain], chain, layers.widths)))
    count = len(layers.ranks)
    height = 2 * MARGIN + count * HEIGHT + (count - 1) * RANK_GAP
    return Drawing(right - left + 2 * MARGIN, height, boxes, paths)


def _ranks(vertices: Sequence[Vertex], edges: Sequence[tuple[Key, Key]]) -> dict[Key, int]:
    """The longest path to each vertex; those that sink stand right above the first they feed."""
    rank = {v.key: 0 for v in vertices}
    fed: dict[Key, list[Key]] = {}
    for start, end in edges:
        fed.setdefault(start, []).append(end)
    for vertex in vertices:
        for end in fed.get(vertex.key, ()):
            rank[end] = max(rank[end], rank[vertex.key] + 1)
    for vertex in reversed(vertices):
        if vertex.sinks and vertex.key in fed:
            rank[vertex.key] = min(rank[end] for end in fed[vertex.key]) - 1
    return rank


def _with_dummies(
    vertices: Sequence[Vertex], edges: Sequence[tuple[Key, Key]], rank: Mapping[Key, int]
) -> tuple[_Layers, list[list[Key]]]:
    """Ranks in which every edge leads to the next rank; and the chain of keys of each edge."""
    ranks: list[list[Key]] = [[] for _ in range(max(rank.values()) + 1)]
    layers = _Layers(ranks, {v.key: v.width for v in vertices})
    for vertex in vertices:
        ranks[rank[vertex.key]].append(vertex.key)
    shared: dict[tuple[Key, int], Key] = {}
    chains = []
    for start, end in edges:
        chain: list[Key] = [start]
        for level in range(rank[start] + 1, rank[end]):
            key = shared.setdefault((start, level), ("dummy", start, level))
            if key not in layers.widths:
                layers.widths[key] = DUMMY_WIDTH
                ranks[level].append(key)
            chain.append(key)
        chain.append(end)
        chains.append(chain)
        for a, b in pairwise(chain):
            if b not in layers.below.setdefault(a, []):
                layers.below[a].append(b)
                layers.above.setdefault(b, []).append(a)
    return layers, chains


def _order(layers: _Layers) -> None:
    """Sort each rank by where its neighbours stand, downwards and upwards in turn."""
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = layers.above if down else layers.below
        for near, rank in pairwise(layers.ranks if down else layers.ranks[::-1]):
            _sort(rank, near, neighbours)


def _sort(rank: list[Key], near: Sequence[Key], neighbours: Mapping[Key, Sequence[Key]]) -> None:
    """Sort a rank by the mean place of each vertex' neighbours, all of which are in `near`."""
    place, own = _shares(near), _shares(rank)

    def mean(key: Key) -> float:
        places = [place[n] for n in neighbours.get(key, ())]
        return sum(places) / len(places) if places else own[key]

    rank.sort(key=mean)


def _shares(rank: Sequence[Key]) -> dict[Key, float]:
    """Where each vertex stands in its rank: 0 for the first, 1 for the last."""
    return {key: index / max(1, len(rank) - 1) for index, key in enumerate(rank)}


def _places(layers: _Layers) -> dict[Key, float]:
    """The centre of each vertex: near the mean of its neighbours, in order, without overlap."""
    centres: dict[Key, float] = {}
    for rank in layers.ranks:
        total = sum(layers.widths[k] for k in rank) + GAP * (len(rank) - 1)
        x = -total / 2
        for key in rank:
            centres[key] = x + layers.widths[key] / 2
            x += layers.widths[key] + GAP
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        neighbours = layers.above if down else layers.below
        for rank in layers.ranks if down else reversed(layers.ranks):
            _settle(rank, layers.widths, centres, neighbours)
    return centres


def _settle(
    rank: Sequence[Key],
    widths: Mapping[Key, float],
    centres: dict[Key, float],
    near: Mapping[Key, Sequence[Key]],
) -> None:
    """Move a rank's vertices to where their neighbours are; those that collide share the shift."""
    groups: list[tuple[list[Key], float, int]] = []  # keys, sum of wanted starts, how many
    for key in rank:
        others = [centres[n] for n in near.get(key, ())]
        wanted = sum(others) / len(others) if others else centres[key]
        group = [key], wanted - widths[key] / 2, 1
        while groups and _end(groups[-1], widths) > group[1] / group[2]:
            keys, start, count = groups.pop()
            offset = sum(widths[k] + GAP for k in keys)
            merged = start + group[1] - offset * group[2]
            group = [*keys, *group[0]], merged, count + group[2]
        groups.append(group)
    for keys, total, count in groups:
        x = total / count
        for key in keys:
            centres[key] = x + widths[key] / 2
            x += widths[key] + GAP


def _end(group: tuple[list[Key], float, int], widths: Mapping[Key, float]) -> float:
    keys, total, count = group
    return total / count + sum(widths[k] + GAP for k in keys)


def _points(
    corners: Sequence[tuple[float, float]], chain: Sequence[Key], widths: Mapping[Key, float]
) -> list[tuple[float, float]]:
    """From the bottom of the first box, through the dummies, to the top of the last."""
    points = []
    for index, ((x, y), key) in enumerate(zip(corners, chain, strict=True)):
        middle = x + widths[key] / 2
        if index:
            points.append((middle, y))
        if index < len(chain) - 1:
            points.append((middle, y + HEIGHT))
    return points
