"""Whatever a user names as a model becomes a traced program and the files that go with it.

A checkpoint folder, a name on the Hub, a `.py` file with `build(config)`, a built-in name, a `.dsc`
text, a transformers causal LM in memory, or a `Program`: one function reads them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.chat_template import CHAT
from dsc.errors import ConfigError, UnsupportedArchitecture, UsageError
from dsc.frontends import python_file, trace_cache
from dsc.frontends.chat_template import find_chat
from dsc.frontends.conversions import Conversions, conversions_of
from dsc.frontends.facts import Facts
from dsc.frontends.family import states_of
from dsc.frontends.folder import TOKENIZER
from dsc.frontends.generation_config import Settings, load_generation, settings_of
from dsc.frontends.hub import located, model_name
from dsc.frontends.longrope import has_longrope, told_of
from dsc.frontends.names import with_state, with_weights
from dsc.frontends.rope_scaling import RopeScaling
from dsc.frontends.schema import DTYPES
from dsc.frontends.self_check import check_architecture
from dsc.frontends.signature import Signature
from dsc.frontends.stock import (
    StockConfig,
    clean,
    completed,
    facts_of,
    stock_model,
)
from dsc.frontends.temperature import has_temperature
from dsc.frontends.text import read_program
from dsc.frontends.tokenizer import find_tokenizer
from dsc.ir.formats import SCALE_FMT, UE8M0
from dsc.ir.lazy import torch
from dsc.ir.limits import OPEN, Limits
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import (
    DictSource,
    MetaSource,
    Source,
    evaluate,
    source_types,
)
from dsc.models import configs
from dsc.runtime.emission import Progress

if TYPE_CHECKING:
    from torch import nn

READING = "reading the model"
"""What `progress` is told first once a model is found."""
BUILT_IN = {"v3": "v3.py", "tiny": "v3.py", "tiny-v3": "v3.py"}
CONSTANT = "constant."
"""Prefix of the keys of values that the tracer found in the module and no checkpoint holds."""


@dataclass
class Loaded:
    """A traced program, what to copy beside it, and what to tell the user."""

    program: Program
    source: str = ""
    files: dict[str, Path | bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """The limits that a user asked for; without `max_context` they are the model's own.

    `untraced` is told where nothing is kept of a trace, before modelling code is imported;
    `scaling` extends the context of a checkpoint.
    """

    max_batch: int
    max_context: int | None
    prefill_chunk: int
    check_facts: Callable[[Facts], None] | None = None
    untraced: Callable[[], None] | None = None
    scaling: RopeScaling | None = None

    def check(self, facts: Facts) -> None:
        """Raise what the configuration alone rules out, before anything large is read."""
        self.limits(facts)
        if self.check_facts is not None:
            self.check_facts(facts)

    def check_unscaled(self) -> None:
        """Raise `UsageError` where a rope scaling is asked for and there is no config.json."""
        if self.scaling is not None:
            raise UsageError(
                "--rope-scaling is written into a checkpoint's config.json, and this is none",
                hint="name a checkpoint folder, or ORG/NAME of the Hub",
            )

    def limits(self, facts: Facts) -> Limits:
        """The limits of a model with these facts; one without positions has none of its own.

        Raises:
            UsageError: more is asked than the model has positions for. Beyond them rope rotates
                by angles that the model never saw, and nothing says so in its text.
        """
        positions = facts.positions
        if positions is None:
            return self.whatever()
        if self.max_context is not None and self.max_context > positions:
            raise UsageError(
                f"max_context {self.max_context} is beyond the model's {positions} positions "
                f"({facts.position_name} in config.json)",
                hint=f"give at most {positions}; a model that was trained further says so there, "
                "and --rope-scaling yarn:N extends one by N",
            )
        return Limits(self.max_batch, self.max_context or positions, self.prefill_chunk)

    def whatever(self) -> Limits:
        """The limits of a program, which has no configuration."""
        return Limits(self.max_batch, self.max_context or Limits().max_context, self.prefill_chunk)


def load_program(
    model: Any,
    *,
    config: str | Path | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    dtype: DType | None = None,
    max_batch: int = 4,
    max_context: int | None = None,
    prefill_chunk: int = 512,
    rope_scaling: str | None = None,
    check_facts: Callable[[Facts], None] | None = None,
    untraced: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Read a model in any of its forms. Arguments as in `dsc.compile`.

    `check_facts` raises what is wrong with the configuration of a causal LM, before it is traced;
    `untraced` is told where a trace is to be made that is not kept.
    """
    scaling = RopeScaling.parse(rope_scaling) if rope_scaling is not None else None
    asked = Asked(max_batch, max_context, prefill_chunk, check_facts, untraced, scaling)
    if isinstance(model, Program):
        asked.check_unscaled()
        verify(model)
        return Loaded(model.limited(asked.whatever()) if model.is_causal_lm else model)
    if not isinstance(model, (str, Path)):
        asked.check_unscaled()
        return _from_module(model, dtype, asked, progress)
    valueless = str(weights) == "none"
    if progress is not None:
        progress("finding the model", 0, 0)
    path, how = located(model, revision, progress, weights=not valueless)
    if str(model) in BUILT_IN and not path.exists():
        path = Path(__file__).resolve().parent.parent / "models" / BUILT_IN[str(model)]
    if not path.is_dir() and not (path.suffix in (".py", ".dsc") and path.is_file()):
        raise UsageError(
            f"no model at {str(model)!r}",
            hint="give a checkpoint folder, ORG/NAME of the Hub, a .py file with build(config), a"
            f" .dsc file, or one of {', '.join(BUILT_IN)}",
        )
    if progress is not None:
        progress(READING, 0, 0)
    if not path.is_dir():
        asked.check_unscaled()
    if path.suffix == ".py" and not path.is_dir():
        return _from_code(path, config, weights, dtype, asked, progress)
    if path.suffix == ".dsc" and not path.is_dir():
        if config is not None or weights not in (None, "none"):
            raise UsageError(
                "a text is whole: it takes neither --config nor --weights", where=str(path)
            )
        return _from_text(path, asked)
    if (path / "dsc.json").is_file() and not (path / "config.json").exists():
        raise UsageError(
            "this is an artifact, compiled already",
            where=str(path),
            hint="name the model that it was compiled from; dsc verify checks an artifact",
        )
    if config is not None:
        raise UsageError(
            "a checkpoint folder has its own config.json",
            where=str(path),
            hint="drop --config, or name models/v3.py and give the folder as --weights",
        )
    # By name: what is not there is not needed.
    only_config = valueless and not Path(model).exists()
    loaded = _from_checkpoint(path, weights, dtype, asked, progress, only_config)
    return replace(loaded, notes=[*how, *loaded.notes])


