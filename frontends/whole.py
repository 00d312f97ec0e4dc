"""Operators that AOTAutograd is to keep whole, because the IR knows them.

PyTorch takes `matmul`, `linear`, `scaled_dot_product_attention` and others apart before a backend
sees them. `kept_whole()` stops that for the time of a trace, as `torch.export` does by the same
means (pytorch, torch/export/exported_program.py). The shape of a `matmul` is worked out without
asking whether a size is one, so that a trace holds for such sizes too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsc.frontends.aten import KEPT_WHOLE


@contextmanager
def kept_whole() -> Iterator[None]:
    """Trace with these operators whole. Tracing holds Dynamo's lock, so one thread at a time."""
    from torch._subclasses import fake_impls
    from torch.export.exported_program import _override_composite_implicit_decomp

    matmul = torch.ops.aten.matmul.default
    if not fake_impls._is_op_registered_to_fake_rule(matmul):
        fake_impls.register_op_impl(matmul)(fake_matmul)
    with _override_composite_implicit_decomp(_composites()):
        yield


@functools.cache
def _composites() -> dict[Any, Callable[..., Any]]:
    """The operators that PyTorch would take apart, each with what to do instead."""
    found = {}
    for name in KEPT_WHOLE:
        operator = getattr(torch.ops.aten, name.removeprefix("aten::")).default
        if is_composite(operator):
            found[operator] = _keep
    found[torch.ops.aten.einsum.default] = _keep_einsum
    return found


def is_composite(operator: Any) -> bool:
    """Whether the dispatcher takes an operator apart before a tracer sees it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    name = operator.name()
    return key in operator.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _keep(*_: Any, **__: Any) -> Any:
    return NotImplemented


def _keep_einsum(equation: str, operands: list[Tensor], **options: Any) -> Any:
    """Of one operand it may be a view, which is known by itself."""
    if len(operands) > 1:
        return NotImplemented
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return torch.ops.aten.einsum.default._op_dk(composite, equation, operands, **options)


def fake_matmul(mode: Any, _: Any, a: Tensor, b: Tensor) -> Tensor:
    """The fake result of `a @ b`."""
    left, right = a.shape[:-2], b.shape[:-2]
    torch._check(a.shape[-1] == b.shape[max(b.dim() - 2, 0)])
    shape = [
        *torch.broadcast_shapes(left, right),
        *(a.shape[-2:-1] if a.dim() > 1 else ()),
        *(b.shape[-1:] if b.dim() > 1 else ()),
    ]
    with mode:
        return torch.empty(shape, dtype=a.dtype, device=a.device)


def fake_linear(mode: Any, _: Any, x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
    """The fake result of `x @ weight^T + bias`."""
    return fake_matmul(mode, _, x, weight.mT)
