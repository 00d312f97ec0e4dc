"""Random small configurations of many types of decoders, against stock transformers.

A configuration is drawn from the defaults of its type's class by the roles of its numbers: which
layers there are, widths, heads, experts and windows are drawn, switches of biases, norms and ties
thrown, another rope taken. Coincidences are sought: widths that are equal, a head for each query
and one for all, heads that are not as wide as the model together, one expert that is chosen, or
all. Its weights are random (`disturb`), saved as transformers saves them, and compiled from the
folder. Every logit of a prompt, of one in chunks, of a batch of different lengths and of 16 decode
steps is held against one forward of the stock class, in fp32.

    python -m bench.matrix [TYPE ...] [--backend NAME] [--draws N]

Results go to bench/out/matrix.jsonl; what was measured at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dsc
from bench import parity
from bench.random_configs import unoptimised
from bench.results import OUT, failed, measured, tell
from dsc.errors import DscError
from dsc.frontends.catalogue import example
from dsc.frontends.comparison import logits_of
from dsc.frontends.facts import NAMES
from dsc.frontends.self_check import disturb, does_not_run, in_memory
from dsc.frontends.shrunk import EVERY, FIRST, LISTED, role_of
from dsc.frontends.stock import StockConfig, clean, plain_experts

TYPES = (
    "deepseek_v2", "deepseek_v3", "axk1", "glm4_moe_lite", "mistral4", "minicpm3", "youtu",
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "gemma2",
    "gemma3_text", "phi3", "olmo2", "glm4", "glm4_moe", "gpt_oss", "granite", "smollm3",
    "ernie4_5", "starcoder2", "dots1", "exaone4",
)  # fmt: skip
BACKENDS = ("reference", "tvm", "onnxruntime")
RESULTS = OUT / "matrix.jsonl"
DRAWS = 5
STEPS = 16
RAGGED = (5, 21, 1, 18)
"""Tokens of the prompts of a batch of different lengths."""
LIMITS: dict[str, Any] = {"max_batch": 4, "max_context": 96, "prefill_chunk": 16}
POSITIONS = 96
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)  # fmt: skip
SWITCHES = ("bias", "qk_norm", "qk_layernorm", "tie_word", "norm_topk", "interleave", "sinks")
"""Words of switches that are thrown."""
FACTORS = ("multiplier", "logits_scaling", "routed_scaling_factor", "scale_emb", "scale_depth")
"""Words of factors that are drawn."""
CAPS = ("softcapping",)


@dataclass(frozen=True)
class Sizes:
    """What widths are drawn from: of the model, of a head, of parts of heads, and all others."""

    hidden: tuple[int, ...] = (8, 12, 16, 24, 32)
    head: tuple[int, ...] = (4, 6, 8, 16)
    parts: tuple[int, ...] = (4, 8, 12)
    others: tuple[int, ...] = (8, 12, 16, 24, 40)


SMALL = Sizes()


def draw(model_type: str, index: int, sizes: Sizes = SMALL) -> StockConfig:
    """Configuration `index` of a type: one that its class takes, and the same at every call."""
    base = dict(example(model_type).values)
    chance = random.Random(f"{model_type} {index}")
    told = ""
    for attempt in range(200):
        rope = ROPES[(index + attempt) % len(ROPES)]
        values = _drawn(base, chance, rope, sizes) | {"model_type": model_type}
        try:
            config = clean(values, f"{model_type} {index}")
            stock, _ = in_memory(config)
        except DscError as refused:
            told = str(refused)
            continue
        if not (told := does_not_run(stock)):
            return config
    raise RuntimeError(f"no draw of {model_type} is one that its class takes: {told}")


def _drawn(
    base: Mapping[str, Any], chance: random.Random, rope: Mapping[str, Any], sizes: Sizes
) -> dict[str, Any]:
    """One draw, legal or not."""
    hidden, heads = chance.choice(sizes.hidden), chance.choice((1, 2, 2, 3, 4))
    fields = {k: _switched(k, v, chance) for k, v in base.items()}
    fields |= _layers(base, chance)
    shared = chance.choice([n for n in range(1, heads + 1) if heads % n == 0])
    experts = _experts(fields, chance)
    facts = {
        "hidden_size": hidden, "num_attention_heads": heads,
        "vocab_size": chance.choice((61, 97, hidden)), "positions": POSITIONS,
    }  # fmt: skip
    named = {name: number for fact, number in facts.items() for name in NAMES[fact]} | {
        "num_key_value_heads": shared,
        "head_dim": chance.choice((*sizes.head, 2 * (hidden // heads // 2) or 2)), **experts,
    }  # fmt: skip
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, (int, list)):
            continue
        role = role_of(key)
        if key in named:
            fields[key] = named[key]
        elif role == "id":
            fields[key] = chance.randrange(3)
        elif role == "window" and isinstance(value, int):
            fields[key] = chance.choice((2, 3, 5, 8))
        elif role == "head_dim":
            fields[key] = chance.choice(sizes.parts)
        elif role == "width" and isinstance(value, int):
            fields[key] = chance.choice((hidden, *sizes.others))
    if "qk_head_dim" in fields:
        fields["qk_head_dim"] = fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]
        turned = base["rope_parameters"].get("partial_rotary_factor", 1.0)
        fields["head_dim"] = round(fields["qk_rope_head_dim"] / turned)
    fields["rope_parameters"] = _ropes(base.get("rope_parameters"), rope)
    return {k: v for k, v in fields.items() if k in base}


def _switched(key: str, value: Any, chance: random.Random) -> Any:
    """A switch thrown, a factor or a bound drawn; anything else as it is."""
    if isinstance(value, bool):
        return chance.random() < 0.5 if any(word in key for word in SWITCHES) else value
    if any(word in key for word in CAPS):
        return chance.choice((None, 5.0, 30.0))
    if isinstance(value, (int, float)) and any(word in key for word in FACTORS):
        return chance.choice((value, 0.5, 2.5))
    return value


def _layers(base: Mapping[str, Any], chance: random.Random) -> dict[str, Any]:
    """How many layers there are, and of which sorts."""
    depth = chance.choice((1, 2, 2, 3))
    counts = [key for key in NAMES["num_hidden_layers"] if isinstance(base.get(key), int)]
    before = base[counts[0]]
    made: dict[str, Any] = dict.fromkeys(counts, depth)
    for key, value in base.items():
        if key in LISTED:
            made[key] = [layer for layer in range(depth) if chance.random() < 0.4]
        elif isinstance(value, list) and len(value) == before:
            made[key] = [chance.choice(value) for _ in range(depth)]
        elif key in FIRST:
            made[key] = chance.randint(0, depth)
        elif key in EVERY and isinstance(value, int):
            made[key] = chance.choice((1, 1, 2))
    return made


def _experts(fields: Mapping[str, Any], chance: random.Random) -> dict[str, int]:
    """Experts, their groups, and how many are chosen: one, two, or all that may be."""
    groups = chance.choice((1, 1, 2))
    of_group = chance.choice((2, 2, 3, 4))
    kept = chance.randint(1, groups)
    chosen = chance.choice((1, 2, kept * of_group))
    made = {"experts": groups * of_group, "chosen": chosen, "shared": chance.choice((1, 2))}
    found = {}
    for key, value in fields.items():
        role = role_of(key)
        if role == "groups":
            found[key] = kept if "topk" in key else groups
        elif role in made and isinstance(value, int):
            found[key] = made[role]
    return found


def _ropes(base: Any, rope: Mapping[str, Any]) -> Any:
    """Another rope in the place of each, with its own base and the part of a head it turns."""
    if not isinstance(base, Mapping):
        return base
    if any(isinstance(each, Mapping) for each in base.values()):
        return {name: _ropes(each, rope) for name, each in base.items()}
    own = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")
    return {**{name: base[name] for name in own if name in base}, **rope}


class Whole:
    """The oracle: one forward of the stock class. No position is in doubt by its choice."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def logits(self, ids: Tensor) -> tuple[Tensor, int]:
        """Logits [S, vocab] of one sequence [S], and how many of its positions are sure."""
        with torch.no_grad(), plain_experts(self.stock.config):
            return logits_of(self.stock, ids[None])[0], len(ids)


