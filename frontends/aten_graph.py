"""A functional ATen graph, as AOTAutograd leaves it: what is compiled and what runs around it.

run = CompiledGraph(gm, Options(fallback="eager"), "attention_layer")
outputs = run([q, k, v])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx

from dsc.errors import DscError, InternalError, UnsupportedOperator
from dsc.frontends.fx_import import Problem, hint, source_line, told
from dsc.frontends.on_card import check_indices
from dsc.frontends.options import Options
from dsc.frontends.partition import Part, is_free, is_number, is_view, needed_by, parts
from dsc.frontends.regions import Region, RegionImporter, attribute, place_of, region_of
from dsc.ir.graph import Value, Weight

Step: TypeAlias = Callable[[list[Any]], None]

_MOVES = frozenset({"aten.scalar_tensor.default", "prims.as_strided_scatter.default"})
"""What is left to PyTorch even where all has to be compiled: AOTAutograd's own bookkeeping."""
_CHOICES = (
    'fallback="eager" runs them by PyTorch and compiles the rest; or choose another backend, or'
    " write them otherwise"
)


class CompiledGraph:
    """A functional graph of which as much is compiled as can be.

    Called with the list of its inputs, which it empties, as AOTAutograd's compilers are asked to.
    Raises `UnsupportedOperator` when made, naming every operator that cannot be compiled, if
    `options.fallback` is "error".
    """

    _boxed_call = True

    def __init__(
        self,
        gm: fx.GraphModule,
        options: Options,
        name: str,
        names: Mapping[fx.Node, str],
        constants: Mapping[fx.Node, Tensor],
    ) -> None:
        """`names` are those of inputs; `constants` are inputs whose values do not change."""
        gm.graph.eliminate_dead_code()
        self.gm = gm
        self.options = options
        self.name = name if name.isidentifier() else "main"
        self.names = names
        self.constants = constants
        self.problems: dict[fx.Node, Problem] = _untranslatable(gm, self.name)
        self.regions: dict[Part, Region] = {}
        self.parts: list[Part] = []
        while True:
            if self.refused and options.fallback == "error":
                raise refusal(self.refused)
            self.parts = parts(gm.graph, self.problems.keys())
            refused = self._compile()
            if not refused:
                break
            self.problems.update(refused)
        self._lower()

    def _compile(self) -> dict[fx.Node, Problem]:
        """Compile each region that is new; the nodes of the first one that is refused."""
        for part in self.parts:
            if not part.compiled or part in self.regions:
                continue
            try:
                region = _prepared(self._region(part))
            except _Refused as found:
                return dict(found.nodes)
            except Exception as problem:
                if self.options.fallback == "eager":
                    return _refused(part, problem)
                if isinstance(problem, UnsupportedOperator):
                    raise UnsupportedOperator(problem.what, problem.where, _CHOICES) from problem
                raise
            self.regions[part] = region
        return {}

    def _region(self, part: Part) -> Region:
        """The program of a part. Raises `_Refused` with the nodes that stand in the way.

        Each symbol that becomes a constant on the way means another translation, without it.
        """
        importer, outputs = self._translated(part)
        for _ in range(len(importer.sizes.names) + 1):
            region = region_of(importer, self.options, outputs)
            if region is not None:
                if self.options.target:
                    check_indices(region.graph)
                return region
            importer, outputs = self._translated(part)
        raise InternalError(f"the sizes of {self.name} do not settle")

    def _translated(self, part: Part) -> tuple[RegionImporter, list[fx.Node]]:
        """A part's nodes in the IR, and those that others read. Raises `_Refused`."""
        inside = set(part.nodes) | needed_by(part.nodes, self.problems.keys())
        importer = RegionImporter(self.name, self.names, self.constants)
        for node in self.gm.graph.nodes:
            if node not in inside:
                continue
            for source in node.all_input_nodes:
                if source not in importer.values and source not in inside:
                    importer.read(source)
            importer.node(node)
        outputs = [n for n in part.nodes if self._leaves(n, inside)]
        for node in outputs:
            if not isinstance(importer.values.get(node), (Value, Weight)):
                importer.problem(node, str(node.target), "a complex result that others read")
        if importer.problems:
            raise _Refused({
                reader: Problem(str(reader.target), problem.reason, source_line(reader))
                for node, problem in importer.problems.items()
                for reader in (node, *node.users)
                if reader in inside
            })  # fmt: skip
        return importer, outputs

    def _leaves(self, node: fx.Node, inside: set[fx.Node]) -> bool:
        """Whether somebody outside of a region reads a node of it, maybe through a view."""
        if not isinstance(node.meta.get("val"), Tensor):
            return False
        pending = list(node.users)
        while pending:
            user = pending.pop()
            free = is_free(user, self.problems.keys())
            if user.op == "output" or (user not in inside and not free):
                return True
            if free:
                pending += user.users
        return False

    @property
    def refused(self) -> dict[fx.Node, Problem]:
        """What cannot be compiled; handing a number to Python, as `.item()` does, is no such.

        Nor is a mistake that PyTorch names best, as it does when the graph runs.
        """
        return {
            n: p
            for n, p in self.problems.items()
            if not _needs_no_kernel(n) and not _mixes_types(n)
        }

    @property
    def steps(self) -> int:
        """How many regions and operators run, one after the other."""
        return len(self._steps)

    def eager_lines(self) -> list[str]:
        """What is not compiled: one line a kind of operator, with why and the user's line."""
        return [line.strip() for line in told(self.refused)]

    # Running.

    def _lower(self) -> None:
        """Number the values and write the steps down, each with the values that die after it."""
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        (output,) = (n for n in self.gm.graph.nodes if n.op == "output")
        self._slots = {n: i for i, n in enumerate(placeholders)}
        steps: list[tuple[Step, Sequence[fx.Node], Sequence[fx.Node]]] = []
        made: set[fx.Node] = set()

        def make(sources: Iterable[fx.Node]) -> None:
            """Views and sizes, where they are first read."""
            for node in sources:
                if node not in made and is_free(node, self.problems.keys()):
                    made.add(node)
                    make(node.all_input_nodes)
                    steps.append((self._eager_step(node), node.all_input_nodes, (node,)))

        for part in self.parts:
            if part.compiled:
                region = self.regions[part]
                read = [*region.inputs, *region.sizes.values()]
                make(read)
                steps.append((self._region_step(region), read, region.outputs))
                continue
            for node in part.nodes:
                make(node.all_input_nodes)
                steps.append((self._eager_step(node), node.all_input_nodes, (node,)))
        make(output.all_input_nodes)
        kept = {*output.all_input_nodes, *(n for n in self._slots if n.op == "get_attr")}
        last = {n: i for i, (_, read, out) in enumerate(steps) for n in (*read, *out)}
        dead: list[list[int]] = [[] for _ in steps]
        for node, position in last.items():
            if node not in kept:
                dead[position].append(self._slots[node])
        self._steps = [(step, tuple(d)) for (step, _, _), d in zip(steps, dead, strict=True)]
        results = cast("Sequence[Any]", output.args[0])
        self._results = [
            (self._slot(x), None) if isinstance(x, fx.Node) else (-1, x) for x in results
        ]
        self._blank = [attribute(n) if n.op == "get_attr" else None
                       for n in list(self._slots)[len(placeholders) :]]  # fmt: skip

    def _slot(self, node: fx.Node) -> int:
        return self._slots.setdefault(node, len(self._slots))

    def _region_step(self, region: Region) -> Step:
        read = tuple(self._slot(n) for n in region.inputs)
        sizes = tuple(self._slot(n) for n in region.sizes.values())
        written = tuple(self._slot(n) for n in region.outputs)

        def step(env: list[Any]) -> None:
            tensors = [env[i] for i in read]
            tensors += [torch.empty((env[i], 0), dtype=torch.int8) for i in sizes]
            for slot, result in zip(written, region.run(tensors), strict=True):
                env[slot] = result

        return step

    def _eager_step(self, node: fx.Node) -> Step:
        slot = self._slot(node)
        target = cast(Callable[..., Any], node.target)
        slots = {n: self._slot(n) for n in node.all_input_nodes}

        def step(env: list[Any]) -> None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[slots[n]])
            env[slot] = target(*args, **kwargs)

        return step

    def __call__(self, args: list[Any]) -> list[Any]:
        """Run on the inputs; `args` is emptied, so that nothing is held longer than needed."""
        env = [*args, *self._blank]
        args.clear()
        for step, dead in self._steps:
            step(env)
            for slot in dead:
                env[slot] = None
        return [constant if slot < 0 else env[slot] for slot, constant in self._results]


