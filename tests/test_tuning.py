"""What tuning changes of an artifact beside the backend's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.runtime.plan import PLAN, Plan
from dsc.runtime.tuned import Tuned
from dsc.tuning import tune
from tests.runtime.test_session import small_lm


class Merging:
    """A backend that finds out that the last launch of each entry is none."""

    name = "null"

    def tune(self, folder: Path, manifest: Mapping[str, Any], *given: Any) -> Tuned:
        plan = Plan.from_json((folder / PLAN).read_bytes())
        entries = {n: replace(e, launches=e.launches[:-1]) for n, e in plan.entries.items()}
        return Tuned({}, {PLAN: replace(plan, entries=entries).to_json()})

    def prepare_tuning(self, *given: Any) -> list[Tuned]:
        return []


def test_a_report_tells_of_the_plan_that_was_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    dsc.compile(small_lm(), backend="null").save(out)
    before = json.loads((out / "report.json").read_text())
    monkeypatch.setattr("dsc.tuning.backends.get", lambda name: Merging())
    assert tune(out)["changed"]
    after = json.loads((out / "report.json").read_text())
    assert after["entries"].keys() == before["entries"].keys()
    for name, entry in after["entries"].items():
        assert entry["launches"] == before["entries"][name]["launches"] - 1
    assert {**after, "entries": before["entries"]} == before
    dsc.load(out)  # its hash is told as well
