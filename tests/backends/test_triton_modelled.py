"""What is read off assembly, what bounds a kernel, and the model of a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cards
from dsc.backends.triton.assembly import matrix_instructions, peak_of
from dsc.backends.triton.devices import ARCHS, CARDS, KIB, LAUNCH_SECONDS
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.modelled import launch_seconds, occupancy
from dsc.backends.triton.report import assumptions, kernel_report
from dsc.ir.program import Program
from dsc.runtime.launch_costs import LaunchCost
from dsc.runtime.plan import Plan
from dsc.targets import KNOWN
from tests.backends.test_triton import model as model  # the fixture
from tests.backends.test_triton import write_artifact, write_records

PTX = """
wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {%f1}, %rd1, %rd2, p, 1, 1;
wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {%r1}, %rd1, %rd2, p;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r5 }, { %r6 }, { %r7 }, { %r5 };
mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r5 }, { %r6 }, { %r7 }, { %r5 };
mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 { %r5 }, { %r6 }, { %r7 }, { %r5 };
@%p1 tcgen05.mma.cta_group::1.kind::f8f6f4 [ %r1 + 0 ], %rd2, %rd3, %r4, %p2;
@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd2, %rd3, %r4, %p2;
wgmma.commit_group.sync.aligned; tcgen05.commit.cta_group::1.b64 [%r1]; ldmatrix.sync.m8n8;
"""
GCN = """
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	v_mfma_f32_16x16x32_fp8_fp8 v[2:5], v[2:3], v[4:5], v[2:5]
	v_mfma_f32_16x16x128_f8f6f4 v[2:5], v[2:9], v[4:11], v[2:5]
	v_mfma_i32_16x16x32_i8 v[2:5], v[2:3], v[4:5], v[2:5]
	v_mfma_f32_16x16x16_f16 v[2:5], v[2:3], v[4:5], v[2:5]
	v_fma_f32 v1, v2, v3, v4
"""


def test_matrix_instructions_are_read_with_their_types() -> None:
    assert list(matrix_instructions(PTX, "cuda")) == [
        "mma.sync bf16", "mma.sync f16", "mma.sync s8", "tcgen05 f16", "tcgen05 f8f6f4",
        "wgmma e4m3", "wgmma s8",
    ]  # fmt: skip
    assert matrix_instructions(GCN, "hip") == {
        "v_mfma bf16": 1, "v_mfma f16": 1, "v_mfma f8f6f4": 1, "v_mfma fp8_fp8": 1, "v_mfma i8": 1,
    }  # fmt: skip
    assert matrix_instructions("add.f32 %f1, %f2, %f3;", "cuda") == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("wgmma e4m3", "fp8"), ("tcgen05 f8f6f4", "fp8"), ("v_mfma fp8_fp8", "fp8"),
     ("wgmma s8", "int8"), ("tcgen05 i8", "int8"), ("v_mfma i8", "int8"), ("mma.sync f16", "bf16"),
     ("v_mfma bf16", "bf16")],
)  # fmt: skip
def test_each_type_has_a_peak(name: str, peak: str) -> None:
    assert peak_of({name: 4}) == peak
    assert peak_of({}) == ""


def test_every_target_has_an_architecture_and_cards_have_known_ones() -> None:
    assert set(ARCHS) == {arch for archs in KNOWN.values() for arch in archs}
    assert {card.arch for card in CARDS.values()} <= set(ARCHS)
    for card in CARDS.values():
        assert 0.8 * card.memory < card.bandwidth < card.memory
        assert all(0.7 * peak < card.peak(kind) < peak for kind, peak in card.matrix.items())


@pytest.mark.parametrize(
    ("arch", "record", "programs", "bound"),
    [("sm_90", (4, 168, 0), 3, "registers"), ("sm_90", (4, 64, 100 * KIB), 2, "shared memory"),
     ("sm_90", (8, 24, 0), 8, "warps"), ("sm_80", (1, 32, 0), 32, "programs"),
     ("sm_120", (4, 255, 0), 2, "registers"), ("gfx942", (4, 256, 0), 2, "registers"),
     ("gfx942", (4, 64, 33 * KIB), 1, "shared memory")],
)  # fmt: skip
def test_programs_on_a_unit(
    arch: str, record: tuple[int, int, int], programs: int, bound: str
) -> None:
    """NVIDIA: 65,536 registers and 228 KiB a unit, one of which each program loses."""
    facts = dict(zip(("warps", "registers", "shared"), record, strict=True))
    found = occupancy(facts, ARCHS[arch])
    assert (found.programs, found.bound) == (programs, bound)


def test_a_launch_takes_the_longer_of_bytes_and_flops() -> None:
    card = replace(CARDS["H200"], copy=1e12, products={"bf16": 1e14, "fp8": 2e14})
    records: Mapping[str, Mapping[str, object]] = {"k": {"matrix": {"wgmma e4m3": 1}}, "n": {}}
    reads = LaunchCost(10**9, 0, 0, 1, "k", "")
    multiplies = LaunchCost(1, 0, 0, 4 * 10**12, "k", "")
    assert launch_seconds(reads, card, records) == pytest.approx(LAUNCH_SECONDS + 1e-3)
    assert launch_seconds(multiplies, card, records) == pytest.approx(LAUNCH_SECONDS + 20e-3)
    slower = replace(multiplies, kernel="n")
    assert launch_seconds(slower, card, records) == pytest.approx(LAUNCH_SECONDS + 40e-3)


def test_a_report_has_the_launches_that_a_step_makes(model: Program, tmp_path: Path) -> None:
    """What chooses tokens on the device is no part of `decode`, which gives logits."""
    folder = write_artifact(model, tmp_path) / "triton"
    plan = Plan.from_json((folder / "sm_90" / "plan.json").read_bytes())
    write_records(LaunchProgram.of(plan), folder / "sm_90")
    report = kernel_report(folder, model)
    (step,) = (s for s in report["steps"] if (s["card"], s["step"]) == ("H200", "decode"))
    kernels = report["kernels"]
    launched = {k["kernel"]: k["in"]["decode"]["launches"] for k in kernels if "decode" in k["in"]}
    assert step["launches"] == sum(launched.values()) > 0
    assert any(k["kernel"].startswith("sample_") for k in kernels)
    assert not any(key.startswith("sample_") for key in launched)


@pytest.mark.slow
def test_the_model_is_near_what_cards_were_measured_to_take() -> None:
    pytest.importorskip("triton")
    found = cards.ratios("671b-3l")
    assert len(found) == 6
    assert all(cards.is_near(step, ratio) for step, ratio in found.items()), found


def test_a_card_that_weights_do_not_fit_on_is_named() -> None:
    """An H100 has 80 GB and an H200 141; what is said of other cards is left out."""
    told = assumptions(("H100", "H200"), 100 * 10**9)
    assert told[0].startswith("H100: 100.0 GB of weights do not fit in 80;")
    assert [line.split()[0] for line in told[-2:]] == ["H100", "H200"]
    assert not any("A100" in line or "H200:" in line for line in told)
    assert not any("do not fit" in line for line in assumptions(("H100",), 80 * 10**9))
