"""Small functions of torch through `@dsc.optimize` and `torch.compile`, compared with eager.

    python -m bench.torch_functions [--door optimize|compile|inductor] [--backend NAME] [CASE ...]

Every script of `bench/functions` runs eagerly and through a door; what it sees must be the same:
values, element types, shapes, whose memory a result is in, what becomes of the arguments,
exceptions. A door may refuse in words (a `DscError`) or run a graph eagerly; it may never differ in
silence, nor fail in another way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import dsc
from bench.functions import CASES, Case, Door, Raised
from bench.functions import elementwise as _1  # noqa: F401
from bench.functions import flow as _5  # noqa: F401
from bench.functions import layers as _2  # noqa: F401
from bench.functions import state as _3  # noqa: F401
from bench.functions import tensors as _4  # noqa: F401
from dsc.errors import DscError

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
"""Of the largest element, or of 1 where that is smaller."""
DOORS = ("optimize", "compile", "inductor")


@dataclass(frozen=True)
class Outcome:
    """How a script went: equal, eager (with words), refused (in words), different or failed."""

    case: str
    kind: str
    result: str
    words: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether a user was served, or told why not."""
        return self.result in ("equal", "eager", "refused")


def door_of(kind: str, backend: str | None = None) -> Door:
    """What makes a callable of a function: `kind` is one of `DOORS`."""
    if kind == "inductor":
        return lambda f, **_: torch.compile(f)
    if kind == "optimize":
        return lambda f, **options: dsc.optimize(backend=backend, **options)(f)
    options: dict[str, Any] = {} if backend is None else {"backend": backend}
    return lambda f, **_: torch.compile(f, backend="dsc", options=options)


def check(case: Case, door: Door) -> Outcome:
    """Run a script both ways. Nothing that it raises goes on."""
    start = time.perf_counter()
    right = list(_seen(case, lambda f, **_: f))
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result, words = _compare(right, _seen(case, door))
        except DscError as refusal:
            result, words = "refused", str(refusal)
        except Exception as problem:
            result, words = "failed", f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - start
    told = [str(w.message) for w in said if str(w.message).startswith("dsc")]
    if result == "equal" and told:
        result, words = "eager", told[0]
    return Outcome(case.name, case.kind, result, words, round(seconds, 2))


def _seen(case: Case, door: Door) -> Iterator[list[Any]]:
    """What a script yields, one list of leaves a yield, copied at once."""
    torch.manual_seed(0)
    with torch.random.fork_rng():
        for seen in case.script(door):
            leaves, layout = tree_flatten(seen)
            yield [str(layout), *map(_copied, leaves)]


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _compare(right: list[list[Any]], found: Iterable[list[Any]]) -> tuple[str, str]:
    steps = 0
    refused = ""
    for wanted, seen in zip(right, found, strict=True):
        steps += 1
        refusals = [x.error for x in seen if isinstance(x, Raised)]
        said_no = next((e for e in refusals if isinstance(e, DscError)), None)
        if said_no is not None and not any(isinstance(x, Raised) for x in wanted):
            refused = str(said_no)
            continue
        why = _differs(wanted, seen)
        if why and not refused:
            return "different", f"step {steps}: {why}"
    return ("refused", refused) if refused else ("equal", "")


def _differs(wanted: list[Any], seen: list[Any]) -> str:
    """Why two steps differ; empty when they agree."""
    errors = [x.error for x in (*wanted, *seen) if isinstance(x, Raised)]
    if errors:
        return "" if _both_raised(wanted, seen) else f"{type(errors[0]).__name__}: {errors[0]}"
    if wanted[0] != seen[0] or len(wanted) != len(seen):
        return f"{wanted[0]} is right, found {seen[0]}"
    return next(filter(None, map(_leaf_differs, wanted[1:], seen[1:])), "")


