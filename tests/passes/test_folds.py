"""Folding: what depends on constants, and what has no elements, becomes what; and what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsc.ir.graph import Graph
from dsc.ir.interpreter import Interpreter
from dsc.ir.printer import print_node
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.verifier import verify
from dsc.ir.weights import Source, evaluate
from dsc.passes.fold_constants import FoldConstants
from dsc.passes.fold_empty import FoldEmpty
from dsc.rewrite.base import PassReport
from tests.rewrite.harness import program_of


def main(program: Program) -> Graph:
    return program.entries["main"]


def folded(body: str, more: str = "", **options: int) -> tuple[Program, PassReport]:
    """The program of one graph after folding its constants."""
    report = PassReport()
    stage = Stage.TRACED if "scatter" in body else Stage.OPTIMIZED
    program = program_of(f"graph main(%x: f32[B,2]{more}) {{\n{body}\n}}", stage)
    verify(program)
    after = FoldConstants(**options).run(program, report)  # type: ignore[arg-type]
    verify(after)
    assert (after is program) == (not report.fired)
    return after, report


RANGE = "%r = arange {start=0, end=2, dtype=f32}\n"
EXP = RANGE + "%e = exp %r\n"
FULL = "%f = full {shape=[], value=16.0, dtype=f32}\n"
USED = "%y = mul %x, %e\n return %y"
TENSORS: dict[str, tuple[str, list[str]]] = {
    "of a range": (EXP + USED, ["mul %x, @constant.e"]),
    "of what is folded": (EXP + "%g = neg %e\n%y = mul %x, %g\n return %y",
                          ["mul %x, @constant.g"]),
    "read twice": (EXP + "%y = mul %x, %e\n %z = add %y, %e\n return %z",
                   ["mul %x, @constant.e", "add %y, @constant.e"]),
    "computed twice": (EXP + "%g = exp %r\n%y = mul %x, %e\n %z = add %y, %g\n return %z",
                       ["mul %x, @constant.e", "add %y, @constant.e"]),
    "returned": (EXP + "%y = neg %x\n return %e, %y", ["neg %x"]),
    "a view of what is folded": (EXP + "%g = reshape %e {shape=[1,2]}\n%y = mul %x, %g\n return %y",
                                 ["mul %x, @constant.g"]),
    "a number": (FULL + "%e = sqrt %f\n" + USED,
                 ["full {dtype=f32, shape=[], value=4.0}", "mul %x, %e"]),
    "a scatter": (
        "%z = full {shape=[2], value=0.0, dtype=f32}\n%i = arange {start=0, end=2, dtype=i64}\n"
        "%o = full {shape=[2], value=3.0, dtype=f32}\n%e = scatter %z, %i, %o {axis=0}\n" + USED,
        ["mul %x, @constant.e"],
    ),
    "a cast of a range": (
        "%r = arange {start=0, end=2, dtype=i64}\n%e = cast %r {dtype=f32}\n" + USED, []
    ),
    "a view of a fill": (FULL + "%e = expand %f {shape=[1,2]}\n" + USED, []),
    "two results": (EXP.replace("end=2", "end=4").replace("%e =", "%g =")
                    + "%e, %h = split %g {sizes=[2,2]}\n" + USED,
                    ["split @constant.g {sizes=[2,2]}", "mul %x, %e"]),
    "a symbol in its type": (
        "%r = arange {start=0, end=B, dtype=f32}\n%f = exp %r\n%e = reshape %f {shape=[B,1]}\n"
        + USED, [],
    ),
    "a symbol in where it starts": (
        EXP.replace("start=0, end=2", "start=B, end=B+2") + USED, []
    ),
    "of an input": ("%e = exp %x\n" + USED, []),
    "what ranks say": (EXP.replace("%e =", "%g =") + "%e = all_reduce %g {ranks=2}\n" + USED,
                       ["all_reduce @constant.g {ranks=2}", "mul %x, %e"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_what_depends_on_constants_alone_is_computed_once(name: str) -> None:
    body, lines = TENSORS[name]
    after, _ = folded(body)
    found = [print_node(n).partition(" = ")[2].partition(" : ")[0] for n in main(after).nodes]
    if not lines:
        assert not after.weights
        return
    assert found == lines
    for key, expr in after.weights.items():
        assert key.startswith("constant.")
        assert evaluate(expr, after.source).shape == expr.type.shape


def test_at_most_so_many_elements_are_folded() -> None:
    assert folded(EXP + USED, limit=2)[1].fired == {"folded": 1}
    assert not folded(EXP + USED, limit=1)[1].fired
    assert FoldConstants().limit == 4 * 1024 * 1024


def test_weights_are_folded_where_that_is_asked_for() -> None:
    body = "%t = permute @w {dims=[1,0]}\n%y = linear %x, %t\n%z = linear %x, @w\n return %y, %z"
    assert not folded(body, ", @w: f32[2,2]")[1].fired
    after, _ = folded(body, ", @w: f32[2,2]", weights=True)
    assert [str(n.operands[1]) for n in main(after).nodes] == ["@w.permute", "@w"]
    w = evaluate(after.weights["w"], after.source)
    assert torch.equal(evaluate(after.weights["w.permute"], after.source), w.T)
    one, _ = folded("%e = neg @w\n" + USED, ", @w: f32[1]", weights=True)
    assert list(one.weights) == ["w", "w.neg"], "the number is not known before the weights are"


def test_a_name_that_is_taken_is_left_to_its_weight() -> None:
    program = program_of(f"graph main(%x: f32[B,2]) {{\n{EXP}{USED}\n}}")
    own = {"constant.e": Source("constant.e", TensorType(DType.f32, (3,)))}
    after = FoldConstants().run(replace(program, weights=own), PassReport())
    assert list(after.weights) == ["constant.e", "constant.e_1"]
    assert str(main(after).nodes[0].operands[1]) == "@constant.e_1"
    assert after.weights["constant.e"] == own["constant.e"]


def test_entries_share_a_constant() -> None:
    program = program_of(f"graph main(%x: f32[B,2]) {{\n{EXP}{USED}\n}}")
    other = program_of("graph main(%x: f32[B,2]) {\n" + (EXP + USED).replace("%e", "%k") + "\n}")
    both = replace(program, entries={"one": main(program), "two": main(other)})
    after = FoldConstants().run(both, PassReport())
    assert list(after.weights) == ["constant.e"]
    assert {str(g.nodes[0].operands[1]) for g in after.entries.values()} == {"@constant.e"}


@pytest.mark.parametrize(("added", "held"), [(0, True), (1, False), (2, True), (3, False)])
def test_a_number_that_fp64_does_not_hold_stays_a_tensor(added: int, held: bool) -> None:
    """From 2**53 on it holds every second integer."""
    body = f"""%a = full {{shape=[], value=9007199254740992.0, dtype=i64}}
      %b = full {{shape=[], value={added}.0, dtype=i64}}
      %c = add %a, %b
      return %c"""
    after, _ = folded(body)
    (found,) = Interpreter(after).run("main", {"x": torch.zeros(1, 2)}).values()
    assert int(found) == 2**53 + added
    assert bool(after.weights) == (not held)


def test_a_cache_of_constants_stays_what_it_is() -> None:
    body = "%y = append @c, @r, @n\n return %y"
    more = ", @c: f32[2,4,3], @r: f32[2,1,3], @n: i64[2]"
    assert not folded(body, more, weights=True)[1].fired


# --- nothing --------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[str, list[str], dict[str, int]]] = {
    "a result": ("%y = neg %e", ["full %y 0.0"], {"neg": 1}),
    "a sum": ("%y = sum %e {axes=[0]}", ["full %y 0.0"], {"sum": 1}),
    "a mean": ("%y = mean %e {axes=[0]}", ["full %y nan"], {"mean": 1}),
    "a product of matrices": ("%y = matmul %t, %e", ["full %y 0.0"], {"matmul": 1}),
    "a linear": ("%y = linear %t, @w", ["full %y 0.0"], {"linear": 1}),
    "a linear with a bias": ("%y = linear %t, @w, @b", ["expand %y @b"], {"linear": 1}),
    "one part": ("%y = concat %e, %x {axis=0}", ["concat %y %x"], {"concat": 1}),
    "one part of three": (
        "%y = concat %x, %e, %x {axis=0}", ["concat %y %x %x"], {"concat": 1}
    ),
    "all parts": ("%y = concat %e, %e {axis=0}", ["full %y 0.0"], {"concat": 1}),
    "a part split off": (
        "%a, %y, %b = split %x {axis=0, sizes=[0,2,0]}",
        ["split %y %x", "full %a 0.0", "full %b 0.0"], {"split": 1},
    ),
    "a part split off between others": (
        "%y, %a, %b = split %x {axis=1, sizes=[1,0,3]}", ["split %y %x", "full %a 0.0"],
        {"split": 1},
    ),
    "a split of nothing": (
        "%y, %a = split %e {axis=1, sizes=[1,3]}", ["full %y 0.0", "full %a 0.0"], {"split": 1}
    ),
    "a part written": (
        "%y = slice_scatter %x, %e {axis=0, start=1, end=1}", ["reshape %y %x"],
        {"slice_scatter": 1},
    ),
    "a scatter": ("%y = scatter %x, %i, %e {axis=0}", ["reshape %y %x"], {"scatter": 1}),
    "a fill": ("%y = full {shape=[0,2], value=7.0, dtype=f32}", ["full %y 7.0"], {}),
    "a cache": ("%y = cache_write %c, %o, %n", ["cache_write %y %c %o %n"], {}),
    "rows looked up": ("%y = take %x, %k {axis=0}", ["full %y 0.0"], {"take": 1}),
    "something beside it": ("%u = neg %e\n%y = neg %x", ["full %u 0.0", "neg %y %x"], {"neg": 1}),
}  # fmt: skip
HEAD = """%x: f32[2,4], %e: f32[0,4], %t: f32[3,0], %i: i64[0,4], %k: i64[0], %c: f32[2,5,3],
  %o: f32[2,0,3], %n: i64[2], @w: f32[2,0], @b: f32[2]"""


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_computed_where_there_is_nothing(name: str) -> None:
    line, lines, fired = EMPTY[name]
    before = program_of(f"graph main({HEAD}) {{\n{line}\n return %y }}", Stage.TRACED)
    report = PassReport()
    after = FoldEmpty().run(before, report)
    verify(after)
    shown = [
        " ".join(
            [n.op, str(n.outputs[0]), *map(str, n.operands)]
            + ([str(n.attrs["value"])] if n.op == "full" else [])
        )
        for n in main(after).nodes
    ]
    assert (shown, report.fired) == (lines, fired)
    assert (after is before) == (not fired)
    inputs = {
        v.name: torch.ones([int(str(d)) for d in v.type.shape], dtype=v.type.dtype.torch)
        for v in main(before).inputs
    }
    wanted, found = (Interpreter(p).run("main", inputs)["y"] for p in (before, after))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_has_no_neutral_value_is_left_as_it_is() -> None:
    before = program_of("graph main(%x: f32[3,0,2]) {\n%y = amax %x {axes=[1]}\n return %y }")
    after = FoldEmpty().run(before, PassReport())
    assert [n.op for n in main(after).nodes] == ["amax"]
