"""Triton's kernels given memory that nobody has written, and NaN and infinity among their numbers.

A case of each template, of each kind of generated kernel, and of products and caches in codes, all
traced: buffers are NaN until they are stored to and lie between guards, programs run in two orders,
and every load and store is looked at (`dsc.backends.triton.access`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
import torch

from dsc.backends.triton.access import TracedExecutable
from dsc.ir.program import Program
from tests.backends.test_triton_kernels import CASES, COMPILED
from tests.backends.test_triton_merged import traced
from tests.backends.triton_cases import program_of
from tests.backends.triton_coded import expected, inputs, loaded, program
from tests.backends.triton_coded_cases import CASES as CODED

pytest.importorskip("triton")

Tensors = Mapping[str, torch.Tensor]
EVERY = bool(os.environ.get("DSC_EXHAUSTIVE"))
WRONG = (float("nan"), float("inf"), -float("inf"))
OPTIONS = {"sample": ("x1",)}
"""Operands of numbers that are no data, by operator: wrong ones are refused before."""
SKIPS = ("attention", "attention_4", "latent", "mla", "absorbed", "expanded", "flash", "pages_abs")
"""Cases whose reference multiplies by zero what a query does not see; kernels never read it."""
TEMPLATES = tuple(name for name in COMPILED if "large" not in name)
IN_CODES = (
    "i4_zeros", "f8_bf16", "k_nibbles", "rows_f8", "rows_f8_many", "rows_i4_many", "rows_i8",
    "experts_rows", "experts_i4", "grouped_rows_f8_many", "grouped_i4", "absorbed_f8",
    "expanded_i8", "pages_absorbed_f8", "write_i8", "norm", "swiglu", "gated", "halves", "flash",
    "table_f8",
)  # fmt: skip


def poisoned(given: Tensors, options: tuple[str, ...] = ()) -> Iterator[dict[str, torch.Tensor]]:
    """The operands with one number in one of them that is none: in each where asked for all."""
    floats = [k for k, x in given.items() if x.is_floating_point() and x.numel()]
    floats = [k for k in floats if k not in options]
    if not floats:
        yield {name: x.clone() for name, x in given.items()}
    sample = sum(x.numel() for x in given.values())
    for at, name in enumerate(floats):
        if not EVERY and at != sample % len(floats):
            continue
        made = {key: x.clone() for key, x in given.items()}
        place = torch.randint(made[name].numel(), (1,), generator=torch.Generator().manual_seed(at))
        made[name].view(-1)[place] = WRONG[at % len(WRONG)]
        yield made


def agree(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Numbers are those of the reference, and what is none there is none here."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted)
        return
    numbers, ours, theirs = wanted.isfinite(), found.float(), wanted.float()
    off = (ours - theirs)[numbers].abs()
    largest = theirs[numbers].abs().max() if numbers.any() else torch.tensor(1.0)
    narrow = wanted.dtype in (torch.bfloat16, torch.float16)
    assert (off <= (2**-6 if narrow else 2**-14) * largest.clamp(min=1)).all()
    if not name.startswith(SKIPS):
        assert not ours[~numbers].isfinite().any()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TracedExecutable]:
    made = program_of({name: CASES[name] for name in TEMPLATES})
    executable = traced(made, tmp_path_factory.mktemp("poisoned"), "interpret")
    yield executable
    executable.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_no_number_stays_where_it_is(watched: TracedExecutable, name: str) -> None:
    case = CASES[name]
    for given in poisoned(case.inputs, OPTIONS.get(case.op, ())):
        kept = {key: x.clone() for key, x in given.items()}
        wanted = case.given(kept)
        watched.faults.clear()
        found = watched.run(name, given).values()
        assert watched.faults == []
        if case.op == "route" and any(x.isnan().any() for x in kept.values()):
            (index, _), experts = found, kept["x1"].shape[0]
            assert ((index >= 0) & (index < experts)).all()  # which of several NaN comes first
            assert (index.sort(-1).values.diff(dim=-1) > 0).all()
            continue
        for ours, theirs in zip(found, wanted, strict=True):
            agree(name, ours, theirs)


@pytest.fixture(scope="module")
def in_codes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Program, TracedExecutable]]:
    made, folder = program({name: CODED[name] for name in IN_CODES}), tmp_path_factory.mktemp("c")
    loaded(made, folder).close()
    out = folder / "out"
    executable = TracedExecutable(out / "triton", out / "weights" / "model.safetensors", made)
    yield made, executable
    executable.close()


@pytest.mark.parametrize("name", IN_CODES)
def test_what_is_no_number_stays_where_it_is_beside_codes(
    in_codes: tuple[Program, TracedExecutable], name: str
) -> None:
    made, executable = in_codes
    for given in poisoned(inputs(CODED[name])):
        wanted = expected(made, name, {key: x.clone() for key, x in given.items()})
        executable.faults.clear()
        (found,) = executable.run(name, given).values()
        assert executable.faults == []
        agree(name, found, wanted)
