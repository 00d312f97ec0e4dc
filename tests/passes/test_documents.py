"""The docstring of every pass up to CANONICAL: Before is parsed, run, and compared with After."""

from __future__ import annotations

import pytest

from dsc import pipeline
from dsc.passes.raise_swiglu import RaiseSwiglu
from dsc.rewrite.harness import EvidenceFailed, check_docstring


@pytest.mark.parametrize("name", pipeline.RAISE)
def test_a_raise_pass_does_what_its_docstring_shows(name: str) -> None:
    check_docstring(pipeline.make(name))


def test_a_docstring_that_lies_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsc.passes.raise_swiglu as module

    monkeypatch.setattr(
        module, "__doc__", (module.__doc__ or "").replace("%y = swiglu", "%z = swiglu")
    )
    with pytest.raises((EvidenceFailed, Exception)):
        check_docstring(RaiseSwiglu())
