"""Does a compiled model compute what its source computes? Teacher-forced logits, compared.

Two questions, answered apart:

*Are the logits right?* Every position has an error: the root mean square, over the vocabulary, of
what its logits differ from the oracle's. Rounding explains so much of it and no more: in bf16 and
fp16 that is measured, as the error of the reference backend run in the same type against itself in
fp32; in fp32 it is derived, from the size of the logits and the depth of the model. The typical
position of each phase, the median, may be `ROOM` times as far off as that. Positions off by
`STRAY` times what is typical are counted: fp32 has none; in 16 bits a router at a tie chooses
another expert now and then, in the yardstick as well, and even that moves logits by less than
`SPREAD` of the range in which they lie.

*Are the greedy tokens the same?* Two answers near a tie may differ for rounding alone, so a
position is compared only where the oracle's margin between its two best tokens exceeds `MARGIN`
times the error found there, less what moves all logits alike. What is left out is counted, and too
much of it is no pass. That an error is not its own excuse is what the first question is for.

*What is the oracle?* The source in fp32, for what passes and kernels make of it together. Where a
program is not to compute what its source says, since weights or rows are rounded to codes, that
would count what codes cost as an error. Then kernels are held to the program's own text, which is
interpreted in fp32 over the weights that are stored (`held_to_text`), and the distance from the
source is a figure. Where rows are codes a number that is off in its last bit may become the next
code, which moves what follows by far more, and so more codes: how far all this comes is measured
as well, with plain weights moved by what fp32 may round, one way and the other, since a number
close to the border between two codes crosses it in one of them alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dsc.backends.reference import ReferenceExecutable
from dsc.ir.lazy import torch
from dsc.ir.ops.quant import makes_codes, takes_codes
from dsc.ir.program import Program
from dsc.ir.types import PRECISIONS, DType
from dsc.rewrite.widen import FP32_ROUNDINGS, in_fp32
from dsc.runtime.session import Session

Logits = NDArray[np.float32]

MARGIN = 10.0
"""Errors of a logit by which the oracle's best token must lead."""
ROOM = 2.0
"""How many times what rounding explains a typical position may be off."""
STRAY = 4.0
"""A position that is so many times as far off as rounding explains typically is a stray."""
STRAYS, STRAY_SHARE = 2, 0.02
"""In 16 bits: strays may be so many for one of the yardstick's, and a share of all besides."""
SPREAD = 0.5
"""How far off a position may be in 16 bits, in standard deviations of its logits."""
MOST_EXCLUDED = 0.5
"""The share of positions that may be left out as ties."""
DECODED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Check:
    """One figure that must stay within a bound."""

    what: str
    found: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether it does. A figure that is no number does not."""
        return self.found <= self.bound


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a model is from its oracle over `positions` predictions.

    `greedy_agreement` is the share of equal greedy tokens among the positions compared (0 where
    none was), `excluded` the share left out as ties. `perplexity` and `oracle_perplexity` are None
    where the tokens were no text. `checks` hold the errors of logits and their bounds.
    """

    positions: int
    max_logit_diff: float
    rms_logit_diff: float
    greedy_agreement: float
    excluded: float
    perplexity: float | None
    oracle_perplexity: float | None
    checks: tuple[Check, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers under their names."""
        return {**asdict(self), "checks": [{**asdict(c), "ok": c.ok} for c in self.checks]}

    def failures(self, require: float = 1.0, most_excluded: float = MOST_EXCLUDED) -> list[str]:
        """Say in words what speaks against the model; nothing where it is right."""
        found = [f"{c.what}: {c.found:.3g}, at most {c.bound:.3g}" for c in self.checks if not c.ok]
        if not math.isfinite(self.max_logit_diff):
            found.append("a logit is NaN or infinite: no text can tell more")
        elif self.excluded > most_excluded:
            found.append(
                f"{self.excluded:.2%} of the positions are near-ties that say nothing, at most"
                f" {most_excluded:.2%} may be; take another text (--text), or more of it (--tokens)"
            )
        if self.excluded < 1.0 and self.greedy_agreement < require:
            found.append(
                f"greedy tokens agree at {self.greedy_agreement:.2%} of the clear positions,"
                f" {require:.2%} required"
            )
        return found


@dataclass(frozen=True, slots=True)
class Noise:
    """The error [S] of each position that rounding to an element type explains.

    `measured` by a yardstick, strays included, or derived. Where it has `codes` to choose between,
    nothing but its own worst position says how far one may be off.
    """

    errors: Logits
    measured: bool
    codes: bool = False

    @staticmethod
    def of(rounded: Logits, exact: Logits, codes: bool = False) -> Noise:
        """What a type does to a model: its logits [S, vocab] in it, and in fp32."""
        return Noise(_rms(rounded.astype(np.float64) - exact.astype(np.float64)), True, codes)

    @staticmethod
    def largest(several: Sequence[Noise]) -> Noise:
        """Of each position the largest of what several yardsticks found."""
        return replace(several[0], errors=np.max([each.errors for each in several], axis=0))

    @staticmethod
    def in_fp32(oracle: Logits, layers: int) -> Noise:
        """What sums in another order may do in fp32 to the logits [S, vocab] of so many layers."""
        return Noise(FP32_ROUNDINGS * layers**0.5 * _rms(oracle.astype(np.float64)), False)


def compare(
    ours: Logits, oracle: Logits, ids: Sequence[int], noise: Noise | None, is_text: bool = True
) -> Comparison:
    """Compare logits [S, vocab] that two models give after each of the `ids` [S].

    Without `noise` nothing is held to a bound: the numbers are figures.
    """
    lengths = {len(ids), len(ours), *(() if noise is None else (len(noise.errors),))}
    if ours.shape != oracle.shape or len(lengths) > 1:
        raise ValueError(f"logits {ours.shape} and {oracle.shape} for {len(ids)} tokens")
    exact = oracle.astype(np.float64)
    difference = ours.astype(np.float64) - exact
    best = np.partition(exact, -2, axis=-1)[:, -2:]
    clear = (best[:, 1] - best[:, 0]) > MARGIN * difference.std(-1)
    equal = ours.argmax(-1) == oracle.argmax(-1)
    return Comparison(
        positions=len(ids),
        max_logit_diff=float(np.abs(difference).max()),
        rms_logit_diff=float(_rms(difference.reshape(-1))),
        greedy_agreement=float(equal[clear].mean()) if clear.any() else 0.0,
        excluded=float(1.0 - clear.mean()),
        perplexity=perplexity(ours, ids) if is_text else None,
        oracle_perplexity=perplexity(oracle, ids) if is_text else None,
        checks=() if noise is None else tuple(_checks(_rms(difference), noise, exact.std(-1))),
    )


def _checks(errors: Any, noise: Noise, spread: Any) -> Iterator[Check]:
    """The errors [S] of positions beside what they may be; `spread` [S] is that of the logits."""
    prompt = prompt_length(len(errors))
    for name, at in (("prefill", slice(0, prompt)), ("decode", slice(prompt, None))):
        if len(errors[at]):
            typical = float(np.median(noise.errors[at]))
            found = float(np.median(errors[at]))
            yield Check(f"a logit's error at a typical position of {name}", found, ROOM * typical)
    far = STRAY * float(np.median(noise.errors))
    allowed = 0
    if noise.measured:
        allowed = STRAYS * int((noise.errors > far).sum()) + math.ceil(STRAY_SHARE * len(errors))
    count = len(errors) - int((errors <= far).sum())  # what is no number is a stray
    yield Check(f"positions where a logit is off by more than {far:.3g}", count, allowed)
    if noise.measured:
        worst = int(np.argmax(errors / spread))
        own = ROOM * float(noise.errors.max()) if noise.codes else 0.0
        yield Check(
            f"a logit's error at the worst position ({worst})",
            float(errors[worst]),
            max(SPREAD * float(spread[worst]), far, own),
        )


def _rms(values: Any) -> Any:
    return np.sqrt(np.mean(np.square(values), axis=-1))


def compute_dtype(program: Program) -> str:
    """Return the element type that a program computes in: that of most of its weights."""
    sizes: Counter[str] = Counter()
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    for kind in program.weight_types().values():
        if kind.dtype in names:
            sizes[names[kind.dtype]] += cast(int, kind.nbytes)
    return max(sizes, key=sizes.__getitem__, default="fp32")


def rounds(program: Program) -> bool:
    """Whether a program rounds to codes what its source has as numbers: weights, or rows of x."""
    made = any(map(makes_codes, program.weights.values()))
    return made or _takes_codes(program)


def _takes_codes(program: Program) -> bool:
    return any(takes_codes(node) for graph in program.entries.values() for node in graph.nodes)


@dataclass(frozen=True)
class Interpreted:
    """A program as the interpreter runs it, where a compiled model is expected."""

    program: Program

    def session(self, max_batch: int, max_context: int) -> Session:
        """A session over it."""
        return Session(ReferenceExecutable(self.program), self.program, max_batch, max_context)


def held_to_text(
    program: Program,
    ids: Sequence[int],
    logits: Callable[[Any, Sequence[int]], Logits] | None = None,
) -> tuple[Logits, Noise]:
    """Logits [S, vocab] of a program's own text in fp32 over its weights, and what may be off.

    `program` is one as it is compiled: entries as kernels were made for them, weights as they are
    stored. In bf16 and fp16 the text in that type says what rounding does; in fp32 that is derived,
    or measured where a number's last bit decides between two codes. `logits` says in which steps a
    model takes the ids: `session_logits` where nothing is said.
    """
    run = logits or session_logits
    exact = run(Interpreted(in_fp32(program)), ids)
    codes = _takes_codes(program) or any(s.type.format is not None for s in program.states)
    if compute_dtype(program) != "fp32":
        return exact, Noise.of(run(Interpreted(program), ids), exact, codes)
    if codes:
        moved = (in_fp32(program, share) for share in (FP32_ROUNDINGS, -FP32_ROUNDINGS))
        return exact, Noise.largest(
            [Noise.of(run(Interpreted(p), ids), exact, codes) for p in moved]
        )
    return exact, Noise.in_fp32(exact, layers_of(program.meta.get("config", {})))


def layers_of(config: Mapping[str, Any]) -> int:
    """How many layers a configuration says."""
    return int(config.get("num_hidden_layers", 1))


def perplexity(logits: Logits, ids: Sequence[int]) -> float:
    """Return exp of the mean negative log-likelihood of each id after the first.

    A uniform guess over the vocabulary has its size as perplexity:

    >>> import numpy as np
    >>> round(perplexity(np.zeros((3, 7), np.float32), [1, 2, 3]), 6)
    7.0
    """
    scores = logits[:-1].astype(np.float64)
    top = scores.max(-1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(scores - top).sum(-1))
    chosen = scores[np.arange(len(scores)), np.asarray(ids[1:])]
    return float(np.exp((normaliser - chosen).mean()))


def prompt_length(tokens: int) -> int:
    """Return how many of some tokens are prompt; the rest goes through decode."""
    return max(1, tokens - DECODED_TOKENS)


def session_logits(compiled: Any, ids: Sequence[int]) -> Logits:
    """Return a compiled model's logits [S, vocab], the last ones by decode steps.

    So both entries are compared: the prompt goes through prefill, the last `DECODED_TOKENS` tokens
    (fewer in a short text) through decode.
    """
    array = np.asarray(ids, dtype=np.int64)
    prompt = prompt_length(len(ids))
    session = compiled.session(max_batch=1, max_context=len(ids))
    rows = [np.asarray(session.prefill(array[None, :prompt], all_logits=True))[0]]
    rows += [np.asarray(session.decode(array[i : i + 1])) for i in range(prompt, len(ids))]
    return np.concatenate([row.astype(np.float32) for row in rows])


def transformers_logits(
    checkpoint: Path,
    ids: Sequence[int],
    max_context: int | None = None,
    rope_scaling: str | None = None,
) -> Logits:
    """Return the logits [S, vocab] of the stock transformers class in fp32, in one forward.

    The class is built and its weights are read as for tracing: no code of the checkpoint runs,
    whatever `auto_map` says, and FP8 weights are dequantised by us (transformers takes a block to
    be rows // rows of scales, which is another one where the last is partial). The other options
    are those that a model was compiled with: they say which angles its positions have.
    """
    from dsc.frontends.huggingface import load_checkpoint
    from dsc.frontends.rope_scaling import RopeScaling

    scaling = RopeScaling.parse(rope_scaling) if rope_scaling is not None else None
    model = load_checkpoint(checkpoint, DType.f32, scaling).stock(max_context)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    found: Logits = logits.float().numpy()
    return found
