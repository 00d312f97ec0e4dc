"""The Relax VM form: its functions give the reference's logits, through TVM's virtual machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsc
from dsc.cli import main
from dsc.errors import UsageError
from tests.backends.canonical_lm import Sizes, canonical_lm
from tests.runtime.test_session import small_lm

pytest.importorskip("tvm")

LIMITS = {"max_batch": 2, "max_context": 48, "prefill_chunk": 24}
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny-v3"
RELAX = {"form": "relax"}


def test_a_session_over_the_vm_gives_the_logits_of_the_reference() -> None:
    """Dense and MoE layers; prefill, extend and decode of two sequences."""
    program = canonical_lm(Sizes(), 2, 48)
    ids = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for backend, extra in (("reference", {}), ("tvm", RELAX)):
        model = dsc.compile(program, backend=backend, backend_options=extra, **LIMITS)  # type: ignore[arg-type]
        session = model.session()
        rows = [session.prefill(ids, lengths=[30, 11]), session.prefill(ids[:, :2])]
        rows += [session.decode(ids[:, i]) for i in range(3)]
        found.append(torch.stack(rows))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-5)


def test_the_functions_take_tensors_and_weights(tmp_path: Path) -> None:
    """As a TVM user calls them: no dsc between the virtual machine and the library."""
    import tvm
    import tvm_ffi
    from safetensors.torch import load_file
    from tvm import relax

    model = dsc.compile(
        small_lm(), backend="tvm", backend_options=RELAX, max_batch=1, max_context=16
    )
    folder = model.save(tmp_path / "out")
    weights = load_file(folder / "weights" / "model.safetensors")
    vm = relax.VirtualMachine(
        tvm.runtime.load_module(str(folder / "relax" / "model.so")), tvm.cpu()
    )
    whole = torch.zeros(1, 1, dtype=torch.int64)
    caches = [torch.zeros(1, 20, 6), torch.zeros(1, 20, 4)]
    given = [torch.tensor([[5]]), whole, torch.zeros(1, dtype=torch.int64), whole, *caches]
    parameters = [
        tvm_ffi.from_dlpack(weights[name]) for name in dsc.load(folder).manifest["meta"]["weights"]
    ]
    found = vm["decode"](*map(tvm_ffi.from_dlpack, given), *parameters)
    reference = dsc.compile(small_lm(), backend="reference", max_context=16)
    wanted = reference.session().prefill([[5]])
    torch.testing.assert_close(
        torch.utils.dlpack.from_dlpack(found[0])[:, 0], wanted, rtol=0, atol=1e-5
    )
    assert bool(caches[0][0, 0].any())  # updated in place
    assert not bool(caches[0][0, 1:].any())


def test_export_writes_it_and_it_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(TINY), "--format", "relax", "--max-context", "64", "-o", str(out)]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--max-batch", "1", "--prefill-chunk", "32"])
    assert not end.value.code
    assert (out / "relax" / "model.so").is_file()
    ids = [[3, 1, 4, 1, 5, 9, 2, 6]]
    ours = dsc.load(out).session().prefill(ids)
    wanted = dsc.compile(TINY, backend="reference", max_context=64).session().prefill(ids)
    scale = float(wanted.float().abs().max())
    assert float((ours.float() - wanted.float()).abs().max()) < 0.05 * scale


def test_pages_are_refused() -> None:
    with pytest.raises(UsageError, match="Relax form takes no caches in pages"):
        dsc.compile(small_lm(), backend="tvm", cache="paged", backend_options=RELAX)


def test_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="Relax form is for one rank"):
        dsc.compile(TINY, backend="tvm", ranks=2, backend_options=RELAX)


def test_check_is_for_onnx(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", str(TINY), "--format", "relax", "--check"])
    assert end.value.code == 2
    assert "--check is for ONNX" in capsys.readouterr().err
