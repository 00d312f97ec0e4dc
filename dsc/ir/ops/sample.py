"""Choosing tokens where the logits are."""

from __future__ import annotations

from typing import Any

from dsc.ir.choosing import Choice, chosen
from dsc.ir.lazy import torch
from dsc.ir.op import op
from dsc.ir.traits import Form, Role, Traits, Within, nothing


def _sample(logits: Any, sampling: Any, seeds: Any) -> Any:
    scores = logits.float().numpy()
    found = torch.empty(logits.shape[:2], dtype=torch.int64)
    for b, (options, (key, draw)) in enumerate(zip(sampling.tolist(), seeds.tolist(), strict=True)):
        temperature, count, mass, share = options
        choice = Choice(temperature, int(count), mass, share)
        for at in range(logits.shape[1]):
            found[b, at] = chosen(scores[b, at], choice, key, draw + at)
    return found


sample = op(
    "sample(logits: F[b, l, v], sampling: f32[b, 4], seeds: i64[b, 2]) -> i64[b, l]",
    Traits(Role.OTHER, Form.LOWERED, flops=nothing),
    reference=_sample,
    doc="The token that each row of logits gives: the likeliest, or a drawn one; -1 where one logit"
    " is NaN or the largest infinite. `sampling` has temperature, top-k, top-p and min-p of each"
    " sequence, `seeds` its key and the number of its first draw (`dsc.ir.choosing`).",
    example="f32[2,3,9], f32[2,4]=1, i64[2,2]=9",
    gives={0: Within("-1", "v-1")},
)
