"""Proofs over the whole pipeline: random programs, and real models pass by pass at every level.

`python -m bench.proofs [programs]` prints one JSON line for each share of the random programs.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings

from dsc import backends, pipeline
from dsc.frontends.load import load_program
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.models import v3
from dsc.rewrite.manager import Watch
from dsc.targets import Target
from tests.ir.models import models
from tests.whole_pipeline import Setting, Tally, check, settings

PROGRAMS, SHARES = 2000, 10
LEVELS = range(4)
UNASKED = frozenset({"merge_shared_expert", "cut_at_collectives", "raise_registered"})
"""Passes that no setting of the random programs asks for, or too few do."""


def random_programs(
    count: int = PROGRAMS, shares: int = SHARES, show: bool = False
) -> dict[str, Any]:
    """`count` random programs through the pipeline: failures, and how often each pass fired."""
    tally, failures = Tally(), Counter[str]()
    start = time.perf_counter()
    for share in range(shares):

        @seed(share)
        @hypothesis_settings(
            max_examples=count // shares,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
            deadline=None,
            derandomize=False,
        )
        @given(models(), settings())
        def through(program: Program, setting: Setting) -> None:
            try:
                check(program, setting, tally)
            except Exception as problem:  # counted, so that one does not hide the others
                failures[f"{type(problem).__name__}: {str(problem).splitlines()[0]}"] += 1

        through()
        if show:
            print(json.dumps(_figures(tally, failures, start)), flush=True)
    return _figures(tally, failures, start)


def _figures(tally: Tally, failures: Counter[str], start: float) -> dict[str, Any]:
    checked = tally.programs
    fired = {name: tally.fired[name] for name in pipeline.PASSES if name not in UNASKED}
    return {
        "ok": not failures and min(fired.values()) >= 0.02 * checked,
        "graphs": checked + tally.refused + failures.total(),
        "refused by tvm or onnxruntime": tally.refused,
        "failures": dict(failures),
        "nodes": tally.nodes,
        "seconds": round(time.perf_counter() - start, 1),
        "fired": fired,
        "rules": dict(sorted(tally.rules.items())),
    }


def verify_each(sources: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every pass verified on models/v3.py, stock V3 and V2, at all levels, and at 671B shrunk."""
    found: dict[str, Any] = {}
    start = time.perf_counter()
    for name, program in (small_models() if sources is None else sources).items():
        for level in LEVELS:
            found[f"{name}, level {level}"] = verified(program, "reference", level)
    if sources is None:
        program = load_program(v3.__file__, config="671b", weights="none").program
        found["v3.py 671b, null, level 3"] = verified(program, "null", 3)
    return {
        "ok": all(not each["unverified"] for each in found.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "runs": found,
    }


def small_models() -> dict[str, Program]:
    """models/v3.py (tiny), and the stock transformers classes of a small V3 and a small V2."""
    from dsc.frontends import causal_lm
    from dsc.frontends.family import states_of
    from tests.family import small, small_v2, stock

    found = {"v3.py tiny": load_program(v3.__file__, config="tiny", weights="none").program}
    for name, config in (("stock V3", small()), ("stock V2", small_v2())):
        symbols = Limits(max_batch=4, max_context=64, prefill_chunk=16).symbols
        found[name] = causal_lm.trace_step(stock(config), states_of(config), symbols)
    return found


def verified(program: Program, backend: str, level: int) -> dict[str, Any]:
    """All passes with `--verify-each`; raises where one changes what the program computes."""
    options = pipeline.PipelineOptions(fusion_level=level, watch=Watch(verify_each=True))
    start = time.perf_counter()
    _, records = pipeline.run(program, backends.get(backend), Target("cpu"), options)
    changed = [r for r in records if r.changed]
    return {
        "passes": len(records),
        "changed": len(changed),
        "unverified": [r.name for r in changed if not r.verified],
        "forms": dict(Counter(r.verified.partition(" form:")[0] for r in changed)),
        "seconds": round(time.perf_counter() - start, 1),
    }


if __name__ == "__main__":
    random_programs(int(sys.argv[1]) if sys.argv[1:] else PROGRAMS, show=True)
