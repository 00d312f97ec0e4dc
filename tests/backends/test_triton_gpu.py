"""Compiled kernels on the GPU at hand, through the driver: what no interpreter can prove.

The device's memory is poisoned in the tests of single operators: a kernel that reads what nobody
wrote finds NaN, or -1. The trained tiny checkpoint runs as users run it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dsc
from bench.gpu.checks import EXACT
from bench.gpu.device import poisoned
from dsc.api import CompiledModel
from dsc.backends.base import EmitOptions
from dsc.backends.reference import ReferenceExecutable
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.device import DeviceExecutable
from dsc.backends.triton.driver import Driver
from dsc.hardware import gpus
from dsc.ir.graph import GraphBuilder
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.models.configs import TINY_CHECKPOINT
from dsc.runtime.packing import pack
from dsc.runtime.session import Session
from dsc.targets import Target, parse_target
from tests.backends.test_triton_fused import REGIONS, agree, region
from tests.backends.triton_cases import EMITTED, Case, cases, large_cases, program_of
from tests.backends.triton_coded import program as coded_program
from tests.backends.triton_coded_cases import CASES as CODED
from tests.backends.triton_coded_cases import check

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

CASES = cases(EMITTED) | large_cases()
WITH_LENGTHS = {"attention": 3, "mla_attention": 5, "latent_attention": 4}
CONTEXT, CHUNK = 256, 64
FP32_TOLERANCE = 1e-3  # of logits up to 14
BF16_ROOM = 2.0  # times the distance that the interpreter's bf16 has from its fp32
PASSAGE = (
    "And the LORD God formed man of the dust of the ground, and breathed into his nostrils the"
    " breath of life; and man became a living soul. And the LORD God planted a garden eastward in"
    " Eden; and there he put the man whom he had formed. And out of the ground made the LORD God to"
    " grow every tree that is pleasant to the sight, and good for food; the tree of life also in"
    " the midst of the garden, and the tree of knowledge of good and evil. And a river went out of"
    " Eden to water the garden; and from thence it was parted, and became into four heads. The name"
    " of the first is Pison: that is it which compasseth the whole land of Havilah, where there is"
    " gold; And the gold of that land is good: there is bdellium and the onyx stone."
)


@pytest.fixture(scope="module")
def target() -> Target:
    found = [gpu.target for gpu in gpus() if gpu.target.startswith("cuda:")]
    if not found:
        pytest.skip("no NVIDIA GPU on this machine")
    return parse_target(found[0])


def load(program: Program, target: Target, folder: Path) -> DeviceExecutable:
    """Compile a program for the GPU and load it, with its weights, into poisoned memory."""
    emission = TritonBackend().emit(program, EmitOptions(targets=(target,)))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    weights = folder / "weights.safetensors"
    pack(program, weights)
    place = folder / "triton" / target.arch
    return DeviceExecutable(place, weights, program, poisoned(Driver()))


@pytest.fixture(scope="module")
def operators(target: Target, tmp_path_factory: pytest.TempPathFactory) -> DeviceExecutable:
    """All cases as one artifact."""
    return load(program_of(CASES), target, tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_reference(operators: DeviceExecutable, name: str) -> None:
    CASES[name].check(run_case(operators, name, CASES[name]))


@pytest.fixture(scope="module")
def codes(
    target: Target, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, DeviceExecutable]:
    """All products, caches and tables in codes as one artifact."""
    made = coded_program(CODED)
    return made, load(made, target, tmp_path_factory.mktemp("codes"))


@pytest.mark.parametrize("name", CODED)
def test_codes_are_the_interpreters(codes: tuple[Program, DeviceExecutable], name: str) -> None:
    check(*codes, name, EXACT)


def run_case(executable: DeviceExecutable, name: str, case: Case) -> dict[str, torch.Tensor]:
    """Results of a case; caches are written in place."""
    return executable.run(name, {k: v.clone() for k, v in case.inputs.items()})


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if len(c.inputs) > WITH_LENGTHS.get(c.op, 9)]
)
def test_rows_past_the_end_are_never_seen(operators: DeviceExecutable, name: str) -> None:
    case = CASES[name]
    inputs = {k: v.clone() for k, v in case.inputs.items()}
    lengths = inputs[f"x{WITH_LENGTHS[case.op]}"]
    keys, values = ("x1", "x2") if case.op == "attention" else ("x2", "x3")
    for row, length in enumerate(lengths.tolist()):
        end = length + inputs["x0"].shape[1]
        inputs[keys][row, end:] = inputs[values][row, end:] = float("nan")
    case.check(operators.run(name, inputs))


def test_results_are_the_same_on_every_run(operators: DeviceExecutable) -> None:
    for name in ("latent_attention_large_1", "grouped_linear_large_0", "mla_attention_large_0"):
        first, second = (operators.run(name, CASES[name].inputs) for _ in range(2))
        assert torch.equal(first["y0"], second["y0"]), name


def test_regions_agree_with_their_bodies(target: Target, tmp_path: Path) -> None:
    graphs = {name: region(name, text) for name, text in REGIONS.items()}
    executable = load(Program("regions", graphs), target, tmp_path)
    for name, graph in graphs.items():
        agree(executable, name, graph)


def test_whole_quotients_leave_no_remainder(target: Target, tmp_path: Path) -> None:
    b = GraphBuilder("main")
    x, y = (b.input(name, TensorType(DType.f32, (4000,))) for name in "xy")
    graph = b.finish([b.remainder(x, y), b.div(x, y)], ("rest", "quotient"))
    divisors = torch.arange(4000) % 97 + 1.0
    quotients = torch.arange(4000) // 31 - 40.0
    given = {"x": divisors * quotients, "y": divisors}
    found = load(Program("p", {"main": graph}), target, tmp_path).run("main", given)
    assert not found["rest"].any()
    torch.testing.assert_close(found["quotient"], quotients, rtol=1e-6, atol=0)


Tiny = Callable[[str], tuple[CompiledModel, CompiledModel]]


@pytest.fixture(scope="module")
def tiny(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The trained checkpoint by dtype: as it was compiled (with its weights), and as it loads."""
    folder = tmp_path_factory.mktemp("tiny")
    known: dict[str, tuple[CompiledModel, CompiledModel]] = {}

    def of(dtype: str) -> tuple[CompiledModel, CompiledModel]:
        if dtype not in known:
            compiled = dsc.compile(
                str(TINY_CHECKPOINT), backend="triton", target=str(target), dtype=dtype,
                max_batch=4, max_context=CONTEXT, prefill_chunk=CHUNK,
            )  # fmt: skip
            known[dtype] = compiled, dsc.load(compiled.save(folder / dtype))
            assert isinstance(known[dtype][1].executable, DeviceExecutable)
        return known[dtype]

    return of


