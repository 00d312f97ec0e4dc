"""Raising routers whose numbers coincide, beyond the examples of its rule."""

from __future__ import annotations

import pytest

from dsc.passes.raise_router import _V3, Route
from tests.rewrite.harness import fire


@pytest.mark.parametrize(("keep", "top_k"), [(3, 9), (3, 7), (2, 6), (1, 3), (3, 1)])
def test_any_number_of_groups_and_experts_is_recognised(keep: int, top_k: int) -> None:
    """Up to all experts of the kept groups; the two best that score a group are no kept groups."""
    text = _V3.format(fill="-inf", source="%s")
    text = text.replace("%m, %mi = topk %h {k=2}", f"%m, %mi = topk %h {{k={keep}}}")
    text = text.replace("%q, %idx = topk %p {k=3}", f"%q, %idx = topk %p {{k={top_k}}}")
    _, after, report = fire(Route(), text)
    assert report.fired == {"Route": 1}, report.missed
    (route,) = (n for n in after.entries["main"].nodes if n.op == "route")
    found = {name: route.attrs[name] for name in ("groups", "keep", "top_k")}
    assert found == {"groups": 4, "keep": keep, "top_k": top_k}
