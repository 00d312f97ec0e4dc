"""What a session, a limit or a weight map must know of a model, whatever its type.

Facts are read of `config.json` by the names that they have there, which differ between types
(`n_positions`, `num_local_experts`); what a file leaves out is the class's default, which is known
once the class was built. So they are kept with a trace, where nobody builds it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from dsc.frontends.quantisation import QuantizationConfig
from dsc.frontends.rope_scaling import reach

NAMES: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "positions": (
        "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len",
        "model_max_length", "n_ctx", "seq_length",
    ),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"),
    "num_attention_heads": (
        "num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"
    ),
    "experts": (
        "n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts", "num_moe_experts"
    ),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
}  # fmt: skip
"""What configurations call a number, by our name; the first that says one holds."""
_LISTS = frozenset({"eos_token_id"})


@dataclass(frozen=True)
class Facts:
    """A model's facts. `None` is what nobody said, or what the model has not (ALiBi: positions).

    `positions` are the tokens that it was trained for, or that its rope scaling reaches;
    `position_name` is the key that says so.
    """

    model_type: str
    vocab_size: int | None = None
    positions: int | None = None
    position_name: str = "max_position_embeddings"
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    experts: int | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    quantization_config: QuantizationConfig | None = None

    @staticmethod
    def read(model_type: str, values: Mapping[str, Any]) -> Facts:
        """The facts that `values` say, under whichever name."""
        found: dict[str, Any] = {}
        for fact in NAMES.keys() & {each.name for each in fields(Facts)}:
            name = next((n for n in NAMES[fact] if _says(values.get(n), fact)), None)
            if name is not None:
                found[fact] = values[name]
                if fact == "positions":
                    found["position_name"] = name
                    found[fact] = max(found[fact], reach(values))
        if found.get("num_hidden_layers", 1) <= _number(values.get("first_k_dense_replace")):
            found.pop("experts", None)  # of which no layer has any
        ties = values.get("tie_word_embeddings")
        found["tie_word_embeddings"] = ties if isinstance(ties, bool) else None
        return Facts(model_type, **found)

    def completed(self, others: Facts) -> Facts:
        """These facts, and where they say nothing what the others say."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        missing = {n: getattr(others, n) for n, value in known.items() if value is None}
        if self.positions is None:
            missing["position_name"] = others.position_name
        return replace(self, **missing)

    def to_json(self) -> dict[str, Any]:
        """What is kept with a trace; how weights are stored is the checkpoint's affair."""
        return {k: v for k, v in asdict(self).items() if k != "quantization_config"}

    @staticmethod
    def from_json(kept: Mapping[str, Any]) -> Facts:
        """The facts that were kept. Raises `TypeError` for anything else."""
        return Facts(**kept)


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _says(value: Any, fact: str) -> bool:
    if isinstance(value, list):
        return fact in _LISTS and all(type(each) is int for each in value)
    return type(value) is int and (value > 0 or fact.endswith("_token_id"))
