"""The triton backend as a whole: a language model through it, and its parts that need no Triton."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dsc import hardware, pipeline
from dsc.backends.base import EmitOptions, No, Yes
from dsc.backends.reference import ReferenceExecutable
from dsc.backends.triton import TritonBackend
from dsc.backends.triton import program as lowered
from dsc.backends.triton.context import template
from dsc.backends.triton.device import DeviceExecutable
from dsc.backends.triton.driver import Driver, Function, OutOfMemory, ReadyLaunch
from dsc.backends.triton.effects import access
from dsc.backends.triton.launch import LaunchProgram
from dsc.backends.triton.program import lower_program
from dsc.errors import ArtifactError, BackendUnavailable, UnsupportedOperator, UsageError
from dsc.ir import views
from dsc.ir.dims import symbol
from dsc.ir.graph import GraphBuilder
from dsc.ir.interpreter import bind_shapes
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View
from dsc.ir.weights import evaluate
from dsc.runtime.caches import Slots
from dsc.runtime.check_plan import check_plan
from dsc.runtime.plan import Plan
from dsc.runtime.session import Session
from dsc.targets import Target
from tests.backends.canonical_lm import Sizes, canonical_lm

SM_90 = Target("cuda", "sm_90")
CONTEXT, CHUNK = 64, 16


@pytest.fixture(scope="module")
def model() -> Program:
    options = pipeline.PipelineOptions(prefill_chunk=CHUNK)
    limits = Limits(max_batch=4, max_context=CONTEXT, prefill_chunk=CHUNK)
    program = canonical_lm(Sizes(), max_context=CONTEXT).limited(limits)
    return pipeline.run(program, TritonBackend(), SM_90, options)[0]


def write_artifact(
    program: Program, folder: Path, *, compile: bool = False, target: Target = SM_90
) -> Path:
    """Write what the artifact's writer would, as far as this backend reads it."""
    options = EmitOptions(targets=(target,), extra={"compile": compile})
    for name, data in TritonBackend().emit(program, options).files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    weights = {k: evaluate(e, program.source).clone() for k, e in program.weights.items()}
    (folder / "weights").mkdir()
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "weights/model.safetensors")
    return folder


