"""Operators from outside are what those of dsc are: printed, proved, fused, planned, run."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import dsc
from dsc import extend
from dsc.api import compile_program
from dsc.backends import get
from dsc.backends.base import No
from dsc.errors import UsageError, VerificationError
from dsc.ir import extensions
from dsc.ir import op as declarations
from dsc.ir.analyses import cost
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.verifier import verify
from dsc.passes.append_cache_in_place import AppendCacheInPlace
from dsc.passes.raise_registered import RaiseRegistered
from dsc.passes.shard import Shard
from dsc.rewrite.base import PassReport
from dsc.rewrite.verify import compare_programs
from tests.documents import registrations_undone
from tests.rewrite.harness import check_rule, program_of

TEXT = """graph main(%x: f32[B,8], %y: f32[B,8]) {
  %r = relu %x : f32[B,8]
  %q = square %r : f32[B,8]
  %s = add %q, %y : f32[B,8]
  %d = row_spread %s : f32[B]
  return %s, %d
}"""
LINES = 60


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The package, imported for these tests alone."""
    pytest.importorskip("tvm")
    with registrations_undone():
        from tests.extension import operators

        yield operators
    sys.modules.pop("tests.extension.operators")


@pytest.fixture(scope="module")
def raised(package: ModuleType) -> Program:
    """A program in which the rule has put the first operator."""
    before, report = program_of(TEXT), PassReport()
    after = RaiseRegistered().run(before, report)
    assert report.fired == {"SquaredRelu": 1}
    assert compare_programs(before, after, RaiseRegistered.tolerance).ok
    return after


def test_one_file_of_sixty_lines_holds_it(package: ModuleType) -> None:
    assert package.__file__ is not None
    assert len(Path(package.__file__).read_text().splitlines()) <= LINES


def test_its_rule_has_evidence(package: ModuleType) -> None:
    check_rule(package.SquaredRelu())


def test_it_is_printed_parsed_and_verified(raised: Program) -> None:
    text = print_program(raised)
    assert "squared_relu %x" in text
    again = parse_program(text)
    assert print_program(again) == text
    verify(again)
    with pytest.raises(VerificationError, match="squared_relu"):
        verify(
            parse_program(text.replace("squared_relu %x : f32[B,8]", "squared_relu %x : f32[B]"))
        )


def test_it_is_costed(raised: Program) -> None:
    first, _, second = raised.entries["main"].nodes
    batch = first.output.type.shape[0]
    assert cost(first).flops == 24 * batch
    assert cost(first).read == cost(first).written == 32 * batch
    assert (cost(second).flops, cost(second).written) == (16 * batch, 4 * batch)


def test_rows_of_a_cache_that_it_maps_are_written_in_place(package: ModuleType) -> None:
    """Which operators keep rows apart is asked when a pass runs, not when it is imported."""
    text = """graph main(%q: f32[B,S,2,4], %past: f32[B,P,8], %new: f32[B,S,8], %n: i64[B]) {
      %c = append %past, %new, %n : f32[B,P+S,8]
      %r = squared_relu %c : f32[B,P+S,8]
      %k = reshape %r {shape=[B,P+S,2,4]} : f32[B,P+S,2,4]
      %y = attention %q, %k, %k, %n {causal=true, scale=0.5} : f32[B,S,2,4]
      return %y, %c as "present" updates %past
    }"""
    after = AppendCacheInPlace().run(program_of(text, Stage.CANONICAL), PassReport())
    assert after.entries["main"].nodes[0].op == "cache_write"


def test_a_pass_that_parts_it_takes_it_whole_and_says_why(raised: Program) -> None:
    """Operators without a placement are computed by every rank; pointwise ones have one."""
    text = """graph main(%x: f32[B,4], @gate: f32[8,4], @up: f32[8,4]) {
      %g = linear %x, @gate : f32[B,8]
      %u = linear %x, @up : f32[B,8]
      %h = swiglu %g, %u : f32[B,8]
      %r = squared_relu %h : f32[B,8]
      %s = row_spread %r : f32[B]
      return %s
    }"""
    before, report = program_of(text, Stage.CANONICAL), PassReport()
    after = Shard(ranks=2).run(before, report)
    assert compare_programs(before, after, Shard.tolerance).ok
    (told,) = [reason for _, _, reason in report.missed if "row_spread" in reason]
    assert told.startswith("row_spread takes %r whole: ")
    types = {n.op: n.operands[0].type.shape[-1] for n in after.entries["main"].nodes}
    assert (types["squared_relu"], types["row_spread"]) == (4, 8)


