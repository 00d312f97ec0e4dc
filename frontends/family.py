"""The DeepSeek-V3 family: all that dsc knows of it beside what it finds for every type.

dsc was made for these models, and has one of its own for them (`models/v3.py`), which is built from
the `ModelConfig` here. So their `config.json` passes our own schema before the stock class is asked
(`stock.py`): every number has a type and a range, every pair of numbers that must agree is checked,
what dsc cannot compute (another router) is refused here by name, and what the published files
spell in several ways has one spelling. Nothing else about them is special: their facts, states,
names of weights and the check against the stock class are found as those of other types are.
Another rope scaling is `OtherRope`: such a model is left to its stock class.

Field names are those of the official `config.json`. Defaults exist only for fields that published
checkpoints leave out; widths have none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from dsc.errors import ConfigError, UnsupportedArchitecture
from dsc.frontends.folder import CONFIG_FILE, read_object
from dsc.frontends.schema import Schema, sentence
from dsc.frontends.signature import LayerState, Signature
from dsc.ir.limits import BATCH, PAST
from dsc.ir.types import DType
from dsc.strict_json import AGAIN

MEMBERS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
}
"""`model_type` as published, and the family member whose equations it follows."""
LINEARS = re.compile(
    r"model\.layers\.\d+\.("
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight"
    r"|mlp\.(shared_experts\.|experts\.\d+\.)?(gate|up|down)_proj\.weight"
    r"|mlp\.experts\.(gate_up|down)_proj)"
)
"""The weights that published checkpoints have in FP8, those of layers that the stock class leaves
out (MTP) among them; experts may be stacked."""


class OtherRope(ConfigError):
    """A rope scaling that this schema does not describe, though a stock class may compute it."""


Width = Annotated[int, Field(gt=0, le=1 << 20)]
Count = Annotated[int, Field(gt=0, le=1 << 14)]
Positive = Annotated[float, Field(gt=0, le=1e9)]


class RopeParameters(Schema):
    """Rotary position embedding, plain or YaRN (Peng et al. 2023, arXiv:2309.00071).

    The older spelling (`rope_theta` beside `rope_scaling` with a `type`) and the newer one
    (`rope_parameters` with a `rope_type`) both arrive here.
    """

    rope_type: Literal["default", "yarn"] = "default"
    rope_theta: Positive = 10000.0
    factor: Annotated[float, Field(ge=1, le=1e6)] = 1.0
    original_max_position_embeddings: Width | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Annotated[float, Field(ge=0, le=100)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=100)] | None = None
    attention_factor: Positive | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _check(self) -> RopeParameters:
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta must exceed 1, found {self.rope_theta}")
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast}) is below beta_slow ({self.beta_slow})")
        return self

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by: m(mscale) / m(mscale_all_dim), 1.0 for V3."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor, 1.0)

    @property
    def softmax_scale_factor(self) -> float:
        """What YaRN multiplies the softmax scale by: m(mscale_all_dim) squared."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return _yarn_mscale(self.factor, self.mscale_all_dim) ** 2


