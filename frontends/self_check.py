"""Whether a type of decoder is compiled rightly, found on a twin of it: the check nobody can skip.

Nothing is known here of any model type, so nothing vouches for one either: a mask that is dropped,
a state that a cache class keeps for itself or a router that is read wrongly gives other text, and
no error. So before a model is compiled, a twin of it (`shrunk.py`) with random weights is traced as
the model will be, and what the reference interpreter makes of the trace is held against the stock
class (`comparison.py`). Where they differ, the model is refused in one sentence.

The verdict is kept (`dsc/kept.py`) under the twin's configuration, the sources of what was loaded
of transformers, ours, and the versions of all packages; and under each configuration that has
that twin, which is found without importing torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from dsc.errors import DscError, UnsupportedArchitecture
from dsc.frontends import trace_cache
from dsc.frontends.longrope import SHORT, for_short_texts
from dsc.frontends.names import with_state
from dsc.frontends.shrunk import shrunk
from dsc.frontends.signature import Signature
from dsc.frontends.stock import HINT, StockConfig, clean, plain_experts, stock_config, stock_model
from dsc.frontends.temperature import for_plain_texts
from dsc.ir.lazy import torch
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.runtime.emission import Progress

if TYPE_CHECKING:
    from dsc.frontends.comparison import Difference, Step

KIND = "verdicts"
TOLERANCE = 1e-4
"""Of max(1, the largest logit): fp32 sums in another order differ by a tenth of it at most."""
SPREAD = 0.1
"""How far vectors of weights are from what their class begins with: norms from 1, biases from 0."""
MOST = 1 << 24
"""Parameters of a twin that is not small."""
GAIN = 1.2
"""How large matrices are, times 1 / sqrt(columns): logits of a few units, so that errors show."""
Classes = tuple[Any, Any]
"""The classes of a configuration object and of a model."""
STOCK: Classes = (None, None)
"""Those that transformers' tables name."""


@dataclass(frozen=True)
class Verdict:
    """What the check of a type found: `fault` is "" where it holds, else one sentence.

    `error` is the largest difference of a logit, relative to max(1, the largest), and `remark` a
    sentence on the stock class itself, where there is one.
    """

    fault: str = ""
    error: float = 0.0
    remark: str = ""

    @property
    def passes(self) -> bool:
        """Whether a model of the type may be compiled."""
        return not self.fault


def check_architecture(
    config: StockConfig, progress: Progress | None = None, classes: Classes = STOCK
) -> None:
    """Raise `UnsupportedArchitecture` with the verdict's sentence, where it is not good.

    What else is raised is said of the configuration by `stock_model`.
    """
    verdict = self_check(config, progress, classes)
    if not verdict.passes:
        raise UnsupportedArchitecture(
            f"{config.published or config.model_type} is not compiled: {verdict.fault}",
            config.where,
            HINT,
        )


def self_check(
    config: StockConfig, progress: Progress | None = None, classes: Classes = STOCK
) -> Verdict:
    """The verdict on a configuration's type, kept or found now, which takes seconds.

    `classes` are those of a model in memory, which need not be the stock ones.

    Raises:
        UnsupportedArchitecture, ConfigError: transformers builds no model of the configuration.
    """
    own = None
    if classes == STOCK:
        own = trace_cache.key_of_installed("transformers", config=config.described)
    if own is not None and (found := _kept(own)) is not None:
        return found
    if progress is not None:
        progress("checking the architecture", 0, 0)
    stock, signature = in_memory(twin(config, classes), classes)
    shared = trace_cache.key_of(stock, tolerance=TOLERANCE)
    verdict = _kept(shared) or examine(stock, signature)
    for key in (own, shared):
        _keep(key, verdict)
    return verdict


def twin(config: StockConfig, classes: Classes = STOCK) -> StockConfig:
    """The configuration of the same type, its class's defaults written out, shrunk."""
    text = stock_config(config, classes[0]).get_text_config(decoder=True)
    values = for_plain_texts(for_short_texts(shrunk(as_json(text.to_dict()))))
    small = clean({**values, "model_type": config.model_type}, config.where)
    return replace(small, where=config.where, published=config.published)


