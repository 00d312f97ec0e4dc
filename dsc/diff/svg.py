"""What is drawn, in places and words: a layer's graph, and what lies in an arena at each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsc.cli.console import human_bytes
from dsc.diff.layout import Vertex, draw
from dsc.errors import DscError
from dsc.ir import regions
from dsc.ir.dims import bounds
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.layers import home, layer_of
from dsc.ir.op import traits_of
from dsc.ir.printer import print_node
from dsc.ir.program import Program
from dsc.ir.traits import Role
from dsc.passes.own_outputs import own_outputs
from dsc.runtime.nodes import draft_nodes
from dsc.runtime.placing import place
from dsc.runtime.plan import ALIGNMENT, EntryPlan, lifetimes, live_at

FAMILIES = {
    "gemm": (Role.PRODUCT,),
    "attention": (Role.ATTENTION,),
    "moe": (Role.DISPATCH, Role.EXPERTS),
    "norm": (Role.REDUCTION, Role.ROTATION),
    "cache": (Role.WRITE, Role.JOIN),
    "table": (Role.LOOKUP,),
    "view": (Role.VIEW,),
}
"""Colours by the roles of operators; those of no other role count as pointwise."""
_FAMILY = {role: family for family, roles in FAMILIES.items() for role in roles}
CHARACTER = 6.3
LONGEST = 34
MAX_TITLES = 2500
"""Rectangles of a timeline that carry a tooltip, at most."""
TIMELINE = (1080.0, 260.0)
STEP_WIDTH = 4.0
"""The least width of a step: long entries are scrolled."""


@dataclass(frozen=True, slots=True)
class Box:
    """A node, or a value at the border (`family` "pill"): where it stands and what it says."""

    family: str
    x: float
    y: float
    width: float
    lines: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """The graph of one layer; `paths` are those of its edges, and whether they cross the border."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    paths: tuple[tuple[str, bool], ...]


def picture(graph: Graph, name: str, changed: frozenset[str]) -> Picture:
    """The nodes that belong to the layer `name`, as a picture; `changed` are marked.

    What comes in from other layers, and what others read, are pills at the border.
    """
    nodes = [n for n in graph.nodes if layer_of(home(n)) == name]
    inside = {v.name: i for i, n in enumerate(nodes) for v in n.outputs}
    vertices, edges = _vertices(graph, nodes, inside)
    drawing = draw(vertices, edges)
    boxes = []
    for vertex in vertices:
        place = (*drawing.boxes[vertex.key], vertex.width)
        if isinstance(vertex.key, int):
            node = nodes[vertex.key]
            boxes.append(Box(_family(node, changed), *place, _labels(node), print_node(node)))
        else:
            boxes.append(Box("pill", *place, (_short(str(vertex.key)[1:]),)))
    paths = tuple(
        (_curve(points), isinstance(start, str) or isinstance(end, str))
        for start, end, points in drawing.paths
    )
    return Picture(drawing.width, drawing.height, tuple(boxes), paths)


def _vertices(
    graph: Graph, nodes: Sequence[Node], inside: Mapping[str, int]
) -> tuple[list[Vertex], list[tuple[int | str, int | str]]]:
    outer: dict[str, Vertex] = {}
    edges: list[tuple[int | str, int | str]] = []
    for i, node in enumerate(nodes):
        for operand in node.operands:
            if isinstance(operand, Weight):
                continue
            if operand.name in inside:
                edges.append((inside[operand.name], i))
            else:
                key = f"<{operand.name}"
                outer.setdefault(key, Vertex(key, _width(operand.name), sinks=True))
                edges.append((key, i))
    leaving = _leaving(graph, nodes, inside)
    out = []
    for value in leaving:
        key = f">{value}"
        out.append(Vertex(key, _width(value)))
        edges.append((inside[value], key))
    own = [Vertex(i, _width(*_labels(n))) for i, n in enumerate(nodes)]
    return [*outer.values(), *own, *out], edges


def _leaving(graph: Graph, nodes: Sequence[Node], inside: Mapping[str, int]) -> list[str]:
    """Values of some nodes that others read, or that the graph returns."""
    own = {id(n) for n in nodes}
    read: list[Operand] = [x for n in graph.nodes if id(n) not in own for x in n.operands]
    names = {x.name for x in (*read, *graph.outputs) if isinstance(x, Value)}
    return [name for name in inside if name in names]


def _labels(node: Node) -> tuple[str, str]:
    """What a box says: the operator or the region, and the weight or the type."""
    name = regions.name_of(node) if node.body is not None else node.op
    weights = [x.name for x in node.operands if isinstance(x, Weight)]
    second = _tail(weights[0]) if weights else str(node.outputs[0].type)
    return _short(name), _short(second)