def reference(tiny: Tiny, dtype: str) -> Session:
    """A session over the interpreter of the IR, for the program that was compiled."""
    program = tiny(dtype)[0].program
    return Session(ReferenceExecutable(program), program, 4, CONTEXT, CHUNK)


Step = Callable[[Session], torch.Tensor]


def steps(tokens: torch.Tensor, name: str) -> list[Step]:
    """What a session is asked for, as functions of it that give logits."""
    forced = [lambda s, t=t: s.decode(tokens[t : t + 1]) for t in range(40, 56)]
    ragged = torch.stack([tokens[at : at + 64] for at in (0, 30, 60, 90)])
    rows = [lambda s, t=t: s.decode(tokens[t : t + 4]) for t in range(64, 68)]
    plans: dict[str, list[Step]] = {
        "one": [lambda s: s.prefill(tokens[:40]), *forced],
        "ragged": [lambda s: s.prefill(ragged, lengths=[64, 23, 1, 40]), *rows],
        "chunked": [
            lambda s: s.prefill(tokens[:150]),
            lambda s: s.decode(tokens[150:151]),
            lambda s: s.prefill(tokens[:9], all_logits=True),
            lambda s: s.decode(tokens[9:10]),
        ],
    }
    return plans[name]


def run_steps(session: Session, plan: Sequence[Step]) -> list[torch.Tensor]:
    return [step(session).float() for step in plan]


def encoded(tiny: Tiny) -> torch.Tensor:
    return torch.tensor(tiny("fp32")[1].tokenizer.encode(PASSAGE).ids)


@pytest.mark.parametrize("name", ["one", "ragged", "chunked"])
def test_logits_agree_with_the_reference(tiny: Tiny, name: str) -> None:
    plan = steps(encoded(tiny), name)
    found = run_steps(tiny("fp32")[1].session(), plan)
    expected = run_steps(reference(tiny, "fp32"), plan)
    for at, (result, wanted) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(result, wanted, rtol=0, atol=FP32_TOLERANCE, msg=f"step {at}")


