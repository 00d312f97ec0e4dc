"""What an attention mask lets through, found by evaluating it.

A mask is raised only when it is causal: query i of sequence b sees rows j <= lengths[b] + i of a
cache, rows j <= t - s + i (the last query sees all), or rows j <= i. Anything else (a sliding
window, chunks, padding) is refused with the pair of rows that it treats differently; it is never
dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dsc.errors import DscError
from dsc.ir.dims import Dim, bounds, evaluate
from dsc.ir.graph import Operand, Value, Weight
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.ir.weights import MetaSource, sources
from dsc.ir.weights import evaluate as evaluate_weight
from dsc.rewrite import lift
from dsc.rewrite.rule import Reject, reject
from dsc.rewrite.scope import Scope

MAX_ELEMENTS = 1 << 24
"""The largest mask that is evaluated to see past a constant, such as a window's width."""
HIDDEN = -1e4
"""An additive mask hides what it lowers by more than this."""


@dataclass(frozen=True)
class Causal:
    """A causal mask; `lengths` is the value it reads them from, if it reads them.

    `from_start`: query i sees rows j <= i, however many rows there are.
    """

    lengths: Value | None
    from_start: bool = False


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
        found = lift.proven(scope, key, partial(_prove, scope, asked, mask))
        if not found:
            return Causal(region.leaves[0] if region.leaves else None, from_start)  # type: ignore[arg-type]
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
        why = _compare(value, inverse, past, None) if past >= 0 else "it has more rows than columns"
        if not why:
            return Causal(None, from_start)
        reasons.append(why)
    return reject(reasons[0], mask)


@dataclass(frozen=True)
class _Asked:
    """What is to be proved of a mask."""

    region: lift.Region
    inverse: bool
    from_start: bool


def _prove(scope: Scope, asked: _Asked, mask: Value) -> str:
    """Why the mask is not causal; empty when it is."""
    region = asked.region
    rows, total = mask.type.shape[-2:]
    cases = _cases(scope, region, rows, total)
    if isinstance(cases, str):
        return cases
    for seed, sizes in enumerate(cases):
        why = _check(asked, sizes, evaluate(rows, sizes), evaluate(total, sizes), seed)
        if why:
            return why
    return ""


def _cases(
    scope: Scope, region: lift.Region, rows: Dim, total: Dim
) -> Sequence[Mapping[str, int]] | str:
    """Sizes to try: small ones, and for every constant written in the mask some beyond it."""
    small = lift.assignments(region.graph)
    cases: list[Mapping[str, int]] = list(small)
    cases += [{**small[0], name: size} for name in small[0] for size in (5, 9)]
    largest = bounds(total, scope.program.symbols).hi
    for constant in sorted(region.constants()):
        if not 3 < abs(constant) < largest or abs(constant) != int(abs(constant)):
            continue
        for name in small[0]:
            sizes = {**small[0], name: int(abs(constant)) + 3}
            if evaluate(total, sizes) * evaluate(rows, sizes) > MAX_ELEMENTS:
                return f"the mask holds the constant {constant:g}, too far out to be tested"
            cases.append(sizes)
    return cases


def _check(asked: _Asked, sizes: Mapping[str, int], rows: int, total: int, seed: int) -> str:
    """Compare one evaluation with `j <= lengths[b] + i`."""
    region = asked.region
    past = 0 if asked.from_start else total - rows
    if past < 0:
        return ""  # sizes that no step has
    lengths = [lift.integers(x, sizes, seed, past + 1) for x in region.leaves]
    try:
        (value,) = lift.run(region.graph, lift.Case(sizes, lengths))
    except (DscError, RuntimeError) as problem:
        return f"the mask does not run: {str(problem).splitlines()[0]}"
    start = lengths[0][:, None, None] if lengths else torch.full((1, 1, 1), past)
    return _compare(value, asked.inverse, past, start)


def _compare(value: torch.Tensor, inverse: bool, past: int, start: torch.Tensor | None) -> str:
    """How a mask differs from `j <= start + i`, with `past` rows before the first; or empty."""
    rows, total = value.shape[-2:]
    start = torch.full((1, 1, 1), past) if start is None else start
    seen = torch.arange(total)[None, None] <= start + torch.arange(rows)[None, :, None]
    shown = _visible(~value if inverse and value.dtype == torch.bool else value)
    if isinstance(shown, str):
        return shown
    flat = shown.reshape(-1, rows, total) if shown.dim() < 4 else shown.amax(1)
    if shown.dim() == 4 and not torch.equal(flat, shown.amin(1)):
        return "the mask differs between heads"
    for b, i, j in _different(flat, seen):
        verb = "hides" if bool(seen.expand_as(flat)[b, i, j]) else "shows"
        return f"the mask {verb} row {j} at row {past + i}: it is not causal (a window, chunks?)"
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
