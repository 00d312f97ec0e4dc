"""What `dsc profile` tells of a decode step's bytes, beside what a configuration says of them.

    python -m bench.decode_bytes [TYPE ...]

Heads that share keys must not read them again: a step reads all weights once, and of every layer
the rows of keys and values in sight once (`bench.limit`). What is more are activations, small
beside both at the sizes here. It is what operators declare, not what a processor counts: rows out
of a window and copies of heads would show, but a declared read of a cache is never more than the
cache (`dsc.ir.costs`). That kernels read a row once for all heads of its group is in their loops
and in their time, which `python -m bench` holds against the machine's limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import limit
from dsc.runtime.limit import working_set

TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4",
    "granite", "smollm3", "ernie4_5", "exaone4",
)  # fmt: skip
"""Those whose MLP has a gate, and whose configurations call widths by the same names."""
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 256,
    "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONTEXT = 3072
MOST = 1.05
"""What is told over what must be, at most: activations are the rest."""


def configuration(model_type: str, **changes: Any) -> Mapping[str, Any]:
    """A type's configuration at `SIZES`, as its class fills it in."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields: Mapping[str, Any] = CONFIG_MAPPING[model_type](**SIZES | changes).to_dict()
    return fields


def ratio(config: Mapping[str, Any], batch: int, context: int, told: float) -> float:
    """The bytes told of a decode step over those that a configuration says, in bf16."""
    return told / working_set(limit.step_work(config, batch, 1, context))


def save(config: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint in bf16, with weights as its class begins with."""
    import torch

    from dsc.frontends.stock import clean, stock_model

    stock: Any = stock_model(clean(dict(config)), device="cpu")
    stock.to(torch.bfloat16).save_pretrained(folder)


def told(folder: Path) -> float:
    """Bytes of a decode step after `CONTEXT` tokens, from the command."""
    out, dsc = folder / "out", [sys.executable, "-m", "dsc"]
    room = str(CONTEXT + 64)
    compiled = ["compile", str(folder), "--backend", "tvm", "--max-context", room, "-o", str(out)]
    profiled = ["profile", str(out), "--context", str(CONTEXT), "--tokens", "1", "--warmup", "0"]
    subprocess.run([*dsc, *compiled], check=True, capture_output=True)
    done = subprocess.run([*dsc, *profiled, "--json"], check=True, capture_output=True, text=True)
    return float(sum(row["bytes"] for row in json.loads(done.stdout)["rows"]))


def measure(types: Sequence[str] = TYPES) -> dict[str, Any]:
    """The ratio of every type: from 1, for nothing is read less than once, to `MOST`."""
    found = {}
    for model_type in types:
        config = configuration(model_type)
        with tempfile.TemporaryDirectory() as place:
            save(config, Path(place))
            found[model_type] = round(ratio(config, 1, CONTEXT, told(Path(place))), 4)
    return {"ok": all(1 <= each <= MOST for each in found.values()), **found}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:] or TYPES), indent=1))
