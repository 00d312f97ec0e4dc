"""The Relax VM form of a compiled program, for people who run models by TVM's virtual machine.

Each entry is a Relax function of its inputs, then all weights in sorted order (`num_input` tells
where they begin); it returns its outputs in order, caches that it updates in place among them. A
node is one `call_tir` of the kernel that the tvm backend calls by address, so the arithmetic is
the same; memory is planned by Relax, reshapes are views, and the VM costs about 1 us a step
(docs/decisions/host-function.md).

    vm = tvm.relax.VirtualMachine(tvm.runtime.load_module("relax/model.so"), tvm.cpu())
    logits, *caches = vm["decode"](*inputs, *weights)

bf16 tensors are given and returned as their bits, uint16: TVM's compiler crashes on functions of
bfloat16 buffers (0.27).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.ir import Call
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from dsc.backends.base import EmitOptions
from dsc.backends.tvm.bf16 import instructions_of
from dsc.backends.tvm.build import OBJECT_BYTES, PIPELINE, tir_passes, tvm_target
from dsc.backends.tvm.lean import private_copy
from dsc.backends.tvm.machine import Machine
from dsc.backends.tvm.schedule import KernelTable, launch_of
from dsc.backends.tvm.tir import Expr, PrimFunc
from dsc.errors import UnsupportedOperator, UsageError
from dsc.files import check_room
from dsc.ir.analyses import aliases_of
from dsc.ir.arrays import Array, array_of
from dsc.ir.dims import Dim, evaluate, free_symbols
from dsc.ir.graph import Graph, Node, Operand, Value
from dsc.ir.index_ranges import index_ranges
from dsc.ir.lanes import moves_nothing
from dsc.ir.types import DType, TensorType
from dsc.runtime.admission import Admitted
from dsc.runtime.emission import Emission

if TYPE_CHECKING:
    from dsc.ir.program import Program

FORM, LIBRARY = "relax", "relax/model.so"
NAMES = {
    DType.f32: "float32", DType.f64: "float64", DType.f16: "float16", DType.bf16: "uint16",
    DType.i64: "int64", DType.i32: "int32", DType.i16: "int16", DType.i8: "int8", DType.u8: "uint8",
    DType.boolean: "bool",
}  # fmt: skip


def emit(program: Program, machine: Machine, options: EmitOptions) -> Emission:
    """The library of all entries. Raises `UsageError` for pages and for several ranks.

    Raises `UnsupportedOperator` where an entry computes an index: no step here checks one.
    """
    if program.page is not None:
        raise UsageError("the Relax form takes no caches in pages", hint="use contiguous caches")
    if program.mesh.ranks > 1:
        raise UsageError("the Relax form is for one rank", hint="leave out --ranks")
    for graph in program.entries.values():
        for found in index_ranges(graph, program.symbols).computed:
            raise UnsupportedOperator(
                f"{found.reader.op}: an index that is computed, and the Relax form checks none",
                where=found.reader.loc or None,
                hint="leave out --format relax",
            )
    weights = sorted(program.weights)
    module = _Module(machine, program, weights)
    for name, graph in program.entries.items():
        module.add(name, graph)
    meta = {"form": FORM, "weights": weights}
    return Emission({LIBRARY: module.compile()}, meta=meta)


@dataclass
class _Module:
    """Relax functions, the kernels that they call, and what stands between the two."""

    machine: Machine
    program: Program
    weights: Sequence[str]
    builder: Any = field(default_factory=relax.BlockBuilder)
    kernels: KernelTable = field(default_factory=KernelTable)
    doors: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def add(self, name: str, graph: Graph) -> None:
        """The Relax function of an entry."""
        types = {v.name: v.type for v in graph.inputs}
        free = sorted({s for t in types.values() for d in t.shape for s in free_symbols(d)})
        sizes = {s: tirx.Var(s, "int64") for s in free}
        values = {n: relax.Var(_plain(n), _type(t, sizes)) for n, t in types.items()}
        known = self.program.weight_types()
        held = {w: relax.Var(_plain(w), _type(known[w], sizes)) for w in self.weights}

        def find(x: Operand) -> Any:
            return values[x.name] if isinstance(x, Value) else held[x.name]

        attrs = {"num_input": len(values)}
        with self.builder.function(name, [*values.values(), *held.values()], attrs):
            for node in graph.nodes:
                arguments = [find(x) for x in node.inputs if x is not None]
                if moves_nothing(node):
                    shape = [_size(d, sizes) for d in node.output.type.shape]
                    found = [self.builder.emit(relax.op.reshape(arguments[0], shape))]
                else:
                    found = self._call(node, arguments, sizes)
                values |= {v.name: x for v, x in zip(node.outputs, found, strict=True)}
            outputs = [find(x) for x in graph.outputs]
            self.builder.emit_func_output(relax.Tuple(outputs))

    def _call(self, node: Node, arguments: list[Any], sizes: Mapping[str, Any]) -> list[Any]:
        """The results of a node: one call of its kernel."""
        launch = launch_of(node, self.machine)
        operands = [x for x in node.inputs if x is not None]
        updated = aliases_of(node)
        shared = [
            operands.index(x) if i in updated and (x := node.inputs[updated[i]]) else -1
            for i in range(len(node.outputs))
        ]
        types = [v.type for v in node.outputs]
        if launch.scratch:
            types.append(TensorType(DType.u8, (launch.scratch,)))
            shared.append(-1)
        key = (launch.key, *(x.type.dtype for x in operands), *(x.type.rank for x in operands))
        key = (*key, *((t.dtype, t.rank) for t in types), *shared)
        if key not in self.doors:
            kinds = [x.type for x in operands]
            with instructions_of(self.machine):
                door = _door(self.kernels.name(launch), kinds, types, shared, len(launch.sizes))
            self.doors[key] = self.builder.add_func(door, f"call_{len(self.doors)}")
        given = [*arguments, *(_size(d, sizes) for d in launch.sizes)]
        results = [_type(t, sizes) for t in types]
        if any(index >= 0 for index in shared):
            call = relax.op.call_tir_inplace(self.doors[key], given, shared, results)
        else:
            call = relax.op.call_tir(
                self.doors[key], given, results if len(results) > 1 else results[0]
            )
        made = self.builder.emit(call)
        if len(types) == 1:
            return [made]
        return [self.builder.emit(relax.TupleGetItem(made, i)) for i in range(len(node.outputs))]

    def compile(self) -> bytes:
        """The shared library."""
        with instructions_of(self.machine):
            kernels = self.kernels.build()
        passes = relax.transform

        @ir.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
        def lower(module: Any, _: Any) -> Any:
            steps = [
                passes.ToNonDataflow(), passes.RemovePurityChecking(), passes.CallTIRRewrite(),
                passes.StaticPlanBlockMemory(), passes.LowerAllocTensor(),
                passes.KillAfterLastUse(), passes.LowerRuntimeBuiltin(),
                passes.ComputePrimValue(), passes.VMShapeLower(), passes.AttachGlobalSymbol(),
            ]  # fmt: skip
            done = ir.transform.Sequential(steps)(module)
            for name, kernel in kernels.items():  # private: called by address, not by the VM
                done[_global_var(name)] = kernel
            return done

        tirx.register_tir_pipeline(PIPELINE, tir_passes)
        target = tvm_target(self.machine.cpu, self.machine.triple, self.machine.without)
        built = relax.build(self.builder.get(), target, relax_pipeline=lower, tir_pipeline=PIPELINE)
        with tempfile.TemporaryDirectory(prefix="dsc-relax-") as folder:
            path = Path(folder) / "model.so"
            check_room(path, OBJECT_BYTES, "code to be linked")
            built.export_library(str(path))
            return path.read_bytes()


def _door(
    kernel: str,
    operands: Sequence[TensorType],
    results: Sequence[TensorType],
    shared: Sequence[int],
    sizes: int,
) -> PrimFunc:
    """A function of tensors that calls a kernel of addresses; shapes are the caller's affair."""
    with IRBuilder() as builder, T.prim_func(private=True, s_tir=True):
        handles = [T.arg(f"x{i}", tirx.Var(f"x{i}", "handle")) for i in range(len(operands))]
        numbers = [T.arg(f"n{i}", tirx.Var(f"n{i}", "int64")) for i in range(sizes)]
        fresh = [i for i, source in enumerate(shared) if source < 0]
        made = {i: T.arg(f"y{i}", tirx.Var(f"y{i}", "handle")) for i in fresh}
        inputs = [
            _address(h, t, f"x{i}") for i, (h, t) in enumerate(zip(handles, operands, strict=True))
        ]
        outputs = {i: _address(h, results[i], f"y{i}") for i, h in made.items()}
        ends = [inputs[s] if s >= 0 else outputs[i] for i, s in enumerate(shared)]
        arguments = [*inputs, *ends, *numbers]
        T.evaluate(Call(_global_var(kernel), arguments, ret_ty=ir.PrimType("int32")))
    return builder.get()


