"""A configuration from a stranger becomes the stock model of transformers that it describes.

`clean` reads a decoded `config.json` as data: sizes, depth and types are bounded, and every key
goes that could make anybody import, download or run something (`auto_map`, the implementations
of attention and experts, kernels, quantisers, templates), under whatever spelling. It needs
neither torch nor transformers, so that a kept trace is found without them.

`stock_model` then builds the stock classes that `model_type` names in transformers' own tables,
on the `meta` device; keys that would shadow a method or property of the configuration class go
there. The Auto classes' loaders and the folder's code are never asked.

Members of the DeepSeek-V3 family pass our own schema before (`family.py`), which tells more
precisely what is wrong, and gives their fields one spelling.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from dsc.errors import ConfigError, DscError, UnsupportedArchitecture
from dsc.frontends.facts import NAMES, Facts
from dsc.frontends.family import MEMBERS, OtherRope, parse_config
from dsc.frontends.folder import CONFIG_FILE
from dsc.frontends.quantisation import quantisation
from dsc.frontends.rope_scaling import RopeScaling, rope_sections, rope_type, wrong_value
from dsc.frontends.schema import DTYPES
from dsc.ir.lazy import torch
from dsc.ir.types import DType
from dsc.strict_json import AGAIN

if TYPE_CHECKING:
    from torch import nn

MAX_DEPTH = 6
MAX_ITEMS = 1 << 14
MAX_TEXT = 1 << 12
MAX_INTEGER = 1 << 40
MAX_LAYERS = 1024
MAX_PARTS = 1 << 18
"""Submodules of a model."""
MAX_TABLES = 1 << 28
"""Bytes of tables that a class computes (rope frequencies, masks) and no checkpoint stores."""
HINT = "`dsc models` lists what compiles"
"""What to do about a type that does not."""
ATTENTION = "sdpa"
EXPERTS = "grouped_mm"
"""The implementations that a model is built with; `registries.py` replaces what they are."""
COUNTS = (
    *NAMES["vocab_size"], *NAMES["hidden_size"], *NAMES["num_attention_heads"],
    "num_key_value_heads",
)  # fmt: skip
"""Keys of what no decoder has none of."""
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
TOWERS = ("text_config", "language_config", "llm_config")
"""Sections of a wrapper's configuration that describe its language model."""
INHERITED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
"""What a wrapper says for its language model, where that says nothing."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_DROPPED = frozenset(
    "automap customgenerate custompipelines trustremotecode nameorpath coderevision revision"
    " token useauthtoken peftconfig adapterconfig baseconfig backbone backboneconfig"
    " usetimmbackbone usepretrainedbackbone backbonekwargs perlayerconfig numlabels id2label"
    " label2id problemtype prunedheads outputattentions outputhiddenstates returndict torchscript"
    " tokenizerclass processorclass featureextractortype imageprocessortype loss losstype"
    " losskwargs architectures transformersversion dtype torchdtype modeltype".split()
)
"""Keys that no decoder needs, spelled without case and signs."""
_DROPPED_PARTS = (
    "implementation", "kernelrepo", "kernelconfig", "usekernel", "hubkernel", "quantiz",
    "compressionconfig", "template", "remotecode", "pretrained", "nameorpath",
    "flashattn", "flashattention", "sagemaker",
)  # fmt: skip
"""Parts of such keys."""


@dataclass(frozen=True)
class StockConfig:
    """A cleaned configuration: what the stock class `model_type` is built from.

    Args:
        model_type: as transformers' tables know it.
        values: the cleaned fields, the text tower's where there is a wrapper.
        facts: what the fields say that is the same for all types.
        where: the file, for messages.
        dtype: the element type that it names, or `None`.
        published: the `model_type` as the file has it.
        wrapper: the `model_type` around the text tower, or "".
        scaling: the rope scaling that was chosen for it, which `values` have.
    """

    model_type: str
    values: Mapping[str, Any]
    facts: Facts
    where: str = CONFIG_FILE
    dtype: str | None = None
    published: str = ""
    wrapper: str = ""
    scaling: RopeScaling | None = None

    @property
    def described(self) -> dict[str, Any]:
        """What a manifest says of the model."""
        named = {"dtype": self.dtype} if self.dtype else {}
        return {**self.values, "model_type": self.model_type, **named}


def clean(
    raw: Mapping[str, Any], where: str = CONFIG_FILE, scaling: RopeScaling | None = None
) -> StockConfig:
    """Check a decoded `config.json`, and leave in it what describes a model, scaled as chosen.

    Raises:
        UnsupportedArchitecture: it names no `model_type`.
        ConfigError: a value is out of all bounds, or a member of the DeepSeek-V3 family is none.
    """
    wrapper = ""
    for name in TOWERS:
        tower = raw.get(name)
        if isinstance(tower, Mapping) and isinstance(tower.get("model_type"), str):
            wrapper = str(raw.get("model_type"))
            raw = {**{k: raw[k] for k in INHERITED if raw.get(k) is not None}, **tower}
    if scaling is not None:
        own = Facts.read("", raw)
        raw = scaling.applied(raw, own.positions, own.position_name, where)
    published = raw.get("model_type")
    if not isinstance(published, str) or not published:
        found = (
            "there is no model_type" if published is None else f"model_type is {published!r:.60}"
        )
        raise UnsupportedArchitecture(
            f"{found}, no name of a model", where, "give a config.json as transformers writes it"
        )
    values: dict[str, Any] = _cleaned(raw, where)
    _check_rope(values, where)
    if published in MEMBERS:
        with suppress(OtherRope):  # which the stock class computes, or refuses
            values = parse_config(raw, where).fields
    _check_counts(values, where)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if dtype is not None and not (isinstance(dtype, str) and dtype in DTYPES):
        known = " or ".join(map(repr, DTYPES))
        raise ConfigError(f"dtype must be {known}, found {dtype!r:.60}", where, AGAIN)
    member = MEMBERS.get(published, published)
    facts = Facts.read(member, values)
    if facts.num_hidden_layers is not None and facts.num_hidden_layers > MAX_LAYERS:
        layers = facts.num_hidden_layers
        raise ConfigError(f"num_hidden_layers is {layers}, beyond {MAX_LAYERS}", where, AGAIN)
    told = quantisation(raw.get("quantization_config"), where)
    facts = replace(facts, quantization_config=told)
    return StockConfig(member, values, facts, where, dtype, published, wrapper, scaling=scaling)


def _check_counts(values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a count below 1, of which a class's own message names no field."""
    for name in COUNTS:
        found = values.get(name)
        if type(found) is int and found < 1:
            raise ConfigError(f"{name} must be above 0, found {found}", where, AGAIN)


