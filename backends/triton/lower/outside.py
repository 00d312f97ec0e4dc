"""Kernels in Triton that operators from outside bring along."""

from __future__ import annotations

import hashlib

from dsc.backends.triton.blocks import next_power
from dsc.backends.triton.context import Context, Given
from dsc.backends.triton.effects import parameters
from dsc.ir.analyses import call_of
from dsc.ir.dims import Dim, product
from dsc.ir.graph import Node
from dsc.ir.kernels import Triton


def lower(ctx: Context, node: Node, kernel: Triton) -> None:
    """Append the launch, over dense operands and results."""
    values = [ctx.dense(view) for view in ctx.operands(node)]
    values += [ctx.result(node, i) for i in range(len(node.outputs))]
    call = call_of(node)
    arguments: list[Given] = [
        *values,
        *(call.attrs[n] if n in call.attrs else _extent(node, n) for n in kernel.sizes),
    ]
    order = [p for p in parameters(kernel.source, kernel.function) if p not in kernel.blocks]
    given = dict(zip(order, arguments, strict=True))
    given |= {p: next_power(ctx.limit(_extent(node, name))) for p, name in kernel.blocks.items()}
    module = f"{kernel.function}_{hashlib.sha256(kernel.source.encode()).hexdigest()[:8]}"
    ctx.sources[module] = kernel.source
    grid = tuple(_extent(node, name) for name in kernel.grid) or (1,)
    ctx.launch(f"{module}:{kernel.function}", grid, given)


def reason(node: Node, kernel: Triton) -> str | None:
    """Why the kernel cannot be launched, or `None`."""
    for name in kernel.blocks.values():
        if not isinstance(_extent(node, name), int):
            return f"the Triton kernel of {node.op} wants a fixed {name}"
    wanted = len(node.operands) + len(node.outputs) + len(kernel.sizes) + len(kernel.blocks)
    taken = len(parameters(kernel.source, kernel.function))
    if taken != wanted:
        return f"the Triton kernel of {node.op} has {taken} parameters, and {wanted} are given"
    return None


def _extent(node: Node, name: str) -> Dim:
    """The extent of a letter of the signature; of a starred one the product."""
    dim = call_of(node).dims[name]
    return product(dim) if isinstance(dim, tuple) else dim
