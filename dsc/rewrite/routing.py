"""Near-ties of routers, for comparing two programs.

With fp32 noise a top-k decision flips now and then, and one flipped expert changes all that
follows. So the second program takes the first one's experts, and a decision counts as wrong only
where the first one's margin exceeds ten times the difference of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc.ir.graph import Node
from dsc.ir.lazy import torch
from dsc.ir.op import lookup
from dsc.ir.ops.moe import routing_scores, with_shared

SAFETY = 10.0
NEAR = 1e-5
"""A margin below this is a near-tie where no second set of scores is at hand."""


@dataclass
class Decision:
    """One run of a router: the experts [n, k], the scores [n, e], the margins [n]."""

    experts: Any
    scores: Any
    margins: Any


@dataclass
class Routing:
    """Records the routers of one run, or imposes those of an earlier one."""

    oracle: list[Decision] | None = None
    seen: list[Decision] = field(default_factory=list)
    forced: int = 0
    wrong: int = 0

    def __call__(self, node: Node, operands: list[Any]) -> tuple[Any, ...] | None:
        """Run a router here; every other node is left to the interpreter."""
        if node.op != "route":
            return None
        definition = lookup("route")
        attrs = node.attrs
        index, weights = definition.reference(*operands, **attrs)
        decision = decide(operands, attrs, index[..., : attrs["top_k"]])
        self.seen.append(decision)
        if self.oracle is None or len(self.seen) > len(self.oracle):
            return index, weights
        known = self.oracle[len(self.seen) - 1]
        if known.experts.shape != decision.experts.shape:
            return index, weights
        flipped = (known.experts.sort(-1)[0] != decision.experts.sort(-1)[0]).any(-1)
        noise = (known.scores - decision.scores).abs().max()
        wrong = flipped & (known.margins > SAFETY * noise)
        self.wrong += int(wrong.sum())
        self.forced += int(flipped.sum())
        chosen = known.experts.reshape(*index.shape[:-1], -1)
        w = weigh(operands, attrs, chosen)
        return with_shared(chosen, w, len(operands[1]), attrs["shared"])  # type: ignore[no-any-return]

    @property
    def decisions(self) -> int:
        """Number of (router, token) decisions that were seen."""
        return sum(len(d.margins) for d in self.seen)


def weigh(operands: list[Any], attrs: Mapping[str, Any], chosen: Any) -> Any:
    """The weights of chosen experts: unbiased scores, normalised, scaled."""
    w = routing_scores(operands[0], operands[1], attrs["score"]).gather(-1, chosen)
    if attrs["normalise"]:
        w = w / (w.sum(-1, keepdim=True) + 1e-20)
    return w * attrs["scale"]


def decide(operands: list[Any], attrs: Mapping[str, Any], index: Any) -> Decision:
    """The decision that gave `index`, with its smallest margin over groups and experts."""
    bias = operands[2] if len(operands) > 2 else None
    scores = routing_scores(operands[0], operands[1], attrs["score"])
    scores = scores.reshape(-1, scores.shape[-1])
    biased = scores if bias is None else scores + bias
    margins = torch.full((len(scores),), float("inf"))
    if attrs["keep"] < attrs["groups"]:
        grouped = biased.unflatten(-1, (attrs["groups"], -1))
        top2 = attrs["group_score"] == "top2"
        best = grouped.topk(2, -1)[0].sum(-1) if top2 else grouped.amax(-1)
        ranked = best.sort(-1, descending=True)[0]
        margins = torch.minimum(margins, ranked[:, attrs["keep"] - 1] - ranked[:, attrs["keep"]])
        kept = torch.zeros_like(best).scatter(-1, best.topk(attrs["keep"], -1)[1], 1.0) > 0
        biased = grouped.masked_fill(~kept[..., None], attrs["fill"]).flatten(-2)
    if attrs["top_k"] < biased.shape[-1]:
        ranked = biased.sort(-1, descending=True)[0]
        margins = torch.minimum(margins, ranked[:, attrs["top_k"] - 1] - ranked[:, attrs["top_k"]])
    return Decision(index.reshape(-1, index.shape[-1]), scores, margins)