def _check_activation(config: StockConfig) -> None:
    """Raise `ConfigError` for an activation that transformers does not know."""
    from transformers.activations import ACT2CLS

    for name in ACTIVATIONS:
        found = config.values.get(name)
        if isinstance(found, str) and found not in ACT2CLS:
            told = f"{name} {found!r:.60} is no activation that the installed transformers knows"
            raise ConfigError(told, config.where, AGAIN)


def _check_rope(values: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a rope section whose type is no text or whose numbers are none.

    `UnsupportedArchitecture` for angles that depend on the longest sequence so far.
    """
    for name, section in rope_sections(values):
        if wrong := wrong_value(name, section):
            raise ConfigError(wrong, where, AGAIN)
        if rope_type(section) == "dynamic":
            raise UnsupportedArchitecture(
                f"{name}: rope_type 'dynamic' turns by angles that depend on the longest"
                " sequence so far, which dsc does not compute", where,
                "compile a checkpoint with another rope_type, such as yarn",
            )  # fmt: skip


def _cleaned(section: Mapping[str, Any], where: str, path: str = "", depth: int = 0) -> Any:
    """A section without the keys that do something, its values within bounds."""
    if depth > MAX_DEPTH:
        raise ConfigError(f"{path} nests deeper than {MAX_DEPTH} sections", where, AGAIN)
    _bounded_count(section, path or "the configuration", where)
    return {
        key: _value(value, where, f"{path}.{key}" if path else key, depth)
        for key, value in section.items()
        if not _is_dropped(key, depth)
    }


def _is_dropped(key: str, depth: int) -> bool:
    """Whether a key could make anybody do something, or is no name."""
    if depth and key.isascii() and key.isdigit():
        return False
    if not _NAME.fullmatch(key) or len(key) > 64:
        return True
    plain = _spelled(key)
    if plain in _DROPPED and not (depth and plain == "modeltype"):
        return True
    return any(part in plain for part in _DROPPED_PARTS)


def _spelled(key: str) -> str:
    """A key without case and signs, as far as it is of Latin letters and digits."""
    return re.sub(r"[^a-z0-9]", "", unicodedata.normalize("NFKC", key).lower())


def _value(value: Any, where: str, path: str, depth: int) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity"):
            return float(value["__float__"])  # as transformers writes it
        return _cleaned(value, where, path, depth + 1)
    if isinstance(value, list):
        if depth >= MAX_DEPTH:
            raise ConfigError(f"{path} nests deeper than {MAX_DEPTH} sections", where, AGAIN)
        _bounded_count(value, path, where)
        return [_value(each, where, path, depth + 1) for each in value]
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise ConfigError(f"{path} is a text of {len(value)} characters", where, AGAIN)
    if type(value) is int and abs(value) > MAX_INTEGER:
        raise ConfigError(f"{path} is beyond {MAX_INTEGER}", where, AGAIN)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, found {value}", where, AGAIN)
    return value


def _bounded_count(items: Any, path: str, where: str) -> None:
    if len(items) > MAX_ITEMS:
        raise ConfigError(f"{path} has {len(items)} entries, more than {MAX_ITEMS}", where, AGAIN)


# From here on transformers is imported.


def stock_config(config: StockConfig, kind: Any = None) -> Any:
    """The configuration object of the stock class, or of another class `kind`.

    Raises:
        UnsupportedArchitecture: transformers knows no such type.
        ConfigError: transformers refuses these fields.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        kind = kind or CONFIG_MAPPING[config.model_type]
    except KeyError:
        raise _unknown(config, "is not one that the installed transformers knows") from None
    given = {k: v for k, v in config.values.items() if not _is_foreign(kind, k, v)}
    _check_activation(config)
    _check_names(kind, given, config.where)
    with _refusing(config.where, "configuration"):
        return kind(**given)


def stock_class(config: StockConfig, built: Any) -> Any:
    """The causal LM class for a configuration object: of transformers' table, or beside it.

    Text towers of some wrappers are in no table. Raises `UnsupportedArchitecture`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(built)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        return found[0] if isinstance(found, (list, tuple)) else found
    name = kind.__module__.replace(".configuration_", ".modeling_")
    beside = importlib.import_module(name) if importlib.util.find_spec(name) else None
    for each in vars(beside).values() if beside is not None else ():
        is_lm = isinstance(each, type) and each.__name__.endswith("ForCausalLM")
        if is_lm and getattr(each, "config_class", None) is kind:
            return each
    raise _unknown(config, "has no causal language model in transformers")


def stock_model(
    config: StockConfig,
    dtype: DType = DType.f32,
    device: str = "meta",
    classes: tuple[Any, Any] = (None, None),
) -> nn.Module:
    """The stock causal LM of a configuration, for inference, with sdpa and grouped experts.

    `classes` are those of a configuration object and of a model, in the place of the stock ones.
    Parameters lie on `device`, untrained. Tables that the class computes and no checkpoint stores
    (rope frequencies) are real even on `meta`: the trace records them as constants.

    Raises:
        UnsupportedArchitecture: there is no such class, or it computes tables that cannot be told.
        ConfigError: transformers refuses the configuration.
    """
    built = stock_config(config, classes[0])
    kind = classes[1] or stock_class(config, built)
    built._attn_implementation = ATTENTION if kind._supports_sdpa else "eager"
    if kind._can_set_experts_implementation():
        built._experts_implementation = EXPERTS
    with _refusing(config.where, "model"), torch.device(device), _few_parts(config.where):
        model: Any = cast_parameters(kind(built).eval(), dtype.torch)
    if device == "meta":
        with _refusing(config.where, "model"):
            _compute_tables(model, config.where)
    model.tie_weights()
    _check_scaled(model, config)
    found: nn.Module = model
    return found


def _check_scaled(model: Any, config: StockConfig) -> None:
    """Raise `ConfigError` where a rope scaling was chosen that no part of the model reads."""
    kinds = [getattr(part, "rope_type", None) for part in model.modules()]
    if config.scaling is not None and config.scaling.kind not in kinds:
        raise ConfigError(
            f"a {config.model_type} has no rotary embedding that can be scaled", config.where,
            "leave out --rope-scaling",
        )  # fmt: skip


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give all parameters the compute dtype, in place; buffers keep theirs.

    `Module.to` would round the router's correction bias and the rope frequencies, which stay fp32
    in every published model.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return module


def take_plain_experts(config: Any) -> None:
    """Have stock experts run in the plain loop: torch's grouped GEMMs refuse odd widths."""
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


@contextmanager
def plain_experts(config: Any) -> Iterator[None]:
    """`take_plain_experts` while it holds."""
    before = getattr(config, "_experts_implementation", None)
    take_plain_experts(config)
    try:
        yield
    finally:
        if before is not None:
            config._experts_implementation = before


def facts_of(built: Any) -> Facts:
    """The facts that a configuration object of transformers says, its defaults among them."""
    names = {name for names in NAMES.values() for name in names} | {"tie_word_embeddings"}
    return Facts.read(built.model_type, {name: getattr(built, name, None) for name in names})


def completed(config: StockConfig, built: Any) -> Facts:
    """All facts of a model: those of the file, then the defaults of its configuration object."""
    return config.facts.completed(facts_of(built))


def _unknown(config: StockConfig, why: str) -> UnsupportedArchitecture:
    what = f"model_type {config.published or config.model_type!r:.60} {why}"
    return UnsupportedArchitecture(what, config.where, HINT)


def _check_names(kind: type, given: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a field that is said twice, differently, or under no name of it."""
    other_names: Mapping[str, str] = getattr(kind, "attribute_map", {})
    for name, own in other_names.items():
        one, two = given.get(name), given.get(own)
        if name in given and own in given and one != two:
            raise ConfigError(
                f"{name} and {own} are one, and are {one!r:.40} and {two!r:.40}", where, AGAIN
            )
    declared = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
    known = {_spelled(name): name for name in sorted({*declared, *other_names})}
    for key in given:
        meant = known.get(_spelled(key))
        if key not in declared and key not in other_names and meant and meant not in given:
            raise ConfigError(f"{key} is no field, and {meant} is missing", where, AGAIN)


def _is_foreign(kind: type, key: str, value: Any) -> bool:
    """Whether a key is a section that its class does not declare, such as a vision tower.

    Or would take the place of a method, property or constant of the class.
    """
    declared = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
    if key in declared or key in getattr(kind, "attribute_map", {}) or key == "rope_scaling":
        return False
    if isinstance(value, Mapping):
        return True
    owner = next((base for base in kind.__mro__ if key in vars(base)), None)
    if owner is None:
        return False
    held = vars(owner)[key]
    is_settable = isinstance(held, property) and held.fset is not None
    return not (is_settable and owner.__module__.startswith("transformers.models."))


@contextmanager
def _refusing(where: str, what: str) -> Iterator[None]:
    """What transformers raises is a `ConfigError` of one sentence; kernels of the hub are none."""
    from transformers.integrations import hub_kernels
    from transformers.utils import logging

    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError("the model asks for a kernel of the hub, which is code", where)

    names = [n for n in ("get_kernel", "load_and_register_attn_kernel") if hasattr(hub_kernels, n)]
    before = {name: getattr(hub_kernels, name) for name in names}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        for name in names:
            setattr(hub_kernels, name, refused)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (DscError, MemoryError):
        raise
    except Exception as problem:
        lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
        told = " ".join(lines)[:300] or type(problem).__name__
        if isinstance(problem, (KeyError, IndexError, AttributeError, TypeError)):
            told = f"{type(problem).__name__}: {told}"
        raise ConfigError(f"transformers refuses this {what}: {told}", where, AGAIN) from None
    finally:
        logging.set_verbosity(verbosity)
        for name, function in before.items():
            setattr(hub_kernels, name, function)


@contextmanager
def _few_parts(where: str) -> Iterator[None]:
    """Raise `ConfigError` where a model is made of more parts than any is."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_PARTS:
            raise ConfigError(f"a model of more than {MAX_PARTS} parts", where, AGAIN)

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _owner(model: Any, path: str) -> Any:
    """The innermost model of transformers that a part belongs to: it knows how to begin it."""
    names = path.split(".") if path else []
    for end in range(len(names), 0, -1):
        part = model.get_submodule(".".join(names[:end]))
        if hasattr(part, "_init_weights"):
            return part
    return model


def _compute_tables(model: Any, where: str) -> None:
    """Make real, by the class's own initialisation, the buffers that no checkpoint stores.

    Raises `ConfigError` where they are huge, `UnsupportedArchitecture` where it leaves one out.
    """
    parts = {
        path: [n for n in part._non_persistent_buffers_set if part._buffers.get(n) is not None]
        for path, part in model.named_modules()
    }
    tables = {path: names for path, names in parts.items() if names}
    held = [model.get_submodule(p)._buffers[n] for p, names in tables.items() for n in names]
    if sum(table.nbytes for table in held) > MAX_TABLES:
        raise ConfigError(f"its tables take more than {MAX_TABLES} bytes", where, AGAIN)
    with torch.no_grad():
        for path, names in tables.items():
            part = model.get_submodule(path)
            for name in names:
                empty = torch.empty_like(part._buffers[name], device="cpu")
                part._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
            _owner(model, path)._init_weights(part)
            for name in names:
                table = part._buffers[name]
                if table.is_meta or (table.is_floating_point() and bool(table.isnan().any())):
                    raise UnsupportedArchitecture(
                        f"{type(part).__name__} computes {name} where nothing can repeat it", where
                    )