@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("backend", ["reference", "tvm"])
def test_it_runs_fused_with_its_neighbour(raised: Program, backend: str, level: int) -> None:
    model = compile_program(program_of(TEXT), backend, fusion_level=level)
    (graph,) = model.program.entries.values()
    bodies = [[n.op for n in node.body.nodes] for node in graph.nodes if node.body is not None]
    assert bodies == ([["squared_relu", "add"]] if level else [])
    x, y = (torch.randn(5, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    found = list(model.run({"x": x, "y": y}).values())
    wanted = x.relu().square() + y
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], wanted.amax(-1) - wanted.amin(-1), rtol=1e-6, atol=1e-6)


def test_an_artifact_of_it_is_loaded_again(raised: Program, tmp_path: Path) -> None:
    model = compile_program(program_of(TEXT), "tvm")
    model.save(tmp_path / "out")
    again = dsc.load(tmp_path / "out")
    x = torch.randn(3, 8)
    inputs = {"x": x, "y": x}
    for one, two in zip(model.run(inputs).values(), again.run(inputs).values(), strict=True):
        assert torch.equal(one, two)


def test_it_is_called_by_name_eagerly_and_in_a_function(package: ModuleType) -> None:
    x = torch.randn(4, 8)
    wanted = x.relu().square() * 0.5
    torch.testing.assert_close(package.squared_relu(x, scale=0.5), wanted)

    @dsc.optimize(backend="tvm")
    def twice(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = package.squared_relu(x, scale=0.5) * 2
        return found

    torch.testing.assert_close(twice(x), wanted * 2)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton"])
def test_a_backend_without_a_kernel_of_it_says_so(raised: Program, backend: str) -> None:
    pytest.importorskip("onnx" if backend == "onnxruntime" else "triton")
    for node in raised.entries["main"].nodes:
        said = get(backend).supports(node)
        assert isinstance(said, No) == (node.op != "add")
        if backend == "triton" and isinstance(said, No):
            assert said.reason.endswith(f"{node.op}; its declaration brings none for triton")


@pytest.fixture
def by_role() -> Iterator[None]:
    """Operators of roles that kernels have formulas for, without a kernel of theirs."""
    with registrations_undone():
        dsc.register_op(
            "spread(x: T[*n, d]) -> T[*n]", extend.Traits(extend.Role.REDUCTION),
            reference=lambda x: x.amax(-1) - x.amin(-1), doc="Of each row.", example="f32[2,3]",
        )  # fmt: skip
        dsc.register_op(
            "rolled(x: T[*n, d]) -> T[*n, d]", extend.Traits(extend.Role.ROTATION),
            reference=lambda x: x.roll(1, -1), doc="The last first.", example="f32[2,3]",
        )  # fmt: skip
        yield


@pytest.mark.parametrize("backend", ["tvm", "triton"])
@pytest.mark.parametrize(("op", "result"), [("spread", "f32[4]"), ("rolled", "f32[4,8]")])
def test_a_role_is_no_kernel(by_role: None, backend: str, op: str, result: str) -> None:
    pytest.importorskip(backend)
    text = f"""graph main(%x: f32[4,8]) {{
      %a = fused %x {{body=graph body(%p: f32[4,8]) {{
          %r = relu %p
          %s = {op} %r
          return %s
      }}}} : {result}
      %b = {op} %x : {result}
      return %a, %b
    }}"""
    region, alone = program_of(text).entries["main"].nodes
    for node in (region, alone):
        said = get(backend).supports(node)
        assert isinstance(said, No)
        assert re.search(rf"no (Triton )?kernel for (the operator )?{op}", said.reason)


def test_operators_of_any_role_pass_the_fusion_of_neighbours(by_role: None) -> None:
    text = """graph main(%x: f32[4,8]) {
      %r = relu %x : f32[4,8]
      %t = rolled %r : f32[4,8]
      %s = spread %t : f32[4]
      return %s
    }"""
    x = torch.randn(4, 8)
    (found,) = compile_program(program_of(text), "reference", fusion_level=3).run({"x": x}).values()
    y = x.relu()
    assert torch.equal(found, y.amax(-1) - y.amin(-1))


BY_KERNEL = """
import dsc
from dsc import extend
from dsc.backends import get
from dsc.ir.parser import parse_program

dsc.register_op(
    "twice(x: T[*n]) -> T[*n]", extend.Traits(extend.Role.POINTWISE),
    reference=lambda x: x + x, doc="2 x.", example="f32[2]",
    kernels={"tvm": extend.Cpp("", "twice", sizes=("*n",))},
)
made = parse_program("graph main(%x: f32[4]) { %y = twice %x\\n return %y }")
(node,) = made.entries["main"].nodes
for backend in ("tvm", "triton"):
    print(backend, type(get(backend).supports(node)).__name__)
    print(backend, "twice" in get(backend).capabilities(None).regions.epilogue)
"""


def test_kernels_do_not_depend_on_when_an_operator_was_declared(
    package: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    first = subprocess.run(
        [sys.executable, "-c", BY_KERNEL], capture_output=True, text=True, check=True
    )
    try:
        exec(BY_KERNEL, {})
    finally:
        declarations._added.pop("twice")
    assert capsys.readouterr().out == first.stdout
    assert first.stdout.splitlines()[::2] == ["tvm Yes", "triton No"]


SIGNATURE = "other(x: T[*n]) -> T[*n]"
MISTAKES = [
    ({"signature": "other(x T)"}, "malformed"),
    ({"signature": "relu(x: T[*n]) -> T[*n]"}, "relu is declared already"),
    ({"example": "f32[2,3] {scale=1}"}, "no call of it: unknown attribute scale"),
    ({"example": "f32[2"}, "no call of it"),
    ({"role": extend.Role.VIEW}, "the role view"),
    ({"signature": "other(x y: T[*n]) -> T[*n]"}, "'x y' is no name"),
    ({"signature": "1other(x: T[*n]) -> T[*n]"}, "'1other' is no name"),
    ({"signature": "other(x: T[*n]; x: int = 1) -> T[*n]"}, "are called x"),
    ({"signature": "other(x: T[*n]) -> "}, "it gives nothing"),
    ({"signature": "other(x: T[*n, d]) -> T[*n]", "role": extend.Role.POINTWISE}, "gives f32"),
    ({"kernels": {"tvm": extend.Cpp("", "f", sizes=("*m",))}}, r"asks for \*m, which it cannot"),
    ({"signature": "other(x: T[*n]; s: float = 1.0) -> T[*n]",
      "kernels": {"tvm": extend.Cpp("", "f", sizes=("*n",))}}, "is not told s"),
    ({"kernels": {"triton": extend.Triton("", "f", blocks={"BLOCK": "m"})}}, "asks for m"),
    ({"signature": "other(x: T[*n]; s: str = 'a') -> T[*n]",
      "kernels": {"tvm": extend.Cpp("", "f", sizes=("*n", "s"))}}, "cannot be told s, which is"),
    ({"signature": "other(x: T[*n]; s: float = 1.0) -> T[*n]", "role": extend.Role.POINTWISE,
      "kernels": {"triton": "{0} * {t}"}}, "is not told s and asks for t, which"),
    ({"role": extend.Role.POINTWISE, "kernels": {"triton": "{0} + {1}"}}, "asks for 1"),
    ({"role": extend.Role.POINTWISE, "kernels": {"triton": "{0"}}, "asks for {0, which"),
    ({"kernels": {"triton": "{0}"}}, "(?s)is of one element, and the role is other.*or Triton"),
    ({"kernels": {"tvm": extend.Formula(abs)}}, "(?s)is of one element.*Role.POINTWISE"),
    ({"kernels": {"triton": extend.Cpp("", "f")}}, "(?s)is a Cpp.*takes a text or Triton"),
    ({"kernels": {"tvm": "{0}"}}, "is a str"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "words"), MISTAKES)
def test_a_declaration_that_cannot_be_is_refused(changed: dict[str, Any], words: str) -> None:
    given = {"signature": SIGNATURE, "example": "f32[2,3]", "role": extend.Role.OTHER, **changed}
    with pytest.raises(UsageError, match=words):
        dsc.register_op(
            given["signature"],
            extend.Traits(given["role"]),
            reference=lambda x: x,
            doc="The same.",
            example=given["example"],
            kernels=given.get("kernels"),
        )
    assert "other" not in declarations.registry()


TIMES = """extern "C" void %s(const float *x, float *y, long n, long by) {
    for (; n-- > 0;) *y++ = by * *x++;
}"""
WRONG_CPP = {
    "int wrong(": r"(?s)the C\+\+ of wrong does not compile.*error",
    TIMES % "right": r"(?s)does not link.*wrong",
    (TIMES % "wrong").removeprefix('extern "C"'): r"(?s)does not link.*wrong",
}


def run_cpp(*operators: tuple[str, extend.Cpp]) -> list[float]:
    """What operators in C++, which multiply by an attribute, make of 1 and 2 in turn, by 3."""
    with registrations_undone():
        for name, kernel in operators:
            dsc.register_op(
                f"{name}(x: T[*n]; by: int = 2) -> T[*n]", extend.Traits(extend.Role.OTHER),
                reference=lambda x, by: x * by, doc="by x.", example="f32[2]",
                kernels={"tvm": kernel},
            )  # fmt: skip
        nodes = [f"%{i} = {name} %{i - 1} {{by=3}}" for i, (name, _) in enumerate(operators, 1)]
        lines = "\n".join(nodes)
        text = f"graph main(%0: f32[B]) {{ {lines}\n return %{len(nodes)} }}"
        found = compile_program(program_of(text), "tvm").run({"0": torch.tensor([1.0, 2.0])})
        return [float(x) for x in next(iter(found.values()))]


@pytest.mark.parametrize("source", WRONG_CPP)
def test_cpp_that_does_not_compile_or_link_is_told(source: str) -> None:
    with pytest.raises(UsageError, match=WRONG_CPP[source]):
        run_cpp(("other", extend.Cpp(source, "wrong", sizes=("*n", "by"))))


AFFINE = """extern "C" void affine(
    const float *x, float *y, double by, long n, long minus, double to) {
    for (; n-- > 0;) *y++ = (minus ? -by : by) * *x++ + to;
}"""


@pytest.mark.parametrize("backend", ["tvm", "triton"])
def test_kernels_are_told_floats_and_booleans(backend: str) -> None:
    """Calls that differ in a number alone, or in the sign of nought, are no one kernel."""
    pytest.importorskip(backend)
    kernel = extend.Cpp(AFFINE, "affine", sizes=("by", "*n", "minus", "to"))
    text = "tl.where({minus} == 1, -{by}, {by}) * {0} + {to}"
    with registrations_undone():
        dsc.register_op(
            "affine(x: T[*n]; by: float, to: float = 0.5, minus: bool = false) -> T[*n]",
            extend.Traits(extend.Role.POINTWISE), example="f32[2] {by=0.5}", doc="by x + to.",
            reference=lambda x, by, to, minus: (-by if minus else by) * x + to,
            kernels={"tvm": kernel, "triton": text},
        )  # fmt: skip
        made = program_of("""graph main(%x: f32[B]) {
          %a = affine %x {by=3}
          %b = affine %x {by=-0.25, to=-1e-3, minus=true}
          %c = affine %x {by=0.0, to=-0.0}
          %d = affine %x {by=-0.0, to=-0.0}
          %e = affine %x {by=1.0, to=inf}
          return %a, %b, %c, %d, %e
        }""")
        found = compile_program(made, backend).run({"x": torch.tensor([1.0, 2.0])})
    wanted = [[3.5, 6.5], [0.249, 0.499], [0.0, 0.0], [-0.0, -0.0], [math.inf, math.inf]]
    for one, two in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(one, torch.tensor(two))
        assert torch.equal(one.signbit(), torch.tensor(two).signbit())


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("long minus, ", "has 5 parameters, and 6 are given"),
        ("double to", r"the parameter `float to`, and a double is given"),
        ("long n", r"the parameter `double n`, and no floating number is given"),
        ("", ""),
    ],
)
def test_cpp_whose_parameters_are_others_is_refused(written: str, words: str) -> None:
    pytest.importorskip("tvm")
    new = {"double to": "float to", "long n": "double n"}.get(written, "")
    kernel = extend.Cpp(
        AFFINE.replace(written, new) if written else AFFINE,
        "affine", sizes=("by", "*n", "minus", "to"),
    )  # fmt: skip
    with registrations_undone():
        dsc.register_op(
            "affine(x: T[*n]; by: float, to: float = 0.5, minus: bool = false) -> T[*n]",
            extend.Traits(extend.Role.OTHER), example="f32[2] {by=0.5}", doc="by x + to.",
            reference=lambda x, by, to, minus: x, kernels={"tvm": kernel},
        )  # fmt: skip
        text = "graph main(%x: f32[B]) { %y = affine %x {by=3.0}\n return %y }"
        said = get("tvm").supports(parse_program(text).entries["main"].nodes[0])
    assert isinstance(said, No) == bool(words)
    assert not isinstance(said, No) or re.search(words, said.reason)


