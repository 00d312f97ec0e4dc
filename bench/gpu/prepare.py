"""What a card's machine is given: binaries and plans of models, and the tokens of the tiny one."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dsc
from bench.gpu import checks, tiles
from bench.gpu.archive import ROOT, TINY_CHECKPOINT, packed, sources
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.weights import Source, WeightExpr, source_types
from dsc.models.configs import CONFIGS
from dsc.runtime.packing import pack
from dsc.targets import parse_target

LIMITS: Mapping[str, Any] = {"max_context": 8192, "max_batch": 4, "prefill_chunk": 4096}
MANY: Mapping[str, Any] = {"max_batch": 64, "prefill_chunk": 64}
"""Of the model that 64 sequences run in: room for a step of so many prompts' chunks would be more
than a card has."""
SHORT: Mapping[str, int] = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
MODELS: Mapping[str, tuple[str, Mapping[str, int], Mapping[str, Any]]] = {
    "moonlight-6l": ("moonlight", {"num_hidden_layers": 6}, {}),
    "671b-3l": ("671b", SHORT, {}),
    "671b-3l, 64 sequences": ("671b", SHORT, MANY),
    "671b-3l fp8": ("671b", SHORT, {"quant": "fp8"}),
    "671b-3l fp8, head too": ("671b", SHORT, {"quant": "fp8", "keep": ["lm_head:fp8"]}),
}
"""By name a configuration, what of it is changed, and options of the compile beside `LIMITS`."""
FORMS: Mapping[str, Mapping[str, Any]] = {
    "bf16": {}, "fp8": {"quant": "fp8", "cache_format": "fp8"}, "int4": {"quant": "int4"},
    "fp8, head too": {"quant": "fp8", "keep": ["lm_head:fp8"]},
}  # fmt: skip
"""What the tiny checkpoint is compiled to."""
TINY_LIMITS: Mapping[str, Any] = {"max_context": 256, "max_batch": 4, "prefill_chunk": 128}
PROMPT, TOKENS = 20, 32
UNUSED = ("interpret", "kernels")
"""What of a compiled model no card needs."""


def prepare(
    archive: Path,
    target: str,
    models: Mapping[str, Any] = MODELS,
    forms: Mapping[str, Any] = FORMS,
    cases: Collection[str] | None = None,
    searched: Mapping[str, tuple[str, ...]] = tiles.ENTRIES,
) -> int:
    """Write what the card's machine needs; how many bytes that are. Raises `ValueError`."""
    asked: dict[str, Any] = {"backend": "triton", "target": target, "dtype": "bf16"}
    with tempfile.TemporaryDirectory(prefix="dsc-gpu-") as place:
        folder = Path(place) / "prepared"
        layers = {}
        for name, (known, changes, options) in models.items():
            layers[name] = changes["num_hidden_layers"]
            file = configured(known, changes, Path(place))
            compiled = dsc.compile(
                ROOT / "models" / "v3.py", config=str(file), weights="none",
                **{**asked, **LIMITS, **options},
            )  # fmt: skip
            _kept(compiled, folder / name)
            if name in searched:
                tiles.prepare(folder / name, target, searched[name])
        for name, options in forms.items():
            own = folder / checks.TINY / name
            compiled = dsc.compile(TINY_CHECKPOINT, **asked, **TINY_LIMITS, **options)
            _kept(compiled, own)
            _constants(compiled.program, own / checks.CONSTANTS)
            (own / checks.EXPECTED).write_text(json.dumps(expected(options)))
        _cases(folder, target, cases)
        line = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        about = {
            "target": target,
            "commit": commit.strip(),
            "dsc": dsc.__version__,
            "layers": layers,
            "sources": sources(),
        }
        (folder / "about.json").write_text(json.dumps(about))
        return packed(folder, archive)


def configured(known: str, changes: Mapping[str, int], folder: Path) -> Path:
    """The file in a folder that a configuration with some changes is written to."""
    file = folder / f"{known}.json"
    file.write_text(json.dumps(json.loads(CONFIGS[known].read_text()) | dict(changes)))
    return file


def _kept(compiled: Any, place: Path) -> None:
    """Write an artifact but for its weights, and for what no card needs."""
    compiled.save(place)
    shutil.rmtree(place / "weights", ignore_errors=True)
    for extra in UNUSED:
        shutil.rmtree(place / "triton" / extra)


def _constants(program: Program, file: Path) -> None:
    """Write what weights are made of that the tiny checkpoint does not hold."""
    stored = open_safetensors(TINY_CHECKPOINT).types
    types = source_types(program.weights.values())
    made: dict[str, WeightExpr] = {k: Source(k, t) for k, t in types.items() if k not in stored}
    pack(replace(program, weights=made), file)


def expected(options: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's greedy tokens of the tiny checkpoint, each with the next best and by how far.

    Of the same program text: with the options of the compile, in bf16.
    """
    import torch

    session = dsc.compile(
        TINY_CHECKPOINT, backend="reference", dtype="bf16", **TINY_LIMITS, **options
    ).session(1)
    prompt = torch.randint(2048, (1, PROMPT), generator=torch.Generator().manual_seed(3))
    logits, pairs = session.prefill(prompt).float(), []
    for _ in range(TOKENS):
        best = logits[0].topk(2)
        first, second = best.indices.tolist()
        pairs.append((first, second, float(best.values[0] - best.values[1])))
        logits = session.decode(best.indices[:1]).float()
    return {"prompt": prompt[0].tolist(), "tokens": pairs}


def _emitted(program: Program, target: str, place: Path) -> None:
    """Write a program of cases with its binaries."""
    from dsc.backends.base import EmitOptions
    from dsc.backends.triton import TritonBackend

    emitted = TritonBackend().emit(program, EmitOptions(targets=(parse_target(target),)))
    for name, data in emitted.files.items():
        if not set(UNUSED) & set(Path(name).parts):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(data)
    (place / "program.dsc").write_text(print_program(program))


def _cases(folder: Path, target: str, wanted: Collection[str] | None) -> None:
    """The cases of the tests, all or some, as programs with their binaries."""
    from tests.backends.triton_cases import EMITTED, cases, large_cases, program_of
    from tests.backends.triton_coded import program
    from tests.backends.triton_coded_cases import CASES

    plain = {
        k: x for k, x in (cases(EMITTED) | large_cases()).items() if wanted is None or k in wanted
    }
    coded = {k: x for k, x in CASES.items() if wanted is None or k in wanted}
    _emitted(program_of(plain), target, folder / checks.CASES)
    _emitted(program(coded), target, folder / checks.CODED)
