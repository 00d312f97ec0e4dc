"""Products whose weights are codes: how a case is written down, compiled, and held against fp64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.ir.formats import Format, pack, pack_rows
from dsc.ir.ops.quant import activation_type
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_expr
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, evaluate, leaf, random_tensor
from dsc.rewrite.base import PassReport
from dsc.runtime import artifact as artifacts
from dsc.targets import parse_target

ROUNDING = {"f32": 2.0**-24, "bf16": 2.0**-8}
ROWS = (0, 1, 2, 5, 6, 17)
"""Each height of a tile, one more than the highest, and none."""


@dataclass(frozen=True)
class Case:
    """A linear, or over stacked weights a grouped_linear: columns, depth, and how they are kept."""

    codes: str
    columns: int
    depth: int
    group: int
    activations: str = "i8:32"
    scales: str = "f16"
    zeros: str | None = None
    dtype: str = "f32"
    experts: int = 0
    high: int = 1

    @property
    def name(self) -> str:
        """What tests call it."""
        words = [f"{v}" for v in vars(self).values() if v not in (None, "")]
        return "_".join(words).replace(":", "x")

    @property
    def weight(self) -> TensorType:
        """The type of the weight, row after row."""
        zeros = DType(self.zeros) if self.zeros else None
        format = Format((self.high, self.group), DType(self.scales), zeros)
        leading = (self.experts,) if self.experts else ()
        return TensorType(DType(self.codes), (*leading, self.columns, self.depth), format)


def program(cases: list[Case], spoiled: bool = False) -> Program:
    """An entry a case, over seeded weights that lie as kernels read them.

    In each row of FP8 that is `spoiled` one code is NaN, but for every third.
    """
    entries, tensors, weights = "", {}, {}
    for case in cases:
        t = case.weight
        x = random_tensor(t.with_dtype(DType.f32), case.name) + (0.3 if case.zeros else 0)
        packed = pack(x, t)
        if case.codes == "i8":  # what adds up to most in 16 bits
            packed.parts[0][..., :2, :] = torch.tensor([[-128], [127]])[: case.columns]
        if spoiled:
            packed.parts[0].view(torch.uint8)[..., ::3, 4] = 0x7F
            packed.parts[0].view(torch.uint8)[..., 1::3, 11] = 0xFF
        for (suffix, _), part in zip(t.parts, packed.parts, strict=True):
            tensors[f"{case.name}{suffix}"] = part
        weights[case.name] = leaf(case.name, t)
        said = f' {{activations="{case.activations}"}}' if case.activations else ""
        grouped = f", %o: i64[{case.experts + 1}]" if case.experts else ""
        op, more = ("grouped_linear", ", %o") if case.experts else ("linear", "")
        entries += f"""graph g_{case.name}(%x: {case.dtype}[N,{case.depth}]{grouped}) {{
          %y = {op} %x, @{case.name}{more}{said} : {case.dtype}[N,{case.columns}]
          return %y
        }}\n"""
    typed = "".join(f"  @{n} : {e.type} = {print_expr(e)}\n" for n, e in weights.items())
    text = (
        f'program "t" {{stage=OPTIMIZED}}\nsymbols {{N=[0,20]}}\nweights {{\n{typed}}}\n{entries}'
    )
    made = parse_program(text, DictSource(tensors))
    chosen = pipeline.make("choose_formats", formats=("i8", "i4", "f8e4m3"), tile=16)
    return pipeline.apply(chosen.run(made, PassReport()), ["own_outputs"])


def compiled(made: Program, target: str, folder: Path, threads: int | None = None) -> Any:
    """The program's kernels, with weights as an artifact holds them."""
    backend = get("tvm")
    emission = backend.emit(made, EmitOptions((parse_target(target),), threads))
    out = artifacts.write(
        folder / "out", made, emission, backend="tvm", targets=(target,), report={}
    )
    read = artifacts.read(out, trust=True)
    return backend.load(out, read.manifest, read.program)


def inputs(case: Case, rows: int) -> dict[str, torch.Tensor]:
    """Rows of x, some large, one of zeros, one of its largest codes; where each expert's begin."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, case.depth, generator=generator)
    x[rows // 2 :] *= 40
    if rows > 2:
        x[1] = 0
    x[5:6] = -3.0
    given = {"x": x.to(DType(case.dtype).torch)}
    if case.experts:
        given["o"] = torch.tensor([0, rows // 3, rows // 3, rows])
    return given


def exact(case: Case, made: Program, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The product in fp64 of what codes say, and the sums of its terms' magnitudes."""
    x = given["x"]
    rows = x.double()
    if case.activations:
        kind = activation_type(TensorType(DType(case.dtype), tuple(x.shape)), case.activations)
        rows = pack_rows(x, kind).unpack(torch.float32).double()
    weight = evaluate(made.weights[case.name], made.source).unpack(torch.float32).double()
    if not case.experts:
        return rows @ weight.T, rows.abs() @ weight.abs().T
    ends = given["o"].tolist()
    parts = [(rows[a:b], w) for a, b, w in zip(ends, ends[1:], weight, strict=False)]
    return (
        torch.cat([part @ w.T for part, w in parts]),
        torch.cat([part.abs() @ w.abs().T for part, w in parts]),
    )


def bound(case: Case, wanted: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """What fp32 may round: of integers each step of 32 columns, else each term; and the result."""
    sums = case.depth // 32 + 6 if case.activations else case.depth + 6
    return sums * 2.0**-24 * terms + ROUNDING[case.dtype] * wanted.abs() + 1e-30
