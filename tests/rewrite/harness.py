"""The evidence that every rule and pass carries, and how it is checked.

A rule's examples must each fire once, verify, and compute the same before and after; an error of
three times the rule's tolerance must be noticed. Its near-misses must not fire. A pass shows
itself in its docstring: the blocks *Before* and *After* hold IR that is parsed, run and compared.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsc.ir.graph import Value
from dsc.ir.parser import parse_graph, parse_program
from dsc.ir.printer import print_graph, print_program
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.verifier import verify
from dsc.ir.weights import evaluate, random_source, sources
from dsc.rewrite.base import EXACT, Pass, PassReport
from dsc.rewrite.driver import sweep
from dsc.rewrite.rule import Rule
from dsc.rewrite.verify import relative_difference, same_bits

if TYPE_CHECKING:
    import torch

SIZES = {"B": 2, "S": 3, "P": 4, "L": 2, "T": 7, "N": 6}
"""Sizes that symbols take when an example is run; others take 3."""

Sample = Callable[[Value, Mapping[str, int], int], Any]


class EvidenceFailed(AssertionError):
    """An example, a near-miss or a docstring that does not hold."""


def program_of(text: str, stage: Stage = Stage.TRACED) -> Program:
    """A program of one entry from a text, a graph or the whole; its sources have random values."""
    program = parse_program(text, stages=(stage,))
    (graph,) = program.entries.values()
    found = {s.key: s.type for expr in program.weights.values() for s in sources(expr)}
    return replace(program, entries={"main": graph}, source=random_source(found))


def check_rule(rule: Rule) -> None:
    """Run all of a rule's evidence. Raises `EvidenceFailed` with the reason."""
    if not rule.examples or not rule.near_misses:
        raise EvidenceFailed(f"{rule.name} has no examples or no near-misses")
    for example in rule.examples:
        _check_example(rule, example)
    for why, example in rule.near_misses.items():
        _check_near_miss(rule, why, example)


def fire(rule: Rule, text: str) -> tuple[Program, Program, PassReport]:
    """An example before and after one sweep of a rule, and the report."""
    before = program_of(text)
    verify(before)
    report = PassReport()
    after = sweep(before, rule, report)
    verify(after)
    return before, after, report


def _check_example(rule: Rule, text: str) -> None:
    before, after, report = fire(rule, text)
    if report.fired != {rule.name: 1}:
        why = "; ".join(reason for _, _, reason in report.missed) or "nothing matched"
        raise EvidenceFailed(f"{rule.name} fired {report.fired}, not once ({why}):\n{text}")
    for seed in range(2):
        wanted = run_example(before, rule.sample, seed)
        found = run_example(after, rule.sample, seed)
        difference = compare(wanted, found, rule.tolerance)
        if difference:
            shown = print_graph(after.entries["main"])
            raise EvidenceFailed(f"{rule.name}: {difference}:\n{text}\nafter:\n{shown}")
        if not compare(wanted, _perturbed(found, rule.tolerance), rule.tolerance):
            raise EvidenceFailed(f"{rule.name}: an error of 3 x its tolerance goes unnoticed")


def _check_near_miss(rule: Rule, why: str, text: str) -> None:
    before, after, report = fire(rule, text)
    if after is not before or report.fired:
        raise EvidenceFailed(f"{rule.name} fires although {why}:\n{text}")


def run_example(program: Program, sample: Sample, seed: int) -> dict[str, torch.Tensor]:
    """The results of an example's graph on seeded inputs."""
    from dsc.ir.interpreter import run_graph

    graph = program.entries["main"]
    names = sorted({s for v in graph.values() for s in v.type.symbols})
    env = {name: SIZES.get(name, 3) for name in names}
    concrete = graph.substitute(env)
    inputs = [sample(v, env, seed) for v in concrete.inputs]
    outputs = run_graph(
        concrete, inputs, lambda name: evaluate(program.weights[name], program.source)
    )
    return dict(zip(graph.output_names, outputs, strict=True))


def compare(
    wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], tolerance: float
) -> str:
    """How results differ beyond a tolerance; empty when they do not. 0 compares bit for bit."""
    for name, a in wanted.items():
        b = found[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name} is {b.dtype} {tuple(b.shape)}, {a.dtype} {tuple(a.shape)} before"
        if tolerance == EXACT or not a.is_floating_point():
            if not same_bits(a, b):
                return f"{name} is not equal bit for bit"
        elif not (error := relative_difference(a, b)) <= tolerance:
            return f"{name} is off by {error:.3g}, {tolerance:.3g} allowed"
    return ""


def _perturbed(found: Mapping[str, torch.Tensor], tolerance: float) -> dict[str, torch.Tensor]:
    """The results with one element off by three tolerances, or by the smallest step when exact."""
    import torch

    out = {name: t.clone().contiguous() for name, t in found.items()}
    for tensor in out.values():
        if not tensor.numel():
            continue
        flat = tensor.view(-1)
        if not tensor.is_floating_point():
            flat[0] = ~flat[0] if tensor.dtype == torch.bool else flat[0] + 1
            continue
        step = 3 * tolerance * max(1.0, tensor.abs().max().item())
        moved = flat[0] + step
        if moved == flat[0]:  # exact, or a step that this element type rounds away
            moved = torch.nextafter(flat[0], torch.tensor(float("inf"), dtype=tensor.dtype))
        flat[0] = moved
    return out


def doc_block(doc: str, name: str) -> str:
    """One block of a pass's docstring: `Before` and what is indented under it."""
    found = re.search(rf"^{name}\b *(.*(?:\n(?:[ \t]+.*|[ \t]*))*)", doc, re.MULTILINE)
    if found is None:
        raise EvidenceFailed(f"no block {name!r}")
    return inspect.cleandoc(found[1])


def check_docstring(each: Pass, stage: Stage = Stage.TRACED) -> None:
    """Parse *Before* in a pass's docstring, run the pass and compare with *After*."""
    doc = inspect.getdoc(inspect.getmodule(type(each))) or ""
    before = program_of(doc_block(doc, "Before"), stage)
    check_golden(each, before, doc_block(doc, "After"))


def check_golden(each: Pass, before: Program, wanted: str) -> None:
    """Run a pass on a program and compare what a text shows with it, an entry or all of it."""
    verify(before)
    after = each.run(before, PassReport())
    verify(after)
    if wanted.startswith("program"):
        found, normal = print_program(after), print_program(parse_program(wanted))
    else:
        shown = parse_graph(wanted)
        found, normal = print_graph(after.entries[shown.name]), print_graph(shown)
    if found != normal:
        raise EvidenceFailed(f"{each.name} gives\n{found}\nand not\n{normal}")
