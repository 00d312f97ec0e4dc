"""A model repository for Triton Inference Server: config.pbtxt, and a model that it keeps state of.

A causal LM is a sequence to Triton. Its implicit states are the caches and how many tokens they
hold, so that a client sends `input_ids` [1,S] and is given the last token's logits [1,1,V]: no
cache travels, and nothing has to be counted outside. At a sequence's start Triton has a state of
one row where the model says any number; the new tokens are written over it.

Requests of several sequences are no batch: Triton stacks the states of a batch, whose lengths
differ. So `max_batch_size` is 0, and sequences take turns. Another model is batched where its
first axis is one that all inputs and outputs share and rows do not see each other: structure
proposes that, evaluation proves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc._version import __version__
from dsc.backends.onnxruntime.graph import GraphWriter
from dsc.backends.onnxruntime.interface import Interface
from dsc.backends.onnxruntime.model import result_names
from dsc.backends.onnxruntime.ports import Port
from dsc.errors import UsageError
from dsc.ir.dims import symbol, symbol_name
from dsc.ir.graph import Graph
from dsc.ir.interpreter import run_graph
from dsc.ir.program import Program
from dsc.ir.samples import sample_inputs
from dsc.ir.types import DType
from dsc.ir.weights import evaluate
from dsc.rewrite.widen import FP32_ROUNDINGS, in_fp32

CONFIG, MODEL = "config.pbtxt", "model.onnx"
LENGTH = ("past.length", "present.length")
TYPES = {
    DType.f32: "TYPE_FP32", DType.f16: "TYPE_FP16", DType.bf16: "TYPE_BF16",
    DType.f64: "TYPE_FP64", DType.i64: "TYPE_INT64", DType.i32: "TYPE_INT32",
    DType.i16: "TYPE_INT16", DType.i8: "TYPE_INT8", DType.u8: "TYPE_UINT8",
    DType.boolean: "TYPE_BOOL",
}  # fmt: skip
LARGEST_BATCH = 64
"""Of a model whose own bound says nothing."""
ROOM = 4.0
"""How many times what rounding explains a row may be another one beside others."""
IDLE = 60 * 60 * 10**6
"""Microseconds after which Triton forgets a sequence that nobody continues."""


def repository_name(program: Program) -> str:
    """What the model is called: a folder's name, so letters, digits and `._-`.

    >>> repository_name(Program("models/R1 (mine)", {}))
    'models_R1_mine_'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", program.name).lstrip(".") or "model"


@dataclass(frozen=True)
class SequenceSignature:
    """A step that keeps count: `input_ids` and states go in, the last logits and states come out.

    `caches` are the graph's inputs, `given` its outputs, name by name.
    """

    caches: tuple[Port, ...]
    given: tuple[Port, ...]
    logits: Port

    @staticmethod
    def of(graph: Graph, border: Interface) -> SequenceSignature:
        """The signature of `graph`. Raises `UsageError` for states that are no rows of tokens."""
        pairs = [(graph.inputs[source], at) for at, source in graph.aliases]
        strange = [v for v, _ in pairs if v.type.rank < 2 or symbol_name(v.type.shape[1]) is None]
        if strange or not pairs:
            what = strange[0].name if strange else "the model"
            raise UsageError(f"{what} has no cache that grows", hint="leave out --for")
        caches = tuple(Port(v.name, border.inputs[v.name], v.type.shape) for v, _ in pairs)
        names = [graph.output_names[at] for _, at in pairs]
        given = tuple(
            Port(name, border.outputs[name], graph.outputs[at].type.shape)
            for name, (_, at) in zip(names, pairs, strict=True)
        )
        scores = graph.outputs[graph.output_names.index("logits")].type.shape[-1]
        logits = Port("logits", border.outputs["logits"], (symbol("B"), 1, scores))
        return SequenceSignature(caches, given, logits)

    @property
    def inputs(self) -> list[Port]:
        """What the model takes."""
        ids = Port("input_ids", DType.i64, (symbol("B"), symbol("S")))
        return [ids, Port(LENGTH[0], DType.i64, (symbol("B"),)), *self.caches]

    @property
    def outputs(self) -> list[Port]:
        """What it gives."""
        return [self.logits, Port(LENGTH[1], DType.i64, (symbol("B"),)), *self.given]

    def enter(self, g: GraphWriter) -> dict[str, str]:
        """Append what makes the graph's inputs; their values by name."""
        first = self.caches[0].name
        g.pool.symbols.update({"B": ("input_ids", 0), "S": ("input_ids", 1), "P": (first, 1)})
        steps = g.op("Unsqueeze", g.arange(symbol("S")), g.i64(0))
        rows = g.op("Unsqueeze", LENGTH[0], g.i64(1))
        last = g.op("Sub", g.dim(symbol("S")), g.i64(1))
        zeros = g.op("Mul", rows, g.i64(0))
        wanted = g.op("Add", zeros, last)
        g.pool.symbols["L"] = (wanted, 1)
        own = {
            "input_ids": "input_ids",
            "positions": g.op("Add", rows, steps),
            "lengths": LENGTH[0],
            "logits_at": wanted,
        }
        return own | {port.name: port.name for port in self.caches}

    def leave(self, g: GraphWriter, results: Mapping[str, str]) -> list[str]:
        """Append what makes `outputs` from the graph's results."""
        grown = g.op("Add", LENGTH[0], g.dim(symbol("S")))
        return [results["logits"], grown, *(results[port.name] for port in self.given)]


