"""The tvm backend on a whole model: sessions, artifacts, run.py, other CPUs, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import dsc
from bench.random_calls import Kind, run
from dsc import pipeline
from dsc.api import CompiledModel, compile_program
from dsc.backends import get
from dsc.backends.base import EmitOptions, No, Yes
from dsc.backends.reference import ReferenceExecutable
from dsc.backends.tvm.lean import private_copy
from dsc.errors import BackendUnavailable, UnsupportedOperator, UsageError
from dsc.generation import generate
from dsc.ir.dims import symbol
from dsc.ir.graph import GraphBuilder
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.runtime.session import Session
from dsc.targets import Target, parse_target
from tests.backends.canonical_lm import Sizes, canonical_lm

pytest.importorskip("tvm")
FP32, BF16 = 2e-5, 5e-2
"""Largest |difference| of logits relative to the largest logit. bf16 keeps 8 bits, and layers add
their roundings in another order than the interpreter."""
ROWS, CONTEXT, CHUNK = 3, 60, 32


@pytest.fixture(scope="module")
def program() -> Program:
    return canonical_lm(Sizes())


@pytest.fixture(scope="module")
def compiled(program: Program) -> CompiledModel:
    return compile_program(program, backend="tvm")


def interpreted(program: Program) -> Session:
    return Session(ReferenceExecutable(program), program, ROWS, CONTEXT, CHUNK)


def largest_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def compare(ours: Session, oracle: Session, tolerance: float) -> None:
    """Ragged prompts, four steps of decoding with the oracle's tokens, then a second prompt."""
    ids = torch.randint(0, 50, (ROWS, 9), generator=torch.Generator().manual_seed(0))
    got, wanted = (s.prefill(ids, lengths=[9, 4, 1]) for s in (ours, oracle))
    assert largest_error(got, wanted) <= tolerance
    for _ in range(4):
        tokens = wanted.float().argmax(-1)
        got, wanted = ours.decode(tokens), oracle.decode(tokens)
        assert largest_error(got, wanted) <= tolerance
    got, wanted = (s.prefill(ids, all_logits=True) for s in (ours, oracle))
    assert largest_error(got, wanted) <= tolerance


def test_sessions_agree_with_the_interpreter(program: Program, compiled: CompiledModel) -> None:
    compare(compiled.session(ROWS, CONTEXT), interpreted(program), FP32)


def test_a_bf16_model_agrees_with_the_interpreter() -> None:
    program = canonical_lm(Sizes(dense=2, dtype=DType.bf16))
    ours = compile_program(program, backend="tvm").session(ROWS, CONTEXT)
    compare(ours, interpreted(program), BF16)


def test_chunked_prefill_is_the_same_as_whole(compiled: CompiledModel) -> None:
    ids = torch.randint(0, 50, (1, 23), generator=torch.Generator().manual_seed(1))
    whole, parts = compiled.session(1, CONTEXT), compiled.session(1, CONTEXT)
    for first in range(0, 20, 10):
        parts.prefill(ids[:, first : first + 10])
    assert largest_error(parts.prefill(ids[:, 20:]), whole.prefill(ids)) <= FP32


@pytest.mark.parametrize(
    ("cpu", "dtype"), [("x86-64-v3", DType.f32), ("x86-64", DType.f32), ("x86-64-v3", DType.bf16)]
)
def test_code_for_older_cpus_agrees(cpu: str, dtype: DType) -> None:
    program = canonical_lm(Sizes(dtype=dtype))
    backend, target = get("tvm"), parse_target(f"cpu:{cpu}")
    done, _ = pipeline.run(program, backend, target, pipeline.PipelineOptions())
    done = replace(done, entries={"extend": done.entries["extend"]})
    model = CompiledModel(done, "tvm", {}, _emission=backend.emit(done, EmitOptions((target,))))
    ours = Session(model.executable, done, ROWS, CONTEXT, CHUNK)
    compare(ours, interpreted(program), FP32 if dtype is DType.f32 else BF16)


