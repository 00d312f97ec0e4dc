"""Folders of Llama and Qwen kinds in every quantised layout, on every backend: `make bars`.

A small model of a type is written in each layout (`bench.quantised_folders`), compiled in fp32,
saved and opened again. Its artifact must hold codes for all linears of the layers, which say bit
for bit the numbers that the layout says they are, and its logits are those of the stock class over
those numbers. Rows stay in fp32 (`activation_bits=16`); with rows in codes too, kernels are held to
the program's own text, as `dsc verify` does. What a backend takes in no such codes, as onnxruntime
FP8, is packed dequantised there, and held to the same numbers.

    python -m bench.coded_folders [TYPE ...] [--backend NAME] [--layout NAME]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import dsc
from bench.matrix import BACKENDS, LIMITS, Whole
from bench.names import quiet, small_model
from bench.quant_matrix import unfused
from bench.quantised_folders import LAYOUTS, Tensors, config_of, stored
from bench.random_configs import unoptimised
from bench.results import OUT, failed, measured, tell
from dsc import backends
from dsc.frontends.load import load_program
from dsc.frontends.self_check import disturb
from dsc.ir.arrays import array_of, tensor_of
from dsc.ir.formats import Packed
from dsc.ir.graph import Weight
from dsc.ir.program import Program
from dsc.ir.safetensors import open_safetensors
from dsc.ir.types import DType
from dsc.ir.weights import evaluate, sources, stored_type
from dsc.targets import Target
from dsc.verification import compare, held_to_text, session_logits

TYPES = ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
VOCABULARY = 61
WHOLE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 384,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
ENDS: dict[str, Any] = WHOLE | {
    "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 160, "head_dim": 24,
}  # fmt: skip
WIDTHS = {"whole": WHOLE, "ends": ENDS}
"""Widths of whole blocks of 128, and such as cut them."""
GROUP = 32
TOLERANCE = 1e-4
CUT = "cuts a block of 128"
KEPT = {
    "ct-int4": "i4{1x32,bf16", "ct-int4-zeros": "i4{1x32,bf16,i8", "ct-int8": "i8{1x32,f16,i8",
    "w8a8": "i8{1x[*],bf16", "fp8-channel": "f8e4m3{1x[*],f32", "fp8-tensor": "f8e4m3{.*",
    "fp8-block": "f8e4m3{128x128,f32", "gptq": "i4{1x32,f16", "gptq-zeros": "i4{1x32,f16,i8",
    "gptq-v2": "i4{1x32,f16,i8", "gptq-8": "i8{1x32,f16,i8", "awq": "i4{1x32,f16,i8",
}  # fmt: skip
"""Patterns of types of weights, by layout, where codes stay as they are stored: see `kept_as`."""
ORDERED = "gptq-ordered"
"""Columns of a group that do not follow each other: read exactly, and packed dequantised."""
CUTTING = ("fp8-block", "awq", "w8a8")
"""Layouts that are tried at widths which cut blocks as well."""
RESULTS = OUT / "coded_folders.jsonl"
CASE = ("type", "layout", "widths")
"""What tells a case."""


@cache
def model_of(model_type: str, widths: str) -> Any:
    """A small model of a type in memory, its logits of a few units."""
    model = small_model(model_type, **WIDTHS[widths])
    disturb(model)
    return model


def plain_of(model: Any) -> tuple[dict[str, Any], Tensors]:
    """`config.json` and the tensors of a model, as transformers publishes it."""
    with tempfile.TemporaryDirectory() as place, quiet():
        model.save_pretrained(place)
        source = open_safetensors(Path(place))
        raw = json.loads((Path(place) / "config.json").read_text())
        return raw, {key: np.array(source.array(key)) for key in source.types}


def folder(path: Path, raw: Mapping[str, Any], tensors: Tensors) -> Path:
    """A checkpoint folder of these tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    save_file(
        {k: tensor_of(np.ascontiguousarray(t)) for k, t in tensors.items()},
        path / "model.safetensors",
    )
    return path


