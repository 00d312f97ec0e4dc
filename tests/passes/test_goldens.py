"""Each raise pass on its part of a real traced layer, compared with the text that was reviewed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc import pipeline
from dsc.rewrite.harness import check_golden, program_of
from tests.passes.goldens import HERE, PARTS

GOLDENS = sorted(HERE.glob("*/*.before.dsc"))


def test_every_part_has_its_golden_and_every_golden_a_pass() -> None:
    assert {path.parent.name for path in GOLDENS} == set(PARTS)
    assert set(PARTS) <= set(pipeline.PASSES)


@pytest.mark.parametrize("before", GOLDENS, ids=lambda path: path.parent.name)
def test_a_pass_gives_its_golden(before: Path) -> None:
    path = before
    after = path.with_name(path.name.replace(".before.", ".after.")).read_text("utf-8")
    each = pipeline.make(path.parent.name)
    check_golden(each, program_of(path.read_text("utf-8")), after)
    assert path.read_text("utf-8") != after, "a golden that shows nothing"
