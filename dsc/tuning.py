"""`dsc tune`: measures on the device at hand what of an artifact could be made otherwise.

What is faster is written into the artifact, which is another whole one then or what it was, and
kept, so that the next compile for the very device takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc import backends
from dsc.backends.base import Tunes
from dsc.errors import UsageError, one_of
from dsc.runtime import artifact as artifacts
from dsc.runtime import sharded
from dsc.runtime.emission import Progress
from dsc.runtime.plan import PLAN, Plan
from dsc.runtime.tuned import Tuned


def tune(
    folder: Path,
    entries: Sequence[str] = (),
    budget: float | None = None,
    prepare: bool = False,
    trust: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Mapping[str, Any]:
    """Tune the artifact in a folder; what was found, as JSON values.

    Of `entries`, or of all; for `budget` seconds at most, beside the compile of what was found.
    With `prepare` only the code is made that measuring could ask for. Raises `UsageError`,
    `ArtifactError`, `BackendUnavailable`.
    """
    if sharded.opened(folder) is not None:
        raise UsageError("an artifact of several ranks is not tuned", where=str(folder))
    opened = artifacts.read(folder, trust)
    backend, program = backends.get(opened.backend), opened.program
    if not isinstance(backend, Tunes):
        raise UsageError(
            f"there is nothing to tune of an artifact by {opened.backend}",
            where=str(folder),
            hint="tvm times its products as it compiles; compile it for triton to tune it",
        )
    if not program.is_causal_lm:
        raise UsageError("only causal language models are tuned", where=str(folder))
    for name in entries:
        if name not in program.entries:
            hint = one_of(name, list(program.entries))
            raise UsageError(f"there is no entry {name!r}", where=str(folder), hint=hint)
    asked = (folder, opened.manifest, program, entries)
    if prepare:
        made = backend.prepare_tuning(*asked, progress)
        for each in made:
            artifacts.rewrite(artifacts.read(folder, trust), each)
        return {"output": str(folder), "prepared": [dict(each.report) for each in made]}
    found = backend.tune(*asked, budget, progress)
    if found.files:
        artifacts.rewrite(opened, _reported(opened, found))
    return {"output": str(folder), "changed": bool(found.files), **found.report}


def _reported(opened: artifacts.Artifact, change: Tuned) -> Tuned:
    """The change with the artifact's report told of the new plan, where its plan is another."""
    if PLAN not in change.files:
        return change
    from dsc.report import replanned

    told = json.loads((opened.folder / artifacts.REPORT).read_text())
    plan = Plan.from_json(change.files[PLAN])
    told = replanned(told, opened.program, plan)
    return replace(change, files={**change.files, artifacts.REPORT: artifacts.as_json(told)})
