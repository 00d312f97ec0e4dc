"""`--quant int8`, `int4` and `fp8` on every type of decoders: what is stored, and what runs.

The draws are those of `bench.matrix` at widths for codes: whole groups and blocks, ends of groups,
and odd widths, of which 4-bit codes keep the columns as they are. A draw is saved as a folder,
compiled in fp32, saved as an artifact and opened again. Held are

*weights*: the numbers that stored codes say lie within the bound of their format of those that they
were made of, element by element (`Packed.bound`);

*operators*: on the same inputs a product of codes is off by no more than that bound explains, as
a share of its result, and no other operator is off at all (`dsc diff --run`);

*logits*: those of the artifact over chunks, a batch of different lengths and decode steps are what
its own program says, interpreted over the weights that it stores (`dsc verify`).

How far logits are from the stock class is a figure that fails nothing: it is what codes cost.

    python -m bench.quant_matrix [TYPE ...] [--backend NAME] [--quant NAME] [--draws N]

Results go to bench/out/quant_matrix.jsonl; what was measured at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dsc
from bench.matrix import LIMITS, RAGGED, TYPES, Sizes, Whole, draw
from bench.names import quiet
from bench.random_configs import unoptimised
from bench.results import OUT, failed, measured, tell
from dsc import backends, pipeline
from dsc.diff.operators import operators
from dsc.frontends.load import load_program
from dsc.frontends.self_check import disturb, in_memory
from dsc.ir.formats import Packed
from dsc.ir.graph import Node, Weight
from dsc.ir.op import traits_of
from dsc.ir.ops.quant import block_codes, makes_codes
from dsc.ir.program import Program
from dsc.ir.traits import Role
from dsc.ir.types import DType
from dsc.ir.weights import Apply, Source, WeightExpr, apply, evaluate, stored_type
from dsc.rewrite.pass_cache import Prepared
from dsc.targets import Target
from dsc.verification import compare, held_to_text, session_logits

CPU = Target("cpu")
TOGETHER = "no kernel of experts"
"""Why a weight is dequantised that a kernel reads beside one that stayed: all in codes, or none."""
BACKENDS = ("reference", "tvm", "onnxruntime")
QUANT = {"int8": DType.i8, "int4": DType.i4, "fp8": DType.f8e4m3}
RESULTS = OUT / "quant_matrix.jsonl"
SIZES = (
    Sizes((64, 128, 256), (16, 32, 64), (16, 32), (64, 128, 192)),
    Sizes((40, 72, 100, 132), (6, 10, 20), (6, 10, 12), (36, 44, 100, 140)),
    Sizes((37, 75, 131), (4, 6, 10), (4, 6, 10), (33, 45, 99, 34)),
)
"""Whole groups of 32 and blocks of 128, ends of them, and odd widths."""
ROWS = (8, 16, 8)
"""Bits of the rows that codes multiply where kernels take them as codes: by draw."""
TOKENS, STEPS = 48, 4
CHANCE = 2.0
"""A result of a few numbers may be so much smaller by chance than its terms let expect."""
EXACT = 1e-5
"""Of operators without codes, as a share of their results: fp32 in another order."""
ROUNDING = 2.0**-14
"""What fp32 may add to the bound of a format, as a share of it."""


Case = tuple[str, str]
"""A backend, and what weights are quantised to."""


@dataclass(frozen=True)
class Drawn:
    """A draw: the program read of its folder, its stock class, and its place in `SIZES`."""

    program: Program
    stock: Whole
    index: int


@contextmanager
def drawn(model_type: str, index: int) -> Iterator[Drawn]:
    """A draw of a type, read of a folder that stays as long as it is used."""
    stock, _ = in_memory(draw(model_type, index, SIZES[index]))
    disturb(stock, index)
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            stock.save_pretrained(folder)
        read = load_program(folder, dtype=DType.f32, **LIMITS)
        yield Drawn(read.program, Whole(stock), index)


def check(model_type: str, index: int, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """A draw in each of these codes on these backends, through saved artifacts."""
    named = {"type": model_type, "draw": index}
    try:
        with drawn(model_type, index) as each:
            for backend, quant in cases:
                yield named | {"backend": backend, "quant": quant} | _tried(each, backend, quant)
    except Exception as problem:
        told = {"ok": False, "error": failed(problem)}
        yield from (named | {"backend": b, "quant": q} | told for b, q in cases)


def _tried(each: Drawn, backend: str, quant: str) -> dict[str, Any]:
    try:
        return held(each, backend, quant)
    except Exception as problem:
        return {"ok": False, "error": failed(problem)}


def held(each: Drawn, backend: str, quant: str) -> dict[str, Any]:
    """All that is held of one artifact: `wrong` has what does not hold, in words."""
    asked: dict[str, Any] = {"quant": quant, "activation_bits": ROWS[each.index]}
    with unoptimised() if backend == "tvm" else nullcontext():
        made = dsc.compile(each.program, backend=backend, **asked, **LIMITS)
    with tempfile.TemporaryDirectory() as out:
        return _of_artifact(each, made, dsc.load(made.save(Path(out) / "out")), asked)


def _of_artifact(
    each: Drawn, made: dsc.CompiledModel, opened: dsc.CompiledModel, asked: Mapping[str, Any]
) -> dict[str, Any]:
    coded = {n for n, expr in made.program.weights.items() if makes_codes(expr)}
    kept = {n for n, e in opened.program.weights.items() if e.type.format is not None}
    before, after = (unfused(each.program, made.backend, a) for a in ({}, asked))
    plain = _stayed(after)
    wrong = [] if coded else ["no weight is in codes"]
    takes = backends.get(made.backend).capabilities(CPU).formats
    due = {n for n in coded if _stored_in(made.program.weights[n]) in takes}
    lost = {n for n in due - kept if not plain.get(n, "").startswith(TOGETHER)}
    if lost or kept - due:
        wrong.append(f"packed dequantised: {', '.join(sorted(lost)[:3])}")
    types = {opened.program.weights[name].type.dtype for name in kept}
    if kept and QUANT[asked["quant"]] not in types:
        wrong.append(f"{', '.join(map(str, types))} alone")
    wrong += [line for name in sorted(coded) if (line := off(name, made.program, opened.program))]
    shares = dict[str, float]()
    wrong += _operators(before.program, after.program, shares)
    vocabulary = opened.manifest["config"]["vocab_size"]
    generator = torch.Generator().manual_seed(each.index)
    ids = torch.randint(vocabulary, (TOKENS,), generator=generator).tolist()
    far = 0.0
    for logits, what in ((session_logits, "one sequence"), (ragged, "four sequences")):
        said, noise = held_to_text(opened.program, ids, logits)
        ours = logits(opened, ids)
        own = compare(ours, said, _of(ids, ours), noise, is_text=False)
        far = max(far, *(check.found / max(check.bound, 1e-30) for check in own.checks))
        wrong += [f"{what}: {line}" for line in own.failures(most_excluded=1.0)]
    exact = each.stock.logits(torch.tensor(ids))[0].numpy()
    cost = float(np.sqrt(np.mean((session_logits(opened, ids) - exact) ** 2)) / exact.std())
    return {
        "ok": not wrong, "wrong": wrong[:5], "coded": len(coded), "stored in codes": len(kept),
        "plain": plain,
        "operators": len(shares), "worst operator": max(shares.values(), default=0.0),
        "logits": far, "cost": cost,
    }  # fmt: skip


def _of(ids: Sequence[int], rows: Any) -> list[int]:
    """So many ids as there are positions; which they are counts for texts alone."""
    return [0] * len(rows) if len(rows) != len(ids) else list(ids)


def ragged(model: Any, ids: Sequence[int]) -> Any:
    """Logits [positions, vocab] of a batch of different lengths: its prompts, then its steps."""
    session = model.session(max_batch=len(RAGGED), max_context=LIMITS["max_context"])
    prompt = np.array([[ids[(7 * row + i) % len(ids)] for i in range(max(RAGGED))]
                       for row in range(len(RAGGED))])  # fmt: skip
    first = np.asarray(session.prefill(prompt, lengths=list(RAGGED), all_logits=True))
    rows = [first[row, :length] for row, length in enumerate(RAGGED)]
    rows += [np.asarray(session.decode(prompt[:, step])) for step in range(STEPS)]
    return np.concatenate(rows).astype(np.float32)


# --- weights --------------------------------------------------------------------------------------


CODING = (block_codes.name, "dequantize", "scaled", "tiled", "above_least", "join_nibbles")
"""Steps that make codes of numbers, or write them otherwise."""


def _stored_in(expr: WeightExpr) -> str:
    stored = stored_type(expr)
    assert stored is not None
    return stored.dtype.value


def numbers(expr: WeightExpr) -> WeightExpr:
    """What a weight in codes is made of: its expression without what makes codes of numbers.

    Where rows move, codes that share a byte are fewer columns than numbers are.
    """
    if isinstance(expr, Source):
        return expr
    if expr.op in CODING:
        return numbers(expr.args[0])
    args, attrs = [numbers(arg) for arg in expr.args], dict(expr.attrs)
    if expr.op == "reshape" and expr.type.shape[-1] == expr.args[0].type.shape[-1]:
        attrs["shape"] = (*attrs["shape"][:-1], args[0].type.shape[-1])
    return apply(expr.op, *args, **attrs)


def off(name: str, made: Program, opened: Program) -> str:
    """What a stored weight says beyond the bound of its format, or "" where it does not."""
    expr = made.weights[name]
    exact = evaluate(numbers(expr), made.source).float()
    stored = evaluate(opened.weights[name], opened.source)
    if isinstance(stored, Packed):
        bound = stored.bound(exact)
        said = stored.unpack(torch.float32)
    else:
        assert isinstance(expr, Apply)
        bound = evaluate(expr.args[0], made.source).bound(exact)
        said = stored.float()
    if said.shape != exact.shape:
        return f"{name} is {list(said.shape)}, of {list(exact.shape)}"
    beyond = (said - exact).abs() > bound * (1 + ROUNDING)
    return f"{name}: {int(beyond.sum())} numbers beyond the bound" if beyond.any() else ""


# --- operators ------------------------------------------------------------------------------------


def _read(node: Node) -> list[Weight]:
    is_product = node.body is None and traits_of(node.op).role in (Role.PRODUCT, Role.EXPERTS)
    return [x for x in node.operands if isinstance(x, Weight) and x.type.rank > 1] * is_product


def _operators(before: Program, after: Program, shares: dict[str, float]) -> Iterator[str]:
    """What is beyond its bound; `shares` gets the part of its bound that each product takes."""
    explained = {name: _explained(name, after) for name in after.weights}
    for entry, graph in after.entries.items():
        by_name = {node.outputs[0].name: node for node in graph.nodes}
        due = {
            name for name, node in by_name.items() if any(explained[w.name] for w in _read(node))
        }
        for each in operators((before, after), (entry, entry)):
            node = by_name.get(each.name)
            parts = [] if node is None else [explained[w.name] for w in _read(node)]
            allowed = CHANCE * (sum(parts) + _of_rows(node))
            due.discard(each.name)
            found = each.added.sums.relative
            if any(parts):
                shares[f"{entry} {each.name}"] = found / allowed
            if not found <= max(allowed, EXACT):
                yield f"{entry}: {each.op} {each.name} is off by {found:.2g}, {allowed:.2g} allowed"
        if due:
            yield f"{entry}: {', '.join(sorted(due)[:3])} of no other program"


def unfused(program: Program, backend: str, asked: Mapping[str, Any]) -> Prepared:
    """What the passes make for a backend, one operator a node."""
    chunk = LIMITS["prefill_chunk"]
    options = pipeline.PipelineOptions(fusion_level=0, prefill_chunk=chunk, **asked)
    return pipeline.prepare(program, backends.get(backend), CPU, options)


def _stayed(prepared: Prepared) -> dict[str, str]:
    """Why weights of products are no codes, by name: nobody makes them, or no kernel takes them."""
    passes = ("quantize_weights", "insert_fp8", "choose_formats")
    found = (r.report.missed for r in prepared.records if r.name in passes)
    return {name: why for missed in found for _, name, why in missed}


def _explained(name: str, program: Program) -> float:
    """The bound of a weight's format as a share of its numbers, both as roots of mean squares."""
    expr = program.weights[name]
    if not makes_codes(expr):
        return 0.0
    assert isinstance(expr, Apply)
    stored = evaluate(expr if expr.type.format else expr.args[0], program.source)
    exact = evaluate(numbers(expr), program.source).float()
    return _size(stored.bound(exact)) / _size(exact)


