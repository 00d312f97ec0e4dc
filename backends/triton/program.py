"""From a program to its launches for one target: every entry, node by node, then its outputs.

What took long is kept (`dsc.kept`), by the program's text, the target and our sources.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dsc import kept
from dsc.backends.triton.blocks import AnyTile, Blocks, tile_json
from dsc.backends.triton.context import Context
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.lower import lower
from dsc.backends.triton.prologue import merges
from dsc.backends.triton.wanted import wanted
from dsc.errors import DscError
from dsc.ir.graph import Graph
from dsc.ir.op import added
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.views import View
from dsc.runtime.placing import place
from dsc.runtime.plan import ARENA, INPUT, OUTPUT, Buffer, Plan, Port

KIND = "plans"
OURS = ("ir", "runtime", "backends/triton")
WORTH = 1.0
"""Seconds: what is lowered in less is lowered again."""


@dataclass(frozen=True)
class Lowered:
    """A program's launches, as plan.json too, and the text of the kernels generated for them."""

    program: LaunchProgram
    sources: Mapping[str, str]
    plan: bytes


NO_CHOICES: Mapping[str, AnyTile] = {}


def lowered_program(
    program: Program,
    target: str,
    reuse: bool = True,
    choices: Mapping[str, AnyTile] = NO_CHOICES,
) -> Lowered:
    """A program for a target, as it was kept or made now; `choices` are tiles by their keys.

    An operator from outside brings code that no key tells of: nothing is kept beside one.
    """
    start = time.perf_counter()
    key = None if added() or kept.refused() else _key(program, target, reuse, choices)
    data = None if key is None else kept.get(KIND, key)
    if data is not None:
        with suppress(ValueError, KeyError, TypeError, DscError):
            head, _, plan = data.partition(b"\n")
            return Lowered(LaunchProgram.of(Plan.from_json(plan)), json.loads(head), plan)
    made, sources = lower_program(program, target, reuse, choices)
    found = Lowered(made, sources, made.plan().to_json())
    if key is not None and time.perf_counter() - start > WORTH:
        kept.put(KIND, key, json.dumps(sources).encode() + b"\n" + found.plan)
    return found


def _key(
    program: Program, target: str, reuse: bool, choices: Mapping[str, AnyTile]
) -> dict[str, Any]:
    text = print_program(program)
    return {
        "program": hashlib.sha256(text.encode()).hexdigest(),
        "target": target,
        "reuse": reuse,
        "choices": {key: tile_json(tile) for key, tile in sorted(choices.items())},
        "ours": kept.sources(*OURS),
    }


def lower_program(
    program: Program,
    target: str,
    reuse: bool = True,
    choices: Mapping[str, AnyTile] = NO_CHOICES,
) -> tuple[LaunchProgram, dict[str, str]]:
    """All entries' plans, and the source text of the kernels generated for them by module."""
    lowered = LaunchProgram(target)
    sources: dict[str, str] = {}
    for name, graph in program.entries.items():
        ranges = program.ranges(name)
        ctx = Context(lowered, Blocks(target, choices), ranges, sources)
        lower_graph(ctx, graph)
        lowered.entries[name] = place(ctx.entry, ranges, reuse)
    return lowered, sources


def lower_graph(ctx: Context, graph: Graph) -> None:
    """Lower one entry into `ctx.entry`."""
    for value in graph.inputs:
        view = ctx.make(value.type, INPUT, value.name)
        ctx.views[value.name] = view
        ctx.entry.inputs.append(Port(value.name, value.type, view.buffer))
    ctx.wanted, ctx.merges = wanted(ctx, graph), merges(graph)
    for node in graph.nodes:
        ctx.node = node
        lower(ctx, node)
    ctx.loc, ctx.node = "", None
    taken: set[int] = set()
    aliased = dict(graph.aliases)
    for index, (operand, name) in enumerate(zip(graph.outputs, graph.output_names, strict=True)):
        view = ctx.view(operand)
        state = graph.inputs[aliased[index]].name if index in aliased else None
        if not _returns_in_place(ctx, view, state):
            view = _as_output(ctx, view, name, taken)
        taken.add(view.buffer)
        ctx.entry.outputs.append(Port(name, view.type, view.buffer))


def _returns_in_place(ctx: Context, view: View, state: str | None) -> bool:
    """Whether an output is the very buffer of the input whose state it carries on."""
    return state is not None and view.buffer == ctx.views[state].buffer and view.is_dense


def _as_output(ctx: Context, view: View, name: str, taken: set[int]) -> View:
    """The output's own buffer: the one it was computed in where that is possible, else a copy."""
    buffer = ctx.entry.buffers[view.buffer]
    whole = view.is_dense and view.offset == 0 and view.type.nbytes == buffer.size
    if buffer.region == ARENA and whole and view.buffer not in taken:
        ctx.entry.buffers[view.buffer] = Buffer(OUTPUT, name, buffer.size)
        return view
    made = ctx.make(view.type, OUTPUT, name)
    ctx.copy(view, made)
    return made
