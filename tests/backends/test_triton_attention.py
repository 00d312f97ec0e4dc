"""Flash attention on triton in tiles that are whole, at an edge, or of no use to some queries."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

import pytest
import torch

from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.access import TracedExecutable
from dsc.backends.triton.blocks import Blocks, Tile
from tests.backends.triton_cases import Case, build, program_of

pytest.importorskip("triton")

AHEAD = "_ahead"

TEXTS = {
    "causal": (
        "attention", "f32[1,37,2,16], f32[1,51,1,16], f32[1,51,1,9] {scale=0.3, causal=true}",
    ),
    "past": (
        "attention",
        "f32[2,21,2,20], f32[2,75,1,20], f32[2,75,1,16], i64[2]=50 {scale=0.3, causal=true}",
    ),
    "all": ("attention", "f32[1,5,2,8], f32[1,50,1,8], f32[1,50,1,8] {scale=0.3, causal=false}"),
    "more_queries_than_rows": (
        "attention", "f32[1,37,1,8], f32[1,20,1,8], f32[1,20,1,8] {scale=0.3, causal=true}",
    ),
    "window_sinks_softcap": (
        "attention",
        "f32[2,21,2,16], f32[2,75,2,16], f32[2,75,2,16], i64[2]=50, f32[2]"
        " {scale=0.3, causal=true, window=20, softcap=2.0}",
    ),
    "narrow_window": (
        "attention",
        "f32[1,37,1,16], f32[1,37,1,16], f32[1,37,1,16] {scale=0.3, causal=true, window=3}",
    ),
    "chunk": (
        "attention",
        "f32[2,21,1,16], f32[2,75,1,16], f32[2,75,1,16], i64[2]=50"
        " {scale=0.3, causal=true, chunk=19}",
    ),
    "negative_scale": (
        "attention", "f32[1,20,1,8], f32[1,20,1,8], f32[1,20,1,8] {scale=-0.5, causal=true}",
    ),
    "pages": (
        "attention",
        "f32[2,21,2,16], f32[9,32,1,16], f32[9,32,1,16], i64[2]=43, f32[2], i64[2,2]=8"
        " {scale=0.3, causal=true}",
    ),
    "pages_of_two_powers": (
        "attention",
        "f32[2,21,4,40], f32[9,32,2,40], f32[9,32,2,33], i64[2]=43, f32[4], i64[2,2]=8"
        " {scale=0.3, causal=true}",
    ),
    "latent": (
        "mla_attention",
        "f32[2,21,2,12], f32[2,21,2,6], f32[2,75,20], f32[2,75,6], f32[48,20], i64[2]=50"
        " {scale=0.3}",
    ),
    "latent_pages": (
        "mla_attention",
        "f32[2,21,2,12], f32[2,21,2,6], f32[9,32,20], f32[9,32,6], f32[48,20], i64[2]=43,"
        " i64[2,2]=8 {scale=0.3}",
    ),
}  # fmt: skip


@cache
def cases() -> dict[str, Case]:
    """Each call by name: in turn, and with scores ahead of the softmax before."""
    each = ((f"{name}{how}", *call) for how in ("", AHEAD) for name, call in TEXTS.items())
    found = {name: build(op, text, name) for name, op, text in each}
    for name, case in found.items():
        if "pages" in name:
            lengths, table = ("x5", "x6") if "latent" in name else ("x3", "x5")
            case.inputs[lengths][:] = torch.tensor([17, 43])  # 64 with the 21 new ones
            case.inputs[table][:] = torch.tensor([[3, -1], [7, 0]])
    return found


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedExecutable]:
    """The calls in tiles of 16 by 16, whose every load and store is watched."""
    folder, program = tmp_path_factory.mktemp("attention"), program_of(cases())
    tiles = cycle([Tile(16, 16, 0, ahead=AHEAD in name) for name in cases()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blocks, "flash", lambda *_: next(tiles))
        emission = TritonBackend().emit(program, EmitOptions(extra={"compile": False}))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    executable = TracedExecutable(folder / "triton", Path("none"), program)
    yield executable
    executable.close()


@pytest.mark.parametrize("how", ["", AHEAD])
@pytest.mark.parametrize("name", TEXTS)
def test_tiles_together_are_the_reference(traced: TracedExecutable, name: str, how: str) -> None:
    traced.faults.clear()
    case = cases()[name + how]
    case.check(traced.run(name + how, {k: v.clone() for k, v in case.inputs.items()}))
    assert not [fault for fault in traced.faults if "flash_attention" in fault.kernel]


@pytest.mark.parametrize("name", ["past", "past_ahead", "chunk"])
def test_rows_behind_the_last_that_is_seen_are_never_read(
    traced: TracedExecutable, name: str
) -> None:
    case = cases()[name]
    inputs = {k: v.clone() for k, v in case.inputs.items()}
    for b, length in enumerate(inputs["x3"].tolist()):
        for cached in ("x1", "x2"):
            inputs[cached][b, length + inputs["x0"].shape[1] :] = float("nan")
    case.check(traced.run(name, inputs))


def test_keys_that_are_no_numbers_reach_those_who_see_them(traced: TracedExecutable) -> None:
    inputs = {k: v.clone() for k, v in cases()["causal"].inputs.items()}
    inputs["x1"][0, 20] = float("nan")
    (found,) = traced.run("causal_ahead", inputs).values()
    assert found[0, :6].isfinite().all()  # query 6 is the first that sees row 20
    assert found[0, 6:].isnan().all()