@pytest.mark.parametrize("name", ["one", "ragged", "chunked"])
def test_bf16_rounds_no_more_than_the_reference(tiny: Tiny, name: str) -> None:
    plan = steps(encoded(tiny), name)
    exact = run_steps(reference(tiny, "fp32"), plan)
    rounded = distance(run_steps(reference(tiny, "bf16"), plan), exact)
    found = distance(run_steps(tiny("bf16")[1].session(), plan), exact)
    assert 0 < found <= BF16_ROOM * rounded, f"{found:.2e}, the interpreter's {rounded:.2e}"


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Root of the squared differences of all steps over that of the values."""
    off = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
    whole = sum(float(b.square().sum()) for b in wanted)
    return float((off / whole) ** 0.5)


@pytest.mark.parametrize(("dtype", "clear"), [("fp32", 0.01), ("bf16", 0.5)])
def test_greedy_text_is_the_references(tiny: Tiny, dtype: str, clear: float) -> None:
    """Both are told the reference's tokens; where its best is `clear` of the next, it is found."""
    prompt = tiny("fp32")[1].tokenizer.encode("In the beginning").ids
    session, wanted = tiny(dtype)[1].session(), reference(tiny, "fp32")
    logits, expected = session.prefill(prompt)[0], wanted.prefill(prompt)[0]
    told = 0
    for _ in range(32):
        best = expected.topk(2)
        token = int(best.indices[0])
        if best.values[0] - best.values[1] > clear:
            assert int(logits.argmax()) == token
            told += 1
        logits, expected = session.decode([token])[0], wanted.decode([token])[0]
    assert told >= 16


def test_sequences_come_and_go(tiny: Tiny) -> None:
    tokens = encoded(tiny).tolist()
    found, expected = tiny("fp32")[1].session(), reference(tiny, "fp32")
    for session in (found, expected):
        session.add(tokens[:30])
        session.add(tokens[40:51])
        session.add(tokens[60:80])
        session.decode({1: tokens[51]})
        session.remove(0)
        session.decode({2: tokens[80], 1: tokens[52]})
        session.add(tokens[90:93])
        session.decode({1: tokens[53], 3: tokens[93]})
    for sequence in (1, 2, 3):
        result, wanted = found.logits(sequence), expected.logits(sequence)
        torch.testing.assert_close(result, wanted, rtol=0, atol=FP32_TOLERANCE)


def test_sessions_and_threads_share_an_executable(tiny: Tiny) -> None:
    model, prompt = tiny("fp32")[1], [5, 6, 7]
    wanted = model.session().prefill(prompt)
    sessions = [model.session() for _ in range(2)]
    with ThreadPoolExecutor(1) as other:
        first = other.submit(sessions[0].prefill, prompt).result()
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)
    torch.testing.assert_close(sessions[1].prefill(prompt), wanted, rtol=0, atol=0)
    again = sessions[0].decode([8])
    sessions[0].reset()
    torch.testing.assert_close(sessions[0].prefill(prompt), wanted, rtol=0, atol=0)
    torch.testing.assert_close(sessions[1].decode([8]), again, rtol=0, atol=0)


def test_the_generated_script_says_what_the_session_does(tiny: Tiny) -> None:
    _, model = tiny("fp32")
    prompt = model.tokenizer.encode("In the beginning").ids
    session = model.session()
    token = int(session.prefill(prompt)[0].argmax())
    text: list[int] = []
    while len(text) < 16:
        text.append(token)
        token = int(session.decode([token])[0].argmax())
    folder = tiny_folder(model)
    command = [sys.executable, str(folder / "run.py"), "In the beginning", "--max-new-tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "In the beginning" + model.tokenizer.decode(text) + "\n"


def tiny_folder(model: CompiledModel) -> Path:
    artifact: Any = model._artifact
    return Path(artifact.folder)


def test_an_executable_gives_its_memory_back(tiny: Tiny) -> None:
    folder = tiny_folder(tiny("fp32")[1])
    weights = (folder / "weights/model.safetensors").stat().st_size
    before = free_bytes()
    model = dsc.load(folder)
    session = model.session()
    session.prefill([5, 6, 7])
    held = before - free_bytes()
    del session, model
    gc.collect()
    assert held > 0.9 * weights
    assert before - free_bytes() < 0.1 * weights


def free_bytes() -> int:
    """Free memory of the device."""
    driver = Driver()
    free, _ = driver.memory()
    driver.close()
    return free