class ModelConfig(Schema):
    """One member of the family: multi-head latent attention and a mixture of experts."""

    model_type: Literal["deepseek_v2", "deepseek_v3"]
    vocab_size: Annotated[int, Field(gt=0, le=1 << 24)]
    hidden_size: Width
    intermediate_size: Width
    moe_intermediate_size: Width
    num_hidden_layers: Annotated[int, Field(gt=0, le=1024)]
    first_k_dense_replace: Annotated[int, Field(ge=0, le=1024)]
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=16)] = 0
    moe_layer_freq: Literal[1] = 1

    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    q_lora_rank: Width | None = None
    kv_lora_rank: Width
    qk_nope_head_dim: Width
    qk_rope_head_dim: Width
    v_head_dim: Width
    attention_bias: bool = False

    n_routed_experts: Annotated[int, Field(gt=0, le=4096)]
    n_shared_experts: Annotated[int, Field(gt=0, le=64)]
    num_experts_per_tok: Count
    n_group: Count = 1
    topk_group: Count = 1
    scoring_func: Literal["sigmoid", "softmax"]
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"]
    norm_topk_prob: bool
    routed_scaling_factor: Positive = 1.0

    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Annotated[float, Field(gt=0, lt=0.1)] = 1e-6
    max_position_embeddings: Annotated[int, Field(gt=0, le=1 << 26)]
    rope_parameters: RopeParameters = RopeParameters()
    rope_interleave: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: Annotated[int, Field(ge=0)] | None = None
    eos_token_id: Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for broken in self._contradictions():
            raise ValueError(broken)
        return self

    def _contradictions(self) -> list[str]:
        """Everything that is in range on its own and wrong together, as sentences."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        groups, kept = self.n_group, self.topk_group
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        kept_experts = kept * (experts // groups)
        router = (self.scoring_func, self.topk_method)
        rules = {
            f"num_key_value_heads ({kv_heads}) must equal num_attention_heads ({heads}): "
            "latent attention has no grouped heads": kv_heads not in (None, heads),
            f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: rope turns pairs":
                self.qk_rope_head_dim % 2 != 0,
            f"num_experts_per_tok ({chosen}) exceeds n_routed_experts ({experts})":
                chosen > experts,
            f"n_group ({groups}) does not divide n_routed_experts ({experts})":
                experts % groups != 0,
            f"topk_group ({kept}) exceeds n_group ({groups})": kept > groups,
            f"num_experts_per_tok ({chosen}) exceeds the {kept_experts} experts of "
            f"topk_group ({kept}) groups": self.topk_method != "greedy" and chosen > kept_experts,
            f"a {self.model_type} router scores by {self._routers()}, found {router}":
                router not in self._routers(),
            f"a group needs two experts to be scored, n_group ({groups}) leaves "
            f"{experts // groups}": self.topk_method == "noaux_tc" and experts // groups < 2,
            "norm_topk_prob is not defined for deepseek_v2 routers":
                self.model_type == "deepseek_v2" and self.norm_topk_prob,
            f"a deepseek_v2 needs a hidden_size ({self.hidden_size}) that num_attention_heads "
            f"({heads}) divides":
                self.model_type == "deepseek_v2" and self.hidden_size % heads != 0,
            "deepseek_v2 has no rope_interleave: false":
                self.model_type == "deepseek_v2" and not self.rope_interleave,
        }  # fmt: skip
        return [sentence for sentence, broken in rules.items() if broken]

    def _routers(self) -> list[tuple[str, str]]:
        if self.model_type == "deepseek_v3":
            return [("sigmoid", "noaux_tc")]
        return [("softmax", "greedy"), ("softmax", "group_limited_greedy")]

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head: the part without position and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(width of a query head), times YaRN's correction (0.1352 for V3)."""
        return math.pow(self.qk_head_dim, -0.5) * self.rope_parameters.softmax_scale_factor

    @property
    def fields(self) -> dict[str, Any]:
        """What the stock class is built from: these fields, and of a plain rope what it has."""
        rope = self.rope_parameters.model_dump(exclude_none=True)
        if self.rope_parameters.rope_type == "default":
            rope = {name: rope[name] for name in ("rope_type", "rope_theta")}
        said = self.model_dump(exclude={"model_type", "dtype"})
        heads = {"num_key_value_heads": self.num_attention_heads}
        return said | {"rope_parameters": rope} | heads

    def is_moe(self, layer: int) -> bool:
        """Whether decoder layer `layer` has experts instead of one dense MLP."""
        return layer >= self.first_k_dense_replace


