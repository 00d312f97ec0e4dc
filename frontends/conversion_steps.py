"""The steps by which transformers makes declared tensors of stored ones, as weight expressions.

Forward a step takes expressions, by the pattern that their names were found by, to expressions;
nothing is read. Backward it takes the shapes that are declared to those that must be stored, and
says how many there must be: so one expert that is missing or misshapen is told by its own name
instead of as a stack that is too short. Each step is named after what it does and translates one
class of `core_model_loading.py` (transformers 5.23).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from dsc.ir.dims import Dim
from dsc.ir.weights import Apply, WeightExpr, apply

Shape: TypeAlias = tuple[Dim, ...]
Values: TypeAlias = Mapping[str, Sequence[WeightExpr]]
"""Expressions by pattern: of a source, then of a target."""


class Untranslated(Exception):
    """A step of transformers that is not known here."""


@dataclass(frozen=True)
class Wanted:
    """What must be stored under the names of one source.

    `shape` of each, `None` where it cannot be told, and how many of them, `None` for any number.
    """

    shape: Shape | None
    count: int | None = None


Shapes: TypeAlias = Mapping[str, Wanted]


@dataclass(frozen=True)
class Making:
    """What a converter is about: its patterns, and the declared shape of each target."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    declared: Mapping[str, Shape]

    def key(self, source: str) -> str:
        """The key of what is made of one source: its own while there are several."""
        return source if len(self.sources) > 1 else self.targets[0]


