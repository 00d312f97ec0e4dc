"""Graphs to ONNX models, and which entries of a program share one model.

A model is built with no weight at hand: what it says of a weight is a place in a packed file,
filled in by `finish` when the artifact's writer knows the places. The models lie beside those files
(`onnx/`), as ONNX asks of external data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from dsc._version import __version__
from dsc.backends.onnxruntime import contrib
from dsc.backends.onnxruntime.emit import emit_graph
from dsc.backends.onnxruntime.forms import expanded, halves
from dsc.backends.onnxruntime.graph import (
    External,
    GraphWriter,
    Halves,
    Pool,
    static,
    value_info,
)  # fmt: skip
from dsc.backends.onnxruntime.interface import Interface, meaning, written
from dsc.backends.onnxruntime.options import Form
from dsc.backends.onnxruntime.ports import Port, Signature
from dsc.ir.analyses import structural_hash
from dsc.ir.dims import Dim, symbol_name
from dsc.ir.graph import Graph, Weight
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.runtime.emission import Place

FOLDER = "onnx"
WEIGHTS, SEVERAL = "model.safetensors", "model-*.safetensors"
"""Beside the models: the file of all weights, or how several are called."""
IR_VERSION = 11

MAX_BRANCHES = 4096
"""Branches for experts that a model may have. Each takes milliseconds to load."""

DOC = (
    "A step of a causal language model with latent attention: new tokens and caches in, logits and"
    " grown caches out. The folder's README.md tells how to call it. Entry {name!r}; it needs ONNX"
    " Runtime {runtime} on CPUs."
)
Places = Mapping[str, Place]


@dataclass(slots=True)
class BuiltModel:
    """A model whose weights have no place yet.

    `contrib`: how often it has which of ONNX Runtime's own operators, `withheld`: those that its
    provider computes wrong, and did not get.
    """

    proto: ModelProto
    externals: list[External]
    contrib: Mapping[str, int]
    withheld: Set[str]

    def serialized(self, places: Places) -> bytes:
        """The model's bytes, its initializers pointing into the packed weights at `places`."""
        for external in self.externals:
            file, start, _ = places[external.weight]
            _point(external.tensor, file, start + external.start, external.length)
        model = ModelProto()
        model.CopyFrom(self.proto)
        model.graph.initializer.extend(e.tensor for e in self.externals)
        return bytes(model.SerializeToString(deterministic=True))


def build_model(
    graph: Graph,
    name: str,
    form: Form | None = None,
    facts: Mapping[str, str] | None = None,
    max_branches: int | None = None,
    signature: Signature | None = None,
    halves: Halves | None = None,
) -> BuiltModel:
    """The ONNX model of one graph. With more than `max_branches` experts it loops over them.

    `facts` become its metadata; `signature` is another than the graph's own; with the `halves` of
    kv_b attention over latents is written in both forms.
    """
    form = form or Form()
    border = Interface.of(graph, form)
    unroll = _experts(graph) <= (MAX_BRANCHES if max_branches is None else max_branches)
    g = GraphWriter.of(graph, Pool(form, unroll, halves or {}))
    own = {v.name: v.name for v in graph.inputs}
    values = own if signature is None else signature.enter(g)
    g.pool.wide |= {
        values[v.name] for v in graph.inputs if border.inputs[v.name] is not v.type.dtype
    }
    results = [
        g.cast(result, x.type.dtype, border.outputs[output])
        for result, x, output in zip(
            emit_graph(g, graph, values), graph.outputs, graph.output_names, strict=True
        )
    ]
    causal = bool(border.caches)
    if signature is None:
        taken, given = _ports(graph, border, causal)
    else:
        results = signature.leave(g, dict(zip(graph.output_names, results, strict=True)))
        taken, given = signature.inputs, signature.outputs
    _name_outputs(g, [port.name for port in given], results)
    used = set(_used(g.nodes))
    proto = helper.make_graph(
        g.nodes,
        name,
        [value_info(p.name, p.dtype, p.shape, p.doc) for p in taken],
        [value_info(p.name, p.dtype, p.shape, p.doc) for p in given],
        [t for t in g.pool.constants.values() if t.name in used],
    )
    opsets = [helper.make_opsetid("", form.opset)]
    opsets += [helper.make_opsetid(contrib.DOMAIN, contrib.VERSION)] * bool(g.pool.contrib)
    model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION)
    model.producer_name, model.producer_version = "dsc", __version__
    if causal:
        model.doc_string = DOC.format(
            name=name, runtime=contrib.least_runtime(form.runtime, g.pool.contrib)
        )
    helper.set_model_props(model, dict(sorted((facts or {}).items())))
    externals = [e for e in g.pool.externals.values() if e.tensor.name in used]
    return BuiltModel(model, externals, g.pool.contrib, g.pool.withheld)


