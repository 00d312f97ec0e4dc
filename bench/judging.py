"""Are the verbs that judge right? Sound models pass in their own type, broken ones fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from dsc.models.configs import TINY_CHECKPOINT
from dsc.runtime.launch import command
from dsc.runtime.protocol import DRIFT

SOUND = (("tvm", "fp32"), ("tvm", "bf16"), ("tvm", "fp16"), ("onnxruntime", "bf16"))
BROKEN = ("model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.experts.3.down_proj.weight")
"""Weights that are doubled, each in a checkpoint of its own: of one layer, of one expert of 16."""
SHORT = {
    "verify": ["--tokens", "48"],
    "bench": ["--prompt-len", "64", "--tokens", "4", "--rounds", "4", "--repeats", "3"],
    "profile": ["--tokens", "4", "--context", "32"],
}


def bar() -> dict[str, Any]:
    """Sound artifacts verify in their own type, broken ones do not; no share passes the limit."""
    told, shares = verdicts(TINY_CHECKPOINT)
    ranks = of_two_ranks(TINY_CHECKPOINT)
    right = all(v["exit"] == (1 if name in BROKEN else 0) for name, v in told.items())
    whole = all(s is not None and 0 < s <= 1 + DRIFT for each in shares.values() for s in each)
    return {
        "ok": right and whole and not any(ranks.values()),
        "verify": told,
        "exit of two ranks": ranks,
        "shares of the limit (prefill, decode)": shares,
    }


def verdicts(checkpoint: Path) -> tuple[dict[str, Any], dict[str, list[float | None]]]:
    """What `dsc verify` says of sound artifacts in three types, and of broken ones in bf16.

    And the shares of the limit of prefill and decode that `dsc bench` tells of the sound ones.
    """
    found, shares = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for backend, dtype in SOUND:
            out = Path(folder) / f"{backend}-{dtype}"
            _dsc("compile", checkpoint, "--backend", backend, "--dtype", dtype, "-o", out)
            done = _dsc("verify", out, "--json")
            found[out.name] = {"exit": done.returncode, **_short(json.loads(done.stdout))}
            told = json.loads(_dsc("bench", out, "--json").stdout)
            shares[out.name] = [told[phase]["of_limit"] for phase in ("prefill", "decode")]
        for number, name in enumerate(BROKEN):
            wrong, out = Path(folder) / f"wrong-{number}", Path(folder) / f"doubled-{number}"
            _doubled(checkpoint, wrong, name)
            _dsc("compile", wrong, "--backend", "tvm", "--dtype", "bf16", "-o", out)
            done = _dsc("verify", out, "--checkpoint", checkpoint, "--json")
            found[name] = {"exit": done.returncode, **_short(json.loads(done.stdout))}
    return found, shares


def of_two_ranks(checkpoint: Path) -> dict[str, int]:
    """The exit status of each verb on an artifact of two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        _dsc("compile", checkpoint, "--backend", "reference", "--ranks", 2, "-o", out)
        return {verb: _dsc(verb, out, *words).returncode for verb, words in SHORT.items()}


def _doubled(checkpoint: Path, out: Path, name: str) -> None:
    """A copy of a checkpoint in which one tensor is twice what it should be."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = tensors[name] * 2
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise KeyError(name)


def _short(told: dict[str, Any]) -> dict[str, Any]:
    """The figures of a verdict, the errors of logits beside their bounds."""
    errors = [[float(f"{c[k]:.3g}") for k in ("found", "bound")] for c in told["checks"]]
    return {"excluded": told["excluded"], "agree": told["greedy_agreement"], "errors": errors}


def _dsc(*words: object) -> subprocess.CompletedProcess[str]:
    line = command([str(word) for word in words])
    return subprocess.run(line, capture_output=True, text=True, check=False)
