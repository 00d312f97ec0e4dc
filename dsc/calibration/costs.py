"""What a calibration found, and which products it keeps for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from dsc.asked import WIDE
from dsc.calibration.measure import Cost, Harm
from dsc.calibration.products import Product
from dsc.errors import UsageError

MORE_BITS = 0.5
"""Bits a weight that may be spent on keeping products where nobody says how many."""
FINER = 2.0**-8
"""Of the harm of 4-bit codes, what 8 bits leave: steps are a sixteenth, and it goes by squares."""
NAMED = 4
"""Products that a note names."""


@dataclass(frozen=True)
class Kept:
    """A product that is kept: in more bits where `finer` is given, else as it was."""

    cost: Cost
    finer: Product | None = None

    @property
    def more(self) -> int:
        """The bytes that it takes beyond those of its codes."""
        product = self.cost.product
        return (self.finer.nbytes if self.finer else product.plain_bytes) - product.nbytes

    @property
    def words(self) -> str:
        """The element type that it is kept in."""
        return " ".join(self.finer.codes) if self.finer else self.cost.product.plain

    @property
    def patterns(self) -> list[str]:
        """Of `keep`, what keeps it so."""
        return [f"{each}{WIDE if self.finer else ''}" for each in self.cost.product.keep]


@dataclass(frozen=True)
class Found:
    """The costs of all products, the worst first, and which of them are kept.

    `together` is the harm of all in codes, `left` with those that are kept.
    """

    quant: str
    costs: Sequence[Cost]
    kept: Sequence[Kept]
    together: Harm
    left: Harm
    tokens: int

    @property
    def keep(self) -> list[str]:
        """Patterns that keep what is kept."""
        return [pattern for each in self.kept for pattern in each.patterns]

    @property
    def notes(self) -> list[str]:
        """What to tell a user, in a few lines."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        before, after = bits(self.costs), bits(self.costs, self.kept)
        yield f"all {len(self.costs)} products in {self.quant}: {_harm(self.together)}"
        if self.kept:
            names = [f"{each.cost.product.name} in {each.words}" for each in self.kept]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            yield f"kept for it: {', '.join(names[:NAMED])}{more}: {_harm(self.left)}"
        yield f"{after:.2f} bits a weight of products, scales counted; {before:.2f} with none kept"
        idle = sum(not cost.ran for cost in self.costs)
        if idle:
            yield f"{idle} products were not measured: the entry that ran does not read them"

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the operators in order, and what they cost together."""
        total = sum(cost.harm.value for cost in self.costs)
        kept = {id(each.cost): each.words for each in self.kept}
        return {
            "quant": self.quant,
            "measure": "kl" if self.together.count else "squared_error",
            "tokens": self.tokens,
            "bits": round(bits(self.costs), 4),
            "bits_kept": round(bits(self.costs, self.kept), 4),
            "keep": self.keep,
            "together": _harm_dict(self.together),
            "left": _harm_dict(self.left),
            "operators": [_cost_dict(cost, total, kept.get(id(cost), "")) for cost in self.costs],
        }


def bits(costs: Sequence[Cost], kept: Iterable[Kept] = ()) -> float:
    """Bits a weight over all products, some of them kept; scales counted."""
    elements = sum(cost.product.elements for cost in costs)
    more = sum(each.more for each in kept)
    return 8 * (sum(cost.product.nbytes for cost in costs) + more) / max(1, elements)


def choose(costs: Sequence[Cost], avg_bits: float | None) -> list[Kept]:
    """What to keep, and in what: most harm a byte first, while all stay within `avg_bits` a weight.

    Raises `UsageError` where the codes alone take more.
    """
    least = bits(costs)
    allowed = least + MORE_BITS if avg_bits is None else avg_bits
    if allowed < least:
        raise UsageError(
            f"avg_bits is {avg_bits:g}, and the codes with their scales take {least:.2f}",
            hint=f"give {math.ceil(100 * least) / 100:.2f} or more",
        )
    kept: dict[int, Kept] = {}
    steps = (step for cost in costs for step in _steps(cost))
    for _, step in sorted(steps, key=itemgetter(0), reverse=True):
        tried = {**kept, id(step.cost): step}
        if bits(costs, tried.values()) <= allowed:
            kept = tried
    return sorted(kept.values(), key=lambda each: each.cost.harm.value, reverse=True)


def _steps(cost: Cost) -> Iterator[tuple[float, Kept]]:
    """Ways to keep a product, and the harm that each takes away for each byte beyond the former.

    The former fits wherever the next does, and is worth more.
    """
    harm, taken = cost.harm.value, 0
    ways = [(Kept(cost, cost.product.finer), harm * (1 - FINER)), (Kept(cost), harm * FINER)]
    for kept, gain in ways if cost.product.finer else [(Kept(cost), harm)]:
        more = kept.more - taken
        if gain > 0 and more > 0:
            yield gain / more, kept
        taken = kept.more


def _harm(harm: Harm) -> str:
    losses = harm.losses
    if losses is None:
        return f"squared error {harm.value:.3g} of the results"
    before, after = map(math.exp, losses)
    return f"KL {harm.value:.3g} nats a token, perplexity {before:.3f} -> {after:.3f}"


def _harm_dict(harm: Harm) -> dict[str, Any]:
    losses = harm.losses
    found: dict[str, Any] = {"harm": harm.value}
    if losses is not None:
        found |= {"loss_before": losses[0], "loss": losses[1]}
    return found


def _cost_dict(cost: Cost, total: float, kept: str) -> Mapping[str, Any]:
    product = cost.product
    return {
        "operator": product.name,
        "weights": list(product.stored),
        "codes": list(product.codes),
        "elements": product.elements,
        "bytes": product.nbytes,
        "plain_bytes": product.plain_bytes,
        "activations": cost.rows.as_dict(),
        "error": cost.errors.relative,
        "calc_diff": cost.errors.calc_diff,
        **_harm_dict(cost.harm),
        "share": cost.harm.value / total if total else 0.0,
        "measured": cost.ran,
        "kept": kept,
    }
