"""Graphs over CUDA tensors: what is launched, on which stream, over which memory.

There is no card here: tensors of the host stand for a card's, and a driver that runs no kernel
records what it is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsc.backends.triton import TritonBackend
from dsc.backends.triton.device import DeviceExecutable
from dsc.errors import UnsupportedOperator
from dsc.frontends import dynamo, on_card, placed
from dsc.frontends.options import Options
from dsc.ir.parser import parse_graph
from dsc.ir.program import Program
from tests.backends.test_triton import FakeDriver

STREAM = 77


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeDriver]]:
    """Every tensor is a card's, whose driver is one of these."""
    pytest.importorskip("triton")
    made: list[FakeDriver] = []

    def load(
        backend: TritonBackend, folder: Path, manifest: Mapping[str, Any], program: Program
    ) -> DeviceExecutable:
        made.append(FakeDriver())
        return DeviceExecutable(folder / "triton/sm_90", folder / "none", program, made[-1])

    for module in (dynamo, placed):
        monkeypatch.setattr(module, "device_of", lambda tensors: torch.device("cpu"))
    monkeypatch.setattr(dynamo, "target_of", lambda device: "cuda:sm_90")
    monkeypatch.setattr(on_card, "target_of", lambda device: "cuda:sm_90")
    monkeypatch.setattr(on_card, "stream_of", lambda device: STREAM)
    monkeypatch.setattr(TritonBackend, "load", load)
    yield made
    torch.compiler.reset()


def test_kernels_are_queued_on_the_callers_stream_over_its_memory(
    drivers: list[FakeDriver],
) -> None:
    def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ w) + x

    with torch.no_grad():
        fast = torch.compile(gated, backend="dsc", options={"backend": "triton"})
        x, w = torch.ones(32, 16), torch.ones(16, 16)
        first, second = fast(x, w), fast(x, w)
    (driver,) = drivers
    assert (first.shape, first.dtype) == ((32, 16), torch.float32)
    half = len(driver.launched) // 2
    assert half >= 1
    assert set(driver.streams) == {STREAM}
    assert (driver.uploads, driver.downloads, driver.waits) == ([], [], 0)
    arguments = [[a for _, _, each in part for a in each]
                 for part in (driver.launched[:half], driver.launched[half:])]  # fmt: skip
    for given, result in zip(arguments, (first, second), strict=True):
        assert {x.data_ptr(), w.data_ptr(), result.data_ptr()} <= set(given)


def test_a_tensor_that_kernels_cannot_take_is_copied_once_on_the_card() -> None:
    whole = torch.arange(40.0)
    odd, across = whole[1:17], whole.reshape(5, 8).T
    for x in (odd, across):
        found = on_card._placed(x, x.device)
        assert found.is_contiguous()
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, x)
    assert on_card._placed(whole, whole.device) is whole


def test_an_index_is_looked_at_on_the_card_before_kernels_follow_it(
    drivers: list[FakeDriver],
) -> None:
    """On a card a wrong one ends the stream; on the host, which stands for it here, it raises."""

    def looked_up(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(torch.nn.functional.embedding(ids, table))

    with torch.no_grad():
        fast = torch.compile(looked_up, backend="dsc", options={"backend": "triton"})
        ids, table = torch.tensor([0, 5, 8]), torch.ones(9, 4)
        fast(ids, table)
        (driver,) = drivers
        launched = len(driver.launched)
        assert any(table.data_ptr() in each for _, _, each in driver.launched)
        assert (driver.downloads, driver.waits) == ([], 0)
        for wrong in (9, -1):
            with pytest.raises(RuntimeError, match="0 to 8 here"):
                fast(torch.full_like(ids, wrong), table)
        assert len(driver.launched) == launched


def test_what_reads_by_an_index_that_it_computes_is_left_to_pytorch() -> None:
    text = "%j = add %i, %i\n%y = embedding %j, %w"
    graph = parse_graph(f"graph g(%i: i64[3], %w: f32[9,4]) {{\n{text}\nreturn %y\n}}")
    with pytest.raises(UnsupportedOperator, match="an index that it computes") as refused:
        on_card.check_indices(graph)
    assert refused.value.places == [graph.nodes[1].loc]
    on_card.check_indices(
        parse_graph("graph g(%i: i64[3], %w: f32[9,4]) {\n%y = embedding %i, %w\nreturn %y\n}")
    )
    on_card.check_indices(parse_graph("graph g(%x: f32[3]) {\n%y = exp %x\nreturn %y\n}"))


def test_which_graphs_are_compiled_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        here, there = (torch.empty(3, device=f"cuda:{i}") for i in (0, 1))
        host, number = torch.empty(3), torch.empty(())
    monkeypatch.setattr(on_card, "target_of", lambda device: "cuda:sm_90")
    assert on_card.device_of([host, number]) is None
    assert on_card.device_of([host, here]) == here.device
    assert on_card.reason_on_card([here, here, number], None) == ""
    assert on_card.reason_on_card([here], "triton") == ""
    assert "the tvm backend runs on the CPU" in on_card.reason_on_card([here], "tvm")
    for other in (there, host):
        assert "on several devices" in on_card.reason_on_card([here, other], None)
    assert "are on cuda:1, and kernels run on the first" in on_card.reason_on_card([there], None)
    monkeypatch.setattr(on_card, "target_of", lambda device: "cuda:sm_70")
    assert "dsc makes no code" in on_card.reason_on_card([here], None)
    made = Options(freeze=True).on_card("cuda:sm_90")
    assert (made.backend, made.freeze, made.target) == ("triton", False, "cuda:sm_90")
