"""Every Triton kernel, interpreted, against the reference of its operator; and compiled."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsc.backends.base import EmitOptions
from dsc.backends.triton import TritonBackend
from dsc.backends.triton.backend import with_templates
from dsc.backends.triton.compile import compile_each, compile_kernels
from dsc.backends.triton.context import KERNELS, template
from dsc.backends.triton.dependent import SAID, takes, waiting
from dsc.backends.triton.effects import access, parameters
from dsc.backends.triton.program import lower_program
from dsc.backends.triton.timer import probe_kernels
from dsc.targets import Target, parse_target
from tests.backends.test_triton_codes import COMPILED as CODED
from tests.backends.triton_cases import EMITTED, cases, large_cases, program_of
from tests.backends.triton_coded import program

pytest.importorskip("triton")

CASES = cases(EMITTED)

# One case for each template and for the shapes of generated kernels that differ in kind.
COMPILED = (
    "linear_1", "linear_3", "grouped_linear_0", "experts_3", "attention_1", "attention_4",
    "mla_attention_1", "latent_attention_1", "latent_attention_4", "route_1", "dispatch_0",
    "combine_0", "rms_norm_2", "softmax_1", "mean_1", "argmax_1", "cumsum_1", "topk_0", "rope_1",
    "embedding_1", "gather_1", "append_1", "cache_write_1", "pow_0", "gelu_0", "where_1",
    "arange_0", "sample_2",
)  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """All cases as one artifact, loaded in one interpreting process."""
    folder = tmp_path_factory.mktemp("cases")
    backend, program = TritonBackend(), program_of(CASES)
    emission = backend.emit(program, EmitOptions(extra={"compile": False}))
    for name, data in emission.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    executable = backend.load(folder, {}, program)
    yield executable
    executable.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_reference(interpreted: object, name: str) -> None:
    case = CASES[name]
    inputs = {k: v.clone() for k, v in case.inputs.items()}
    case.check(interpreted.run(name, inputs))  # type: ignore[attr-defined]


def test_cache_is_written_into_the_tensor_that_was_given(interpreted: object) -> None:
    case = CASES["cache_write_1"]
    inputs = {k: v.clone() for k, v in case.inputs.items()}
    (result,) = interpreted.run("cache_write_1", inputs).values()  # type: ignore[attr-defined]
    assert result is inputs["x0"]
    assert torch.equal(inputs["x0"], case.expected()[0])


@pytest.mark.parametrize("target", ["cuda:sm_90", "hip:gfx942"])
def test_kernels_compile_without_a_gpu(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = {name: CASES[name] for name in COMPILED}
    program, generated = lower_program(program_of(chosen), target)
    place = parse_target(target)
    seen: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        assert target in what
        seen.append(done)
        assert done <= total

    texts = with_templates(program, generated)
    binaries, records = compile_kernels(program.kernels, place, texts, progress)
    assert records.keys() == program.kernels.keys()
    assert len(binaries) == len(records) == len(seen)
    for key, record in records.items():
        visible = [k for k in program.kernels[key].signature.values() if k != "constexpr"]
        assert record["parameters"] >= len(visible)
        assert record["registers"] > 0
        assert binaries[record["file"]][:4] == b"\x7fELF"
    again = compile_kernels(program.kernels, place, texts, progress)
    assert again == (binaries, records)
    assert len(seen) == len(binaries)  # nothing was compiled
    changed = {module: text + "# other\n" for module, text in texts.items()}
    name, kernel = next(iter(program.kernels.items()))
    compile_kernels({name: kernel}, place, changed, lambda what, done, total: seen.append(done))
    assert len(seen) == len(binaries) + 1
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    compile_kernels({name: kernel}, place, texts, lambda what, done, total: seen.append(done))
    assert len(seen) == len(binaries) + 2


def test_every_kernel_waits_for_the_former_one_before_all_else() -> None:
    """On sm_90 and later; what a kernel calls, and other targets, have no such line."""
    program, generated = lower_program(program_of(CASES), "cuda:sm_90")
    texts = with_templates(program, generated)
    made = waiting(texts, program.kernels.values())
    assert [t for t in ("sm_80", "sm_90", "sm_100") if takes(Target("cuda", t))] == [
        "sm_90",
        "sm_100",
    ]
    assert not takes(Target("hip", "gfx950"))
    kernels = {(k.module, k.function) for k in program.kernels.values()}
    for module, text in made.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                said = [ast.unparse(line) for line in node.body[: len(SAID) + 1]]
                begin = said[1:] if ast.get_docstring(node) else said[:-1]
                assert (tuple(begin) == SAID) == ((module, node.name) in kernels)
    assert all(access(made[m], f) == access(texts[m], f) for m, f in kernels)


def test_a_kernel_waits_whatever_it_calls_the_language() -> None:
    program, generated = lower_program(program_of({"add_0": CASES["add_0"]}), "cuda:sm_90")
    texts = with_templates(program, generated)
    renamed = {m: re.sub(r"\btl\b", "language", text) for m, text in texts.items()}
    waits = waiting(renamed, program.kernels.values())
    (record,) = compile_kernels(program.kernels, Target("cuda", "sm_90"), waits)[1].values()
    assert record["dependent"]


def test_prefill_on_sm_90_keeps_its_products_on_their_way() -> None:
    chosen = {"mla": large_cases()["mla_attention_large_0"]}
    program, generated = lower_program(program_of(chosen), "cuda:sm_90")
    texts = waiting(with_templates(program, generated), program.kernels.values())
    _, records = compile_kernels(program.kernels, Target("cuda", "sm_90"), texts)
    assert {key.partition("_")[0] for key in records} == {"flash", "gemm"}
    for record in records.values():
        assert record["matrix"].keys() == {"wgmma bf16"}
        assert record["serialised"] == record["spill_bytes"] == record["stack_bytes"] == 0


def test_kernel_errors_are_all_reported() -> None:
    program, generated = lower_program(program_of({"add_0": CASES["add_0"]}), "cuda:sm_90")
    texts = with_templates(program, generated)
    texts = {module: text.replace("tl.load", "tl.lod") for module, text in texts.items()}
    with pytest.raises(RuntimeError, match=r"1 kernels did not compile for cuda:sm_90(?s:.)*lod"):
        compile_kernels(program.kernels, Target("cuda", "sm_90"), texts)


def test_a_kernel_that_ends_its_process_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program, generated = lower_program(
        program_of({k: CASES[k] for k in ("add_0", "exp_0")}), "cuda:sm_90"
    )
    texts = with_templates(program, generated)
    ending, other = sorted(program.kernels)
    texts[program.kernels[ending].module] = "import os\nos._exit(3)\n"
    _, records, failed = compile_each(program.kernels, Target("cuda", "sm_90"), texts)
    assert records.keys() == {other}
    assert failed == {ending: "the compiling process ended"}
    texts = dict.fromkeys(texts, "import os\nos._exit(3)\n")
    _, records, failed = compile_each(program.kernels, Target("cuda", "sm_90"), texts)
    assert failed.keys() == {ending, other}


def test_compiled_cases_cover_every_template() -> None:
    coded = {name: case for name, (case, _) in CODED.items()}
    chosen = {name: CASES[name] for name in COMPILED}
    made = [lower_program(p, "cuda:sm_90")[0] for p in (program_of(chosen), program(coded))]
    probes = probe_kernels(Target("cuda", "sm_90"))
    used = {k.function for each in (*(p.kernels for p in made), probes) for k in each.values()}
    for path in KERNELS.glob("*.py"):
        for line in template(path.stem).splitlines():
            if line.startswith("def ") and not line.startswith("def _"):  # what kernels call
                function = line[4:].partition("(")[0]
                assert parameters(template(path.stem), function)
                with_slots = any(name.startswith(f"{function}_") for name in used)
                assert function in used or with_slots, f"{path.stem}:{function} is not compiled"
