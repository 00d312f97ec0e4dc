"""Trace one layer of each kind, and write the others down.

Tracing costs seconds a layer, and the 61 layers of a V3 are of two kinds. So the model is traced
with one layer of each kind, the trace is cut into segments by `loc`, and a segment is copied for
every layer of its kind:

    @model.layers.1.mlp.gate.weight   becomes   @model.layers.7.mlp.gate.weight
    %past.1.latent, %present.1.rope             %past.7.latent, %present.7.rope
    loc model.layers.1.self_attn                loc model.layers.7.self_attn
    the one value of layer 0 that it reads      the same value of layer 6

`layer_kinds.py` says which layers are of one kind, `segments.py` checks that a segment touches
nothing but what is renamed here. Whatever does not fit raises `Irregular`, and the model is traced
whole: slower, never wrong.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from dsc.errors import UsageError, VerificationError
from dsc.frontends.facts import NAMES
from dsc.frontends.layer_kinds import CACHE, INDEX, LayerStack, layer_kinds
from dsc.frontends.meta_run import Irregular
from dsc.frontends.segments import Cut, cut
from dsc.ir.graph import Graph, Node, Operand, Value, Weight
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import DictSource, LayeredSource, MetaSource, Source, WeightExpr

Trace = Callable[[nn.Module, Sequence[int] | None], Program]
"""Traces a module of these layers of the whole one, or of all, into a program with one entry."""

T = TypeVar("T")

log = logging.getLogger(__name__)


def trace_by_kind(
    module: nn.Module,
    inputs: Sequence[Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
    trace: Trace,
) -> Program:
    """Trace `module` through one layer of each kind where that is sound, else whole.

    `inputs` and the names are those of a step at full depth; caches are called `past.N.*` and
    `present.N.*`. `trace` is called once, with a shallow module, or a second time with `module`.
    """
    caches = [CACHE.fullmatch(name) for name in input_names]
    owners = {int(cache[2]) for cache in caches if cache}
    try:
        stack = layer_kinds(module, inputs, input_names, output_names)
        if len(stack.firsts) == len(stack.kinds) or len(stack.kinds) <= max(owners, default=0):
            raise Irregular(f"{len(stack.firsts)} kinds of layers, {len(owners)} with caches")
        part = shallow(module, stack)
        _check_behaviour(part, stack, dict(zip(input_names, inputs, strict=True)), output_names)
        return instantiate(trace(part, stack.firsts), stack, module)
    except (Irregular, UsageError, VerificationError) as reason:
        log.info("traced whole: %s", reason)
        return trace(module, None)


def shallow(module: nn.Module, stack: LayerStack) -> nn.Module:
    """The module with the first layer of each kind alone. Parameters are shared, not copied.

    A configuration that parts of it hold says as much: how many layers there are, and what it
    lists for each. So does a step's signature.
    """
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    shells = [root := _shell(module)]
    for name in stack.path.split("."):
        child = _shell(shells[-1].get_submodule(name))
        shells[-1]._modules[name] = child
        shells.append(child)
    parent = shells[-1]
    cut_configs: dict[int, Any] = {}
    for shell in shells:
        config = vars(shell).get("config")
        if config is not None:
            shell.config = cut_configs.setdefault(id(config), _cut_config(config, stack))
    if (signature := vars(root).get("signature")) is not None:
        root.signature = signature.only(stack.firsts)
    parent._modules.clear()
    for index, first in enumerate(stack.firsts):
        original = module.get_submodule(f"{stack.path}.{first}")
        try:
            layer = copy.deepcopy(original, {**tensors, **cut_configs})
        except Exception as problem:
            raise Irregular(f"layer {first} cannot be copied: {problem}") from problem
        for part in layer.modules():
            if getattr(part, INDEX, None) == first:
                setattr(part, INDEX, index)
        parent._modules[str(index)] = layer
    return root


def _cut_config(config: Any, stack: LayerStack) -> Any:
    """A configuration of the first layers of each kind: lists of all layers, and their count."""
    depth, firsts = len(stack.kinds), stack.firsts
    cut = copy.copy(config)
    for name, value in vars(config).items():
        if name in NAMES["num_hidden_layers"] and value == depth:
            vars(cut)[name] = len(firsts)
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            vars(cut)[name] = type(value)(value[first] for first in firsts)
    return cut


def _check_behaviour(
    part: nn.Module, stack: LayerStack, inputs: Mapping[str, Tensor], output_names: Sequence[str]
) -> None:
    """Raise `Irregular` unless the shallow module does what the whole one does.

    It need not: a model may count its layers, or do something after its third one.
    """
    kept = {name: k for k in inputs if (name := _cache_of_first(k, stack)) is not None}
    outputs = [name for k in output_names if (name := _cache_of_first(k, stack)) is not None]
    found = layer_kinds(part, [inputs[k] for k in kept.values()], list(kept), outputs)
    wanted = tuple(stack.behaviour[first] for first in stack.firsts)
    if (found.path, found.behaviour, found.tail) != (stack.path, wanted, stack.tail):
        raise Irregular("with fewer layers the model does something else")


def _cache_of_first(name: str, stack: LayerStack) -> str | None:
    """A name of the step's signature in the shallow module; `None` for caches it has not."""
    cache = CACHE.fullmatch(name)
    if cache is None:
        return name
    layer = int(cache[2])
    return _cache_of(name, stack.kinds[layer]) if layer in stack.firsts else None


