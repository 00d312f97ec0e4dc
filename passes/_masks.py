"""What an attention mask lets through, found by evaluating it.

A mask is raised only when it is causal: query i of sequence b, which is row lengths[b] + i of a
cache, row t - s + i (the last query sees all), or row i, sees no row after its own; and of those
before it all, the last `window`, or those of its own chunk. How wide these are is read off the
constants written in the mask, and proved at sizes around it. Anything else (padding, a bias) is
refused with the pair of rows that it treats differently; it is never dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dsc.errors import DscError
from dsc.ir.dims import Dim, bounds, evaluate, free_symbols
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.lazy import torch
from dsc.ir.ops.nn import sees
from dsc.ir.types import DType
from dsc.ir.weights import MetaSource, sources
from dsc.ir.weights import evaluate as evaluate_weight
from dsc.rewrite import lift
from dsc.rewrite.rule import Reject, reject
from dsc.rewrite.scope import Scope

MAX_ELEMENTS = 1 << 24
"""The largest mask that is evaluated to see past a constant, such as a window's width."""
HIDDEN = -1e4
"""A score at or below this is hidden, and so is what an additive mask lowers by more."""


@dataclass(frozen=True)
class Causal:
    """A causal mask; `lengths` is the value it reads them from, if it reads them.

    `from_start`: query i is row i, however many rows there are. `window` and `chunk` as
    `attention` has them; 0 is none.
    """

    lengths: Value | None
    from_start: bool = False
    window: int = 0
    chunk: int = 0


_Sight = tuple[int, int]
"""A window and a chunk."""


@dataclass(frozen=True)
class _Shown:
    """What one evaluation shows: bool[b, s, t], and the row [b, 1, 1] of each first query."""

    seen: torch.Tensor
    start: torch.Tensor


def classify(scope: Scope, mask: Operand, inverse: bool = False) -> Causal | Reject:
    """Prove that a mask [.., s, t] is causal, by lengths, by t - s or by 0; else say why not.

    `inverse`: the mask is true where a row is hidden.
    """
    if not isinstance(mask, Value):
        return _folded(scope, mask, inverse)
    region = lift.cut(scope, [mask], lambda v: False)
    if region is None:
        return reject("the mask is computed from too much to be looked through", mask)
    foreign = [x for x in region.leaves if x.type.dtype is not DType.i64 or x.type.rank != 1]
    if foreign or len(region.leaves) > 1 or mask.type.rank < 2:
        return reject("the mask depends on more than the lengths", *(foreign or region.leaves))
    reasons = []
    for from_start in (False,) if region.leaves else (False, True):
        key = ("mask", region.key, inverse, from_start)
        asked = _Asked(region, inverse, from_start)
        found = lift.proven(scope, key, partial(_find, scope, asked, mask))
        if not isinstance(found, str):
            lengths = region.leaves[0] if region.leaves else None
            return Causal(lengths, from_start, *found)  # type: ignore[arg-type]
        reasons.append(found)
    return reject(reasons[0], mask)


def _folded(scope: Scope, mask: Weight, inverse: bool) -> Causal | Reject:
    """The same of a mask whose sizes were known, so that it has become a constant."""
    expr = scope.program.weights.get(mask.name)
    if expr is None or any(True for _ in sources(expr)) or mask.type.rank < 2:
        return reject("the mask is a weight", mask)
    value = evaluate_weight(expr, MetaSource({}))
    rows, total = value.shape[-2:]
    reasons = []
    for from_start in (False, True):
        past = 0 if from_start else total - rows
        if past < 0:
            reasons.append("it has more rows than columns")
            continue
        shown = _shown(value, inverse, torch.full((1, 1, 1), past))
        found = shown if isinstance(shown, str) else _sight([shown], _widths(shown))
        if not isinstance(found, str):
            return Causal(None, from_start, *found)
        reasons.append(found)
    return reject(reasons[0], mask)


def _widths(shown: _Shown) -> list[_Sight]:
    """Of how many rows a window or a chunk would be: where the first row is hidden first."""
    hidden = (~shown.seen[0, :, 0]).nonzero()
    first = int(hidden[0]) + int(shown.start[0]) if len(hidden) else 0
    return [(first, 0), (0, first)] if first > 0 else []


@dataclass(frozen=True)
class _Asked:
    """What is to be proved of a mask."""

    region: lift.Region
    inverse: bool
    from_start: bool


