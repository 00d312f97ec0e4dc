"""One engine in a process of its own: reads a request a line, answers a line, sleeps in between.

    python -m bench.worker ENGINE

A request is JSON: `{"call": "open" | "prefill" | ..., "arguments": {...}}`. What engines print goes
to standard error; answers go to what was standard output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, TextIO

from bench.engines import open_engine


def answers() -> TextIO:
    """Where answers go; standard output becomes standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out


def peak_rss() -> int:
    """The most bytes of memory that this process held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Answer until standard input ends."""
    out, name, engine = answers(), sys.argv[1], None
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        try:
            start = time.perf_counter()
            if request["call"] == "open":
                engine = open_engine(name, request["arguments"])
                load = getattr(engine, "load_seconds", time.perf_counter() - start)
                found: Any = {
                    "load_s": load,
                    "compile_s": getattr(engine, "compile_seconds", 0.0),
                    "units": getattr(engine, "units", ""),
                }
            elif request["call"] == "rss":
                found = peak_rss()
            else:
                found = getattr(engine, request["call"])(**request["arguments"])
            answer = {"result": found}
        except Exception as problem:  # the parent reports it beside the cell
            answer = {"error": f"{type(problem).__name__}: {problem}"[:400]}
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
