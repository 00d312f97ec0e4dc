"""Inputs that share memory, held against the bytes that their elements lie in."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from dsc.frontends.overlaps import is_refused, shared

BASE = torch.arange(24.0)
VIEWS = {
    "all": BASE, "front": BASE[:8], "behind front": BASE[8:16], "one more": BASE[7:9],
    "inside": BASE[2:4], "rows": BASE[8:16].view(2, 4), "every third": BASE[8:23:3],
    "expanded": BASE[3:4].expand(5), "one": BASE[5], "empty": BASE[4:4],
    "windows": BASE[8:].as_strided((3, 4), (2, 1)), "tiles": BASE[8:].as_strided((3, 2), (2, 1)),
    "gaps": BASE[8:].as_strided((2, 2), (3, 1)), "once": BASE[:4].as_strided((1, 4), (0, 1)),
}  # fmt: skip


def places(x: Tensor) -> list[int]:
    """The element of the storage in which each element lies."""
    return [
        int(x.storage_offset() + sum(i * s for i, s in zip(at, x.stride(), strict=True)))
        for at in product(*(range(n) for n in x.shape))
    ]


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_is_listed_with_itself_where_elements_lie_in_one_place(name: str) -> None:
    view = VIEWS[name]
    own = places(view)
    twice = len(set(own)) < len(own)
    assert shared([1, view]) == ({(1, 1, 0, view.storage_offset())} if twice else set())


def test_two_tensors_are_listed_where_the_bytes_that_they_span_meet() -> None:
    for first, second in product(VIEWS, VIEWS):
        inputs = [VIEWS[first], VIEWS[second]]
        found = [entry for entry in shared(inputs) if entry[0] != entry[1]]
        a, b = places(inputs[0]), places(inputs[1])
        if not a or not b or max(min(a), min(b)) > min(max(a), max(b)):
            assert not found, (first, second)
            continue
        ((i, j, distance, offset),) = found
        assert {i, j} == {0, 1}
        assert distance == 4 * (places(inputs[j])[0] - places(inputs[i])[0]) >= 0
        assert offset == inputs[i].storage_offset()


def test_what_pytorch_refuses_is_seen_on_a_copy() -> None:
    def change(x: Tensor) -> None:
        x.add_(1)

    def fail(x: Tensor) -> None:
        raise RuntimeError("another reason")

    before = BASE.clone()
    assert is_refused(change, [VIEWS["expanded"]])
    assert not is_refused(change, [VIEWS["front"]])
    assert not is_refused(fail, [VIEWS["front"]])
    assert torch.equal(BASE, before)
