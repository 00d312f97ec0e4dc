"""Programmatic dependent launch: a kernel is made ready while the one before it still runs.

On sm_90 and later a launch may be allowed to begin before the former one is done: its programs are
placed as soon as all of that one's have begun and multiprocessors have room, and wait there. So the
time between two short kernels, of which a decode step has hundreds, is that of a wait and not of a
launch (CUDA C++ programming guide, "Programmatic Dependent Launch").

Each kernel says two things before all else: that the next one may come, and that it waits for the
former. Since all wait, and nobody reads or writes memory before, what any earlier launch wrote is
there, and nobody overwrites what an earlier one still reads.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from dsc.backends.triton.launch import Kernel
from dsc.targets import Target

FIRST = 90
"""The least architecture that has it."""
SAID = ("_cuda.gdc_launch_dependents()", "_cuda.gdc_wait()")
IMPORT = "from triton.language.extra import cuda as _cuda\n"
"""Behind the module's own text, which may call `triton.language` as it likes."""


def takes(target: Target) -> bool:
    """Whether kernels of a target may begin before the former is done."""
    return target.kind == "cuda" and int(target.arch.removeprefix("sm_")) >= FIRST


def as_compiled(
    sources: Mapping[str, str], kernels: Iterable[Kernel], target: Target
) -> Mapping[str, str]:
    """The sources by module as kernels of a target are made of: they wait where it takes that."""
    return waiting(sources, kernels) if takes(target) else sources


def waiting(sources: Mapping[str, str], kernels: Iterable[Kernel]) -> dict[str, str]:
    """The sources by module, in which each of the kernels waits for the launch before its own."""
    found, named = dict(sources), {(k.module, k.function) for k in kernels}
    for module, function in sorted(named):
        found[module] = _waiting(found[module], function)
    for module in {module for module, _ in named}:
        found[module] += f"\n{IMPORT}"
    return found


def _waiting(text: str, function: str) -> str:
    """A module's text with both lines at the begin of a function."""
    (body,) = (
        statement.body
        for statement in ast.parse(text).body
        if isinstance(statement, ast.FunctionDef) and statement.name == function
    )
    begins = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    at = (body[0].end_lineno or 0) if begins else body[0].lineno - 1
    lines = text.splitlines(keepends=True)
    indent = " " * body[0].col_offset
    return "".join([*lines[:at], *(f"{indent}{line}\n" for line in SAID), *lines[at:]])
