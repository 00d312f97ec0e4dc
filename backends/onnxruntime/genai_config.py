"""genai_config.json: what ONNX Runtime GenAI must be told of a model to generate with it.

GenAI's own kind of decoder without a name, "decoder", takes the signature of
`stock_signature.py` with whole rows as one head. It finds the widths of keys and values in the
model, one a layer for both; its beams and rewinding cut caches along axes that rows have too.
"""

from __future__ import annotations

import json
from typing import Any

from dsc.backends.onnxruntime.stock_signature import PARTS, PAST, PRESENT, StockSignature
from dsc.ir.program import Program

CONFIG = "genai_config.json"
DRAWN = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""What of generation_config.json GenAI has under the same name."""


def text(program: Program, signature: StockSignature, path: str) -> str:
    """The file for the model at `path`."""
    facts = program.meta.get("config", {})
    said = program.meta.get("generation", {})
    ends = said.get("eos_token_id") or []
    first = signature.layers[0]
    heads, width = signature.shape(first, 0)[1::2]
    names = {
        f"{side}_{part}_names": form.format("%d", part)
        for side, form in (("past", PAST), ("present", PRESENT))
        for part in PARTS
    }
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": path,
        "head_size": width,
        "num_key_value_heads": heads,
        "num_hidden_layers": len(signature.layers),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{key: name for key, name in names.items() if key.startswith("past")},
        },
        "outputs": {
            "logits": "logits",
            **{key: name for key, name in names.items() if key.startswith("present")},
        },
    }
    counted = ("hidden_size", "num_attention_heads")
    decoder |= {key: facts[key] for key in counted if isinstance(facts.get(key), int)}
    pad = said.get("pad_token_id")
    model: dict[str, Any] = {
        "type": "decoder",
        "vocab_size": signature.logits.shape[-1],
        "context_length": program.limits.max_context,
        "bos_token_id": said.get("bos_token_id") or 0,
        "eos_token_id": ends,
        "pad_token_id": pad if pad is not None else (ends[0] if ends else 0),
        "decoder": decoder,
    }
    search = {key: said[key] for key in DRAWN if key in said}
    search |= {"max_length": program.limits.max_context, "past_present_share_buffer": False}
    return json.dumps({"model": model, "search": search}, indent=1) + "\n"
