"""Attention over odd shapes, and a plain formula in fp64 that its kernels are held against.

A case is a call of the operator with fixed sizes. All cases are entries of one program, which is
compiled at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsc import pipeline
from dsc.backends import get
from dsc.backends.base import EmitOptions
from dsc.ir.graph import Graph, GraphBuilder
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.runtime import artifact
from dsc.runtime.executable import Executable
from dsc.targets import parse_target

TOLERANCE = {DType.f32: 1e-5, DType.bf16: 2e-2, DType.f16: 3e-3}
"""Largest |difference| where values are a few units: weights and sums of bf16 are rounded."""
PAGES = 40
"""Pages of the pool that a case in pages draws from."""


@dataclass(frozen=True)
class Case:
    """Heads, widths and sizes of a call, the rows before each sequence's new ones, attributes."""

    heads: int
    groups: int
    d: int
    e: int
    new: int
    total: int
    lengths: tuple[int, ...] | None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    sinks: bool = False
    page: int = 0
    dtype: DType = DType.f32

    @property
    def id(self) -> str:
        """A name for an entry."""
        more = "_".join(f"{k}{v}" for k, v in self.attrs.items()).replace(".", "p")
        return (
            f"h{self.heads}g{self.groups}d{self.d}e{self.e}s{self.new}t{self.total}"
            f"b{self.batch}{'k' * self.sinks}{f'p{self.page}' * (self.page > 0)}"
            f"{'l' * (self.lengths is not None)}_{more}_{self.dtype}"
        )

    @property
    def batch(self) -> int:
        """Sequences; one where there are no lengths."""
        return len(self.lengths) if self.lengths is not None else 1

    def types(self) -> dict[str, TensorType | None]:
        """The operands in order."""
        b, rows = self.batch, (self.batch, self.total)
        slots = (PAGES, self.page) if self.page else rows
        blocks = -(-self.total // self.page) if self.page else 0
        lengths, table = TensorType(DType.i64, (b,)), TensorType(DType.i64, (b, blocks))
        return {
            "q": TensorType(self.dtype, (b, self.new, self.heads, self.d)),
            "k": TensorType(self.dtype, (*slots, self.groups, self.d)),
            "v": TensorType(self.dtype, (*slots, self.groups, self.e)),
            "lengths": lengths if self.lengths is not None else None,
            "sinks": TensorType(self.dtype, (self.heads,)) if self.sinks else None,
            "block_table": table if self.page else None,
        }

    def attributes(self) -> dict[str, Any]:
        """All attributes that the call is given."""
        return {"scale": self.d**-0.5, "causal": True, **self.attrs}

    def graph(self) -> Graph:
        """The call."""
        b = GraphBuilder(self.id)
        given = [None if t is None else b.input(n, t) for n, t in self.types().items()]
        return b.finish(b.call("attention", *given, **self.attributes()), ("y",))

    def inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Seeded operands: scores of a few units, pages in no order."""
        generator = torch.Generator().manual_seed(seed)
        made: dict[str, torch.Tensor] = {}
        for name, t in self.types().items():
            if t is None:
                continue
            shape = [int(d) for d in t.shape]  # type: ignore[arg-type]
            if name == "lengths":
                made[name] = torch.tensor(self.lengths)
            elif name == "block_table":
                order = torch.randperm(PAGES, generator=generator)
                made[name] = order[: shape[0] * shape[1]].reshape(shape)
            else:
                scale = 2.0 if name == "q" else 1.0
                tensor = torch.randn(shape, generator=generator) * scale
                made[name] = tensor.to(t.dtype.torch)
        return made


def formula(
    given: Mapping[str, torch.Tensor], *, scale: float, causal: bool, window: int = 0,
    chunk: int = 0, softcap: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Attention in fp64, a query at a time, each over a list of the rows that it sees."""
    q, k, v = (given[name].double() for name in "qkv")
    table = given.get("block_table")
    if table is not None:
        k, v = (torch.stack([x[row].flatten(0, 1) for row in table]) for x in (k, v))
    batch, new, heads, _ = q.shape
    total, share = k.shape[1], heads // k.shape[2]
    out = torch.zeros(batch, new, heads, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        start = int(given["lengths"][b]) if "lengths" in given else total - new
        for i in range(new):
            own = start + i if causal or "lengths" in given else total - 1
            rows = [
                j
                for j in range(min(own + 1, total))
                if (not window or j > own - window) and (not chunk or j // chunk == own // chunk)
            ]
            for h in range(heads):
                scores = k[b, rows, h // share] @ q[b, i, h] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                mass = weights.sum()
                if "sinks" in given:
                    mass = mass + given["sinks"][h].double().exp()
                if rows:
                    out[b, i, h] = weights @ v[b, rows, h // share] / mass
    return out


def program(cases: Sequence[Case]) -> Program:
    """One program with an entry for each case."""
    return Program("attention", {c.id: c.graph() for c in cases}, stage=Stage.OPTIMIZED)


def of_types(cases: Sequence[Case], *dtypes: DType) -> list[Case]:
    """The cases in each of some element types."""
    return [Case(**{**vars(c), "dtype": dtype}) for dtype in dtypes for c in cases]


def _windows(widths: Sequence[int], **changes: Any) -> list[Case]:
    given: dict[str, Any] = {
        "heads": 4, "groups": 2, "d": 32, "e": 32, "new": 1, "total": 200,
        "lengths": (199, 70, 0), **changes,
    }  # fmt: skip
    return [Case(**given, attrs={"window": w}) for w in widths]


CASES = [
    Case(6, 2, 8, 16, 1, 1, (0,)),
    Case(6, 2, 32, 32, 1, 130, (129, 3)),
    Case(3, 1, 32, 32, 0, 5, (2,)),
    Case(2, 1, 16, 32, 3, 0, None, {"causal": False}),
    Case(2, 2, 32, 32, 3, 0, None, {"causal": False}, sinks=True),
    Case(5, 1, 64, 32, 17, 50, (33, 0, 9), {"window": 9}),
    Case(3, 3, 24, 40, 17, 17, None),
    Case(4, 4, 128, 128, 3, 90, (80, 20), {"softcap": 1.5}),
    Case(8, 2, 64, 64, 1, 300, (299, 200, 7), {"window": 33, "softcap": 3.0}, sinks=True),
    Case(12, 3, 32, 96, 40, 150, (110, 0), {"chunk": 16}, sinks=True),
    Case(3, 1, 20, 12, 5, 3, None, {"window": 1}),
    Case(3, 1, 32, 32, 5, 3, None, {"window": 2}),
    Case(4, 2, 32, 64, 7, 40, (33, 1), {"causal": False}),
    Case(6, 2, 32, 32, 1, 256, (250, 63, 64), {"window": 20}, True, 64),
    Case(6, 2, 64, 32, 19, 192, (170, 5), {"chunk": 48}, page=64),
    Case(22, 2, 32, 32, 1, 70, (69, 2), {"softcap": 5.0}, sinks=True),
    *_windows((1, 2, 63, 65)),
]
"""Few heads and many, widths of whole vectors and others, one row and 17, pages, all attributes."""
EVERYTHING = [
    *CASES,
    *_windows((1, 5, 9, 31, 32, 33, 64, 128), total=200),
    *_windows((1, 7, 9, 32, 64), new=17, total=217, lengths=(199, 50, 0)),
    *(
        Case(g * n, g, d, d, s, s + 60, (60, 0), {"window": w, "softcap": c}, sinks=w > 3)
        for g in (1, 2, 3, 4)
        for n, d, s, w, c in (
            (1, 8, 1, 0, 0.0), (2, 64, 17, 4, 2.0), (7, 128, 1, 9, 0.0), (3, 96, 33, 0, 4.0)
        )
    ),
]  # fmt: skip
"""All that `make bars` runs."""


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference; 0 of nothing."""
    return float((got.double() - wanted).abs().max()) if wanted.numel() else 0.0


def loaded(backend: str, cases: list[Case], folder: Path, target: str = "cpu") -> Executable:
    """The cases as one program, compiled and loaded."""
    planned = pipeline.apply(program(cases), ["own_outputs"])
    emission = get(backend).emit(planned, EmitOptions((parse_target(target),)))
    artifact.write(folder, planned, emission, backend=backend, targets=(target,), report={})
    opened = artifact.read(folder)
    return get(backend).load(folder, opened.manifest, opened.program)
