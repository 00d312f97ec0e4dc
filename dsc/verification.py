"""Does a compiled model compute what its source computes? Teacher-forced logits, compared.

Two answers near a tie may differ for rounding alone, so greedy agreement is required only where the
oracle's margin between its two best tokens exceeds ten times the measured error of a logit; the
positions left out are counted. The error of a logit is its root mean square over all positions and
tokens: with the largest error in its place nothing could ever disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Logits = NDArray[np.float32]

MARGIN = 10.0
DECODED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model is from its oracle over `positions` predictions.

    `greedy_agreement` is the share of equal greedy tokens among the positions compared, `excluded`
    the share left out as ties. `perplexity` and `oracle_perplexity` are None where the tokens were
    no text.
    """

    positions: int
    max_logit_diff: float
    rms_logit_diff: float
    greedy_agreement: float
    excluded: float
    perplexity: float | None
    oracle_perplexity: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the numbers under their names."""
        return asdict(self)


def compare(ours: Logits, oracle: Logits, ids: Sequence[int], is_text: bool = True) -> Comparison:
    """Compare logits [S, vocab] that two models give after each of the `ids` [S]."""
    import numpy as np

    if ours.shape != oracle.shape or len(ids) != len(ours):
        raise ValueError(f"logits {ours.shape} and {oracle.shape} for {len(ids)} tokens")
    difference = ours.astype(np.float64) - oracle.astype(np.float64)
    rms = float(np.sqrt(np.mean(difference**2)))
    best = np.partition(oracle, -2, axis=-1)[:, -2:]
    clear = (best[:, 1] - best[:, 0]) > MARGIN * rms
    equal = ours.argmax(-1) == oracle.argmax(-1)
    return Comparison(
        positions=len(ids),
        max_logit_diff=float(np.abs(difference).max()),
        rms_logit_diff=rms,
        greedy_agreement=float(equal[clear].mean()) if clear.any() else 1.0,
        excluded=float(1.0 - clear.mean()),
        perplexity=perplexity(ours, ids) if is_text else None,
        oracle_perplexity=perplexity(oracle, ids) if is_text else None,
    )


def perplexity(logits: Logits, ids: Sequence[int]) -> float:
    """Return exp of the mean negative log-likelihood of each id after the first.

    A uniform guess over the vocabulary has its size as perplexity:

    >>> import numpy as np
    >>> round(perplexity(np.zeros((3, 7), np.float32), [1, 2, 3]), 6)
    7.0
    """
    import numpy as np

    scores = logits[:-1].astype(np.float64)
    top = scores.max(-1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(scores - top).sum(-1))
    chosen = scores[np.arange(len(scores)), np.asarray(ids[1:])]
    return float(np.exp((normaliser - chosen).mean()))


def session_logits(compiled: Any, ids: Sequence[int]) -> Logits:
    """Return a compiled model's logits [S, vocab], the last ones by decode steps.

    So both entries are compared: the prompt goes through prefill, the last `DECODED_TOKENS` tokens
    (fewer in a short text) through decode.
    """
    import numpy as np

    array = np.asarray(ids, dtype=np.int64)
    prompt = max(1, len(ids) - DECODED_TOKENS)
    session = compiled.session(max_batch=1, max_context=len(ids))
    rows = [np.asarray(session.prefill(array[None, :prompt], all_logits=True))[0]]
    rows += [np.asarray(session.decode(array[i : i + 1])) for i in range(prompt, len(ids))]
    return np.concatenate([row.astype(np.float32) for row in rows])


def transformers_logits(checkpoint: Path, ids: Sequence[int]) -> Logits:
    """Return the logits [S, vocab] of the stock transformers class in fp32, in one forward."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=False
    )
    with torch.inference_mode():
        logits = model.eval()(torch.tensor([list(ids)])).logits[0]
    found: Logits = logits.float().numpy()
    return found
