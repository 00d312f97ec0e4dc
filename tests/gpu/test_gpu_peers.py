"""What is compared on a card, here on the CPU at small sizes with a clock for the card's events."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import peers

SMALL = {
    "HEADS": 2, "NOPE": 8, "ROPE": 8, "VALUE": 8, "LATENT": 16, "Q_LATENT": 24, "HIDDEN": 32,
    "CONTEXT": 128, "COPY_BYTES": 1 << 12, "SQUARE": 32, "REPEATS": 2, "WARMUP": 1, "DEVICE": "cpu",
    "PRODUCTS": {"q_b": (48, 24)}, "ROWS": (1, 4),
}  # fmt: skip


class Event:
    """An event of a device that is done as soon as it is asked."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        """Note the time."""
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is queued."""
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end.at - self.at) * 1e3


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is this CPU."""
    for name, value in SMALL.items():
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(peers, "is_card", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    compiled: Callable[..., Any] = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda m, mode=None, **given: compiled(m, backend="eager")
    )


def told(part: Callable[..., None]) -> dict[str, Any]:
    """What a part tells."""
    found: dict[str, Any] = {}
    part(Path(), {}, found.__setitem__)
    assert found.pop("torch") == torch.__version__
    return found


def test_speeds_are_those_of_a_copy_and_of_products() -> None:
    found = told(peers.speeds)
    assert found["copy"]["bytes"] == 2 * SMALL["COPY_BYTES"]  # type: ignore[operator]
    assert found["copy"]["a second"] == pytest.approx(2e6 * (1 << 12) / found["copy"]["us"], 0.1)
    assert found["bf16"]["flops"] == 2 * 32**3
    assert found["fp8"].keys() == found["bf16"].keys()


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_products_and_attention_have_their_bytes_and_flops() -> None:
    found = told(peers.products)
    assert found["q_b, 4 rows"]["flops"] == 2 * 4 * 48 * 24
    assert found["q_b, 1 rows"]["bytes"] == 2 * (48 * 24 + 48 + 24)
    found = told(peers.attention)
    assert "error" in found["cudnn_attention"]
    assert found["flash_attention"].keys() | found["flash_attention, values padded"].keys() >= {
        "us", "flops"
    }  # fmt: skip
    assert told(peers.flex)["flex"]["flops"] == 2 * (128 * 129 // 2) * 2 * (8 + 8 + 8)


def test_the_block_attends_to_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return attend(q, k, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch, "compile", lambda m, **given: m)
    found = told(peers.block)
    assert {*seen} == {(128, 128), (1, 129)}
    assert found.keys() == {
        "decode at 4096, default", "decode at 4096, reduce-overhead", "prefill of 4096, default"
    }  # fmt: skip
    ahead = found["decode at 4096, default"]["bytes"] - found["prefill of 4096, default"]["bytes"]
    assert ahead == 2 * 128 * (16 + 8)


def test_dynamo_takes_the_block_and_its_cache() -> None:
    assert peers._by_block(1, "default")["us"] > 0


def test_what_fails_says_why_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: Any, **named: Any) -> None:
        raise NotImplementedError("no such product here")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    found = told(peers.speeds)
    assert found["fp8"] == {"error": "NotImplementedError: no such product here"}
    assert found["bf16"]["us"] > 0
    monkeypatch.setattr(peers, "is_card", lambda: False)
    with pytest.raises(RuntimeError, match="torch has no CUDA here"):
        told(peers.speeds)