def _from_checkpoint(
    folder: Path,
    weights: str | Path | None,
    dtype: DType | None,
    asked: Asked,
    progress: Progress | None,
    only_config: bool = False,
) -> Loaded:
    """A checkpoint folder; `only_config`: whatever weights it has, or has not."""
    from dsc.frontends.huggingface import bare, opened, read_config

    if weights is not None and str(weights) != "none":
        raise UsageError(
            "a checkpoint folder has its own weights",
            where=str(folder),
            hint='drop --weights, or give "none" to compile without values',
        )
    raw, config = read_config(folder, asked.scaling)
    asked.check(config.facts)
    load_generation(folder, config.facts)
    checkpoint = (bare if only_config else opened)(folder, raw, config, dtype)
    tokenizer = find_tokenizer(folder)
    context = asked.limits(config.facts).max_context
    step = _Step(lambda: checkpoint.build(context), config, checkpoint.dtype, asked, "transformers")
    check_architecture(config, progress)
    asked.check(step.facts)
    settings = load_generation(folder, step.facts)
    if not only_config:
        checkpoint = checkpoint.mapped(step.parameters, step.facts, step.conversions)
    traced = replace(step.traced(progress), name=model_name(folder.resolve()))
    if weights is None:
        program = with_weights(traced, checkpoint.weights, checkpoint.source)
    else:
        program = _without_values(traced)
    notes = list(checkpoint.notes)
    if angles := told_of(config.values, context):
        notes.append(angles)
    if asked.scaling is not None:
        program = replace(program, meta={**program.meta, "rope_scaling": str(asked.scaling)})
        notes.append(
            f"positions are scaled by {asked.scaling}, to {step.facts.positions}: texts longer than"
            " the model was trained for are more of a guess, short ones may lose a little"
        )
    return _loaded(program, settings, folder, notes, tokenizer)


