"""What ONNX Runtime's kernels set for a decode step: the products of the model, and nothing else.

The nodes of `KERNELS` are cut out of a model, branches for few tokens in place of their `If`, with
their own weights; what else goes into them is an input that holds what it held in a step. That
model runs in turns with the whole one. What is between the two is what the graph around the
products costs; what is left is up to ONNX Runtime.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bench.onnx_steps import spent

KERNELS = frozenset({"MatMulNBits", "QMoE", "MatMul", "Gemm"})
"""Operators that read weights, or caches."""
STEPS = 6


def flat(nodes: Iterable[Any]) -> Iterator[Any]:
    """The nodes with every `If` replaced by what its first branch has."""
    onnx: Any = import_module("onnx")
    for node in nodes:
        if node.op_type != "If":
            yield node
            continue
        branch = next(a.g for a in node.attribute if a.name == "then_branch")
        yield from flat(branch.node)
        for inner, outer in zip(branch.output, node.output, strict=True):
            yield onnx.helper.make_node("Identity", [inner.name], [outer])


def cut(model: Any) -> tuple[list[Any], list[Any]]:
    """All nodes of a model, and its products with the transpositions that they read through."""
    nodes = list(flat(model.graph.node))
    makers = {name: node for node in nodes for name in node.output}
    kept: dict[int, Any] = {}
    for node in (n for n in nodes if n.op_type in KERNELS):
        for name in node.input:
            made = makers.get(name)
            if made is not None and made.op_type == "Transpose":
                kept[id(made)] = made
        kept[id(node)] = node
    return nodes, list(kept.values())


def _open(engine: Any, model: Any, place: Path, name: str, profile: str = "") -> Any:
    """A session of a model beside the weights of the engine's folder."""
    path = place / f"{name}.onnx"
    path.write_bytes(model.SerializeToString())
    return engine.opened(path, profile)


def _models(model: Any, nodes: list[Any], kept: list[Any]) -> tuple[Any, Any, list[str]]:
    """The model that gives what goes into the products, one of the products alone, and names."""
    onnx: Any = import_module("onnx")
    helper = onnx.helper
    held = {x.name for x in model.graph.initializer}
    own = {name for node in kept for name in node.output}
    wanted = sorted({x for n in kept for x in n.input if x and x not in held | own})

    def made(nodes: list[Any], inputs: Any, outputs: list[str]) -> Any:
        read = {x for node in nodes for x in node.input}
        weights = [x for x in model.graph.initializer if x.name in read]
        given = [helper.make_empty_tensor_value_info(x) for x in outputs]
        graph = helper.make_graph(nodes, "kernels", inputs, given, weights)
        opsets = list(model.opset_import)
        return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)

    read = {x for node in kept for x in node.input}
    results = [x for node in kept for x in node.output if x not in read]
    types = dict.fromkeys(wanted, onnx.TensorProto.UNDEFINED)
    inputs = [helper.make_tensor_value_info(x, types[x], None) for x in wanted]
    return made(nodes, list(model.graph.input), wanted), made(kept, inputs, results), wanted


def _bound(session: Any, values: dict[str, Any]) -> Any:
    """A binding of a session's inputs to values, made once for all runs."""
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for port in session.get_outputs():
        binding.bind_output(port.name)
    return binding


def beside_step(engine: Any, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step and of its products alone, in turns, and both operator by operator."""
    onnx: Any = import_module("onnx")
    path = engine.folder / engine.meta["models"]["decode"]
    model = onnx.load(str(path), load_external_data=False)
    nodes, kept = cut(model)
    with tempfile.TemporaryDirectory(dir=engine.folder.parent) as folder:
        place = Path(folder)
        for file in path.parent.iterdir():
            if file.suffix != ".onnx":
                os.link(file, place / file.name)
        giving, alone, names = _models(model, nodes, kept)
        engine.start(1, context, STEPS * (rounds + 4))
        ids = engine.ids(1, 1)
        value = engine.runtime.OrtValue.ortvalue_from_numpy
        past = {name: value(x) for name, x in engine.views(ids).items()} or engine.past
        feeds = engine.values(ids) | past
        found = _open(engine, giving, place, "giving").run_with_ort_values(names, feeds)
        values = dict(zip(names, found, strict=True))
        helper = onnx.helper
        for port in alone.graph.input:
            held = values[port.name].numpy()
            kind = helper.np_dtype_to_tensor_dtype(held.dtype)
            port.CopyFrom(helper.make_tensor_value_info(port.name, kind, held.shape))
        only = _open(engine, alone, place, "alone")
        best = {"step": np.inf, "alone": np.inf}
        given = _bound(only, values)
        for _ in range(rounds):
            best["step"] = min([best["step"], *(1e3 * s for s in engine.steps(STEPS))])
            for _ in range(STEPS):
                start = time.perf_counter()
                only.run_with_iobinding(given)
                best["alone"] = min(best["alone"], 1e3 * (time.perf_counter() - start))
        told: dict[str, Any] = {name: round(took, 2) for name, took in best.items()}
        told["share"] = round(best["alone"] / best["step"], 3)
        step = engine.session("decode", f"{place}/step")
        products = _open(engine, alone, place, "timed", f"{place}/alone")
        given = _bound(products, values)
        for _ in range(STEPS * 2):
            engine.forward(step, ids)
            products.run_with_iobinding(given)
        for name, session in (("operators", step), ("operators alone", products)):
            found = spent(json.loads(Path(session.end_profiling()).read_text()))
            told[name] = {kind: round(took, 2) for kind, took in found.most_common(12)}
    return told