def _size(x: torch.Tensor) -> float:
    """The root of the mean square."""
    return float(x.square().mean().sqrt())


def _of_rows(node: Node | None) -> float:
    """As much of rows that become codes: of 8 bits half a step, of FP8 half of the last bit."""
    said = "" if node is None else str(node.attrs.get("activations") or "")
    return {"": 0.0, "i": math.sqrt(32) * 0.5 / 127, "f": 2.0**-4}[said[:1]]


# --- all of them ----------------------------------------------------------------------------------


def run(
    types: Sequence[str] = TYPES, names: Sequence[str] = BACKENDS,
    quants: Sequence[str] = tuple(QUANT), draws: int = len(SIZES),
) -> list[dict[str, Any]]:  # fmt: skip
    """Results of so many draws of these types, one for each backend and each sort of codes.

    Types take turns with the three sorts of widths, so that a run which is cut off has tried all.
    """
    wanted = [(t, (d + TYPES.index(t)) % len(SIZES)) for d in range(draws) for t in types]
    ways: list[Case] = [(backend, quant) for backend in names for quant in quants]
    return measured(RESULTS, ("type", "draw", "backend", "quant"), wanted, ways, check)


def bar() -> dict[str, Any]:
    """27 types in int8, int4 and FP8, three draws each, on every backend."""
    found = run()
    bad = [each for each in found if not each["ok"]]
    figures: dict[str, Any] = {"ok": not bad, "results": len(found)}
    for backend, quant in itertools.product(BACKENDS, QUANT):
        some = [e for e in found if (e["backend"], e["quant"]) == (backend, quant) and e["ok"]]
        counted = ("coded", "stored in codes", "operators")
        most = ("worst operator", "logits", "cost")
        told = {key: sum(each[key] for each in some) for key in counted}
        told |= {key: round(max((each[key] for each in some), default=0.0), 4) for key in most}
        figures[f"{backend} {quant}"] = {"ok": len(some), **told}
    return figures | {"bad": len(bad), "first bad": bad[:20]}


def main() -> None:
    """Measure, and print what does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--backend", action="append")
    parser.add_argument("--quant", action="append")
    parser.add_argument("--draws", type=int, default=len(SIZES))
    asked = parser.parse_args()
    tell(run(asked.types, asked.backend or BACKENDS, asked.quant or tuple(QUANT), asked.draws))


if __name__ == "__main__":
    main()
