"""Every causal language model class of the installed transformers, and whether it compiles.

A type is asked on an example: its class's defaults, which say what the class is, with what they
leave open filled in. The check is the one that every model passes before it is compiled
(`self_check.py`), and then the example's twin goes through all passes for the reference backend.
What came out is kept for the whole list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsc.errors import DscError
from dsc.frontends import trace_cache
from dsc.frontends.self_check import Verdict, as_json, examine, in_memory, one_line, twin
from dsc.frontends.shrunk import role_of
from dsc.frontends.stock import StockConfig, clean, stock_class, stock_config
from dsc.ir.program import Program
from dsc.runtime.emission import Progress

KIND = "catalogues"
BESIDE: Mapping[str, str] = {"mistral4": "Mistral4ForCausalLM"}
"""Text towers whose class is in no table of transformers."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OPEN: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "reformer": {"is_decoder": True},
}
"""What the defaults of a type leave open, beside numbers: without it there is no model."""
FILLED = {"experts": 8, "chosen": 2, "groups": 1, "shared": 1}
"""Numbers that defaults leave open, by their roles."""


@dataclass(frozen=True)
class Row:
    """A type: its class, and why it does not compile, or "" where it does.

    `error` is the largest difference from stock, relative to max(1, the largest logit).
    """

    model_type: str
    model_class: str
    reason: str = ""
    error: float = 0.0
    remark: str = ""

    @property
    def compiles(self) -> bool:
        """Whether a model of the type compiles."""
        return not self.reason


class Catalogue:
    """The list of types with what is known of them. Make it before transformers is imported.

    `rows` are kept rows by type; `check` finds more.
    """

    def __init__(self) -> None:
        self._key = trace_cache.key_of_installed("transformers", catalogue=1)
        found = trace_cache.entry(KIND, self._key) if self._key is not None else None
        self.rows = {name: Row(**row) for name, row in (found or {}).get("rows", {}).items()}

    def check(self, names: Sequence[str], progress: Progress, compiled: Compile) -> list[Row]:
        """The rows of these types, those not known yet found now; all are kept."""
        for done, name in enumerate(names):
            if name not in self.rows:
                progress(f"checking the architectures: {name}", done, len(names))
                self.rows[name] = row_of(name, compiled)
        if self._key is not None:
            kept = {name: asdict(row) for name, row in self.rows.items()}
            trace_cache.keep_entry(KIND, self._key, {"rows": kept})
        return [self.rows[name] for name in names]


Compile = Callable[[Program], None]
"""Compiles a program; raises `DscError` where that cannot be done."""


def classes() -> dict[str, str]:
    """The causal language model class of every type, by type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **BESIDE}
    return {
        name: found if isinstance(found, str) else found[0] for name, found in sorted(named.items())
    }


def row_of(model_type: str, compiled: Compile) -> Row:
    """The row of a type: checked on its twin, which is then compiled."""
    name = classes()[model_type]
    try:
        small = twin(example(model_type))
        name = stock_class(small, stock_config(small)).__name__
        verdict = examine(*in_memory(small), compiled)
    except DscError as refusal:
        verdict = Verdict(one_line(refusal.what))
    except Exception as problem:  # a class that fails in a way of its own is one that does not run
        verdict = Verdict(f"{name} cannot be built: {type(problem).__name__}: {one_line(problem)}")
    return Row(model_type, name, verdict.fault, verdict.error, verdict.remark)


def example(model_type: str) -> StockConfig:
    """A configuration of a type: its class's defaults, with what they leave open.

    Raises `DscError` where `clean` refuses it, and what the class raises.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    given = dict(OPEN.get(model_type, {}))
    defaults = CONFIG_MAPPING[model_type](**given).get_text_config(decoder=True)
    values = {**defaults.to_dict(), "model_type": defaults.model_type}
    for key, value in values.items():
        if value is None and role_of(key) in FILLED:
            values[key] = FILLED[role_of(key)]
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and hidden:
        filled = {"head_dim": hidden // heads, "num_key_value_heads": heads}
        values |= {k: v for k, v in filled.items() if k in values and values[k] is None}
    return clean(as_json(values), model_type)


def matching(patterns: Sequence[str], names: Mapping[str, str]) -> Iterator[str]:
    """The types that a pattern names, whole, with `*`, or by the name of their class; all of none.

    >>> list(matching(["gemma*", "LlamaForCausalLM"], {"gemma": "A", "llama": "LlamaForCausalLM"}))
    ['gemma', 'llama']
    """
    wanted = [re.compile(re.escape(each).replace(r"\*", ".*")) for each in patterns]
    for model_type, model_class in names.items():
        both = (model_type, model_class)
        if not wanted or any(each.fullmatch(name) for each in wanted for name in both):
            yield model_type