class _Refused(Exception):
    """Nodes that keep a region from being compiled, and why."""

    def __init__(self, nodes: Mapping[fx.Node, Problem]) -> None:
        super().__init__(nodes)
        self.nodes = nodes


def _prepared(region: Region) -> Region:
    """The region, compiled; with fewer symbolic sizes where the backend refuses it otherwise.

    A size that becomes a constant is guarded, so that another one is captured again.
    """
    try:
        region.prepare()
        return region
    except UnsupportedOperator as refused:
        known = region.program.symbols.keys()
        choices = (frozenset(region.features & known), frozenset(known))
        for names in filter(None, dict.fromkeys(choices)):
            narrower = region.with_sizes(names)
            with suppress(UnsupportedOperator):
                narrower.prepare()
                for name in names:
                    int(region.numbers[name])
                return narrower
        raise refused


def _untranslatable(gm: fx.GraphModule, name: str) -> dict[fx.Node, Problem]:
    """The nodes that have no translation, found by translating the whole graph once."""
    importer = RegionImporter(name, {}, {})
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            importer.read(node)
        elif node.op == "call_function":
            importer.node(node)
            if is_number(node) and not is_free(node, importer.problems.keys()):
                importer.problem(node, str(node.target), "a number that depends on the data")
            elif node not in importer.values:
                importer.problem(node, str(node.target), "")
    return {n: p for n, p in importer.problems.items() if n.op == "call_function"}


