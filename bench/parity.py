"""Compare compiled checkpoints with stock transformers, over a grid of configurations.

A case is a small legal configuration of the family. Its checkpoint is written by transformers'
`save_pretrained` with seeded random weights, compiled from the folder by `dsc.compile`, and run:
prefill, prefill in chunks, a batch of different lengths, and 32 decode steps past the original
YaRN length. Every logit is compared in fp32 with one full forward of transformers.

Where the router's decision hangs on less than ten times the score error that fp32 makes, the two
may choose different experts and both be right: such positions, and those that see them, are left
out and counted (at most 1%).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dsc
from dsc.frontends.family import ModelConfig, parse_config
from dsc.frontends.huggingface import stock_causal_lm

TOLERANCE = 1e-4
SCORE_ERROR = 1e-7
"""Measured error of the router's scores in fp32 between two orders of summation."""
MARGIN = 10 * SCORE_ERROR
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BASE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 96,
    "rope_parameters": YARN,
}
V2 = {"model_type": "deepseek_v2", "routed_scaling_factor": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3-no-q-lora": {"q_lora_rank": None},
    "v3-one-group": {"n_group": 1, "topk_group": 1},
    "v3-plain-rope": {"rope_parameters": PLAIN},
    "v3-wide-value": {"v_head_dim": 20, "qk_nope_head_dim": 10},
    "v3-halves": {"rope_interleave": False},
    "v3-unnormalised": {"norm_topk_prob": False},
    "v3-attention-bias": {"attention_bias": True},
    "v3-all-moe": {"first_k_dense_replace": 0, "n_shared_experts": 1},
    "v3-all-dense": {"first_k_dense_replace": 3},
    "v3-odd": {"hidden_size": 37, "num_attention_heads": 3, "kv_lora_rank": 11, "vocab_size": 61},
    "v2": {**V2, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
    "v2-lite": {**V2, "topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "v2-plain-rope": {**V2, "topk_method": "greedy", "rope_parameters": PLAIN},
}


@dataclass
class Result:
    """The largest relative logit error of each scenario, and what was left out of it."""

    case: str
    backend: str
    errors: dict[str, float] = field(default_factory=dict)
    positions: int = 0
    excluded: int = 0

    @property
    def worst(self) -> float:
        """The largest error relative to max(1, |logit|max); infinite if nothing was compared."""
        return max(self.errors.values(), default=float("inf"))

    @property
    def ok(self) -> bool:
        """Whether every error is within tolerance and few positions were left out."""
        return self.worst <= TOLERANCE and self.excluded <= 0.01 * self.positions

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        shown = {name: float(f"{error:.3g}") for name, error in self.errors.items()}
        return {
            "case": self.case, "backend": self.backend, "ok": self.ok, "errors": shown,
            "positions": self.positions, "excluded": self.excluded,
        }  # fmt: skip


def config_of(case: str) -> ModelConfig:
    """The configuration of a case."""
    return parse_config(BASE | CASES[case])


def make_checkpoint(case: str, folder: Path, seed: int = 0) -> nn.Module:
    """Write the case's checkpoint as transformers would, and return the stock model."""
    model: Any = randomise(stock_causal_lm(config_of(case), device="cpu"), seed)
    model.save_pretrained(folder)
    stock: nn.Module = model
    return stock


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights in place: norms about 1, matrices small, router biases of both signs."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        values = torch.randn(tensor.shape, generator=random)
        centre = 1.0 if "norm" in name else 0.0
        with torch.no_grad():
            tensor.copy_(centre + 0.15 * values)
    return module


class Oracle:
    """Stock transformers: full forward of one sequence, and which positions hang on a near-tie."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._margins: list[Tensor] = []
        for module in model.modules():
            if type(module).__name__.endswith("TopkRouter"):
                module.register_forward_hook(self._note)

    def logits(self, ids: Tensor) -> tuple[Tensor, int]:
        """Logits [S, vocab] of one sequence [S], and the first position that is in doubt."""
        self._margins.clear()
        with torch.no_grad():
            out: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0]
        doubtful = [int(i) for m in self._margins for i in (m < MARGIN).nonzero()[:, 0]]
        return out, min(doubtful, default=len(ids))

    def _note(self, router: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Each token's margin: the least gap at which another group or expert would be chosen."""
        scores = output[0].float()
        v3 = hasattr(router, "e_score_correction_bias")
        biased = scores.sigmoid() + router.e_score_correction_bias if v3 else scores.softmax(-1)
        margin = torch.full(biased.shape[:1], torch.inf)
        grouped_method = v3 or router.topk_method == "group_limited_greedy"
        if grouped_method and router.topk_group < router.num_group:
            grouped = biased.view(len(biased), router.num_group, -1)
            best = grouped.topk(2, -1)[0].sum(-1) if v3 else grouped.amax(-1)
            ranked = best.sort(-1, descending=True)[0]
            margin = ranked[:, router.topk_group - 1] - ranked[:, router.topk_group]
            kept = torch.zeros_like(best).scatter(1, best.topk(router.topk_group, -1)[1], 1.0)
            biased = grouped.masked_fill(kept[..., None] == 0, -torch.inf).flatten(1)
        ranked = biased.sort(-1, descending=True)[0]
        if router.top_k < ranked.shape[1]:
            gap = ranked[:, router.top_k - 1] - ranked[:, router.top_k]
            margin = torch.minimum(margin, gap)
        self._margins.append(margin)


def check(case: str, backend: str, folder: Path, steps: int = 32, seed: int = 0) -> Result:
    """Run every scenario of a case whose checkpoint lies in `folder` on a backend."""
    from transformers import AutoModelForCausalLM

    # "eager" experts take widths that torch's grouped GEMM refuses.
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    compiled = dsc.compile(
        folder, backend=backend, dtype="fp32", max_batch=4, max_context=96, prefill_chunk=16
    )
    return compare(compiled, Oracle(stock), Result(case, backend), steps, seed)


def compare(
    compiled: dsc.CompiledModel, oracle: Oracle, result: Result, steps: int = 32, seed: int = 0
) -> Result:
    """Fill `result`: prefill, chunked prefill, ragged batches of 1 to 4, decode."""
    vocab = compiled.manifest["config"]["vocab_size"]
    random = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(vocab, shape, generator=random)

    for batch in (1, 3):
        ids = tokens(batch, 13)
        ours = compiled.session().prefill(ids, all_logits=True)
        note(result, f"prefill batch {batch}", oracle, ids, ours, 0)
    ids = tokens(2, 37)
    ours = compiled.session().prefill(ids, all_logits=True)
    note(result, "chunked prefill", oracle, ids, ours, 0)
    lengths = [5, 21, 1, 18]
    ids = tokens(4, 21 + steps)
    session = compiled.session()
    prompt = torch.zeros(4, 21, dtype=torch.int64)
    for row, n in enumerate(lengths):
        prompt[row, :n] = ids[row, :n]
    rows = [session.prefill(prompt, lengths=lengths)]
    for step in range(steps):
        token = torch.stack([ids[row, n + step] for row, n in enumerate(lengths)])
        rows.append(session.decode(token))
    ours = torch.stack(rows, 1)
    for row, n in enumerate(lengths):
        used = ids[row : row + 1, : n + steps]
        note(result, "ragged prefill and decode", oracle, used, ours[row : row + 1], n - 1)
    return result


def note(
    result: Result, scenario: str, oracle: Oracle, ids: Tensor, ours: Tensor, first: int
) -> None:
    """Compare our logits of positions `first` on with the oracle's, row by row."""
    for row, mine in zip(ids, ours, strict=True):
        theirs, doubt = oracle.logits(row)
        known = max(0, min(doubt, len(row)) - first)
        result.positions += len(row) - first
        result.excluded += len(row) - first - known
        theirs, mine = theirs[first : first + known].float(), mine[:known].float()
        if known:
            scale = max(1.0, float(theirs.abs().max()))
            error = float((mine - theirs).abs().max()) / scale
            result.errors[scenario] = max(result.errors.get(scenario, 0.0), error)


def main() -> None:
    """Check cases on backends, all or those named on the command line, and print a line each."""
    import sys
    import tempfile

    asked = sys.argv[1:]
    backends = [a for a in asked if a not in CASES] or ["reference", "onnxruntime", "tvm"]
    for case in [a for a in asked if a in CASES] or list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(case, Path(folder))
            for backend in backends:
                result = check(case, backend, Path(folder))
                mark = "ok " if result.ok else "BAD"
                print(f"{mark} {case:18} {backend:12} {result.worst:.2e} {result.as_dict()}")


if __name__ == "__main__":
    main()
