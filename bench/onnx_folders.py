"""Codes that a checkpoint stores, looked for in the ONNX files: bit for bit, in both dialects.

Folders are those of `bench.coded_folders`, in every layout of integers, and FP8 in blocks that is
exported as int8 and int4. The bytes of initializers are read by onnx alone, and taken apart here:
all codes, zero points and scales must be those that the folder stores, or that its FP8 numbers have
by the definition of the format. Rows stay in fp32 (`activation_bits=16`), so stock ONNX Runtime is
held to the stock class over the numbers that the codes say.

    python -m bench.onnx_folders [TYPE ...] [--layout NAME] [--ops NAME]

Results go to bench/out/onnx_folders.jsonl; what was measured at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dsc
from bench.coded_folders import (
    CASE,
    GROUP,
    KEPT,
    TOLERANCE,
    TYPES,
    VOCABULARY,
    cases,
    folder,
    model_of,
    paired,
    places_of,
    plain_of,
)  # fmt: skip
from bench.matrix import LIMITS, Whole
from bench.names import quiet
from bench.onnx_stock import StockSession
from bench.quantised_folders import LAYOUTS, Codes, Integers, Tensors, config_of, stored
from bench.results import OUT, failed, measured, tell
from dsc.backends.onnxruntime.contrib import DIALECTS
from dsc.ir.arrays import Array
from dsc.ir.program import Program
from dsc.runtime import artifact

RESULTS = OUT / "onnx_folders.jsonl"
CONVERTED = {"fp8-block as int8": "int8", "fp8-block as int4": "int4"}
"""FP8 that is made what `--quant` says on the way."""
INTEGERS = tuple(name for name in KEPT if isinstance(LAYOUTS[name].store, Integers))


# --- what is due ----------------------------------------------------------------------------------


def rounded(weight: Array, bits: int) -> Codes:
    """int8 and int4 of numbers: fp16 scales, none too small for the largest number."""
    most, middle = (1 << bits - 1) - 1, 1 << bits - 1
    rows, columns = weight.shape
    index = np.arange(columns) // GROUP
    padded = np.pad(weight, [(0, 0), (0, -columns % GROUP)]).reshape(rows, -1, GROUP)
    least = np.abs(padded).max(-1) / np.float32(most)
    scales = np.where(least == 0, 1, least).astype(np.float16)
    scales = np.where(scales < least, np.nextafter(scales, np.float16(np.inf)), scales)
    codes = np.round(weight / scales.astype(np.float32)[:, index]) + middle
    zeros = np.full(scales.shape, middle, np.uint8)
    return Codes(codes.astype(np.uint8), zeros, scales, index)


def due(tensors: Tensors, layout: str) -> dict[str, Codes]:
    """The codes of all weights that a layout stores as such, or that are made of its FP8."""
    if layout in CONVERTED:
        bits = int(CONVERTED[layout].removeprefix("int"))
        _, numbers = stored(tensors, LAYOUTS["fp8-block"], GROUP)
        inner = [key for key in numbers if numbers[key] is not tensors[key]]
        made = {key: rounded(numbers[key], bits) for key in inner}
        return made | {"lm_head.weight": rounded(tensors["lm_head.weight"], 8)}
    store = LAYOUTS[layout].store
    assert isinstance(store, Integers)
    _, numbers = stored(tensors, LAYOUTS[layout], GROUP)
    inner = [key for key in numbers if numbers[key] is not tensors[key]]
    return {key: store.codes(tensors[key], GROUP) for key in inner}


# --- what is in the files -------------------------------------------------------------------------


def initializers(out: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shapes and bytes of what the models of an export read of its file of weights."""
    import onnx

    found = {}
    for path in sorted(out.rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            place = {each.key: each.value for each in tensor.external_data}
            if place:
                with (path.parent / place["location"]).open("rb") as file:
                    file.seek(int(place["offset"]))
                    data = file.read(int(place["length"]))
                found[tensor.name] = (tuple(tensor.dims), data)
    return found


def _whole(found: Mapping[str, tuple[tuple[int, ...], bytes]], name: str) -> bytes:
    """The bytes of a weight's part: one initializer, or one for each matrix of a stack."""
    if name in found:
        return found[name][1]
    parts = [key for key in found if re.fullmatch(re.escape(name) + r"/\d+", key)]
    return b"".join(found[key][1] for key in sorted(parts, key=lambda k: int(k.split("/")[-1])))


def _numbers(data: bytes, bits: int, rows: int) -> Array:
    """Unsigned numbers of so many bits, row by row; of two in a byte the first is the low half."""
    array = np.frombuffer(data, np.uint8).reshape(rows, -1)
    if bits == 8:
        return array
    return np.stack([array & 15, array >> 4], -1).reshape(rows, -1)


def in_files(
    found: Mapping[str, tuple[tuple[int, ...], bytes]], name: str, bits: int, due: Codes
) -> str:
    """What a weight's initializers have otherwise than the codes that are due, in words."""
    rows, columns = due.codes.shape
    scales = np.frombuffer(_whole(found, f"{name}.scale"), np.float32).reshape(rows, -1)
    blocks = scales.shape[1]
    wide = np.arange(blocks) * (-(-columns // blocks) if due.scales.shape[1] == 1 else GROUP)
    index = due.index[np.minimum(wide, columns - 1)]
    zero = _whole(found, f"{name}.zero")
    middle = np.full((rows, blocks), 1 << bits - 1, np.uint8)
    zeros = _numbers(zero, bits, rows)[:, :blocks] if zero else middle
    each = {
        "codes": (_numbers(_whole(found, name), bits, rows)[:, :columns], due.codes),
        "scales": (scales, due.scales.astype(np.float32)[:, index]),
        "zero points": (zeros, due.zeros[:, index]),
    }
    other = [what for what, (there, wanted) in each.items() if not np.array_equal(there, wanted)]
    return f"{name} has other {' and '.join(other)}" if other else ""


def joined(parts: Sequence[Codes], experts: int) -> Codes:
    """The codes of rows one after another; of gates and ups of so many experts in pairs."""

    def rows(each: str) -> Array:
        x = np.concatenate([getattr(part, each) for part in parts])
        if not experts:
            return x
        return x.reshape(experts, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)

    return Codes(rows("codes"), rows("zeros"), rows("scales"), parts[0].index)


def other_codes(out: Path, program: Program, codes: Mapping[str, Codes]) -> tuple[int, list[str]]:
    """How many weights are codes in the files, and what they have otherwise than is due."""
    found, wrong, seen = initializers(out), [], 0
    packed = artifact.read(out, trust=True).program
    for name, keys in places_of(program, codes).items():
        if f"{name}.scale" not in found and f"{name}.scale/0" not in found:
            wrong.append(f"{name} is no codes")
            continue
        seen += len(keys)
        experts = len(keys) // 2 if paired(name, packed) else 0
        bits = packed.weights[name].type.dtype.bits
        wrong += filter(
            None, [in_files(found, name, bits, joined([codes[k] for k in keys], experts))]
        )
    if seen != len(codes):
        wrong.append(f"{seen} of {len(codes)} weights are codes")
    return seen, wrong


# --- all of them ----------------------------------------------------------------------------------


def check(
    model_type: str, layout: str, widths: str, dialects: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """A layout of a type in each dialect."""
    case = {"type": model_type, "layout": layout, "widths": widths}
    model = model_of(model_type, widths)
    raw, tensors = plain_of(model)
    kind = LAYOUTS["fp8-block" if layout in CONVERTED else layout]
    made, _ = stored(tensors, kind, GROUP)
    codes = due(tensors, layout)
    numbers = tensors | {key: each.numbers for key, each in codes.items()}
    quant = CONVERTED.get(layout, "none")
    kept = sorted(tensors.keys() - codes.keys()) if quant != "none" else []
    with tempfile.TemporaryDirectory() as place, quiet():
        coded = folder(Path(place) / "stored", config_of(raw, kind, GROUP), made)
        plain = folder(Path(place) / "plain", raw, numbers)
        for ops in dialects:
            try:
                found = _held(coded, plain, codes, ops, quant, kept)
            except Exception as problem:
                found = {"ok": False, "wrong": [failed(problem)]}
            yield case | {"ops": ops} | found


def _held(
    coded: Path, plain: Path, codes: Mapping[str, Codes], ops: str, quant: str, kept: Sequence[str]
) -> dict[str, Any]:
    """All that is held of a folder in a dialect: `wrong` has what does not hold, in words.

    Quantising leaves what is `kept`: the folder's numbers.
    """
    from transformers import AutoModelForCausalLM

    compiled = dsc.compile(
        coded, backend="onnxruntime", dtype="fp32", quant=quant, activation_bits=16,
        group_size=None if quant == "none" else GROUP, keep=kept,
        backend_options={"onnx_ops": ops}, **LIMITS,
    )  # fmt: skip
    out = compiled.save(coded.with_name(ops))
    seen, wrong = other_codes(out, compiled.program, codes)
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    ids = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(0))
    exact = Whole(stock).logits(ids)[0].numpy()
    session = StockSession(out)
    (prompt,) = session.prefill([ids[:40].tolist()])
    ours = np.concatenate([prompt, *(session.decode([int(token)]) for token in ids[40:])])
    error = float(np.abs(ours - exact).max() / max(1.0, np.abs(exact).max()))
    if not error <= TOLERANCE:
        wrong.append(f"logits are off by {error:.2g}")
    return {"ok": not wrong, "wrong": wrong[:5], "weights": seen, "error": error}


def run(
    types: Sequence[str] = TYPES, layouts: Sequence[str] = (*INTEGERS, *CONVERTED),
    dialects: Sequence[str] = DIALECTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """Results of these types in these layouts, one a dialect."""
    return measured(RESULTS, (*CASE, "ops"), cases(types, layouts), dialects, check)


def bar() -> dict[str, Any]:
    """GPTQ, AWQ, compressed-tensors and converted FP8: the codes in ONNX files are those stored."""
    found = run()
    bad = [each for each in found if not each["ok"]]
    figures: dict[str, Any] = {"ok": not bad, "results": len(found)}
    for ops in DIALECTS:
        some = [each for each in found if each["ops"] == ops and each["ok"]]
        figures[ops] = {
            "ok": len(some), "weights": sum(each["weights"] for each in some),
            "worst": max((each["error"] for each in some), default=0.0),
        }  # fmt: skip
    return figures | {"bad": len(bad), "first bad": bad[:20]}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--layout", action="append")
    parser.add_argument("--ops", action="append")
    asked = parser.parse_args()
    tell(run(asked.types, asked.layout or (*INTEGERS, *CONVERTED), asked.ops or DIALECTS))


if __name__ == "__main__":
    main()