def notes(models: Collection[BuiltModel], provider: str) -> tuple[str, ...]:
    """What to tell of ONNX Runtime's own operators in models for a provider."""
    withheld = {op_type for one in models for op_type in one.withheld}
    return contrib.notes((one.contrib for one in models), withheld, provider)


def result_names(graph: Graph) -> tuple[str, ...]:
    """What a model calls its results: as the graph does, unless an input or a weight has the name.

    In ONNX a name is one value.
    """
    read = (*graph.outputs, *(x for node in graph.walk() for x in node.operands))
    taken = {v.name for v in graph.inputs} | {x.name for x in read if isinstance(x, Weight)}
    return tuple(f"{n}.out" if n in taken else n for n in graph.output_names)


def _ports(graph: Graph, border: Interface, causal: bool) -> tuple[Sequence[Port], Sequence[Port]]:
    """Inputs and outputs as the graph has them; a causal language model's say what they are."""
    has_room = bool(written(graph))

    def port(name: str, dtype: DType, type: TensorType) -> Port:
        return Port(name, dtype, type.shape, meaning(name, has_room) if causal else "")

    taken = [port(v.name, border.inputs[v.name], v.type) for v in graph.inputs]
    given = zip(result_names(graph), graph.output_names, graph.outputs, strict=True)
    return taken, [port(theirs, border.outputs[n], x.type) for theirs, n, x in given]


def _experts(graph: Graph) -> int:
    """How many experts all layers have together."""
    at = {"experts": 3, "grouped_linear": 1}
    stacks = (node.operands[at[node.op]] for node in graph.walk() if node.op in at)
    return sum(static(stack.type.shape[0]) for stack in stacks)


def shared_entries(program: Program) -> dict[str, str]:
    """For each entry, the entry whose model runs it.

    A decode entry that is the general one with S = 1 put in runs on the general model: one
    session, and weights that ONNX Runtime prepares once. So do entries that are another in the
    absorbed form. Of equal entries it is the last that takes any number of new tokens.
    """
    known = halves(program)
    graphs = {name: expanded(graph, known, program) for name, graph in program.entries.items()}
    bounded = {guard.entry for guard in program.guards if guard.step is not None}
    last = program.guards[-1].entry if program.guards else ""
    names = sorted(program.entries, key=lambda name: (name in bounded, name != last))
    keys = {name: _key(graphs[name]) for name in names}
    shared: dict[str, str] = {}
    for name, graph in graphs.items():
        shared[name] = name
        for other, general in graphs.items():
            if other == name or shared.get(other, other) != other:
                continue
            env = _specialises(graph, general)
            earlier = not env and names.index(other) < names.index(name)
            if env is not None and (env or earlier) and _key(general.substitute(env)) == keys[name]:
                shared[name] = other
                break
    return {name: _last(shared, name) for name in shared}


def _last(shared: Mapping[str, str], name: str) -> str:
    while shared[name] != name:
        name = shared[name]
    return name


def _key(graph: Graph) -> tuple[str, ...]:
    """Equal for graphs that compute the same from the same inputs and weights."""
    weights = [x.name for node in graph.walk() for x in node.operands if isinstance(x, Weight)]
    names = (*(v.name for v in graph.inputs), "->", *graph.output_names)
    return (structural_hash(graph), *names, *weights)


def _specialises(special: Graph, general: Graph) -> dict[str, Dim] | None:
    """What the symbols of `general` are in `special`, or `None` where their inputs do not fit."""
    if [v.name for v in special.inputs] != [v.name for v in general.inputs]:
        return None
    env: dict[str, Dim] = {}
    for ours, theirs in zip(special.inputs, general.inputs, strict=True):
        if ours.type.rank != theirs.type.rank:
            return None
        for have, dim in zip(ours.type.shape, theirs.type.shape, strict=True):
            name = symbol_name(dim)
            if name is not None and have != dim and env.setdefault(name, have) != have:
                return None
    return env


def _name_outputs(g: GraphWriter, names: Iterable[str], results: Iterable[str]) -> None:
    """Give results their public names: by renaming, or by an Identity where one has a name."""
    made = {name for node in g.nodes for name in node.output}
    renamed: dict[str, str] = {}
    for name, result in zip(names, results, strict=True):
        if result in made and result not in renamed:
            renamed[result] = name
        elif result != name:
            g.nodes.append(helper.make_node("Identity", [renamed.get(result, result)], [name]))
    _rename(g.nodes, renamed)


def _rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    for node in nodes:
        for side in (node.input, node.output):
            for index, name in enumerate(side):
                if name in names:
                    side[index] = names[name]
        for branch in _branches(node):
            _rename(branch.node, names)


def _used(nodes: Iterable[NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from node.input
        for branch in _branches(node):
            yield from _used(branch.node)
            yield from (output.name for output in branch.output)


def _branches(node: NodeProto) -> Iterator[GraphProto]:
    return (a.g for a in node.attribute if a.HasField("g"))


def _point(tensor: TensorProto, file: str, offset: int, length: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
