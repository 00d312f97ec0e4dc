"""What a layer of experts costs in its two forms, from its sizes and a backend's kernels.

direct    the operator `experts`: one kernel for gate, up and activation of the chosen experts, one
          for down and the weighted sum.
grouped   dispatch, grouped_linear, activation, grouped_linear, combine.

Costs are in bytes: what moves, or what could have moved while the flops were done, whichever is
more, and for each kernel what could have moved while it started.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertKernels:
    """A backend's kernels for experts, as data for the pass that chooses the form.

    `rereads`: the direct kernel reads an expert's weights again for every token that chose it; else
    once. `tile`: rows to which a grouped GEMM pads each expert's. `balance`: flops that the machine
    does in the time of a byte. `launch`: bytes that it moves in the time that a kernel takes to
    start. `kernels`: launches of the grouped form beyond those of the direct one. `of`: the
    backend whose kernels these are, as pass options name it.
    """

    rereads: bool
    tile: int
    balance: float
    launch: int
    kernels: int = 4
    of: str = ""


def expected_experts(experts: int, chosen: int, tokens: int) -> float:
    """How many distinct experts `tokens` choose, `chosen` each, evenly and independently.

    >>> expected_experts(64, 6, 1), round(expected_experts(64, 6, 8), 1)
    (6.0, 34.9)
    """
    return experts * (1 - (1 - chosen / experts) ** tokens)


@dataclass(frozen=True)
class ExpertLayer:
    """Sizes: experts, of them chosen by a token, hidden width d, inner width i, bytes a number.

    `weights` are the bytes of one expert, as they are stored.
    """

    experts: int
    top_k: int
    width: int
    inner: int
    itemsize: int
    weights: int

    def used(self, tokens: int) -> float:
        """Experts that some token chose, on average."""
        return expected_experts(self.experts, self.top_k, tokens)

    def direct(self, tokens: int, kernels: ExpertKernels) -> float:
        """The cost of the direct form."""
        pairs = tokens * self.top_k
        read = pairs if kernels.rereads else self.used(tokens)
        moved = read * self.weights + 2 * pairs * self.inner * self.itemsize
        return max(moved, self._flops(pairs) / kernels.balance)

    def grouped(self, tokens: int, kernels: ExpertKernels) -> float:
        """The cost of the grouped form: rows are sorted, padded, and their results gathered."""
        pairs, used = tokens * self.top_k, self.used(tokens)
        rows = max(pairs + used * (kernels.tile - 1) / 2, used * kernels.tile)
        traffic = pairs * (6 * self.inner + 4 * self.width) * self.itemsize
        moved = used * self.weights + traffic
        return max(moved, self._flops(rows) / kernels.balance) + kernels.kernels * kernels.launch

    def _flops(self, rows: float) -> float:
        return 6 * rows * self.width * self.inner


TIE = 1.05
"""Costs nearer than this cannot be told apart by measuring; see `direct_pays`."""


def direct_pays(
    layer: ExpertLayer, kernels: ExpertKernels, low: int, high: int
) -> tuple[bool, tuple[float, float]]:
    """Whether the direct form is to be taken for `low` to `high` tokens, and both `regrets`.

    The form with the smaller regret is. Where they tie, the grouped form is taken if tokens share
    experts (more pairs than experts): its buffers are planned with all others, and are fused.
    """
    direct, grouped = regrets(layer, kernels, low, high)
    if max(direct, grouped) <= TIE:
        return high * layer.top_k <= layer.experts, (direct, grouped)
    return direct <= grouped, (direct, grouped)


def regrets(layer: ExpertLayer, kernels: ExpertKernels, low: int, high: int) -> tuple[float, float]:
    """How much the direct and the grouped form cost above the better one, at worst in a range.

    The range of tokens is tried at its bounds and at every doubling between them.
    """
    tokens, worst = max(low, 1), (1.0, 1.0)
    while True:
        direct, grouped = layer.direct(tokens, kernels), layer.grouped(tokens, kernels)
        best = min(direct, grouped)
        worst = (max(worst[0], direct / best), max(worst[1], grouped / best))
        if tokens >= high:
            return worst
        tokens = min(2 * tokens, high)