@dataclass(frozen=True)
class Step(ABC):
    """One step of a converter. `dim` is the axis that it is about."""

    dim: int = 0

    @abstractmethod
    def forward(self, given: Values, making: Making) -> Values:
        """What it makes. Raises `TypeMismatch` for shapes that do not go together."""

    @abstractmethod
    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """What it needs for `wanted`; `pieces` are the tensors that it is given."""

    def pieces(self, given: int, making: Making) -> int:
        """How many tensors come out, of as many."""
        return given

    def to_json(self) -> dict[str, Any]:
        """Its name and its numbers."""
        return {"step": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Join(Step):
    """`Concatenate`: all tensors of all sources, in the order of the sources, along an axis."""

    def forward(self, given: Values, making: Making) -> Values:
        """One tensor."""
        parts = [part for source in making.sources for part in given.get(source, ())]
        return {making.targets[0]: [joined(parts, self.dim)]}

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """Equal parts, or unknown ones where the axis has none."""
        shape = wanted[making.targets[0]].shape
        axis = self.dim % len(shape) if shape else 0
        if not shape or not isinstance(shape[axis], int) or shape[axis] % pieces:  # type: ignore[operator]
            return dict.fromkeys(making.sources, Wanted(None))
        part = (*shape[:axis], shape[axis] // pieces, *shape[axis + 1 :])
        return dict.fromkeys(making.sources, Wanted(part))

    def pieces(self, given: int, making: Making) -> int:
        """One."""
        return 1


@dataclass(frozen=True)
class Stack(Step):
    """`MergeModulelist`: the tensors of each source along a new axis."""

    def forward(self, given: Values, making: Making) -> Values:
        """One tensor for each source."""
        return {making.key(source): [self._stacked(parts)] for source, parts in given.items()}

    def _stacked(self, parts: Sequence[WeightExpr]) -> WeightExpr:
        made = apply("stack", *parts)
        if self.dim % made.type.rank == 0:
            return made
        axes = list(range(1, made.type.rank))
        axes.insert(self.dim % made.type.rank, 0)
        return apply("permute", made, dims=tuple(axes))

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """As many as the axis has."""
        found: dict[str, Wanted] = {}
        for source in making.sources:
            shape = wanted[making.key(source)].shape
            axis = self.dim % len(shape) if shape else 0
            count = shape[axis] if shape else None
            each = (*shape[:axis], *shape[axis + 1 :]) if shape else None
            found[source] = Wanted(each, count if isinstance(count, int) else None)
        return found

    def pieces(self, given: int, making: Making) -> int:
        """One of each source."""
        return len(making.sources)


@dataclass(frozen=True)
class Cut(Step):
    """`Chunk` and, where each part is as large as its target, `Split`: a tensor for each target."""

    as_declared: bool = False

    def forward(self, given: Values, making: Making) -> Values:
        """Slices, in the order of the targets."""
        whole = _only(given)
        axis = self.dim % whole.type.rank
        length, count = whole.type.shape[axis], len(making.targets)
        sizes: list[Dim] = [-(-length // count)] * count
        if self.as_declared:
            sizes = [making.declared[target][axis] for target in making.targets]
        made: dict[str, list[WeightExpr]] = {}
        start: Dim = 0
        for place, (target, size) in enumerate(zip(making.targets, sizes, strict=True)):
            end = length if place == count - 1 else start + size
            made[target] = [apply("slice", whole, axis=axis, start=start, end=end)]
            start = end
        return made

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """The targets, one after the other."""
        shapes = [wanted[target].shape for target in making.targets]
        first = shapes[0]
        if first is None:
            return {making.sources[0]: Wanted(None)}
        axis = self.dim % len(first)
        length: Dim = 0
        for shape in shapes:
            length = length + (shape[axis] if shape else 0)
        return {making.sources[0]: Wanted((*first[:axis], length, *first[axis + 1 :]))}


@dataclass(frozen=True)
class Alternate(Step):
    """`Interleave`: elements at even places, then those at odd ones, or back."""

    inverse: bool = False

    def forward(self, given: Values, making: Making) -> Values:
        """A tensor of the same shape."""
        whole = _only(given)
        axis = self.dim % whole.type.rank
        half = whole.type.shape[axis] // 2
        return {
            making.targets[0]: [_regrouped(whole, axis, (2, half) if self.inverse else (half, 2))]
        }

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """The same."""
        return wanted


@dataclass(frozen=True)
class Transpose(Step):
    """`Transpose`: two axes change places; `as_needed` only where the shape is not right yet."""

    other: int = 1
    as_needed: bool = False

    def forward(self, given: Values, making: Making) -> Values:
        """The turned tensor."""
        whole = _only(given)
        target = making.targets[0]
        key = making.sources[0] if len(making.targets) > 1 else target
        if self.as_needed and whole.type.shape == making.declared[target]:
            return {key: [whole]}
        axes = self._turned(tuple(range(whole.type.rank)))
        return {key: [apply("permute", whole, dims=axes)]}

    def _turned(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        turned = list(axes)
        turned[self.dim], turned[self.other] = turned[self.other], turned[self.dim]
        return tuple(turned)

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """The shape turned, unknown where it may be either."""
        return {
            key: Wanted(None if self.as_needed or not each.shape else self._turned(each.shape))
            for key, each in wanted.items()
        }


@dataclass(frozen=True)
class RopeRows(Step):
    """`PermuteForRope`: rows of each head from pairs of neighbours to two halves, or back.

    `names`: parts of the patterns that it is done to, all where there are none.
    """

    heads: int = 1
    inverse: bool = False
    names: tuple[str, ...] = ()

    def forward(self, given: Values, making: Making) -> Values:
        """Tensors of the same shapes."""
        alone = len(making.sources) == len(making.targets) == 1
        return {
            making.targets[0] if alone else key: [self._turned(part) for part in parts]
            if not self.names or any(name in key for name in self.names) else parts
            for key, parts in given.items()
        }  # fmt: skip

    def _turned(self, part: WeightExpr) -> WeightExpr:
        rows = part.type.shape[0]
        half = rows // self.heads // 2
        pairs = (self.heads, 2, half) if self.inverse else (self.heads, half, 2)
        return _regrouped(part, 0, pairs)

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """The same."""
        return wanted


@dataclass(frozen=True)
class Other(Step):
    """A step that has no translation, which is no fault until a tensor needs it."""

    name: str = ""

    def forward(self, given: Values, making: Making) -> Values:
        """An error."""
        raise Untranslated(self.name)

    def backward(self, wanted: Shapes, making: Making, pieces: int) -> Shapes:
        """Nothing is known."""
        return dict.fromkeys(making.sources, Wanted(None))


STEPS: Mapping[str, type[Step]] = {
    each.__name__: each for each in (Join, Stack, Cut, Alternate, Transpose, RopeRows, Other)
}


def step_of(operation: Any, config: Any) -> Step:
    """The step that one of transformers' operations is, for a model of this configuration."""
    name, told = type(operation).__name__, vars(operation)
    shards = told.get("num_shards_attribute")
    match name:
        case "Concatenate":
            return Join(told["dim"])
        case "MergeModulelist":
            return Stack(told["dim"])
        case "Chunk" if shards is None:
            return Cut(told["dim"])
        case "Split":
            return Cut(told["dim"], True)
        case "Interleave":
            return Alternate(told["dim"], told["inverse"])
        case "Transpose":
            return Transpose(told["dim0"], told["dim1"], told["check_dims"])
        case "PermuteForRope":
            part = getattr(config, told["subconfig_key"] or "", config)
            heads = getattr(part, "num_attention_heads", 1)
            return RopeRows(0, heads, told["inverse"], tuple(told["permute_layer_names"] or ()))
    return Other(0, name)


def step_from_json(kept: Mapping[str, Any]) -> Step:
    """The step that was kept. Raises `KeyError`, `TypeError` for anything else."""
    told: dict[str, Any] = {k: v for k, v in kept.items() if k != "step"}
    told = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return STEPS[kept["step"]](**told)


def made_by(steps: Sequence[Step], given: Values, making: Making) -> Values:
    """What all steps make, by target. Raises `TypeMismatch`, `Untranslated`."""
    for step in steps:
        given = step.forward(given, making)
    return given


def wanted_by(steps: Sequence[Step], making: Making, pieces: int) -> dict[str, Wanted]:
    """What must be stored under the names of each source; `pieces` are found in all."""
    counts = [max(pieces, len(making.sources))]
    for step in steps:
        counts.append(step.pieces(counts[-1], making))
    wanted: Shapes = {target: Wanted(shape) for target, shape in making.declared.items()}
    for step, count in zip(reversed(steps), reversed(counts[:-1]), strict=True):
        wanted = step.backward(wanted, making, count)
    return {s: wanted.get(s) or next(iter(wanted.values())) for s in making.sources}


def joined(parts: Sequence[WeightExpr], axis: int) -> WeightExpr:
    """Parts along an axis; stacks expert by expert, so that one at a time is in memory."""
    if len(parts) == 1:
        return parts[0]
    axis %= parts[0].type.rank
    stacks = [part for part in parts if isinstance(part, Apply) and part.op == "stack"]
    if axis and len(stacks) == len(parts) and len({len(stack.args) for stack in stacks}) == 1:
        rows = zip(*(stack.args for stack in stacks), strict=True)
        return apply("stack", *(joined(row, axis - 1) for row in rows))
    return apply("concat", *parts, axis=axis)


def _only(given: Values) -> WeightExpr:
    return next(iter(given.values()))[0]


def _regrouped(whole: WeightExpr, axis: int, groups: tuple[Dim, ...]) -> WeightExpr:
    """An axis seen as groups, the last two of which change places, and joined again."""
    shape = whole.type.shape
    parted = apply("reshape", whole, shape=(*shape[:axis], *groups, *shape[axis + 1 :]))
    axes = list(range(parted.type.rank))
    last = axis + len(groups) - 1
    axes[last - 1], axes[last] = last, last - 1
    return apply("reshape", apply("permute", parted, dims=tuple(axes)), shape=shape)
