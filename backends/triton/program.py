"""From a program to its launches for one target: every entry, node by node, then its outputs."""

from __future__ import annotations

from dsc.backends.triton.blocks import Blocks
from dsc.backends.triton.context import Context
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.lower import lower
from dsc.backends.triton.wanted import wanted
from dsc.ir.graph import Graph
from dsc.ir.program import Program
from dsc.ir.views import View
from dsc.runtime.placing import place
from dsc.runtime.plan import ARENA, INPUT, OUTPUT, Buffer, Port


def lower_program(
    program: Program, target: str, reuse: bool = True
) -> tuple[LaunchProgram, dict[str, str]]:
    """All entries' plans, and the source text of the kernels generated for them by module."""
    lowered = LaunchProgram(target)
    sources: dict[str, str] = {}
    for name, graph in program.entries.items():
        ctx = Context(lowered, Blocks(target), program.symbols, sources)
        lower_graph(ctx, graph)
        lowered.entries[name] = place(ctx.entry, program.symbols, reuse)
    return lowered, sources


def lower_graph(ctx: Context, graph: Graph) -> None:
    """Lower one entry into `ctx.entry`."""
    for value in graph.inputs:
        view = ctx.make(value.type, INPUT, value.name)
        ctx.views[value.name] = view
        ctx.entry.inputs.append(Port(value.name, value.type, view.buffer))
    ctx.wanted = wanted(ctx, graph)
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