def test_cpp_takes_no_name_that_others_have() -> None:
    twice = [("one", extend.Cpp(TIMES % "by", "by", sizes=("*n", "by")))]
    twice += [("two", extend.Cpp(" " + TIMES % "by", "by", sizes=("*n", "by")))]
    with pytest.raises(UsageError, match=r"(?s)does not link.*multiple definition of .by"):
        run_cpp(*twice)
    with pytest.raises(UsageError, match=r"expf in C.. is a function of the C library"):
        run_cpp(("one", extend.Cpp(TIMES % "expf", "expf", sizes=("*n", "by"))))


def test_one_text_of_cpp_may_hold_several_kernels() -> None:
    both = TIMES % "one" + TIMES % "two"
    kernels = [(n, extend.Cpp(both, n, sizes=("*n", "by"))) for n in ("one", "two")]
    assert run_cpp(*kernels) == [9.0, 18.0]


def test_cpp_is_what_it_includes_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    header = tmp_path / "times.h"
    kernel = extend.Cpp(f'#include "{header}"', "included", sizes=("*n", "by"))
    header.write_text(TIMES % "included")
    assert run_cpp(("one", kernel)) == [3.0, 6.0]
    header.write_text((TIMES % "included").replace("by *", "2 * by *"))
    assert run_cpp(("one", kernel)) == [6.0, 12.0]