def test_language_model_agrees_with_the_reference(model: Program, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    executable = TritonBackend().load(write_artifact(model, tmp_path), {}, model)
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    reference = ReferenceExecutable(model)
    sessions = [Session(x, model, 2, CONTEXT, CHUNK) for x in (executable, reference)]
    found, expected = (s.prefill(ids, lengths=[20, 13]) for s in sessions)
    tokens, said = [], []
    for _ in range(3):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        tokens.append(expected.argmax(-1))
        found, expected = (s.decode(tokens[-1]) for s in sessions)
        said.append(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    for sequence, length in enumerate((20, 13)):
        sessions[0].truncate(sequence, length)
    again = sessions[0].decode(tokens[0])
    torch.testing.assert_close(again, said[0], rtol=0, atol=1e-5)
    executable.close()  # type: ignore[attr-defined]


def test_importing_asks_neither_triton_nor_a_driver() -> None:
    code = (
        "import sys, dsc.backends.triton, dsc.backends.triton.lower;"
        "assert not {'triton', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_launches_survive_their_text_form(model: Program) -> None:
    plan = lower_program(model, "cuda:sm_90")[0].plan()
    read = LaunchProgram.of(Plan.from_json(plan.to_json()))
    assert read.plan().to_json() == plan.to_json()


@pytest.mark.parametrize("level", range(4))
def test_plans_hold_at_every_level_and_their_arena_is_the_least_there_can_be(level: int) -> None:
    options = pipeline.PipelineOptions(prefill_chunk=CHUNK, fusion_level=level)
    whole = canonical_lm(Sizes(), max_context=CONTEXT)
    program = pipeline.run(whole, TritonBackend(), SM_90, options)[0]
    for target in ("interpret", "cuda:sm_90"):
        for name, entry in lower_program(program, target)[0].entries.items():
            check_plan(entry, program.symbols, name)
            assert entry.lower_bound <= entry.arena_bytes <= 1.05 * entry.lower_bound


def test_what_a_kernel_does_to_its_pointers_is_read_off_its_text() -> None:
    moe, lookups = template("moe"), template("lookups")
    kinds = access(moe, "sort_by_expert")
    assert [kinds[k] for k in ("index", "offsets", "order", "place")] == ["r", "w", "w", "w"]
    kinds = access(lookups, "append")
    assert [kinds[k] for k in ("past", "new", "lengths", "y")] == ["r", "r", "r", "w"]
    text = "def f(x, y, z, n):\n at = x + n\n v = tl.load(at) + tl.load(z)\n"
    text += " at += 4\n tl.store(at, v)\n tl.store(y + tl.load(z + n), v)\n"
    assert access(text, "f") == {"x": "u", "y": "w", "z": "r", "n": "u"}
    assert access("def f(x, y):\n tl.atomic_add(x, tl.load(y))\n", "f") == {"x": "u", "y": "r"}


HELPED = """
import triton.language as tl
from elsewhere import strange

def at(p, q, n):
    return p + tl.load(q) + n

def put(to, what, *, mask):
    tl.store(to, what, mask=mask)

def forward(a, b):
    put(what=tl.load(at(b, a, 3)), to=at(a, b, 0), mask=True)

def kernel(x, y, z, w, v, u):
    here = at(x, y, 1)
    put(here, tl.load(z), mask=x.put(y))
    forward(w, v)
    strange(u + 1)

def spread(x, y):
    put(*(x, y), mask=True)
"""


def test_what_functions_do_that_a_kernel_calls_is_what_the_kernel_does() -> None:
    kinds = access(HELPED, "kernel")
    assert kinds == {"x": "w", "y": "r", "z": "r", "w": "u", "v": "r", "u": "u"}
    assert access(HELPED, "spread") == {"x": "w", "y": "w"}


def test_equal_layers_share_kernels() -> None:
    programs = [canonical_lm(Sizes(layers=n)) for n in (3, 6)]
    few, many = (lower_program(p, "cuda:sm_90")[0] for p in programs)
    assert few.kernels.keys() == many.kernels.keys()
    assert len(few.entries["step"].launches) < len(many.entries["step"].launches)


def test_absorbed_attention_splits_a_long_cache() -> None:
    b, f32 = GraphBuilder("main"), DType.f32
    shapes = [(1, 1, 16, 64), (1, 1, 16, 16), (1, 4096, 64), (1, 4096, 16)]
    operands = [b.input(f"x{i}", TensorType(f32, s)) for i, s in enumerate(shapes)]
    lengths = b.input("lengths", TensorType(DType.i64, (1,)))
    out = b.latent_attention(*operands, lengths, scale=0.1)
    lowered, _ = lower_program(Program("p", {"main": b.finish([out])}), "cuda:sm_90")
    first, second = lowered.entries["main"].launches
    assert first.grid[2] == 64
    assert second.kernel.startswith("latent_combine")


def test_strides_that_are_multiples_of_16_are_promised() -> None:
    b, bf16 = GraphBuilder("main"), DType.bf16
    rows = symbol("C")
    shapes: list[tuple[Any, ...]] = [(1, 1, 16, 64), (1, 1, 16, 24), (1, rows, 64), (1, rows, 24)]
    operands = [b.input(f"x{i}", TensorType(bf16, s)) for i, s in enumerate(shapes)]
    lengths = b.input("lengths", TensorType(DType.i64, (1,)))
    out = b.latent_attention(*operands, lengths, scale=0.1)
    lowered, _ = lower_program(Program("p", {"main": b.finish([out])}), "cuda:sm_90")
    kernel = lowered.kernels[lowered.entries["main"].launches[0].kernel]
    assert "l_batch" in kernel.aligned, "64 numbers a token, however many tokens"
    assert not {"r_batch", "T"} & set(kernel.aligned), "24 times an unknown number is no multiple"


@pytest.mark.parametrize(("gate", "widen"), [(DType.bf16, False), (DType.f32, True)])
def test_router_products_are_exact(gate: DType, widen: bool) -> None:
    b = GraphBuilder("main")
    x = b.input("x", TensorType(DType.bf16, (3, 32)))
    weight = b.input("w", TensorType(gate, (8, 32)))
    index, weights = b.route(x, weight, score="softmax", top_k=2, normalise=False)
    lowered, _ = lower_program(Program("p", {"main": b.finish([index, weights])}), "cuda:sm_90")
    kernel = lowered.kernels[lowered.entries["main"].launches[0].kernel]
    assert kernel.constants["WIDEN"] is widen
    assert kernel.signature["c"] == "*fp32"


def test_refusals_name_every_reason_and_place() -> None:
    b = GraphBuilder("main")
    x = b.input("x", TensorType(DType.f32, (symbol("N"), symbol("K"))))
    b.loc = "model.sorter"
    values, _ = b.sort(x, axis=-1)
    b.loc = "model.top"
    top, _ = b.topk(values, k=2)
    graph = b.finish([top])
    backend = TritonBackend()
    assert backend.supports(graph.nodes[0]) == No("no Triton kernel for sort")
    assert isinstance(backend.supports(graph.nodes[1]), No)
    with pytest.raises(UnsupportedOperator, match=r"no Triton kernel for sort \(at model.sorter\)"):
        backend.emit(Program("p", {"main": graph}), EmitOptions())


@pytest.mark.parametrize(("archs", "made"), [((), []), (("sm_75", "sm_80", "sm_80"), ["sm_80"])])
def test_code_for_no_target_is_for_the_gpus_at_hand(
    archs: Sequence[str], made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = [hardware.Gpu("a card", f"cuda:{arch}", 1 << 30) for arch in archs]
    monkeypatch.setattr(hardware, "gpus", lambda: cards)
    b = GraphBuilder("main")
    x = b.input("x", TensorType(DType.f32, (4,)))
    program = Program("p", {"main": b.finish([b.add(x, x)])})
    asked = EmitOptions(extra={} if not made else {"compile": False})
    emission = TritonBackend().emit(program, asked)
    found = {name.split("/")[1] for name in emission.files}
    assert found == {"kernels", "interpret", *made}
    assert list(emission.meta["targets"]) == [f"cuda:{arch}" for arch in made]
    assert emission.plan is not None
    assert emission.plan.entries["main"].launches


def test_a_pointwise_operator_without_an_expression_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dsc.backends.triton.pointwise import EXPRESSIONS

    b = GraphBuilder("g")
    b.gelu(b.input("x", TensorType(DType.f32, (4, 4))))
    assert TritonBackend().supports(b.nodes[0]) == Yes()
    monkeypatch.delitem(EXPRESSIONS, "gelu")
    assert TritonBackend().supports(b.nodes[0]) == No("no Triton kernel for gelu")


def test_every_node_of_the_family_is_taken(model: Program) -> None:
    backend = TritonBackend()
    answers = {backend.supports(n) for g in model.entries.values() for n in g.nodes}
    assert answers == {Yes()}


def test_inputs_of_a_wrong_shape_are_named(model: Program) -> None:
    graph = model.entries["decode"]
    shapes = [[2 if str(d) == "B" else 7 for d in v.type.shape] for v in graph.inputs]
    with pytest.raises(UsageError, match="input input_ids has 7 at axis 1"):
        bind_shapes(graph, shapes)


@given(st.data())
def test_reshaped_views_address_what_torch_does(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    dense = torch.arange(torch.Size(shape).numel()).reshape(shape)
    start = View(0, TensorType(DType.i64, tuple(shape)), views.dense_strides(shape))
    moved, view = dense.permute(order), views.permute(start, order)
    flat = torch.Size(shape).numel()
    first = data.draw(st.sampled_from([d for d in range(1, flat + 1) if flat % d == 0]))
    wanted = (first, flat // first)
    found = views.reshape(view, wanted)
    if found is not None:
        strides = [int(s) for s in found.strides]  # type: ignore[arg-type]
        assert torch.equal(dense.as_strided(wanted, strides), moved.reshape(wanted))


def test_symbolic_axes_fold_and_unfold() -> None:
    batch, new = symbol("B"), symbol("S")
    type = TensorType(DType.f32, (batch, new, 24))
    view = View(0, type, views.dense_strides(type.shape))
    heads = views.reshape(view, (batch, new, 3, 8))
    assert heads is not None
    part = views.narrow(heads, 3, 2, 5)
    assert views.fold(part, 3) == (batch * new * 3, 8)
    assert views.reshape(part, (batch * new, 15)) is None


class FakeDriver(Driver):
    """A device whose memory is the host's and whose kernels are only recorded."""

    def __init__(self, beside: FakeDriver | None = None) -> None:
        self.blocks: dict[int, Any] = beside.blocks if beside is not None else {}
        self.launched: list[tuple[Function, tuple[int, int, int], list[int]]] = []
        self.uploads: list[int] = []
        self.streams: list[int | None] = []
        self.downloads: list[int] = []
        self.waits = self.captures = self.replays = 0
        self.room = 1 << 40

    @property
    def arch(self) -> str:
        return "sm_90"

    def load(
        self,
        image: bytes,
        symbol: str,
        warps: int,
        shared: int,
        parameters: int,
        dependent: bool = False,
    ) -> Function:
        return Function(ctypes.c_void_p(1), warps * 32, shared, parameters)

    def allocate(self, size: int) -> int:
        if sum(map(len, self.blocks.values())) + size > self.room:
            raise OutOfMemory("full")
        block = ctypes.create_string_buffer(max(size, 1))
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def upload(self, target: int, source: int, size: int) -> None:
        self.uploads.append(size)
        ctypes.memmove(target, source, size)

    def download(self, target: int, source: int, size: int) -> None:
        self.downloads.append(size)
        ctypes.memmove(target, source, size)

    def copy(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def clear(self, target: int, size: int) -> None:
        ctypes.memset(target, 0, size)

    def launch(self, launch: ReadyLaunch, stream: int | None = None) -> None:
        self.streams.append(stream)
        assert len(launch.arguments) == launch.function.parameters
        values = [a.value for a in launch.arguments]
        self.launched.append((launch.function, launch.grid, values))

    def memory(self) -> tuple[int, int]:
        return self.room - sum(map(len, self.blocks.values())), self.room

    def capture(self, launches: Sequence[ReadyLaunch]) -> Any:
        self.captures += 1
        return list(launches)

    def replay(self, graph: Any) -> None:
        self.replays += 1
        for launch in graph:
            self.launch(launch)

    def forget(self, graph: Any) -> None:
        return

    def synchronise(self) -> None:
        self.waits += 1

    def activate(self) -> None:
        return

    def close(self) -> None:
        return


def write_records(program: LaunchProgram, folder: Path) -> None:
    """Stand-ins for binaries."""
    records = {
        key: {"file": "k", "symbol": k.function, "warps": k.warps, "shared": 0, "global_scratch": 0,
              "profile_scratch": 0, "parameters": len(k.signature) + 2}
        for key, k in program.kernels.items()
    }  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps(records))
    (folder / "k").write_bytes(b"")


@pytest.fixture
def on_fake(model: Program, tmp_path: Path) -> tuple[DeviceExecutable, FakeDriver, LaunchProgram]:
    """The model on a device that runs nothing."""
    folder = write_artifact(model, tmp_path) / "triton/sm_90"
    program = LaunchProgram.of(Plan.from_json((folder / "plan.json").read_bytes()))
    write_records(program, folder)
    driver = FakeDriver()
    weights = tmp_path / "weights/model.safetensors"
    return DeviceExecutable(folder, weights, model, driver), driver, program


def test_cuda_launches_what_was_emitted(
    model: Program, on_fake: tuple[DeviceExecutable, FakeDriver, LaunchProgram]
) -> None:
    executable, driver, program = on_fake
    session = Session(executable, model, 1, CONTEXT, CHUNK)
    session.prefill([1, 2, 3])
    launches = len(driver.launched)
    plain = {name: entry.without("sample") for name, entry in program.entries.items()}
    assert launches == len(plain["extend"].launches) == len(program.entries["extend"].launches) - 4
    before = len(driver.uploads)
    assert before == 2, "weights and inputs: caches begin as zeros on the device"
    session.decode([4])
    assert len(driver.uploads) == before + 1, "all inputs at once"
    step = len(plain["decode"].launches)
    arena = max(program.entries[name].arena_bytes for name in ("extend", "decode"))
    assert executable._held.pools["arena"][1] == arena
    assert len(driver.launched) - launches == step
    session.decode([5])
    session.decode([6])
    assert len(driver.launched) - launches == 3 * step
    assert driver.launched[-step:] == driver.launched[-2 * step : -step]
    for _, _, arguments in driver.launched:
        assert all(a >= 0 for a in arguments)


def test_tokens_that_are_chosen_on_the_device_are_waited_for_once(
    model: Program, on_fake: tuple[DeviceExecutable, FakeDriver, LaunchProgram]
) -> None:
    """All that a step needs is copied on the device; the host sees the ids at the end."""
    executable, driver, program = on_fake
    session = Session(executable, model, 2, CONTEXT, CHUNK)
    session.prefill([[1, 2, 3], [4, 5, 6]])
    session.generate(7)  # buffers have their sizes then
    launches, waits = len(driver.launched), driver.waits
    uploads, downloads = len(driver.uploads), len(driver.downloads)
    ids = session.generate(7)
    assert ids.shape == (2, 7)
    assert len(driver.launched) - launches == 7 * len(program.entries["decode"].launches)
    assert driver.waits == waits + 1
    assert len(driver.uploads) == uploads + 1, "tokens, positions and lengths of all steps"
    vocab = 50
    assert driver.downloads[downloads:] == [7 * 2 * 8, 2 * vocab * 4]
    assert session.lengths == [17, 17]


def test_a_moved_sequence_takes_its_rows_on_the_device_along(
    model: Program, on_fake: tuple[DeviceExecutable, FakeDriver, LaunchProgram]
) -> None:
    executable, _, _ = on_fake
    session = Session(executable, model, 2, CONTEXT, CHUNK)
    first, second = session.add([1, 2, 3]), session.add([4, 5])
    (kept,) = session._kept
    assert isinstance(kept, Slots)
    slots = [(executable._held.resident(x), x.nbytes // 2) for x in kept._slots.values()]
    residents = [r.pointer for r in executable._held.caches.values()]
    for pointer, size in slots:  # what a kernel would write for the second sequence's two tokens
        ctypes.memset(pointer + size, 7, 2 * size // (CONTEXT + CHUNK))
    session.decode({second: 6})
    session.remove(first)
    session.decode({second: 8})
    assert [r.pointer for r in executable._held.caches.values()] == residents
    for pointer, size in slots:
        width = size // (CONTEXT + CHUNK)
        assert ctypes.string_at(pointer, 2 * width) == b"\x07" * 2 * width


def test_an_executable_gives_everything_back(
    on_fake: tuple[DeviceExecutable, FakeDriver, LaunchProgram], model: Program
) -> None:
    executable, driver, _ = on_fake
    session = Session(executable, model, 1, CONTEXT, CHUNK)
    session.prefill([1, 2, 3])
    executable.close()
    assert not driver.blocks


def test_no_driver_is_said_so() -> None:
    from dsc.hardware import gpus

    if gpus():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match="no driver of an NVIDIA GPU"):
        DeviceExecutable(Path("sm_90"), Path("absent"), Program("none", {}))


def test_a_machine_without_hip_says_so(model: Program, tmp_path: Path) -> None:
    folder = write_artifact(model, tmp_path)
    weights = folder / "weights/model.safetensors"
    with pytest.raises(BackendUnavailable, match="no HIP run time on this machine"):
        TritonBackend().load_on("hip:gfx942", folder, weights, model)


def test_an_artifact_without_weights_does_not_load(model: Program, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="without weights"):
        TritonBackend().load(tmp_path, {"weights": None}, model)


def test_a_plan_that_took_long_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = pipeline.PipelineOptions(prefill_chunk=CHUNK)
    whole = canonical_lm(Sizes(layers=1, dense=0), max_context=CONTEXT)
    program = pipeline.run(whole, TritonBackend(), SM_90, options)[0]
    made = lowered.lowered_program(program, "cuda:sm_90")
    assert not list(tmp_path.rglob("plans/*"))  # it took no second
    monkeypatch.setattr(lowered, "WORTH", 0.0)
    first = lowered.lowered_program(program, "cuda:sm_90")
    monkeypatch.setattr(lowered, "lower_program", None)
    again = lowered.lowered_program(program, "cuda:sm_90")
    assert again == first == made
    assert again.program.kernels == first.program.kernels
    for other in (replace(program, name="other"), program):
        with pytest.raises(TypeError, match="not callable"):
            lowered.lowered_program(other, "cuda:sm_80" if other is program else "cuda:sm_90")
    (entry,) = tmp_path.rglob("plans/*")
    entry.write_bytes(entry.read_bytes()[:-9])
    with pytest.raises(TypeError, match="not callable"):
        lowered.lowered_program(program, "cuda:sm_90")
