"""Whatever a user names as a model becomes a traced program and the files that go with it.

A checkpoint folder, a name on the Hub, a `.py` file with `build(config)`, a built-in name, a `.dsc`
text, a transformers causal LM in memory, or a `Program`: one function reads them all.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsc.chat_template import CHAT
from dsc.errors import ConfigError, DscError, UnsupportedArchitecture, UsageError
from dsc.frontends import trace_cache
from dsc.frontends.chat_template import find_chat
from dsc.frontends.conversions import Conversions, conversions_of
from dsc.frontends.facts import Facts
from dsc.frontends.family import ModelConfig, states_of
from dsc.frontends.folder import TOKENIZER
from dsc.frontends.generation_config import Settings, load_generation, settings_of
from dsc.frontends.hub import located, model_name
from dsc.frontends.longrope import has_longrope, told_of
from dsc.frontends.rope_scaling import RopeScaling
from dsc.frontends.schema import DTYPES
from dsc.frontends.self_check import check_architecture
from dsc.frontends.signature import Signature
from dsc.frontends.stock import StockConfig, clean, completed, facts_of, stock_model
from dsc.frontends.text import read_program
from dsc.frontends.tokenizer import find_tokenizer
from dsc.ir.lazy import torch
from dsc.ir.limits import OPEN, Limits
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import (
    DictSource,
    LayeredSource,
    MetaSource,
    Source,
    WeightExpr,
    WeightSource,
    evaluate,
    source_types,
)
from dsc.models import configs
from dsc.runtime.emission import Progress

if TYPE_CHECKING:
    from torch import nn

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
    shares: Callable[[Facts], None] | None = None
    untraced: Callable[[], None] | None = None
    scaling: RopeScaling | None = None

    def check(self, facts: Facts) -> None:
        """Raise what the configuration alone rules out, before anything large is read."""
        self.limits(facts)
        if self.shares is not None:
            self.shares(facts)

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
    check: Callable[[Facts], None] | None = None,
    untraced: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Read a model in any of its forms. Arguments as in `dsc.compile`.

    `check` raises what is wrong with the configuration of a causal LM, before it is traced;
    `untraced` is told where a trace is to be made that is not kept.
    """
    scaling = RopeScaling.parse(rope_scaling) if rope_scaling is not None else None
    asked = Asked(max_batch, max_context, prefill_chunk, check, untraced, scaling)
    if progress is not None:
        progress("reading the model", 0, 0)
    if isinstance(model, Program):
        asked.check_unscaled()
        verify(model)
        return Loaded(model.limited(asked.whatever()) if model.is_causal_lm else model)
    if not isinstance(model, (str, Path)):
        asked.check_unscaled()
        return _from_module(model, dtype, asked, progress)
    valueless = str(weights) == "none"
    path, how = located(model, revision, progress, weights=not valueless)
    if str(model) in BUILT_IN and not path.exists():
        path = Path(__file__).resolve().parent.parent / "models" / BUILT_IN[str(model)]
    if not path.is_dir():
        asked.check_unscaled()
    if path.suffix == ".py" and path.is_file():
        return _from_code(path, config, weights, dtype, asked, progress)
    if path.suffix == ".dsc" and path.is_file():
        if config is not None or weights not in (None, "none"):
            raise UsageError(
                "a text is whole: it takes neither --config nor --weights", where=str(path)
            )
        return _from_text(path, asked)
    if (path / "dsc.json").is_file() and not (path / "config.json").exists():
        raise UsageError(
            "this is an artifact, compiled already",
            where=str(path),
            hint="name the model that it was compiled from",
        )
    if path.is_dir():
        if config is not None:
            raise UsageError(
                "a checkpoint folder has its own config.json",
                where=str(path),
                hint="drop --config, or name models/v3.py and give the folder as --weights",
            )
        bare = valueless and not Path(model).exists()  # by name: what is not there is not needed
        loaded = _from_checkpoint(path, weights, dtype, asked, progress, bare)
        return replace(loaded, notes=[*how, *loaded.notes])
    raise UsageError(
        f"no model at {str(model)!r}",
        hint="give a checkpoint folder, ORG/NAME of the Hub, a .py file with build(config), a .dsc"
        f" file, or one of {', '.join(BUILT_IN)}",
    )