def as_json(value: Any) -> Any:
    """Values as `config.json` would have them; what it cannot hold is left out."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items() if not _is_unbounded(v)}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _is_unbounded(value: Any) -> bool:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, float) and not isfinite(each) for each in parts)


def in_memory(config: StockConfig, classes: Classes = STOCK) -> tuple[Any, Signature]:
    """A twin's stock model and its signature, found on meta before any memory is taken.

    Raises as `stock_model` and `signature_of` do, and `UnsupportedArchitecture` for one that is
    large although it was shrunk.
    """
    from dsc.frontends.states import signature_of

    stock = stock_model(config, classes=classes)
    signature = signature_of(stock)
    size = sum(parameter.numel() for parameter in stock.parameters())
    if size > MOST:
        raise UnsupportedArchitecture(
            f"the small {type(stock).__name__} to check it on has {size:,} parameters: widths"
            " of names that dsc does not know",
            config.where,
        )
    return stock_model(config, device="cpu", classes=classes), signature


def examine(
    stock: Any, signature: Signature, compiled: Callable[[Program], None] | None = None
) -> Verdict:
    """Trace a small stock causal LM in memory, run the trace, and compare. Changes its weights.

    `compiled` is given the program where all is well, and may raise what is wrong with it.
    """
    from dsc.frontends.comparison import differences, own_cache_error
    from dsc.frontends.stock import facts_of

    name = type(stock).__name__
    disturb(stock)
    if told := does_not_run(stock):
        return Verdict(told)
    worst = 0.0
    try:
        program = traced(stock, signature)
        step = interpreted(program, signature)
        with torch.no_grad(), plain_experts(stock.config):
            for each in differences(step, signature, stock, facts_of(stock.config).positions):
                worst = max(worst, each.error)
                if each.error > TOLERANCE:
                    return Verdict(_differs(name, each), each.error)
            apart = own_cache_error(stock, signature)
        if compiled is not None:
            compiled(program)
    except DscError as refusal:
        return Verdict(one_line(refusal.what))
    except Exception as problem:
        return Verdict(f"{name} cannot be traced: {type(problem).__name__}: {one_line(problem)}")
    own = f"with its own cache {name} gives other logits than without one"
    return Verdict("", worst, own if apart > TOLERANCE else "")


def does_not_run(stock: Any) -> str:
    """Why a stock model in memory does not run by itself, or "" where it does."""
    from dsc.frontends.comparison import logits_of

    try:
        with torch.no_grad(), plain_experts(stock.config):
            logits_of(stock, torch.zeros(2, 3, dtype=torch.int64))
    except Exception as problem:
        told = f"{type(problem).__name__}: {one_line(problem)}"
        return f"{type(stock).__name__} itself does not run: {told}"
    return ""


def traced(stock: Any, signature: Signature) -> Program:
    """The trace of a stock causal LM's step, over the weights that it has in memory."""
    from dsc.frontends.causal_lm import CausalLMStep, trace_step

    module = CausalLMStep(stock, signature, SHORT)
    program = trace_step(module, signature, Limits().symbols)
    return with_state(program, module)


def interpreted(program: Program, signature: Signature) -> Step:
    """The step as the reference interpreter runs it."""
    from dsc.ir.interpreter import Interpreter

    interpreter = Interpreter(program)
    inputs, outputs = signature.input_names(), signature.output_names()

    def step(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = interpreter.run("step", dict(zip(inputs, given, strict=True)))
        return [found[output] for output in outputs]

    return step


def disturb(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights in place, none of which is where its class begins.

    A norm of ones or a bias of zeros that is left out changes nothing, and is not missed.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in sorted(module.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=random)
            if tensor.dim() > 1:
                tensor.copy_(drawn * GAIN / tensor.shape[-1] ** 0.5)
            else:
                begun = tensor.float().nan_to_num(0.0, 0.0, 0.0).clamp(-8, 8)
                tensor.copy_(begun + SPREAD * drawn)


def _differs(name: str, found: Difference) -> str:
    how = f"by {found.error:.2g} of the largest" if isfinite(found.error) else "beyond all measure"
    return f"its step differs from {name} {how}, over {found.scenario}"


def one_line(problem: object, most: int = 200) -> str:
    """A message without its lines' ends and addresses, cut where it is long."""
    words = " ".join(re.sub(r" at 0x\w+", "", str(problem)).split()) or type(problem).__name__
    return words if len(words) <= most else words[: most - 1] + "…"


def _kept(key: Mapping[str, Any] | None) -> Verdict | None:
    entry = trace_cache.entry(KIND, key) if key is not None else None
    with suppress(TypeError, KeyError):
        return None if entry is None else Verdict(**entry["verdict"])
    return None


def _keep(key: Mapping[str, Any] | None, verdict: Verdict) -> None:
    if key is not None:
        trace_cache.keep_entry(KIND, key, {"verdict": asdict(verdict)})