def sequence_config(program: Program, name: str, signature: SequenceSignature) -> str:
    """config.pbtxt of a causal LM."""
    one = {"B": 1}
    taken, given = signature.inputs, signature.outputs
    states = zip(taken[1:], given[1:], strict=True)
    lines = [
        *_head(name),
        "# No batches: the states of a batch are stacked, and those of sequences differ in length.",
        "max_batch_size: 0",
        *_ports("input", taken[:1], one),
        *_ports("output", given[:1], one),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {IDLE}",
        f"  oldest {{ max_candidate_sequences: {program.limits.max_batch} }}",
        *(line for pair in states for line in _state(*pair)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def plain_config(program: Program, name: str, graph: Graph, border: Interface, file: str) -> str:
    """config.pbtxt of a model without state, in `file`; batched where that changes no result."""
    taken = [Port(v.name, border.inputs[v.name], v.type.shape) for v in graph.inputs]
    outputs = zip(result_names(graph), graph.output_names, graph.outputs, strict=True)
    given = [Port(theirs, border.outputs[n], x.type.shape) for theirs, n, x in outputs]
    reason = unbatched(program, graph)
    if reason:
        batching = [f"# No dynamic batching: {' '.join(reason.split())}.", "max_batch_size: 0"]
    else:
        axis = symbol_name(graph.inputs[0].type.shape[0])
        most = program.symbols[str(axis)].hi
        batching = [f"max_batch_size: {min(most, LARGEST_BATCH)}", "dynamic_batching { }"]
        taken, given = ([Port(p.name, p.dtype, p.shape[1:]) for p in x] for x in (taken, given))
    head = _head(name, file)
    lines = [*head, *batching, *_ports("input", taken), *_ports("output", given)]
    return "\n".join(lines) + "\n"


def unbatched(program: Program, graph: Graph) -> str:
    """Why requests cannot be put together along the first axis; empty where they can."""
    shapes = [*(v.type.shape for v in graph.inputs), *(x.type.shape for x in graph.outputs)]
    axes = {symbol_name(s[0]) if s else None for s in shapes}
    (axis, *others) = axes or {None}
    if axis is None or others:
        return "inputs and outputs do not share one first axis"
    if any(axis in str(dim) for shape in shapes for dim in shape[1:]):
        return f"{axis} is the size of another axis too"
    bounds = program.symbols[axis]
    if bounds.lo > 1 or bounds.hi < 2:
        return f"{axis} is {bounds.lo} to {bounds.hi}"
    if not program.has_weights:
        return "without weights nobody can tell whether rows see each other"
    return _mixed(program, graph, axis)


def _mixed(program: Program, graph: Graph, axis: str) -> str:
    """Run two rows together and one by one, in fp32; empty where that is the same."""
    sizes = {n: max(r.lo, min(3, r.hi)) for n, r in program.symbols.items()}
    program = in_fp32(program)
    graph = program.entries[graph.name]
    bound = ROOM * FP32_ROUNDINGS * len(graph.nodes) ** 0.5

    def weight(name: str) -> Any:
        return evaluate(program.weights[name], program.source)

    for seed in range(2):
        drawn = sample_inputs(graph, {**sizes, axis: 2}, seed)
        inputs = [drawn[v.name] for v in graph.inputs]
        whole = run_graph(graph, inputs, weight)
        for row in range(2):
            own = run_graph(graph, [x[row : row + 1] for x in inputs], weight)
            for name, x, both in zip(graph.output_names, own, whole, strict=True):
                if _off(x, both[row : row + 1]) > bound:
                    return f"rows of {axis} see each other in {name}"
    return ""


def _off(one: Any, other: Any) -> float:
    """The largest difference, as a share of the largest number."""
    a, b = (x.double().nan_to_num() for x in (one, other))
    return float((a - b).abs().amax() / b.abs().amax().clamp(min=1.0)) if a.numel() else 0.0


def _head(name: str, file: str = MODEL) -> list[str]:
    return [
        f"# Written by dsc {__version__} for Triton Inference Server.",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{file}"',
    ]


def _ports(kind: str, ports: Iterable[Port], sizes: Mapping[str, int] | None = None) -> list[str]:
    """The blocks of inputs or outputs, sizes that are open as -1."""
    found = [f"  {{ name: {_text(p.name)} {_typed(p, sizes or {})} }}" for p in ports]
    return [f"{kind} [", ",\n".join(found), "]"]


def _state(taken: Port, given: Port) -> list[str]:
    """A state of a sequence: what it is at first, zeros of one row where rows are open."""
    dims = _dims(taken, {"B": 1})
    first = ", ".join(str(1 if d < 0 else d) for d in dims)
    kind = TYPES[taken.dtype]
    return [
        "  state {",
        f"    input_name: {_text(taken.name)} output_name: {_text(given.name)}",
        f"    {_typed(taken, {'B': 1})}",
        f"    initial_state {{ name: {_text(taken.name)} data_type: {kind} dims: [ {first} ]"
        " zero_data: true }",
        "  }",
    ]


def _typed(port: Port, sizes: Mapping[str, int]) -> str:
    if port.dtype not in TYPES:
        raise UsageError(f"Triton has no type for {port.name} : {port.dtype.value}")
    dims = ", ".join(map(str, _dims(port, sizes)))
    kind = f"data_type: {TYPES[port.dtype]}"
    return f"{kind} dims: [ {dims} ]" if dims else f"{kind} dims: [ 1 ] reshape {{ shape: [ ] }}"


def _dims(port: Port, sizes: Mapping[str, int]) -> Sequence[int]:
    return [d if isinstance(d, int) else sizes.get(symbol_name(d) or "", -1) for d in port.shape]


def _text(name: str) -> str:
    """A text of the protobuf text format, which escapes what JSON does."""
    return json.dumps(name, ensure_ascii=False)