def _yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature m = 0.1 * mscale * ln(factor) + 1 (section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parse_config(raw: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelConfig:
    """Check a decoded `config.json` and give it its canonical spelling.

    Raises:
        UnsupportedArchitecture: `model_type` is none of `MEMBERS`.
        ConfigError: a field is missing, of a wrong type, out of range or contradicts another.
    """
    published = raw.get("model_type")
    member = MEMBERS.get(published) if isinstance(published, str) else None
    if member is None:
        known = ", ".join(MEMBERS)
        raise UnsupportedArchitecture(
            f"model_type {published!r} is not one that dsc knows", where, f"known: {known}"
        )
    known_keys = ModelConfig.model_fields
    fields = {key: v for key, v in raw.items() if key in known_keys and v is not None}
    fields["model_type"] = member
    fields["dtype"] = raw.get("dtype") or raw.get("torch_dtype")
    fields["rope_parameters"] = _rope_parameters(raw, where)
    _default(fields, _routing_defaults(member))
    for name in ("mlp_bias", "use_sliding_window"):
        if raw.get(name):
            raise ConfigError(f"{name} is not supported for {member}", where)
    if raw.get("partial_rotary_factor") not in (None, 1):
        raise ConfigError("partial_rotary_factor: all of qk_rope_head_dim is rotated", where)
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as exc:
        raise ConfigError(sentence(exc), where, AGAIN) from None


def load_config(path: Path | str) -> ModelConfig:
    """Read and check the `config.json` at `path`, a file or a checkpoint folder."""
    path = Path(path)
    file = path / CONFIG_FILE if path.is_dir() else path
    return parse_config(read_object(file), str(file))


def states_of(config: ModelConfig, dtype: DType = DType.f32) -> Signature:
    """The states of a model that `build(config)` makes: a latent and a rope key for each layer."""
    parts = (("latent", "keys", config.kv_lora_rank), ("rope", "values", config.qk_rope_head_dim))
    states = tuple(
        LayerState(layer, name, part, (BATCH, PAST, width), dtype, 1)
        for layer in range(config.num_hidden_layers)
        for name, part, width in parts
    )
    return Signature(states, config.vocab_size)


def _default(fields: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in defaults.items():
        if fields.get(name) is None:
            fields[name] = value


def _routing_defaults(member: str) -> dict[str, Any]:
    """What the modelling code of each member does when its config says nothing."""
    if member == "deepseek_v3":
        router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    else:
        router = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    return {"n_group": 1, "topk_group": 1} | router


SCALING = {"yarn": ("factor",)}
"""Rope types that change the frequencies, and the keys that each means nothing without."""


def _rope_parameters(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Both spellings of the rope section as the fields of `RopeParameters`.

    What transformers derives is derived: the base of the frequencies is 10000 where no key says
    it, and yarn's original context is the model's.
    """
    newer, older = (_section(raw, name, where) for name in ("rope_parameters", "rope_scaling"))
    differ = {k for k in newer.keys() | older.keys() if newer.get(k) != older.get(k)}
    if newer and older and differ - {"rope_theta"}:
        raise ConfigError("rope_parameters and rope_scaling say different things", where)
    rope = {"rope_type": "default"} | older | newer
    if "rope_theta" not in rope and raw.get("rope_theta") is not None:
        rope["rope_theta"] = raw["rope_theta"]
    if rope["rope_type"] == "yarn":
        own = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings"))
        original = raw.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = own if original is None else original
    return rope


def _section(raw: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """One spelling of the rope section, without its nulls and with its type; {} if there is none.

    Raises:
        ConfigError: it is no section, is one for each kind of layer, is of a type that dsc does not
            compute, or lacks a key without which it means nothing.
    """
    found = raw.get(name)
    if found is None or found == {}:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"the rope section {name} must be an object, found {found!r}", where)
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if nested:
        raise ConfigError(
            f"{name} has sections of its own ({', '.join(nested)}): all layers of the family "
            "rotate alike", where,
        )  # fmt: skip
    section = {key: value for key, value in found.items() if value is not None}
    kind = section.pop("type", None)
    kind = section.setdefault("rope_type", kind)
    if kind is None:
        del section["rope_type"]
        scaling = section.keys() & RopeParameters.model_fields.keys() - {"rope_theta"}
        if scaling:
            raise ConfigError(f"{name} has {', '.join(sorted(scaling))} and no rope_type", where)
        return section
    if kind not in ("default", *SCALING):
        raise OtherRope(
            f"{name}: rope_type {kind!r} is not one that dsc computes", where,
            f"known: default, {', '.join(SCALING)}",
        )  # fmt: skip
    missing = [key for key in SCALING.get(kind, ()) if key not in section]
    if missing:
        raise ConfigError(f"{name}.{', '.join(missing)} is missing, and {kind} needs it", where)
    return section
