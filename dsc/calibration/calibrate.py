"""Calibrating: what quantising costs on a text, and what to keep, before a compile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc import pipeline
from dsc.asked import QUANT
from dsc.backends.base import Backend
from dsc.calibration.asked import Asked
from dsc.calibration.costs import Found, choose
from dsc.calibration.drawing import DRAWING, draw
from dsc.calibration.measure import Trial
from dsc.calibration.products import find_products, with_finer
from dsc.calibration.texts import ASKS, named_batches, text_ids, token_batches
from dsc.errors import UsageError
from dsc.frontends.folder import TOKENIZER
from dsc.frontends.load import Loaded
from dsc.ir.formats import ROWS
from dsc.ir.program import Program
from dsc.passes.quantize_activations import QuantizeActivations
from dsc.passes.quantize_weights import NONE, QuantizeWeights
from dsc.rewrite.base import PassReport
from dsc.runtime.emission import Progress
from dsc.targets import Target


def measured(
    loaded: Loaded,
    backend: Backend,
    target: Target,
    options: pipeline.PipelineOptions,
    asked: Asked,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], pipeline.PipelineOptions]:
    """Calibrate what was loaded; what was found, and the options that keep the worst.

    Notes and a drawing go to what is loaded.
    """
    tokenizer = loaded.files.get(TOKENIZER)
    found = calibrate(loaded.program, backend, target, options, asked, tokenizer, progress)
    loaded.notes += found.notes
    told = found.as_dict()
    loaded.files[DRAWING] = draw(told).encode()
    return told, replace(options, keep=(*options.keep, *found.keep))


def calibrate(
    program: Program,
    backend: Backend,
    target: Target,
    options: pipeline.PipelineOptions,
    asked: Asked,
    tokenizer: Path | bytes | None = None,
    progress: Progress | None = None,
) -> Found:
    """Run a program on what is asked, with each of its products quantised alone.

    Several ranks run what one does: it is measured as a whole. Raises `UsageError`.
    """
    if not program.has_weights:
        raise UsageError("weights without values cannot be calibrated", hint="give the weights")
    ids = None
    if program.is_causal_lm:
        if isinstance(asked.given, Mapping):
            raise UsageError("a language model is calibrated on a text", hint=ASKS)
        ids = text_ids(asked.given, tokenizer)
    whole = replace(options, ranks=1)
    first = pipeline.quantising(options.quant)
    ready, rest = pipeline.until(program, backend, target, whole, first)
    each = rest[0]
    if isinstance(each, QuantizeWeights):
        each = replace(each, table=NONE)  # an embedding is no product
    products = find_products(ready, each.run(ready, PassReport()))
    if isinstance(each, QuantizeWeights):
        finer = replace(each, codes="i8").run(ready, PassReport())
        products = with_finer(products, find_products(ready, finer))
    if not products:
        raise UsageError("no product has a weight that could be quantised", where=program.name)
    batches = (
        named_batches(ready, asked.given) if ids is None
        else token_batches(ready, ids, asked.nsamples, asked.seqlen)
    )  # fmt: skip
    codes = QUANT[options.quant]
    taken = any(isinstance(x, QuantizeActivations) and codes in x.weights for x in rest)
    trial = Trial(ready, products, ROWS[codes] if taken else "")

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("calibrating", done, total)

    costs = trial.measure(batches, tell)
    if not all(math.isfinite(cost.harm.value) for cost in costs):
        raise UsageError(
            "the results on this text are no numbers, with or without codes",
            where=program.name,
            hint="calibrate on another text, or see dsc verify",
        )
    kept = choose(costs, asked.avg_bits)
    chosen = {id(each.cost): each.finer for each in kept}
    left = [chosen.get(id(cost), cost.product) for cost in costs]
    together = trial.harm(batches, products)
    return Found(
        quant=options.quant,
        costs=sorted(costs, key=lambda cost: cost.harm.value, reverse=True),
        kept=kept,
        together=together,
        left=trial.harm(batches, [each for each in left if each is not None]) if kept else together,
        tokens=together.count,
    )