def _find(scope: Scope, asked: _Asked, mask: Value) -> _Sight | str:
    """The window and the chunk of a causal mask; or why it is none."""
    rows, total = mask.type.shape[-2:]
    cases = _cases(scope, asked.region, rows, total)
    if isinstance(cases, str):
        return cases
    views = []
    for seed, sizes in enumerate(cases):
        past = 0 if asked.from_start else evaluate(total, sizes) - evaluate(rows, sizes)
        if past < 0:
            continue  # sizes that no step has
        shown = _evaluated(asked, sizes, past, seed)
        if isinstance(shown, str):
            return shown
        views.append(shown)
    written = [int(abs(c)) for c in sorted(asked.region.constants()) if float(c).is_integer()]
    widths = [n for c in written for n in (c, c - 1, c + 1) if n > 0]
    return _sight(views, [*((n, 0) for n in widths), *((0, n) for n in written if n)])


def _sight(views: Sequence[_Shown], guesses: Sequence[_Sight]) -> _Sight | str:
    """The first of no window, or a guess, that all views agree with; or how they differ."""
    plain = ""
    for guess in ((0, 0), *dict.fromkeys(guesses)):
        why = next((w for w in (_difference(v, *guess) for v in views) if w), "")
        if not why:
            return guess
        plain = plain or why
    return plain


def _cases(
    scope: Scope, region: lift.Region, rows: Dim, total: Dim
) -> Sequence[Mapping[str, int]] | str:
    """Sizes to try: small ones, and for every constant written in the mask some beyond it."""
    small = lift.assignments(region.graph)
    cases: list[Mapping[str, int]] = list(small)
    cases += [{**small[0], name: size} for name in small[0] for size in (5, 9)]
    ranges = scope.program.symbols
    largest, cached = bounds(total, ranges).hi, free_symbols(total) - free_symbols(rows)
    for constant in sorted(region.constants()):
        if not 3 < abs(constant) < largest or abs(constant) != int(abs(constant)):
            continue
        beyond = int(abs(constant)) + 3
        for name in small[0]:
            if name not in cached and name in ranges and ranges[name].hi < abs(constant):
                continue  # it never goes so far
            sizes = {**small[0], name: beyond}
            if evaluate(total, sizes) * evaluate(rows, sizes) > MAX_ELEMENTS:
                return f"the mask holds the constant {constant:g}, too far out to be tested"
            cases.append(sizes)
            twice = {**small[0], name: 2 * beyond}
            if evaluate(total, twice) * evaluate(rows, twice) <= MAX_ELEMENTS:
                cases.append(twice)
    return cases


def _evaluated(asked: _Asked, sizes: Mapping[str, int], past: int, seed: int) -> _Shown | str:
    """What the mask shows at some sizes; of the sequences the last has all rows of its past."""
    lengths = [lift.integers(x, sizes, seed, past + 1) for x in asked.region.leaves]
    for each in lengths:
        each[-1:] = past
    try:
        (value,) = lift.run(asked.region.graph, lift.Case(sizes, lengths))
    except (DscError, RuntimeError) as problem:
        return f"the mask does not run: {str(problem).splitlines()[0]}"
    start = lengths[0][:, None, None] if lengths else torch.full((1, 1, 1), past)
    return _shown(value, asked.inverse, start)


def _shown(value: torch.Tensor, inverse: bool, start: torch.Tensor) -> _Shown | str:
    """A mask as what it shows of each sequence; it must be the same for all heads."""
    rows, total = value.shape[-2:]
    shown = _visible(~value if inverse and value.dtype == torch.bool else value)
    if isinstance(shown, str):
        return shown
    if shown.dim() < 4:
        return _Shown(shown.reshape(-1, rows, total), start)
    heads = shown.reshape(shown.shape[0], -1, rows, total)
    if not torch.equal(heads.amax(1), heads.amin(1)):
        return "the mask differs between heads"
    return _Shown(heads[:, 0], start)


def _difference(view: _Shown, window: int, chunk: int) -> str:
    """How a mask differs from a causal one with this window and chunk; or empty."""
    rows, total = view.seen.shape[-2:]
    last = view.start + torch.arange(rows)[None, :, None]
    wanted = sees(last, torch.arange(total)[None, None], window, chunk)
    for b, i, j in _different(view.seen, wanted):
        each = wanted.expand_as(view.seen) if len(wanted) == 1 else wanted
        verb = "hides" if bool(each[b, i, j]) else "shows"
        row = int(last.expand(len(each), rows, 1)[b, i, 0])
        return f"the mask {verb} row {j} at row {row}: it is neither causal nor a window nor chunks"
    return ""


def _different(found: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    if found.shape[0] not in (1, wanted.shape[0]) and wanted.shape[0] != 1:
        yield (0, 0, 0)
        return
    yield from (found != wanted).nonzero()[:1].tolist()


def _visible(mask: torch.Tensor) -> torch.Tensor | str:
    """A mask as bool: true is seen. An additive one must be 0 where it is seen."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= HIDDEN
    if bool((mask[~hidden] != 0).any()):
        return "the mask adds a bias to what it shows"
    return ~hidden
