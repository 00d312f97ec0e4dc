"""Every product of codes in every form that this CPU can run, against fp64: `make bars`.

    python -m bench.coded_products [--seconds S]

Formats of weights x rows as they are or in codes x element types x shapes whose blocks, groups and
vectors do not come out even; linears and grouped linears; none, one and up to 17 rows; for this CPU
and for those whose code it may run; one thread and two, which must agree bit for bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dsc.backends.tvm.machine import machine_for
from dsc.runtime.standalone import lacking
from dsc.targets import parse_target
from tests.backends.coded_products import ROWS, Case, bound, compiled, exact, inputs, program

CPUS = {
    "": (),
    "x86-64": (),
    "x86-64-v3": ("avx2", "fma", "f16c"),
    "skylake-avx512": ("avx512bw", "avx512vl", "avx512dq"),
    "cascadelake": ("avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
}
"""CPUs that code is made for, and what this one must have to run it."""
SHAPES = ((1, 32), (7, 20), (41, 100), (130, 70), (576, 128), (300, 256))
"""Columns and depth: one column, odd ones, N = 576, groups that do not divide, whole ones."""
AT_ONCE = 24
"""Cases a library."""
Figures = dict[str, Any]


def cases() -> Iterator[Case]:
    """All that formats, activations, types and shapes make; a group is never deeper than a row."""
    kinds = itertools.product(("f32", "bf16"), SHAPES, (0, 3))
    for dtype, (columns, depth), experts in kinds:
        at: dict[str, Any] = {"dtype": dtype, "columns": columns, "depth": depth}
        at["experts"] = experts
        for codes, group, rows in itertools.product(("i8", "i4"), (32, 64, 128, 0), ("", "i8:32")):
            for scales, zeros in itertools.product(("f16", "bf16", "f32"), (None, "i8")):
                if group <= depth:
                    yield Case(
                        codes, group=group, activations=rows, scales=scales, zeros=zeros, **at
                    )  # fmt: skip
        blocks = ((128, 128), (1, 0), (0, 0), (1, 32), (16, 128))
        for (high, group), rows in itertools.product(blocks, ("", "f8e4m3:128")):
            for scales in ("f32", "f8e8m0", "f16", "bf16"):
                yield Case(
                    "f8e4m3", group=group, high=high, activations=rows, scales=scales, **at
                )  # fmt: skip


def measure(seconds: float = float("inf"), seed: int = 0) -> Figures:
    """Hold all cases, in an order that is drawn, against fp64 for as long as there is time."""
    order = list(cases())
    random.Random(seed).shuffle(order)
    end = time.monotonic() + seconds
    held: Counter[str] = Counter()
    wrong: list[str] = []
    skipped = {cpu: list(absent) for cpu, needs in CPUS.items() if (absent := lacking(needs))}
    for first in range(0, len(order), AT_ONCE):
        batch = order[first : first + AT_ONCE]
        if time.monotonic() > end:
            break
        for cpu in CPUS:
            if cpu not in skipped:
                held[cpu or "this"] += len(batch)
                wrong += _wrong(batch, cpu)
    return {
        "ok": not wrong and all(held.values()),
        "cases": len(order),
        "held": dict(held),
        "rows": ROWS,
        "forms": {cpu or "this": machine_for(_target(cpu)).dots for cpu in CPUS},
        "skipped": skipped,
        "wrong": wrong[:20],
    }


def _wrong(batch: list[Case], cpu: str) -> Iterator[str]:
    """What is beyond its bound, or differs between one thread and two."""
    made = program(batch)
    with tempfile.TemporaryDirectory() as folder:
        run = compiled(made, f"cpu:{cpu}" if cpu else "cpu", Path(folder))
        for case, rows in itertools.product(batch, ROWS):
            given = inputs(case, rows)
            wanted, terms = exact(case, made, given)
            results = []
            for threads in (1, 2):
                run.set_threads(threads, None)
                results.append(run.run(f"g_{case.name}", given)["y"])
            if not torch.equal(*results):
                yield f"{cpu or 'this'} {case.name} {rows} rows: threads differ"
            if not bool(((results[0].double() - wanted).abs() <= bound(case, wanted, terms)).all()):
                yield f"{cpu or 'this'} {case.name} {rows} rows: beyond the bound"


def _target(cpu: str) -> Any:
    return parse_target(f"cpu:{cpu}" if cpu else "cpu")


def main() -> None:
    """Print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"))
    print(json.dumps(measure(parser.parse_args().seconds), indent=1))


if __name__ == "__main__":
    main()