def _shell(module: nn.Module) -> nn.Module:
    """The same module with a table of submodules of its own."""
    shell = copy.copy(module)
    shell._modules = dict(module._modules)
    return shell


def instantiate(program: Program, stack: LayerStack, module: nn.Module) -> Program:
    """The program at full depth, from one whose layers are the first of each kind.

    `module` is the whole model: it gives the weights of the copied layers. Raises `Irregular`.
    """
    ((name, graph),) = program.entries.items()
    parts = cut(graph, stack.path)
    if len(parts.streams) != len(stack.firsts):
        raise Irregular(f"{len(parts.streams)} layers traced, {len(stack.firsts)} expected")
    full = _Instantiation(graph, parts, stack).graph()
    interface = replace(program.interface, states=())  # those of all layers follow from the entry
    whole = replace(program, entries={name: full}, interface=interface)
    result = _with_weights(whole, stack.path, module)
    verify(result)
    return result


class _Instantiation:
    """Writes the graph at full depth, node by node, under fresh names."""

    def __init__(self, graph: Graph, cut: Cut, stack: LayerStack) -> None:
        self.traced, self.cut, self.stack = graph, cut, stack
        self.own = re.compile(re.escape(stack.path) + r"\.\d+(?=\.|$)")
        self.nodes: list[Node] = []
        self.shared: dict[str, Value] = {}
        self.layers: list[dict[str, Value]] = [{} for _ in stack.kinds]
        self.counts: dict[str, int] = {}
        self.taken: set[str] = set()

    def graph(self) -> Graph:
        """All of it: signature, nodes, outputs, aliases."""
        cut, traced = self.cut, self.traced
        inputs = [
            self._defined(value, layer, _cache_of(value.name, layer))
            for value, layer in self._all_layers(traced.inputs, [v.name for v in traced.inputs])
        ]
        self._copies(cut.before)
        self._copy(cut.head, None)
        self._copies(cut.segments)
        self.shared[cut.streams[-1]] = self._stream(len(self.layers) - 1)
        self._copy(cut.tail, None)
        self._copies(cut.behind)
        names = list(traced.output_names)
        outputs = tuple(self._operand(x, k) for x, k in self._all_layers(traced.outputs, names))
        output_names = tuple(_cache_of(name, k) for name, k in self._all_layers(names, names))
        places = {v.name: place for place, v in enumerate(inputs)}
        pairs = [(names[out], traced.inputs[into].name) for out, into in traced.aliases]
        aliases = tuple(
            (output_names.index(_cache_of(out, k)), places[_cache_of(into, k)])
            for (out, into), k in self._all_layers(pairs, [out for out, _ in pairs])
        )
        nodes = tuple(self.nodes)
        return Graph(traced.name, tuple(inputs), nodes, outputs, output_names, aliases)

    def _all_layers(self, items: Sequence[T], names: Sequence[str]) -> list[tuple[T, int | None]]:
        """Items of a signature at full depth, those of caches once a layer, in its place."""
        of_kind: dict[int, list[T]] = {}
        for item, name in zip(items, names, strict=True):
            if cache := CACHE.fullmatch(name):
                of_kind.setdefault(int(cache[2]), []).append(item)
        found: list[tuple[T, int | None]] = []
        expanded = False
        for item, name in zip(items, names, strict=True):
            if not CACHE.fullmatch(name):
                found.append((item, None))
            elif not expanded:
                expanded = True
                for k, kind in enumerate(self.stack.kinds):
                    found += [(own, k) for own in of_kind.get(kind, ())]
        return found

    def _copies(self, parts: Sequence[Sequence[Node]]) -> None:
        for layer, kind in enumerate(self.stack.kinds):
            self._copy(parts[kind], layer)

    def _copy(self, nodes: Sequence[Node], layer: int | None) -> None:
        for node in nodes:
            inputs = tuple(None if x is None else self._operand(x, layer) for x in node.inputs)
            outputs = tuple(self._defined(v, layer, self._fresh(v.name)) for v in node.outputs)
            self.nodes.append(Node(node.op, inputs, node.attrs, outputs, self._at(node.loc, layer)))

    def _operand(self, x: Operand, layer: int | None) -> Operand:
        """What `x` of the trace is for a layer: its own, the stream, or shared."""
        if isinstance(x, Weight):
            return Weight(self._at(x.name, layer), x.type)
        own = self.layers[layer] if layer is not None else {}
        if x.name in own:
            return own[x.name]
        if layer and x.name == self.cut.streams[self.stack.kinds[layer] - 1]:
            return self._stream(layer - 1)
        if x.name not in self.shared:
            raise Irregular(f"%{x.name} is read before it is made")
        return self.shared[x.name]

    def _stream(self, layer: int) -> Value:
        """What a layer hands on."""
        return self.layers[layer][self.cut.streams[self.stack.kinds[layer]]]

    def _at(self, path: str, layer: int | None) -> str:
        """A module path or weight name, moved to a layer if it lies inside one."""
        if layer is None or not self.own.match(path):
            return path
        return self.own.sub(f"{self.stack.path}.{layer}", path, count=1)

    def _defined(self, value: Value, layer: int | None, name: str) -> Value:
        new = Value(name, value.type)
        (self.shared if layer is None else self.layers[layer])[value.name] = new
        self.taken.add(name)
        return new

    def _fresh(self, name: str) -> str:
        """A name that is not taken, on the same stem: `linear_7` of `linear_3`."""
        stem = re.sub(r"(_\d+)+$", "", name)
        while True:
            self.counts[stem] = self.counts.get(stem, 0) + 1
            fresh = f"{stem}_{self.counts[stem]}"
            if fresh not in self.taken:
                return fresh