def both(
    path: Path, plain: tuple[dict[str, Any], Tensors], layout: str, group: int
) -> tuple[Path, Path]:
    """A model in a layout, and the numbers that it stands for."""
    raw, tensors = plain
    made, numbers = stored(tensors, LAYOUTS[layout], group)
    told = config_of(raw, LAYOUTS[layout], group)
    return folder(path / "stored", told, made), folder(path / "plain", raw, numbers)


def check(
    model_type: str, layout: str, widths: str, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A layout of a type on each backend."""
    from transformers import AutoModelForCausalLM

    case = {"type": model_type, "layout": layout, "widths": widths}
    with tempfile.TemporaryDirectory() as place, quiet():
        coded, plain = both(Path(place), plain_of(model_of(model_type, widths)), layout, GROUP)
        stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        for backend in names:
            out = Path(place) / backend
            try:
                found = _held(coded, plain, out, backend, layout, Whole(stock))
            except Exception as problem:
                found = {"ok": False, "wrong": [failed(problem)]}
            yield case | {"backend": backend} | found


def _held(
    coded: Path, plain: Path, out: Path, backend: str, layout: str, stock: Whole
) -> dict[str, Any]:
    """All that is held of a folder on a backend: `wrong` has what does not hold, in words."""
    made, opened = _compiled(coded, out, backend, activation_bits=16)
    places = places_of(made.program, open_safetensors(plain).types)
    wrong = [w for name, keys in places.items() if (w := _other(name, keys, opened, coded, plain))]
    kept = {name for name in places if opened.program.weights[name].type.format is not None}
    types = {str(opened.program.weights[name].type) for name in kept}
    due = _due(layout, backend)
    strange = [t for t in types if not (due and re.match(due, t))]
    wrong += [f"a weight is kept as {t}" for t in strange]
    left = {name: keys for name, keys in places.items() if name not in kept}
    if due:
        wrong += _needless(left, coded, backend)
    ids = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
    exact = stock.logits(ids)[0].numpy()
    error = float(np.abs(session_logits(opened, ids.tolist()) - exact).max())
    error /= max(1.0, float(np.abs(exact).max()))
    if not error <= TOLERANCE:
        wrong.append(f"logits are off by {error:.2g}")
    if backend == "tvm":
        wrong += _with_rows_in_codes(coded, out.with_name("rows"), ids.tolist())
    counts = {"kept": len(kept), "dequantised": len(left)}
    return {"ok": not wrong, "wrong": wrong[:5], **counts, "error": error}


def _due(layout: str, backend: str) -> str:
    """A pattern of the types that a backend keeps a layout's weights as; "" where it does not."""
    takes = backends.get(backend).capabilities(Target("cpu"))
    codes = KEPT.get(layout, "").partition("{")[0]
    if codes not in takes.formats:
        return ""
    return rf"{codes}{{.*,unsigned}}" if takes.unsigned else kept_as(layout)


def kept_as(layout: str, group: int = GROUP) -> str:
    """A pattern of the types of weights that keep a layout's codes, rows side by side or not."""
    return KEPT[layout].replace(f"1x{GROUP}", f"1x{group}") + r"(,tile=\d+)?}"


def _compiled(coded: Path, out: Path, backend: str, **asked: Any) -> tuple[Any, Any]:
    """A folder compiled, and the same saved and opened again."""
    with unoptimised() if backend == "tvm" else nullcontext():
        made = dsc.compile(coded, backend=backend, dtype="fp32", **asked, **LIMITS)
    return made, dsc.load(made.save(out))


def _with_rows_in_codes(coded: Path, out: Path, ids: list[int]) -> list[str]:
    """What kernels say otherwise than the text where rows are codes too, as they are by default."""
    _, opened = _compiled(coded, out, "tvm")
    said, noise = held_to_text(opened.program, ids)
    own = compare(session_logits(opened, ids), said, ids, noise, is_text=False)
    return own.failures(most_excluded=1.0)


def places_of(program: Program, plain: Container[str]) -> dict[str, list[str]]:
    """The matrices, by their names in the plain folder, that each weight is made of codes of."""
    found = {}
    for name, expr in program.weights.items():
        if stored_type(expr) is not None:
            stems = [each.key.rpartition(".")[0] + ".weight" for each in sources(expr)]
            found[name] = [key for key in dict.fromkeys(stems) if key in plain]
    return found


def _other(name: str, keys: Sequence[str], opened: Any, coded: Path, plain: Path) -> str:
    """What a stored weight has otherwise than its folder, in words: numbers, and codes of FP8."""
    stored = evaluate(opened.program.weights[name], opened.program.source)
    numbers, codes = open_safetensors(plain), open_safetensors(coded)
    exact = np.concatenate([numbers.array(key) for key in keys])
    is_packed = isinstance(stored, Packed)
    said = array_of(stored.unpack(torch.float32) if is_packed else stored)
    if paired(name, opened.program):  # each gate row beside its up row
        count, rows, columns = said.shape
        said = said.reshape(count, rows // 2, 2, columns).swapaxes(1, 2)
    if not np.array_equal(exact, said.reshape(exact.shape)):
        return f"{name} says other numbers than {keys[0]}"
    if is_packed and stored.type.dtype is DType.f8e4m3:
        due = np.concatenate([codes.array(key).view(np.uint8) for key in keys])
        if not np.array_equal(
            due, array_of(stored.in_rows[0].view(torch.uint8)).reshape(due.shape)
        ):
            return f"{name} has other codes than {keys[0]}"
    return ""


def paired(name: str, program: Program) -> bool:
    """Whether experts read a weight as gate and up rows in pairs."""
    nodes = (node for graph in program.entries.values() for node in graph.nodes)
    stacks = (node["gate_up"] for node in nodes if node.attrs.get("pairs"))
    return any(isinstance(x, Weight) and x.name == name for x in stacks)


def _needless(left: Iterable[str], coded: Path, backend: str) -> list[str]:
    """Weights that are dequantised although no block of what one product reads is cut."""
    program = load_program(coded, dtype=DType.f32, **LIMITS).program
    records = unfused(program, backend, {}).records
    (found,) = (r.report.missed for r in records if r.name == "choose_formats")
    why = {name: told for _, name, told in found}
    cut = {name.rpartition(".")[0] for name, told in why.items() if CUT in told}
    return [f"{n}: {why.get(n)}" for n in left if n.rpartition(".")[0] not in cut]


# --- all of them ----------------------------------------------------------------------------------


def run(
    types: Sequence[str] = TYPES, names: Sequence[str] = BACKENDS,
    layouts: Sequence[str] = (*KEPT, ORDERED),
) -> list[dict[str, Any]]:  # fmt: skip
    """Results of these types in these layouts, one for each backend."""
    return measured(RESULTS, (*CASE, "backend"), cases(types, layouts), names, check)


def cases(types: Sequence[str], layouts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Types in layouts at `WIDTHS`, of which the ends of blocks are for `CUTTING`."""
    every = [(t, each, w) for t in types for each in layouts for w in WIDTHS]
    return [case for case in every if case[2] == "whole" or case[1] in CUTTING]


def bar() -> dict[str, Any]:
    """FP8, GPTQ, AWQ and compressed-tensors folders of Llama and Qwen kinds, on every backend."""
    found = run()
    bad = [each for each in found if not each["ok"]]
    figures: dict[str, Any] = {"ok": not bad, "results": len(found)}
    for name in BACKENDS:
        some = [each for each in found if each["backend"] == name and each["ok"]]
        told = {key: sum(each[key] for each in some) for key in ("kept", "dequantised")}
        figures[name] = {
            "ok": len(some),
            **told,
            "worst": max((e["error"] for e in some), default=0),
        }
    return figures | {"bad": len(bad), "first bad": bad[:20]}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--backend", action="append")
    parser.add_argument("--layout", action="append")
    asked = parser.parse_args()
    layouts = asked.layout or (*KEPT, ORDERED)
    tell(run(asked.types, asked.backend or BACKENDS, layouts))


if __name__ == "__main__":
    main()
