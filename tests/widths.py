"""Two stored traces in which every extent differs, at other widths: see `bench.apart`.

`python -m bench.bars random_configs` holds what `apart.at` writes down against live traces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import apart
from bench.parity import YARN
from dsc.frontends.family import ModelConfig, parse_config
from dsc.ir.program import Program

TRACED = Path(__file__).resolve().parent / "data" / "apart"
_FIELDS: dict[str, Any] = apart.WIDTHS | {
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "rope_parameters": YARN,
}  # fmt: skip
APART = {
    "v3": _FIELDS | {"model_type": "deepseek_v3", "routed_scaling_factor": 2.5},
    "v2": _FIELDS
    | {
        "model_type": "deepseek_v2",
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
}


def at(name: str, config: ModelConfig) -> Program:
    """The stored trace `name` with the widths of `config`, over weights without values."""
    text = (TRACED / f"{name}.dsc").read_text()
    return apart.at(text, parse_config(APART[name]), config)