def _cache_of(name: str, layer: int | None) -> str:
    """The name of a cache, `past.1.rope`, for another layer."""
    cache = CACHE.fullmatch(name)
    return name if cache is None or layer is None else f"{cache[1]}.{layer}.{cache[3]}"


def _with_weights(program: Program, path: str, module: nn.Module) -> Program:
    """The program with the weights that its graph reads; those of layers are the module's."""
    state = {
        name: tensor.detach()
        for name, tensor in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        )
        if name.startswith(path + ".")
    }
    weights: dict[str, WeightExpr] = {}
    used: dict[str, Weight] = {}
    for graph in program.entries.values():
        operands = (x for node in graph.nodes for x in node.operands)
        used |= {x.name: x for x in (*operands, *graph.outputs) if isinstance(x, Weight)}
    for name, weight in used.items():
        if not name.startswith(path + "."):
            weights[name] = program.weights[name]
            continue
        tensor = state.get(name)
        if tensor is None or _type(tensor) != weight.type:
            raise Irregular(f"the module has no {name} of type {weight.type}")
        weights[name] = Source(name, weight.type)
    real = {k: v for k, v in state.items() if v.device.type != "meta"}
    absent = {k: _type(v) for k, v in state.items() if v.device.type == "meta"}
    source = LayeredSource((DictSource(real), MetaSource(absent), program.source))
    return replace(program, weights=weights, source=source)


def _type(tensor: Tensor) -> TensorType:
    return TensorType(DType.of(tensor.dtype), tuple(tensor.shape))