def _both_raised(wanted: list[Any], seen: list[Any]) -> bool:
    """Whether both ended with an exception, and who catches the right one catches the other too."""
    if not (isinstance(wanted[-1], Raised) and isinstance(seen[-1], Raised)):
        return False
    # torch.compile's own, whatever the backend, where a function fails while it is captured
    captured = torch._dynamo.exc.TorchRuntimeError
    return isinstance(seen[-1].error, (type(wanted[-1].error), DscError, captured))


def _leaf_differs(wanted: Any, seen: Any) -> str:
    if not isinstance(wanted, Tensor) or not isinstance(seen, Tensor):
        same = type(wanted) is type(seen) and (wanted == seen or wanted != wanted)
        if isinstance(wanted, float) and isinstance(seen, float):
            same = same or abs(wanted - seen) <= 2e-5 * max(1.0, abs(wanted))
        return "" if same else f"{wanted!r} is right, found {seen!r}"
    if (wanted.dtype, wanted.shape) != (seen.dtype, seen.shape):
        return f"{wanted.dtype}{list(wanted.shape)} is right, found {seen.dtype}{list(seen.shape)}"
    bound = TOLERANCE.get(wanted.dtype)
    if bound is None or not wanted.numel():
        return "" if torch.equal(wanted, seen) else f"{_first(wanted)} is right, {_first(seen)}"
    finite = wanted[wanted.isfinite()].abs()
    room = bound * max(1.0, float(finite.max()) if finite.numel() else 1.0)
    close = torch.isclose(seen, wanted, rtol=0.0, atol=room, equal_nan=True)
    if bool(close.all()):
        return ""
    return f"{_first(wanted[~close])} is right, found {_first(seen[~close])}"


def _first(x: Tensor) -> list[Any]:
    return list(x.flatten()[:4].tolist())


def run(
    names: Iterable[str], door: Door, told: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Check cases by name."""
    found = []
    for name in names:
        outcome = check(CASES[name], door)
        found.append(outcome)
        if told is not None:
            told(outcome)
    return found


def summary(found: Iterable[Outcome]) -> dict[str, Any]:
    """Counts of results, and all that is not right."""
    outcomes = list(found)
    counts = Counter(o.result for o in outcomes)
    return {
        "ok": all(o.ok for o in outcomes),
        "cases": len(outcomes),
        **counts,
        "bad": {o.case: f"{o.result}: {o.words[:300]}" for o in outcomes if not o.ok},
        "seconds": round(sum(o.seconds for o in outcomes), 1),
    }


def run_apart(doors: Sequence[tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    """The summary of each door (and its options), each in a process of its own, side by side."""
    running = {
        door: subprocess.Popen(
            [sys.executable, "-m", __name__, "--json", "--door", door, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for door, *options in doors
    }
    found = {}
    for door, process in running.items():
        told, _ = process.communicate()
        ended = {"ok": False, "bad": f"the process ended with {process.returncode}"}
        found[door] = json.loads(told) if told.strip() else ended
    return found


def main() -> None:
    """Print an outcome a line, and a summary as JSON. Exits with 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names or kinds; all by default")
    parser.add_argument("--door", choices=DOORS, default="optimize")
    parser.add_argument("--backend", help="of dsc; tvm by default")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case, from the I-th")
    parser.add_argument("--json", action="store_true", help="the summary alone")
    given = parser.parse_args()
    index, count = map(int, given.part.split("/"))
    wanted = [
        c.name for c in CASES.values() if not given.cases or {c.name, c.kind} & {*given.cases}
    ]

    def tell(outcome: Outcome) -> None:
        if given.json:
            return
        words = " ".join(outcome.words.split())[:400]
        print(f"{outcome.result:9} {outcome.case} [{outcome.kind}] {words}", flush=True)

    found = summary(run(wanted[index::count], door_of(given.door, given.backend), tell))
    print(json.dumps(found, indent=1))
    sys.exit(not found["ok"])


if __name__ == "__main__":
    main()