@cache
def _global_var(name: str) -> Any:
    """One GlobalVar a name: TVM compares them by identity."""
    return ir.GlobalVar(name)


def _address(handle: Expr, type: TensorType, name: str) -> Expr:
    shape = [tirx.Var(f"{name}_{axis}", "int64") for axis in range(type.rank)]
    buffer = T.match_buffer(handle, shape, NAMES[type.dtype], align=1)
    return Call("tirx.reinterpret", [buffer.data], ret_ty=ir.PrimType("int64"))


def _type(type: TensorType, sizes: Mapping[str, Any]) -> Any:
    return relax.TensorType([_size(d, sizes) for d in type.shape], NAMES[type.dtype])


def _size(dim: Dim, sizes: Mapping[str, Any]) -> Expr:
    """A dim over the function's symbols."""
    return evaluate(dim, sizes)


def _plain(name: str) -> str:
    return name.replace(".", "_")


class RelaxExecutable(Admitted):
    """Runs the entries by TVM's virtual machine on arrays where they are."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], program: Program) -> None:
        super().__init__(program)
        with private_copy(folder / LIBRARY) as own:
            self._vm = relax.VirtualMachine(tvm.runtime.load_module(str(own)), tvm.cpu())
        names = manifest["meta"]["weights"]
        self._weights = [_given(array_of(program.source.load(name))) for name in names]

    def execute(
        self, graph: Graph, inputs: Mapping[str, Array], env: Mapping[str, int]
    ) -> dict[str, Array]:
        """Run an entry. Outputs that update an input in place are that input."""
        in_place = graph.updated_inputs()
        given = (_given(inputs[v.name]) for v in graph.inputs)
        found = self._vm[graph.name](*given, *self._weights)
        return {
            name: inputs[in_place[name]]
            if name in in_place
            else np.from_dlpack(found[i]).view(x.type.dtype.numpy)
            for i, (name, x) in enumerate(zip(graph.output_names, graph.outputs, strict=True))
        }


def _given(array: Array) -> Any:
    """An array as the VM takes it, without a copy."""
    return tvm_ffi.from_dlpack(array.view(np.uint16) if array.dtype.isbuiltin != 1 else array)