def test_layers_share_kernels(program: Program) -> None:
    """More layers: more steps, not one kernel more."""
    from dsc.backends.tvm.machine import GENERIC
    from dsc.backends.tvm.schedule import plan_program

    counts = []
    for layers in (3, 5):  # an expert layer in the middle is followed by a norm
        model, options = canonical_lm(Sizes(layers=layers)), pipeline.PipelineOptions()
        deep, _ = pipeline.run(model, get("tvm"), Target("cpu"), options)
        plans, kernels = plan_program(deep, GENERIC)
        counts.append((len(kernels.names), len(plans["decode"].launches)))
    assert counts[0][0] == counts[1][0]
    assert counts[1][1] > counts[0][1]


RUN = """
import json, sys
import numpy as np
import run
model = run.Model(sys.argv[1])
out = []
tokens, start = np.array([[3, 1, 4, 1, 5]], dtype=np.int64), 0
for _ in range(3):
    n = tokens.shape[1]
    at = np.arange(start, start + n, dtype=np.int64)[None]
    logits = model.step(tokens, at, np.array([start]), np.array([[n - 1]]))
    start, tokens = start + n, logits[:, -1].argmax(-1)[:, None]
    out.append(logits[0, -1].tolist())
heavy = [m for m in ("dsc", "tvm", "torch") if sys.modules.get(m) is not None]
print(json.dumps([out, heavy]))
"""


