"""Products of codes by NEON, in an emulator, against their numbers in fp64 (`test_tvm_codes`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("tvm")

from dsc.backends.tvm.kernels import cpp
from dsc.backends.tvm.machine import cpu_of, machine_for
from dsc.errors import BackendUnavailable
from dsc.targets import parse_target
from tests.backends.coded_products import ROWS, bound, exact, inputs, program
from tests.backends.elsewhere import Elsewhere
from tests.backends.test_tvm_codes import CASES


@pytest.mark.parametrize(
    ("cpu", "dots", "numbers"), [("neoverse-n1", "sdot", (12, 1)), ("cortex-a72", "adds", (7,))]
)
def test_neon_multiplies_codes(
    cpu: str, dots: str, numbers: tuple[int, ...], tmp_path: Path
) -> None:
    """The emulated CPU refuses instructions that it has not got."""
    cases = [CASES[number] for number in numbers]
    made = program(cases)
    run = Elsewhere(made, cpu, tmp_path)
    assert machine_for(parse_target(f"cpu:{cpu}")).dots == dots
    given = [(case, rows, inputs(case, rows)) for case in cases for rows in ROWS]
    calls = [(f"g_{case.name}", x) for case, _, x in given]
    one, two = (run.run(calls, tasks) for tasks in (1, 2))
    for (case, _, x), got, again in zip(given, one, two, strict=True):
        wanted, terms = exact(case, made, x)
        assert bool(((got["y"].double() - wanted).abs() <= bound(case, wanted, terms)).all())
        assert torch.equal(got["y"], again["y"])


def test_another_architecture_needs_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    triple = cpu_of("neoverse-n1" if cpu_of("znver4").triple == "" else "znver4").triple
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(BackendUnavailable, match=f"no C.. compiler for {triple}") as told:
        cpp.compiler(triple)
    assert f"apt install g++-{triple.replace('_', '-')}" in str(told.value.hint)
