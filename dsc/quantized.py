"""`dsc.QuantizedModel`: a model whose weights are quantised, called as models are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsc.api import CompiledModel, compile
from dsc.errors import UsageError
from dsc.generation import GREEDY, generate, room
from dsc.runtime.session import Session
from dsc.runtime.tokens import read_ids
from dsc.sampling import Sampling

WEIGHTS = {8: "int8", 4: "int4"}
"""What `quant` of `dsc.compile` is called by bits of a weight."""
ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "weight_bits": tuple(WEIGHTS),
    "activation_bits": (8, 16),
    "quant_scheme": ("symmetric",),
}
"""Keys of `quant_config` with few values, and those."""
PASSED = (
    "group_size", "keep", "quant_embedding", "calibrate", "nsamples", "seqlen", "avg_bits",
)  # fmt: skip
"""Keys that are options of `dsc.compile` as they stand."""


class QuantizedModel:
    """A causal language model with quantised weights: `dsc.compile`, and a model to call.

        q = dsc.QuantizedModel("path/to/checkpoint", {"weight_bits": 4, "calibrate": "book.txt"})
        logits = q(ids)                     # [B, S, vocab]
        tokens = q.generate(ids, 20)        # [B, S + 20]

    `quant_config` may hold `weight_bits` (8 or 4), `activation_bits` (8, where the backend's
    kernels take rows so, or 16: rows stay in the compute type), `quant_scheme` ("symmetric";
    scales without zero points are what there is), and `group_size`, `keep`,
    `quant_embedding`, `calibrate`, `nsamples`, `seqlen`, `avg_bits` as `dsc.compile` takes them,
    which also takes all other `options`.
    """

    def __init__(
        self, model: Any, quant_config: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        asked = {"weight_bits": 8, **(quant_config or {})}
        _check(asked)
        passed = {key: asked[key] for key in (*PASSED, "activation_bits") if key in asked}
        self.compiled: CompiledModel = compile(
            model, quant=WEIGHTS[asked["weight_bits"]], **passed, **options
        )

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the compile; `quantisation` is what calibrating found."""
        return self.compiled.report

    def __call__(self, ids: Any) -> Any:
        """Logits [B, S, vocab] of all positions of `ids` [B, S] (or [S]), in their kind."""
        return self._session(ids).prefill(ids, all_logits=True)

    def generate(
        self,
        ids: Any,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> list[list[int]]:
        """Each row of `ids` [B, S] (or [S]) with up to so many tokens after it, until a stop id."""
        rows, _ = read_ids(ids, "batch")
        prompts: Sequence[list[int]] = rows.tolist()
        room(rows.shape[1], self.compiled.max_context)
        session = self.compiled.session(max_batch=1)
        return [
            prompt + list(
                generate(session, prompt, max_new_tokens, sampling=sampling, seed=seed, stop=stop)
            )
            for prompt in prompts
        ]  # fmt: skip

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the artifact folder, for `dsc.load`. Raises `ArtifactError`."""
        return self.compiled.save(path, force)

    def _session(self, ids: Any) -> Session:
        rows, _ = read_ids(ids, "batch")
        return self.compiled.session(max_batch=len(rows))


def _check(asked: Mapping[str, Any]) -> None:
    """Raise one `UsageError` for all that a `quant_config` may not hold."""
    known = [*ALLOWED, *PASSED]
    wrong = []
    for key, value in asked.items():
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            wrong.append(f"no key is called {key!r}" + (f", {near[0]} is" if near else ""))
        elif key in ALLOWED and not _among(value, ALLOWED[key]):
            wrong.append(f"{key} is {value!r}, not {' or '.join(map(repr, ALLOWED[key]))}")
    if wrong:
        raise UsageError(f"quant_config: {'; '.join(wrong)}", hint=f"keys are {', '.join(known)}")


def _among(value: object, allowed: Sequence[object]) -> bool:
    return any(type(value) is type(each) and value == each for each in allowed)