KERNEL = "def times(x, y, width, by, BLOCK: tl.constexpr):\n    tl.store(y, tl.load(x))"
REFUSED = {
    "a block of a size that varies": ("f32[4,B]", ("d", "by"), "wants a fixed d"),
    "a size that the kernel does not take": ("f32[B,4]", ("d", "by", "*n"), "5 parameters, and 6"),
    "what it takes": ("f32[B,4]", ("d", "by"), ""),
}


@pytest.mark.parametrize(("type", "sizes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_triton_kernel_gets_sizes_and_attributes_or_is_refused(
    type: str, sizes: tuple[str, ...], words: str
) -> None:
    from dsc.backends.triton.program import lower_program

    kernel = extend.Triton(KERNEL, "times", sizes, grid=("*n",), blocks={"BLOCK": "d"})
    with registrations_undone():
        dsc.register_op(
            "times(x: T[*n, d]; by: float) -> T[*n, d]", extend.Traits(extend.Role.OTHER),
            reference=lambda x, by: by * x, doc="by x.", example="f32[2,3] {by=0.5}",
            kernels={"triton": kernel},
        )  # fmt: skip
        made = parse_program(f"graph main(%x: {type}) {{ %y = times %x {{by=0.5}}\n return %y }}")
        said = get("triton").supports(made.entries["main"].nodes[0])
        if words:
            assert isinstance(said, No)
            assert words in said.reason
            return
        (found,) = lower_program(made, "interpret", True)[0].kernels.values()
    assert found.constants == {"width": 4, "by": 0.5, "BLOCK": 4}


def test_a_pass_from_outside_runs_and_says_what_it_needs(package: ModuleType) -> None:
    class Doubled(extend.Pass):
        needs = frozenset({extend.Stage.OPTIMIZED})

        def run(self, program: Program, report: PassReport) -> Program:
            return program

    canonical = program_of(TEXT, Stage.CANONICAL)
    with pytest.raises(UsageError, match="takes a program at stage OPTIMIZED"):
        extend.apply(canonical, [Doubled()])
    assert extend.apply(canonical.at(Stage.OPTIMIZED), [Doubled()]).stage is Stage.OPTIMIZED


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """What packages name under the group, as if they were installed."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(extensions, "entry_points", lambda group: found)
    extensions.load_extensions.cache_clear()
    yield found
    extensions.load_extensions.cache_clear()


def test_an_installed_package_is_imported_when_an_operator_is_unknown(
    installed: list[EntryPoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "an_extension.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(EntryPoint("mine", "an_extension", extensions.GROUP))
    declarations.lookup("relu")
    assert "an_extension" not in sys.modules
    with pytest.raises(declarations.TypeMismatch, match="unknown operator frobnicate"):
        declarations.lookup("frobnicate")
    del sys.modules["an_extension"]


def test_a_package_that_cannot_be_imported_is_named(installed: list[EntryPoint]) -> None:
    installed.append(EntryPoint("mine", "no_such_module", extensions.GROUP))
    with pytest.raises(UsageError, match=r"mine \(no_such_module\) cannot be imported"):
        declarations.lookup("frobnicate")