def check(model_type: str, index: int, backends: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compare a configuration on each backend with the stock class, through a saved folder."""
    case = {"type": model_type, "draw": index}
    try:
        config = draw(model_type, index)
        stock, _ = in_memory(config)
        disturb(stock, index)
    except Exception as problem:
        yield from (case | {"backend": b, "ok": False, "error": failed(problem)} for b in backends)
        return
    oracle: Any = Whole(stock)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        for backend in backends:
            yield case | {"backend": backend} | _compared(Path(folder), backend, oracle, index)


def _compared(folder: Path, backend: str, oracle: Any, seed: int) -> dict[str, Any]:
    result = parity.Result(folder.name, backend)
    try:
        with unoptimised() if backend == "tvm" else nullcontext():
            compiled = dsc.compile(folder, backend=backend, dtype="fp32", **LIMITS)
        parity.compare(compiled, oracle, result, STEPS, seed)
    except Exception as problem:
        return {"ok": False, "error": failed(problem)}
    return {"ok": result.worst <= parity.TOLERANCE, "worst": result.worst}


def run(types: Sequence[str], backends: Sequence[str], draws: int) -> list[dict[str, Any]]:
    """Results of all draws of these types, one a backend."""
    cases = [(model_type, index) for model_type in types for index in range(draws)]
    return measured(RESULTS, ("type", "draw", "backend"), cases, backends, check)


def bar() -> dict[str, Any]:
    """27 types of decoders, five random configurations each, through folders, against stock."""
    found = run(TYPES, BACKENDS, DRAWS)
    bad = [each for each in found if not each["ok"]]
    worst = {b: max(e.get("worst", 0.0) for e in found if e["backend"] == b) for b in BACKENDS}
    return {"ok": not bad, "results": len(found), "worst": worst, "bad": bad[:20]}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--backend", action="append")
    parser.add_argument("--draws", type=int, default=DRAWS)
    asked = parser.parse_args()
    tell(run(asked.types, asked.backend or BACKENDS, asked.draws))


if __name__ == "__main__":
    main()