def _tail(weight: str) -> str:
    parts = [p for p in weight.split(".") if p != "weight"]
    return "@" + ".".join(parts[-2:] if len(parts[-1]) == 1 else parts[-1:])


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _width(*texts: str) -> float:
    return 16 + CHARACTER * max(len(_short(t)) for t in texts)


def _family(node: Node, changed: frozenset[str]) -> str:
    family = "fused" if node.body is not None else _FAMILY.get(traits_of(node.op).role, "pointwise")
    return f"{family} changed" if node.outputs[0].name in changed else family


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """Straight down where a path is at rest, curves from one rank to the next."""
    path = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 == x1:
            path.append(f"V{y1:.1f}")
        else:
            middle = (y0 + y1) / 2
            path.append(f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {y1:.1f}")
    return "".join(path)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of the arena that hold one storage, from its first step to its last."""

    name: str
    offset: int
    size: int
    first: int
    last: int
    loc: str


@dataclass(frozen=True)
class Timeline:
    """All blocks of an entry's arena, at the upper bounds of the symbols.

    `parts` are the parts of the model, by the step at which each begins.
    """

    blocks: tuple[Block, ...]
    parts: Mapping[int, str]
    steps: int
    size: int
    lower_bound: int

    @property
    def width(self) -> float:
        """Of the picture."""
        return max(TIMELINE[0], STEP_WIDTH * self.steps)

    @property
    def scales(self) -> tuple[float, float]:
        """The picture's width of a step and height of a byte."""
        return self.width / max(1, self.steps), TIMELINE[1] / self.size


def timeline(program: Program, entry: str, plan: EntryPlan | None = None) -> Timeline | None:
    """What lies in an entry's arena over its launches; `None` where it cannot be planned.

    Without the plan of an artifact it is that of the graph's nodes one by one.
    """
    graph = program.entries[entry]
    try:
        if plan is None:
            plan = place(draft_nodes(own_outputs(graph)), program.symbols)
        sizes = [bounds(b.size, program.symbols).hi for b in plan.buffers]
    except (DscError, KeyError, ValueError):
        return None
    blocks = [
        Block(
            plan.buffers[number].name or plan.launches[first].node,
            plan.buffers[number].offset,
            -(-sizes[number] // ALIGNMENT) * ALIGNMENT,
            first,
            last,
            plan.launches[first].loc,
        )
        for number, (first, last) in lifetimes(plan.buffers, plan.launches).items()
    ]
    homes = {node.outputs[0].name: home(node) for node in graph.nodes}
    parts: dict[int, str] = {}
    for position, launch in enumerate(plan.launches):
        part = layer_of(homes.get(launch.node, launch.loc))
        if part not in parts.values():
            parts[position] = part
    steps = len(plan.launches)
    return Timeline(tuple(blocks), parts, steps, plan.arena_bytes, plan.lower_bound)


def rectangles(found: Timeline) -> Iterator[tuple[float, float, float, float, str]]:
    """Offsets over steps: x, y, width, height and title of one rectangle a storage."""
    scale_x, scale_y = found.scales
    titled = len(found.blocks) <= MAX_TITLES
    for block in found.blocks:
        height = max(block.size * scale_y, 0.6)
        text = (
            f"%{block.name} {human_bytes(block.size)} at {block.offset},"
            f" steps {block.first} to {block.last} {block.loc}"
        )
        yield (
            block.first * scale_x,
            TIMELINE[1] - block.offset * scale_y - height,
            (block.last - block.first + 1) * scale_x,
            height,
            text if titled else "",
        )


def part_marks(found: Timeline) -> Iterator[tuple[float, str]]:
    """Where each part of the model begins, and its name where there is room."""
    scale_x, _ = found.scales
    starts = [*found.parts, found.steps]
    for (step, name), end in zip(found.parts.items(), starts[1:], strict=True):
        has_room = (end - step) * scale_x >= 8 + CHARACTER * len(_short(name))
        yield step * scale_x, _short(name) if has_room else ""


def live_line(found: Timeline) -> str:
    """The live bytes at each step, as a line of steps."""
    scale_x, scale_y = found.scales
    held = ((block.first, block.last, block.size) for block in found.blocks)
    points = (
        f"V{TIMELINE[1] - live * scale_y:.2f}H{(step + 1) * scale_x:.2f}"
        for step, live in enumerate(live_at(found.steps, held))
    )
    return f"M0 {TIMELINE[1]:.2f}{''.join(points)}"