def _needs_no_kernel(node: fx.Node) -> bool:
    """Whether a node that runs eagerly computes nothing: a number for Python, or a view."""
    return is_number(node) or is_view(node) or str(node.target) in _MOVES


def _mixes_types(node: fx.Node) -> bool:
    """Whether PyTorch itself refuses the element types that an operator is given."""
    from torch.utils._python_dispatch import _disable_current_modes

    fakes = [n.meta.get("val") for n in node.all_input_nodes]
    if len({f.dtype for f in fakes if isinstance(f, Tensor)}) < 2 or not callable(node.target):
        return False
    try:
        with _disable_current_modes(), torch.no_grad():
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: _zeros(n.meta.get("val"))
            )
            node.target(*args, **kwargs)
    except RuntimeError as problem:
        return "type" in str(problem)
    return False


def _zeros(fake: Any) -> Any:
    """A value like a traced one: zeros of its shape, none along an unknown size; or the number."""
    if isinstance(fake, Tensor):
        return torch.zeros([hint(n) or 0 for n in fake.shape], dtype=fake.dtype)
    return hint(fake)


def _refused(part: Part, problem: Exception) -> dict[fx.Node, Problem]:
    """The nodes of a part that a backend does not take; all, where it does not say which."""
    places = getattr(problem, "places", ())
    known = [n for n in part.nodes if place_of(n) in places]
    why = str(problem).partition("\n  to do:")[0]
    if not isinstance(problem, DscError):
        why = f"a bug in dsc: {type(problem).__name__}: {why.partition(chr(10))[0]}"
    return {n: Problem(str(n.target), why, source_line(n)) for n in known or part.nodes}


def refusal(problems: Mapping[fx.Node, Problem]) -> UnsupportedOperator:
    """One error that names every operator that cannot be compiled, with the user's lines."""
    return UnsupportedOperator(
        "operators that cannot be compiled:\n" + "\n".join(told(problems)), hint=_CHOICES
    )
