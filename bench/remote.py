"""The other end of `bench.worker`: an engine in another process, driven through pipes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.engines import ENGINES, module_of

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1800.0
"""Seconds that a call may take."""


class EngineFailed(Exception):
    """An engine that cannot do what was asked; the message says why."""


class Remote:
    """A process with one engine. A call blocks; between calls the process waits for its pipe.

    `root` is the checkout whose engine it is: another commit's, to measure that beside this one.
    """

    def __init__(
        self,
        engine: str,
        python: str = sys.executable,
        threads: int = 1,
        limit: float = LIMIT,
        root: Path = ROOT,
    ) -> None:
        path = os.pathsep.join(p for p in (str(root), os.environ.get("PYTHONPATH", "")) if p)
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        env |= {"TOKENIZERS_PARALLELISM": "false"}
        self.engine, self.limit = engine, limit
        self.process = subprocess.Popen(
            [python, "-m", "bench.worker", engine],
            cwd=root,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, name: str, **arguments: Any) -> Any:
        """Ask, and wait for the answer. Raises `EngineFailed`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
        if not ready:
            self.close()
            raise EngineFailed(f"{name} took more than {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def _died(self) -> EngineFailed:
        time.sleep(0.1)
        return EngineFailed(f"its process ended ({self.process.poll()}): out of memory, perhaps")


def missing(engine: str, python: str = sys.executable) -> str:
    """Which package an engine lacks in an environment, and how to get it; empty if none."""
    assert engine in ENGINES
    needs = module_of(engine).NEEDS[engine]
    code = f"from importlib.util import find_spec as f; print(*[n for n in {needs!r} if not f(n)])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{python} does not run"
    absent = done.stdout.split()
    return f"not installed: {', '.join(absent)}" if absent else ""