def _from_checkpoint(
    folder: Path,
    weights: str | Path | None,
    dtype: DType | None,
    asked: Asked,
    progress: Progress | None,
    bare: bool = False,
) -> Loaded:
    """A checkpoint folder; `bare`: of its configuration alone, whatever weights it has."""
    from dsc.frontends.huggingface import bare_checkpoint, open_checkpoint, read_config

    if weights is not None and str(weights) != "none":
        raise UsageError(
            "a checkpoint folder has its own weights",
            where=str(folder),
            hint='drop --weights, or give "none" to compile without values',
        )
    _, config = read_config(folder, asked.scaling)
    asked.check(config.facts)
    load_generation(folder, config.facts)
    tokenizer = find_tokenizer(folder)
    opened = (bare_checkpoint if bare else open_checkpoint)(folder, dtype, asked.scaling)
    context = asked.limits(config.facts).max_context
    step = _Step(lambda: opened.build(context), config, opened.dtype, asked, "transformers")
    check_architecture(config, progress)
    asked.check(step.facts)
    settings = load_generation(folder, step.facts)
    checkpoint = opened
    if not bare:
        checkpoint = opened.mapped(step.parameters, step.facts, step.conversions)
    traced = step.traced(progress)
    given = None if weights is not None else (checkpoint.weights, checkpoint.source)
    program = _with_weights(traced, given, model_name(folder.resolve()))
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
    ours = _module_of_ours(path)
    signature = states_of(config, compute)
    step = _Step(lambda: _built(path, config, compute), stock, compute, asked, ours, signature)
    if checkpoint is not None:
        checkpoint = checkpoint.mapped(step.parameters, step.facts, step.conversions)
    with blaming(path, only_its_lines=True):
        traced = step.traced(progress)
    if checkpoint is None:
        return _loaded(_with_weights(traced, None, path.stem), settings)
    program = _with_weights(traced, (checkpoint.weights, checkpoint.source), path.stem)
    return _loaded(program, settings, folder, checkpoint.notes, tokenizer)


def _built(path: Path, config: ModelConfig, dtype: DType) -> nn.Module:
    """What `build(config)` of a file gives, on meta. Raises `UsageError` for any fault of it."""
    from dsc.frontends.causal_lm import cast_parameters

    build = _build_function(path)
    with torch.device("meta"), blaming(path):
        module = build(config)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"build(config) returned {type(module).__name__}, not a module",
            where=str(path),
            hint="return the torch.nn.Module to compile, as models/v3.py does",
        )
    module = cast_parameters(module, dtype.torch)
    _check_signature(module, config, path)
    return module


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
            " @dsc.optimize or torch.compile(module, backend='dsc')",
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
    state = {k: v.detach() for k, v in step.state_dict().items()}
    if any(v.is_meta for v in state.values()):
        return _loaded(_with_weights(traced, None, config.model_type), settings)
    source = DictSource(state)
    given = {k: Source(k, source.types[k]) for k in state}
    program = _with_weights(traced, (given, source), config.model_type)
    return _loaded(program, settings)


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
        if has_longrope(config.values):
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


def _with_weights(
    traced: Program, given: tuple[Mapping[str, WeightExpr], WeightSource] | None, name: str
) -> Program:
    """The program over a checkpoint's weights; constants that the trace found stay its own."""
    types = source_types(traced.weights.values())
    expressions, source = given or ({}, MetaSource(types))
    weights = {n: expressions.get(n, expr) for n, expr in traced.weights.items()}
    layered = LayeredSource((traced.source, source))
    return replace(traced, name=name, weights=weights, source=layered)


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


def _build_function(path: Path) -> Callable[[ModelConfig], nn.Module]:
    build: Callable[[ModelConfig], nn.Module] | None = getattr(_module_at(path), "build", None)
    if not callable(build):
        raise UsageError(
            "the file defines no build(config)",
            where=str(path),
            hint="define build(config) that returns the module to compile, as models/v3.py does",
        )
    return build


def _check_signature(module: nn.Module, config: ModelConfig, path: Path) -> None:
    """Raise `UsageError` unless `forward` takes what the step of a causal LM gives it."""
    try:
        inspect.signature(module.forward).bind(*states_of(config).input_names())
    except TypeError as problem:
        raise UsageError(
            f"forward of {type(module).__name__} does not take"
            f" input_ids, positions, lengths, logits_at, *past: {problem}",
            where=str(path),
            hint="give it the signature of the model in models/v3.py",
        ) from None


@contextmanager
def blaming(path: Path, only_its_lines: bool = False) -> Iterator[None]:
    """Turn what the user's own file raises into a `UsageError` that names its line.

    With `only_its_lines` an error that no line of the file takes part in stays what it is.
    """
    try:
        yield
    except (DscError, OSError, MemoryError):
        raise
    except Exception as problem:
        lines = [n for name, n in _frames(problem) if name == str(path.resolve())]
        if only_its_lines and not lines:
            raise
        raise UsageError(
            f"the file fails when it is run: {type(problem).__name__}: {problem}",
            where=f"{path}:{lines[-1]}" if lines else str(path),
        ) from problem


def _frames(problem: BaseException | None) -> Iterator[tuple[str, int | None]]:
    """Files and lines that an error and its causes passed through."""
    while problem is not None:
        yield from ((f.filename, f.lineno) for f in traceback.extract_tb(problem.__traceback__))
        problem = problem.__cause__


def _module_of_ours(path: Path) -> str:
    """The module that a file of dsc's models is; of others ""."""
    ours = path.resolve().parent == Path(configs.__file__).resolve().parent
    return f"dsc.models.{path.stem}" if ours else ""


def _module_at(path: Path) -> ModuleType:
    """Import a file under a name of its own; a file of dsc's models is the module it already is."""
    if ours := _module_of_ours(path):
        return importlib.import_module(ours)
    path = path.resolve()
    name = f"dsc_user_model_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError("this is no Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with blaming(path):
        spec.loader.exec_module(module)
    return module