def _from_code(
    path: Path,
    config_name: str | Path | None,
    weights: str | Path | None,
    dtype: DType | None,
    asked: Asked,
    progress: Progress | None,
) -> Loaded:
    """A `.py` file is the user's own code: it is run, and its `build(config)` called.

    One of dsc's own models is installed code, which is not run where its trace is kept.
    """
    from dsc.frontends.huggingface import open_checkpoint

    if config_name is None and weights is not None and str(weights) != "none":
        config = configs.config(str(weights))
    else:
        config = configs.config(str(config_name or "tiny"))
    if weights is None:
        if str(config_name or "tiny") != "tiny":
            raise UsageError(
                f"the configuration {config_name} comes without weights",
                hint="give --weights DIR, or --weights none to compile without values",
            )
        weights = configs.TINY_CHECKPOINT
    stock = clean(config.model_dump(), str(config_name))
    facts = stock.facts
    asked.check(facts)
    folder = None if str(weights) == "none" else Path(weights)
    settings = settings_of({}, facts) if folder is None else load_generation(folder, facts)
    tokenizer = (None, "") if folder is None else find_tokenizer(folder)
    checkpoint = open_checkpoint(folder, dtype) if folder is not None else None
    given = checkpoint.config if checkpoint is not None else stock
    if (given.model_type, given.values) != (stock.model_type, stock.values):
        raise ConfigError(
            f"the weights in {folder} are of another configuration than {config_name}",
            hint="leave --config out to use the folder's own",
        )
    named = DTYPES[config.dtype or "bfloat16"]
    compute = checkpoint.dtype if checkpoint is not None else dtype or named
    ours = python_file.module_of_ours(path)
    signature = states_of(config, compute)
    step = _Step(
        lambda: python_file.built(path, config, compute), stock, compute, asked, ours, signature
    )
    if checkpoint is not None:
        checkpoint = checkpoint.mapped(step.parameters, step.facts, step.conversions)
    with python_file.blaming(path, only_its_lines=True):
        traced = replace(step.traced(progress), name=path.stem)
    if checkpoint is None:
        return _loaded(_without_values(traced), settings)
    program = with_weights(traced, checkpoint.weights, checkpoint.source)
    return _loaded(program, settings, folder, checkpoint.notes, tokenizer)


def _from_text(path: Path, asked: Asked) -> Loaded:
    """A text says its own ranges; a causal LM whose ranges are open gets the limits asked for."""
    program = read_program(path)
    if not program.is_causal_lm:
        return Loaded(program, str(path))
    limits = asked.whatever()
    ranges = limits.symbols
    symbols = {
        name: ranges[name] if name in ranges and found.hi >= OPEN else found
        for name, found in program.symbols.items()
    }
    return Loaded(replace(program, symbols=symbols).limited(limits), str(path))


def _from_module(
    module: Any, dtype: DType | None, asked: Asked, progress: Progress | None
) -> Loaded:
    """A stock transformers causal LM in memory: traced with its own weights."""
    from dsc.frontends.causal_lm import CausalLMStep

    stock = getattr(module, "config", None)
    if not isinstance(module, torch.nn.Module) or not hasattr(stock, "to_dict"):
        raise UsageError(
            f"cannot compile a {type(module).__name__} as a language model",
            hint="give a transformers causal LM; other functions and modules go through"
            " dsc.export(target, OUT, args=[…]), @dsc.optimize or"
            " torch.compile(module, backend='dsc')",
        )
    if getattr(module, "get_output_embeddings", lambda: None)() is None:
        raise UnsupportedArchitecture(f"{type(module).__name__} has no lm_head")
    assert stock is not None
    config = clean(stock.to_dict(), type(stock).__name__)
    facts = completed(config, stock)
    asked.check(facts)
    stored = DType.of(next(module.parameters()).dtype)
    if dtype is not None and dtype != stored:
        raise UsageError(
            f"the module computes in {stored}", hint=f"convert it first: module.to({dtype.torch})"
        )
    generation = getattr(module, "generation_config", None)
    settings = settings_of({} if generation is None else generation.to_dict(), facts)
    check_architecture(config, progress, (type(stock), type(module)))
    step = CausalLMStep(module.eval(), context=asked.limits(facts).max_context)
    known = replace(config, facts=facts)
    traced = _Step(lambda: step, known, stored, asked).traced(progress)
    traced = replace(traced, name=config.model_type)
    bare = any(tensor.is_meta for tensor in step.state_dict().values())
    return _loaded(_without_values(traced) if bare else with_state(traced, step), settings)


