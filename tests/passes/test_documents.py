"""The docstring of every pass: Before is parsed, run, and compared with After."""

from __future__ import annotations

from typing import Any

import pytest

from dsc import pipeline
from dsc.ir.stages import Stage
from dsc.passes import raise_swiglu
from dsc.passes.raise_swiglu import RaiseSwiglu
from tests.rewrite.harness import EvidenceFailed, check_docstring

OPTIONS: dict[str, dict[str, Any]] = {"absorb_mla": {"entries": ("main",)}}
APART = frozenset({"specialise_entries", "raise_registered"})
"""The first makes three entries of one called `step`: see test_structure.py. The second has no
rules of its own: see tests/extension."""


@pytest.mark.parametrize("name", [n for n in pipeline.PASSES if n not in APART])
def test_a_pass_does_what_its_docstring_shows(name: str) -> None:
    each = pipeline.make(name, **OPTIONS.get(name, {}))
    check_docstring(each, min(each.needs))


SHOWN = '%y = swiglu %gate, %up : f32[B,4] loc "mlp"'
LIES = {
    "the operands are the other way round": (SHOWN, SHOWN.replace("%gate, %up", "%up, %gate")),
    "the operator is another": (SHOWN, SHOWN.replace("swiglu", "mul")),
    "it comes from another place": (SHOWN, SHOWN.replace("mlp", "mlp.act_fn")),
    "nothing changes": (SHOWN, '%s = silu %gate : f32[B,4] loc "mlp.act_fn"\n'
                        '                 %y = mul %s, %up : f32[B,4] loc "mlp"'),
    "there is no After": ("After ", "Then "),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_docstring_that_lies_is_found_out(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told, instead = LIES[lie]
    doc = raise_swiglu.__doc__ or ""
    assert told in doc
    check_docstring(RaiseSwiglu(), Stage.TRACED)
    monkeypatch.setattr(raise_swiglu, "__doc__", doc.replace(told, instead))
    with pytest.raises(EvidenceFailed, match=r"raise_swiglu gives|no block 'After'"):
        check_docstring(RaiseSwiglu(), Stage.TRACED)