def test_run_py_gives_the_same_logits_without_dsc(compiled: CompiledModel, tmp_path: Path) -> None:
    folder = compiled.save(tmp_path / "out")
    line = [sys.executable, "-c", RUN, str(folder)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, heavy = json.loads(done.stdout)
    assert heavy == []
    session = compiled.session(1, CONTEXT)
    wanted = session.prefill(torch.tensor([[3, 1, 4, 1, 5]]))
    for row in logits:
        assert largest_error(torch.tensor([row]), wanted) <= FP32
        wanted = session.decode(wanted.argmax(-1))


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"


@pytest.fixture(scope="module")
def artifact(compiled: CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact of the model whose tokens are letters."""
    program = compiled.program.limited(Limits(ROWS, CONTEXT, CHUNK))
    limited = replace(compiled, program=program)
    folder = limited.save(tmp_path_factory.mktemp("letters") / "out")
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_run_py_ends_at_the_context_from_its_own_folder(artifact: Path) -> None:
    line = [sys.executable, "run.py", LETTERS[:40], "--max-new-tokens", "1560"]
    done = subprocess.run(line, cwd=artifact, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "length\n")
    session = dsc.load(artifact).session(1)
    ids = list(generate(session, list(range(40)), 1560))
    assert len(ids) == CONTEXT - 40
    assert done.stdout == LETTERS[:40] + "".join(LETTERS[i] for i in ids) + "\n"


@pytest.mark.parametrize("name", ["weights/model.safetensors", "tvm/steps.bin"])
def test_a_model_does_not_open_files_that_were_cut(name: str, artifact: Path) -> None:
    """Reading past the end of a mapped file would end the process, or give any text."""
    whole = (artifact / name).read_bytes()
    short = len(whole) - 88
    line = [sys.executable, "-c", "import run; run.Model('.')"]
    try:
        (artifact / name).write_bytes(whole[:-88])
        done = subprocess.run(line, cwd=artifact, capture_output=True, text=True, check=False)
    finally:
        (artifact / name).write_bytes(whole)
    assert f"ValueError: {name} has {short} bytes, {len(whole)} recorded" in done.stderr


def test_run_py_names_the_package_that_is_missing(artifact: Path, tmp_path: Path) -> None:
    site = Path(np.__file__).parent.parent
    line = [sys.executable, "-I", "-S", "-c", BARE, str(artifact), str(tmp_path), "abc"]
    for added in (("numpy", "numpy.libs", "tokenizers"), ("tvm_ffi", "typing_extensions.py")):
        for name in added:
            if (site / name).exists():
                (tmp_path / name).symlink_to(site / name)
        done = subprocess.run(line, cwd=artifact, capture_output=True, text=True, check=False)
        assert done.returncode > 0
        assert "apache-tvm" in done.stderr
        assert "Traceback" not in done.stderr
    assert "there is no package tvm" in done.stderr, "its own folder tvm/ is none"


BARE = """
import runpy, sys
artifact, packages = sys.argv[1:3]
sys.argv[:3] = [artifact + "/run.py"]
sys.path[:0] = [artifact, packages]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_library_refuses_wrong_calls_and_writes_nowhere_else(
    compiled: CompiledModel, tmp_path: Path
) -> None:
    outcome = run(Kind("tvm", "contiguous", "library"), compiled.save(tmp_path / "out"), 200)
    assert not outcome.bad, outcome.bad
    assert outcome.worked + outcome.refused == outcome.calls == 200
    assert set(outcome.faults) == {
        "address", "input_ids", "lengths", "logits_at", "positions", "size",
    }  # fmt: skip


INDICES = """
program "indices" {stage=CANONICAL}
symbols {S=[0,8]}
graph main(%x: f32[5,3], %i: i64[S], %by: i64[]) {
  %j = add %i, %by : i64[S]
  %y = take %x, %j {axis=0} : f32[S,3]
  return %y as "y"
}
"""


@pytest.mark.parametrize("backend", ["tvm", "reference", "onnxruntime", "triton"])
def test_an_index_that_is_computed_is_refused_where_it_is_outside(backend: str) -> None:
    options = {"compile": False} if backend == "triton" else None
    compiled = dsc.compile(parse_program(INDICES), backend=backend, backend_options=options)
    x = torch.arange(15.0).view(5, 3)

    def taken(indices: list[int], by: int) -> torch.Tensor:
        index = torch.tensor(indices, dtype=torch.int64)
        results = compiled.run({"x": x, "i": index, "by": torch.tensor(by)})
        assert list(results) == ["y"]
        y: torch.Tensor = results["y"]
        return y

    assert torch.equal(taken([0, 2, 1], 2), x[[2, 4, 3]])
    assert taken([], 9).shape == (0, 3)
    for indices, by in (([0, 3], 2), ([1], -7), ([1, 0], -1), ([1 << 62], 1)):
        with pytest.raises(UsageError, match="an index that is computed must be inside"):
            taken(indices, by)
        if backend == "reference":
            with dsc.Profiler(), pytest.raises(UsageError, match="must be inside"):
                taken(indices, by)
    assert torch.equal(taken([4], 0), x[4:])


def test_a_computed_index_is_checked_where_its_values_still_lie() -> None:
    """Between a narrow index and its reader the arena's bytes go to others."""
    text = """
    program "indices" {stage=CANONICAL}
    symbols {S=[1,64]}
    graph main(%x: f32[5,S], %i: i32[S], %by: i32[]) {
      %j = add %i, %by : i32[S]
      %k = cast %j {dtype=i64} : i64[S]
      %a = exp %x : f32[5,S]
      %b = permute %a {dims=[1,0]} : f32[S,5]
      %c = softmax %b {axis=-1} : f32[S,5]
      %y = gather %c, %m {axis=1} : f32[S,1]
      return %y as "y"
    }
    """
    text = text.replace("%a = exp", "%m = reshape %k {shape=[S,1]} : i64[S,1]\n      %a = exp")
    compiled = compile_program(parse_program(text), backend="tvm", fusion_level=0)
    x, index = torch.randn(5, 40), torch.arange(40, dtype=torch.int32) % 5
    wanted = x.exp().t().softmax(-1).gather(1, index.long()[:, None])
    found = compiled.run({"x": x, "i": index, "by": torch.tensor(0, dtype=torch.int32)})["y"]
    assert torch.allclose(found, wanted)
    with pytest.raises(UsageError, match="an index that is computed must be inside"):
        compiled.run({"x": x, "i": index, "by": torch.tensor(1, dtype=torch.int32)})


def test_what_checks_no_index_is_no_way_to_compile_one() -> None:
    options = {"form": "relax"}
    with pytest.raises(UnsupportedOperator, match="take: an index that is computed"):
        dsc.compile(parse_program(INDICES), backend="tvm", backend_options=options)


def test_only_the_copy_of_a_library_asks_for_room(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_bytes(b"code")
    seen = []

    def opened(path: Path) -> None:
        with private_copy(path) as own:
            seen.append(own.read_bytes())
            raise OSError("an undefined symbol")

    with pytest.raises(OSError, match="symbol"):
        opened(tmp_path / "a.so")
    assert seen == [b"code"]
    with pytest.raises(BackendUnavailable, match="cannot be copied"):
        opened(tmp_path / "none.so")


def test_threads_wait_for_each_other(compiled: CompiledModel) -> None:
    prompts = [
        torch.randint(50, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 30)
    ]
    alone = [compiled.session().prefill(prompt) for prompt in prompts]

    def again(at: int) -> bool:
        found = []
        for _ in range(30):
            found.append(compiled.session().prefill(prompts[at]))
        return all(torch.equal(x, alone[at]) for x in found)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(again, (0, 1)))


def test_what_has_no_kernel_is_refused_with_a_reason() -> None:
    backend, b = get("tvm"), GraphBuilder("g")
    n = symbol("N")
    x = b.input("x", TensorType(DType.f32, (4, n)))
    gain = b.input("gain", TensorType(DType.f32, (n,)))
    packed = b.input("packed", TensorType(DType.f8e4m3, (4, 4)))
    b.rms_norm(x, gain, eps=1e-6)
    b.neg(packed)
    b.sort(x, axis=-1)
    b.neg(x)
    norm, fp8, sort, fine = map(backend.supports, b.nodes)
    assert isinstance(fine, Yes)
    assert isinstance(norm, No)
    assert "fixed size" in norm.reason
    assert isinstance(fp8, No)
    assert "f8e4m3" in fp8.reason
    assert isinstance(sort, No)
    assert "sort" in sort.reason


def test_a_pointwise_operator_without_a_formula_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dsc.backends.tvm.kernels.formulas import FORMULAS

    b = GraphBuilder("g")
    for extent in (4, 5):  # answers are kept by what is asked
        b.gelu(b.input("x", TensorType(DType.f32, (4, extent))))
    assert get("tvm").supports(b.nodes[0]) == Yes()
    monkeypatch.delitem(FORMULAS, "gelu")
    assert get("tvm").supports(b.nodes[1]) == No("no kernel for the operator gelu")


def test_an_unknown_cpu_is_a_users_mistake(program: Program) -> None:
    done, _ = pipeline.run(program, get("tvm"), Target("cpu"), pipeline.PipelineOptions())
    with pytest.raises(UsageError, match="no CPU called"):
        get("tvm").emit(done, EmitOptions((parse_target("cpu:imaginary"),)))


def test_inputs_are_checked(compiled: CompiledModel) -> None:
    graph = compiled.program.entries["decode"]
    sizes = {"B": 1, "C": 8}
    given = {
        v.name: torch.zeros([sizes.get(str(d)) or int(str(d)) for d in v.type.shape]).to(
            v.type.dtype.torch
        )
        for v in graph.inputs
    }
    run = compiled.executable.run
    run("decode", given)
    with pytest.raises(UsageError, match="needs the inputs lengths"):
        run("decode", {k: v for k, v in given.items() if k != "lengths"})
    with pytest.raises(UsageError, match="lengths"):
        run("decode", given | {"lengths": torch.zeros(1)})
    with pytest.raises(UsageError, match="positions"):
        run("decode", given | {"positions": torch.zeros(1, 2, dtype=torch.int64)})
    latent = given["past.0.latent"]
    with pytest.raises(UsageError, match="contiguous"):
        run("decode", given | {"past.0.latent": latent.repeat(1, 1, 2)[..., ::2]})
    with pytest.raises(UsageError, match="no entry"):
        run("train", given)