class _Step:
    """The step of a causal LM: the module that `build` gives, or what is kept of its trace.

    `installed` is the module or package that `build` is known to come from: then it is asked for a
    module only where nothing is kept. A module that does not bring a signature is given one.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        config: StockConfig,
        dtype: DType,
        asked: Asked,
        installed: str = "",
        signature: Signature | None = None,
    ) -> None:
        self.build, self.config, self.dtype, self.asked = build, config, dtype, asked
        self.signature = signature
        self.told: dict[str, Any] = {"config": config.described, "dtype": str(dtype)}
        if has_longrope(config.values) or has_temperature(config.values):
            self.told["context"] = asked.limits(config.facts).max_context
        self.key = trace_cache.key_of_installed(installed, **self.told) if installed else None
        self.kept = trace_cache.load(self.key) if self.key is not None else None

    @cached_property
    def facts(self) -> Facts:
        """All facts of the model: the configuration's, and where it says nothing the class's."""
        known = self.config.facts
        if self.kept is not None:
            return known.completed(self.kept.facts) if self.kept.facts else known
        if self.signature is not None:
            return known
        module: Any = self.module
        return known.completed(facts_of(module.config))

    @cached_property
    def module(self) -> nn.Module:
        """The module itself. What `build` raises."""
        if self.asked.untraced is not None:
            self.asked.untraced()
        return self.build()

    @cached_property
    def parameters(self) -> Mapping[str, TensorType]:
        """Names and types of all that a checkpoint must supply."""
        if self.kept is not None:
            return self.kept.parameters
        from dsc.frontends.causal_lm import parameter_types

        return parameter_types(self.module)

    @cached_property
    def conversions(self) -> Conversions:
        """How a checkpoint of the stock class names and stores all that."""
        if self.kept is not None:
            return self.kept.conversions
        from dsc.frontends.causal_lm import CausalLMStep

        module = self.module
        stock = module.stock() if isinstance(module, CausalLMStep) else stock_model(self.config)
        return conversions_of(stock)

    def traced(self, progress: Progress | None) -> Program:
        """The program, with the limits asked for. Its source holds the trace's constants alone."""
        limits = self.asked.limits(self.facts)
        if self.kept is None and self.key is None:
            self.key = trace_cache.key_of(self.module, **self.told)
            self.kept = trace_cache.load(self.key) if self.key is not None else None
        if self.kept is None:
            if progress is not None:
                progress("tracing", 0, 0)
            self.kept = self._trace(limits)
            if self.key is not None:
                trace_cache.store(self.key, self.kept)
        program = self.kept.program
        said = {k: v for k, v in self.facts.to_json().items() if v is not None}
        meta = {**program.meta, "config": {**said, **self.config.described}}
        stored = self.facts.quantization_config
        meta |= {SCALE_FMT: UE8M0} if stored is not None and stored.scale_fmt == UE8M0 else {}
        symbols = {**program.symbols, **limits.symbols}
        return replace(program, meta=meta, symbols=symbols).limited(limits)

    def _trace(self, limits: Limits) -> trace_cache.Trace:
        from dsc.frontends.causal_lm import trace_step

        module: Any = self.module
        program = trace_step(module, self.signature or module.signature, limits.symbols)
        values = {n: _value(program, n) for n in program.weights if n not in self.parameters}
        own = {CONSTANT + n: value for n, value in values.items() if value is not None}
        weights = {
            n: Source(CONSTANT + n, expr.type) if CONSTANT + n in own else expr
            for n, expr in program.weights.items()
        }
        program = replace(program, weights=weights, source=DictSource(own))
        return trace_cache.Trace(program, self.parameters, self.facts, self.conversions)


def _without_values(traced: Program) -> Program:
    """The program where nobody gives weights: their types alone are known."""
    return with_weights(traced, {}, MetaSource(source_types(traced.weights.values())))


def _value(traced: Program, name: str) -> Any:
    """A traced constant's value, or `None` for a parameter on meta."""
    try:
        value = evaluate(traced.weights[name], traced.source)
    except (UsageError, KeyError):
        return None
    return None if value.is_meta else value


def _loaded(
    program: Program,
    settings: Settings,
    folder: Path | None = None,
    notes: Sequence[str] = (),
    tokenizer: tuple[Path | bytes | None, str] = (None, ""),
) -> Loaded:
    generation, unused = settings
    program = replace(program, meta={**program.meta, "generation": generation})
    files: dict[str, Path | bytes] = {}
    file, note = tokenizer
    if file is not None:
        files[TOKENIZER] = file
    chat, refused = (None, "") if folder is None else find_chat(folder)
    if chat is not None:
        files[CHAT] = chat
    told = [*notes, *unused, *filter(None, [note, refused])]
    source = str(folder.resolve()) if folder is not None else ""
    return Loaded(program, source, files, told)
