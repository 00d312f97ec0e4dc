"""What a calibration found, and which products it keeps for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsc.calibration.measure import Cost, Harm
from dsc.errors import UsageError

MORE_BITS = 0.5
"""Bits a weight that may be spent on keeping products where nobody says how many."""
NAMED = 4
"""Products that a note names."""


@dataclass(frozen=True)
class Found:
    """The costs of all products, the worst first, and of those `kept` in the compute type.

    `together` is the harm of all in codes, `left` with those that are kept as they were.
    """

    quant: str
    costs: Sequence[Cost]
    kept: Sequence[Cost]
    together: Harm
    left: Harm
    tokens: int

    @property
    def keep(self) -> list[str]:
        """Patterns that keep what is kept."""
        return [pattern for cost in self.kept for pattern in cost.product.keep]

    @property
    def notes(self) -> list[str]:
        """What to tell a user, in a few lines."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        before, after = bits(self.costs), bits(self.costs, self.kept)
        yield f"all {len(self.costs)} products in {self.quant}: {_harm(self.together)}"
        if self.kept:
            names = [cost.product.name for cost in self.kept]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            yield f"kept for it: {', '.join(names[:NAMED])}{more}: {_harm(self.left)}"
        yield f"{after:.2f} bits a weight of products, scales counted; {before:.2f} with none kept"
        idle = sum(not cost.ran for cost in self.costs)
        if idle:
            yield f"{idle} products were not measured: the entry that ran does not read them"

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the operators in order, and what they cost together."""
        total = sum(cost.harm.value for cost in self.costs)
        kept = set(map(id, self.kept))
        return {
            "quant": self.quant,
            "measure": "kl" if self.together.count else "squared_error",
            "tokens": self.tokens,
            "bits": round(bits(self.costs), 4),
            "bits_kept": round(bits(self.costs, self.kept), 4),
            "keep": self.keep,
            "together": _harm_dict(self.together),
            "left": _harm_dict(self.left),
            "operators": [_cost_dict(cost, total, id(cost) in kept) for cost in self.costs],
        }


def bits(costs: Sequence[Cost], kept: Sequence[Cost] = ()) -> float:
    """Bits a weight over all products, some of them kept; scales counted."""
    elements = sum(cost.product.elements for cost in costs)
    more = sum(cost.product.plain_bytes - cost.product.nbytes for cost in kept)
    return 8 * (sum(cost.product.nbytes for cost in costs) + more) / max(1, elements)


def choose(costs: Sequence[Cost], avg_bits: float | None) -> list[Cost]:
    """What to keep: most harm a byte first, as long as all stay within `avg_bits` a weight.

    Raises `UsageError` where the codes alone take more.
    """
    least = bits(costs)
    allowed = least + MORE_BITS if avg_bits is None else avg_bits
    if allowed < least:
        raise UsageError(
            f"avg_bits is {avg_bits:g}, and the codes with their scales take {least:.2f}",
            hint=f"give {math.ceil(100 * least) / 100:.2f} or more",
        )
    kept: list[Cost] = []
    for cost in sorted(costs, key=_worth, reverse=True):
        if _worth(cost) > 0 and bits(costs, [*kept, cost]) <= allowed:
            kept.append(cost)
    return sorted(kept, key=lambda cost: cost.harm.value, reverse=True)


def _worth(cost: Cost) -> float:
    """The harm of a product for each byte that keeping it takes."""
    more = cost.product.plain_bytes - cost.product.nbytes
    return cost.harm.value / more if more > 0 else 0.0


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


def _cost_dict(cost: Cost, total: float, kept: bool) -> Mapping[str, Any]:
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
