"""Running launches in Triton's interpreter, on CPU memory. For a process of its own.

`TRITON_INTERPRET` acts when a kernel is decorated, so a process that interprets cannot compile.
`worker.py` is that process; it is the only importer of this module.

Triton's interpreter is adapted in four places, all measured or wrong as it ships (3.9):

- It patches and restores the whole language module around every launch and every call of a device
  function, about a millisecond each. One patch for the life of the process does the same.
- It holds bf16 as uint16 and hands those bits to `numpy.matmul` in `tl.dot`. Operands are widened.
- It truncates fp32 to bf16; hardware rounds to nearest even.
- It rounds numbers to e4m3 half up, and to no NaN; ml_dtypes rounds as hardware does.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from dsc.backends.triton.launch import Kernel, LaunchProgram
from dsc.backends.triton.schedule import Address, Call, resolve
from dsc.ir.dims import evaluate
from dsc.ir.lazy import torch
from dsc.runtime.plan import ALIGNMENT, ARENA, WEIGHT


def adapt_interpreter() -> None:
    """Apply the four changes to the imported interpreter."""
    from triton.runtime import interpreter

    _patch_once(interpreter)
    _widen_bf16(interpreter)
    _round_fp8(interpreter)


def _patch_once(interpreter: Any) -> None:
    import triton.language as tl

    class Kept:
        def restore(self) -> None:
            """Leave the patches in place."""

    def both() -> None: ...

    sample = FunctionType(both.__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sample)
    interpreter._patch_lang = lambda fn: Kept()


def _widen_bf16(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def widen(x: Any) -> Any:
        bits = x.data.astype(np.uint32) << np.uint32(16)
        return handle(bits.view(np.float32), tl.float32)

    def narrow(x: Any) -> Any:
        data = np.ascontiguousarray(x.data)
        bits = data.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        kept = np.where(np.isnan(data), bits | np.uint32(1 << 22), rounded)
        return handle((kept >> np.uint32(16)).astype(np.uint16), tl.bfloat16)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target == tl.float32:
            return widen(src)
        if source == tl.float32 and target == tl.bfloat16:
            return narrow(src)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def _round_fp8(interpreter: Any) -> None:
    import ml_dtypes
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, dot = builder.create_fp_to_fp, builder.create_dot
    kinds = {tl.float8e4nv: ml_dtypes.float8_e4m3fn, tl.float8e4b8: ml_dtypes.float8_e4m3fnuz}

    def widened(x: Any) -> Any:
        kind = kinds.get(x.dtype.scalar)
        return x if kind is None else handle(x.data.view(kind).astype(np.float32), tl.float32)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        kind = kinds.get(dst_type.scalar)
        if kind is not None:
            wide = self.cast_impl(widened(src), tl.float32)
            return handle(wide.data.astype(kind).view(np.uint8), dst_type.scalar)
        if src.dtype.scalar in kinds:
            return self.cast_impl(widened(src), dst_type)
        return convert(self, src, dst_type, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *rest)

    builder.create_fp_to_fp, builder.create_dot = create_fp_to_fp, create_dot


class Kernels:
    """The kernel functions of an artifact, imported from its `triton/kernels` folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, Any] = {}

    def function(self, module: str, name: str) -> Any:
        """The jitted function `name` of `module`."""
        if module not in self._modules:
            path = self._folder / f"{module}.py"
            spec = importlib.util.spec_from_file_location(f"dsc_kernels_{module}", path)
            assert spec is not None, f"{path} is a Python file"
            assert spec.loader is not None, f"{path} is a Python file"
            self._modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self._modules[module])
        return getattr(self._modules[module], name)


class InterpretedProgram:
    """An artifact's entries, run one program after another on CPU tensors."""

    def __init__(
        self, program: LaunchProgram, kernels: Kernels, weights: Mapping[str, torch.Tensor]
    ) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
        adapt_interpreter()
        self._program = program
        self._kernels = kernels
        self._weights = weights
        self._rewritten: dict[str, Callable[..., None]] = {}

    def run(
        self, entry: str, sizes: Mapping[str, int], inputs: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[float]]:
        """Run an entry at these sizes of its symbols: its outputs, and when each launch ended.

        The first time is that of the start. Caches that are updated in place are returned as the
        tensors given.
        """
        plan = self._program.entries[entry]
        arena = torch.empty(plan.arena_bytes + ALIGNMENT, dtype=torch.uint8)
        base = -(-arena.data_ptr() // ALIGNMENT) * ALIGNMENT
        addresses: dict[int, int] = {}
        for number, buffer in enumerate(plan.buffers):
            if buffer.region == WEIGHT:
                addresses[number] = self._weights[buffer.name].data_ptr()
            elif buffer.region == ARENA:
                addresses[number] = base + buffer.offset
        memory = {p.buffer: inputs[p.name].contiguous() for p in plan.inputs}
        outputs: dict[str, torch.Tensor] = {}
        for port in plan.outputs:
            if port.buffer not in memory:
                shape = [evaluate(d, sizes) for d in port.type.shape]
                memory[port.buffer] = torch.empty(shape, dtype=port.type.dtype.torch)
            outputs[port.name] = memory[port.buffer]
        addresses |= {k: v.data_ptr() for k, v in memory.items()}
        times = [time.perf_counter()]
        for call in resolve(plan, sizes).calls:
            self._call(call, addresses)
            times.append(time.perf_counter())
        return outputs, times

    def told(self) -> dict[str, Any]:
        """What there is to tell of the last run beside its results, as JSON values."""
        return {}

    def _call(self, call: Call, addresses: Mapping[int, int]) -> None:
        run = self._bound(call, addresses)
        for place in np.ndindex(call.grid):
            run(place)

    def _bound(self, call: Call, addresses: Mapping[int, int]) -> Callable[[tuple[int, ...]], None]:
        """What runs a program of a call by its place in the grid."""
        from triton.runtime.interpreter import interpreter_builder

        kernel = self._program.kernels[call.kernel]
        if call.kernel not in self._rewritten:
            jitted = self._kernels.function(kernel.module, kernel.function)
            self._rewritten[call.kernel] = jitted.rewrite()
        function = self._rewritten[call.kernel]
        given = _arguments(kernel, call, addresses)
        interpreter_builder.set_grid_dim(*call.grid)

        def run(place: tuple[int, ...]) -> None:
            interpreter_builder.set_grid_idx(*place)
            with np.errstate(all="ignore"):
                function(**given)

        return run


def _arguments(kernel: Kernel, call: Call, addresses: Mapping[int, int]) -> dict[str, Any]:
    """Interpreter values by parameter name: constants as they are, the rest as scalars."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    given: dict[str, Any] = dict(kernel.constants)
    names = [n for n, kind in kernel.signature.items() if kind != "constexpr"]
    for name, value in zip(names, call.arguments, strict=True):
        kind = tl.str_to_ty(kernel.signature[name], None)
        if isinstance(value, Address):
            data = np.array([addresses[value.buffer] + value.offset], dtype=np.uint64)
        else:
            wide = kernel.signature[name] == "i64"
            data = np.array([value], dtype=np.int64 if wide else np.int32)
        given[name] = tl.tensor(TensorHandle(data, kind), kind)
    return given
