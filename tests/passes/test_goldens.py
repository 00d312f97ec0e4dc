"""Passes on real traced layers, compared with the text that was reviewed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc import backends, pipeline
from tests.passes.goldens import AFTER, CANONICAL, HERE, LAYERS, PARTS, layers, raised
from tests.rewrite.harness import check_golden, program_of

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


# --- a dense and a MoE layer ----------------------------------------------------------------------


def test_every_pass_after_raising_has_a_golden_of_whole_layers() -> None:
    later = set(pipeline.PASSES) - set(pipeline.RAISE)
    assert {path.stem for path in LAYERS.glob("*.dsc")} == {CANONICAL, *AFTER}
    shown = {each.name for text in AFTER.values() for each in pipeline.read(text, backends.get)}
    assert shown == later


def test_a_dense_and_a_moe_layer_are_raised_to_their_golden() -> None:
    assert raised() == (LAYERS / f"{CANONICAL}.dsc").read_text("utf-8")


@pytest.mark.parametrize("name", AFTER)
def test_passes_give_the_golden_of_whole_layers(name: str) -> None:
    assert layers(AFTER[name]) == (LAYERS / f"{name}.dsc").read_text("utf-8")
