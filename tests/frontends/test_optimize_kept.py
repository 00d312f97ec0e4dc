"""Functions that were compiled before: found again, and never in the place of another."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dsc
from dsc import kept
from dsc.errors import UsageError
from dsc.frontends.calls import KIND, Calls, kind_of
from dsc.hardware import Gpu

WIDTH = 3
SOURCE = """\
import torch
import torch.nn.functional as F
import settings

SCALE = 0.5

def helper(x, bias=1.0):
    return x * SCALE + bias

def made(shift):
    def function(x, y, power=2):
        z = helper(x.transpose(0, 1) @ torch.softmax(y, -1)) + shift
        return {"z": F.silu(z) * settings.GAIN, "pair": (x, [z ** power, None, 3])}
    return function
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def module(source: str = SOURCE, gain: float = 1.5) -> Any:
    """The module of a source text, as if its file had been imported anew."""
    sys.modules["settings"] = settings = ModuleType("settings")
    settings.__dict__["GAIN"] = gain
    made: Any = ModuleType("user")
    exec(compile(source, "user.py", "exec"), made.__dict__)
    return made


def calls_of(function: Any) -> Calls:
    found: Calls = function.dsc_calls
    return found


def called(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bool, Any]:
    """Whether a first call finds kept code, and its result, which is that of eager PyTorch."""
    function = dsc.optimize(backend="reference")(plain)
    result = function(*args, **kwargs)
    torch.testing.assert_close(result, plain(*args, **kwargs))
    return bool(calls_of(function).known), result


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), torch.randn(3, 5, generator=generator)


def test_a_first_call_finds_what_was_compiled_and_gives_the_same_bits() -> None:
    x, y = arguments()
    made, first = called(module().made(0.25), x, y)
    found, second = called(module().made(0.25), x, y)
    assert (made, found) == (False, True)
    assert second["pair"][0] is x
    assert list(second) == ["z", "pair"]
    assert torch.equal(first["z"], second["z"])
    assert torch.equal(first["pair"][1][0], second["pair"][1][0])


def test_another_function_or_call_is_never_answered_by_kept_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = arguments()
    called(module().made(0.25), x, y)

    def hit(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        return called(plain, *(args or (x, y)), **kwargs)[0]

    def changed(old: str, new: str) -> Any:
        assert old in SOURCE
        return module(SOURCE.replace(old, new)).made(0.25)

    assert not hit(module().made(0.75)), "a cell of the closure"
    assert not hit(module(gain=2.5).made(0.25)), "an attribute of a module"
    assert not hit(changed("SCALE = 0.5", "SCALE = 0.25")), "a global"
    assert not hit(changed("* SCALE +", "- SCALE +")), "a function that is called"
    assert not hit(changed("bias=1.0", "bias=2.0")), "a default of a function that is called"
    assert not hit(changed("power=2", "power=3")), "a default"
    assert not hit(changed("F.silu", "F.gelu")), "a function of torch"
    assert not hit(module().made(0.25), x, y, power=3), "a number"
    assert not hit(module().made(0.25), x.double(), y.double()), "element types"
    assert not hit(module().made(0.25), x[:, :1], y), "a size"
    assert not hit(module().made(0.25), x.T.contiguous().T, y), "strides"
    assert not hit(module().made(0.25), x[:, :3], x[:, :3]), "other sizes"
    with torch.no_grad():
        assert not hit(module().made(0.25)), "the grad mode"
    assert is_kept(module().made(0.25), x, y)
    softmax, times, silu = torch.softmax, Tensor.__mul__, torch.nn.functional.silu
    for place, name, other in (
        (torch, "softmax", lambda x, dim: softmax(x, dim) * 2),
        (torch, "softmax", torch.log_softmax),
        (torch.nn.functional, "silu", lambda x: silu(x) + 1),
        (torch.nn.functional, "handle_torch_function", print),
        (Tensor, "__mul__", lambda a, b: times(a, b) + 1),
        (Tensor, "transpose", Tensor.swapaxes),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, other)
            assert not is_kept(module().made(0.25), x, y), f"another {name}"
    monkeypatch.setattr(kept, "_packages", lambda: ["torch-0.dist-info"])
    assert not is_kept(module().made(0.25), x, y), "a package"


def is_kept(plain: Callable[..., Any], *args: Any) -> bool:
    """Whether code is kept for a call, which is not made."""
    from dsc.frontends.calls import kind_of

    calls = calls_of(dsc.optimize(backend="reference")(plain))
    sought = calls._sought(kind_of(args, {}))
    return sought is not None and sought.load() is not None


def test_code_in_use_is_left_as_soon_as_something_changes() -> None:
    x, y = arguments()
    called(module().made(0.25), x, y)
    user = module()
    plain = user.made(0.25)
    function = dsc.optimize(backend="reference")(plain)
    function(x, y)
    assert calls_of(function).known
    for change in (
        lambda: user.__dict__.update(SCALE=3.0),
        lambda: sys.modules["settings"].__dict__.update(GAIN=-1.0),
        lambda: user.helper.__setattr__("__defaults__", (5.0,)),
        lambda: user.__dict__.update(helper=lambda x: x - 1),
    ):
        change()
        torch.testing.assert_close(function(x, y), plain(x, y))
    wider = torch.randn(3, 7)
    torch.testing.assert_close(function(wider, y), plain(wider, y))


def test_code_of_triton_is_kept_for_the_gpus_that_it_was_made_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = []
    for backend, cards in itertools.product(("triton", "tvm"), ([], [Gpu("a", "cuda:sm_90", 1)])):
        monkeypatch.setattr("dsc.frontends.calls.gpus", lambda cards=cards: cards)
        found = calls_of(dsc.optimize(backend=backend)(module().made(0.25)))
        sought = found._sought(kind_of(arguments(), {}))
        assert sought is not None
        keys.append(json.dumps(sought.key))
    assert keys[0] != keys[1]
    assert keys[2] == keys[3]


def test_what_cannot_be_told_by_value_is_not_kept() -> None:
    x = torch.ones(4)
    box = SimpleNamespace(scale=2.0)
    numbers, weight = [2.0], torch.ones(4)

    def object_(x: Tensor) -> Tensor:
        scale: float = box.scale
        return x * scale

    def list_(x: Tensor) -> Tensor:
        return x * numbers[0]

    def tensor(x: Tensor) -> Tensor:
        return x + weight

    def hidden(x: Tensor) -> Tensor:
        width: int = calls_of.__globals__["WIDTH"]
        return x * width

    def in_place(x: Tensor) -> Tensor:
        return x.add_(1)

    def drawn(x: Tensor) -> Tensor:
        return x + torch.rand(())

    def view(x: Tensor) -> Tensor:
        return x.view(2, 2)

    for plain in (object_, list_, tensor, hidden, in_place, drawn, view):
        dsc.optimize(backend="reference", fallback="eager")(plain)(x.clone())
    dsc.optimize(backend="reference")(lambda x: x * 2)(x.clone().requires_grad_())
    dsc.optimize(backend="reference")(lambda x, sizes: x * sizes[0])(x, [2])
    assert not [e for e in kept.entries() if e.kind == KIND]


def test_errors_are_those_of_code_that_was_just_compiled() -> None:
    rows, table = torch.tensor([0, 2]), torch.randn(3, 4)

    def looked_up(table: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.embedding(rows, table) * 2

    for _ in range(2):
        function = dsc.optimize(backend="reference")(looked_up)
        function(table, rows)
        with pytest.raises(UsageError, match="holds 0 to 3") as raised:
            function(table, torch.tensor([0, 3]))
        assert "rows" in str(raised.value)
    assert calls_of(function).known


def test_a_report_of_kept_code_says_what_was_captured() -> None:
    x, y = arguments()
    reports = []
    for _ in range(2):
        torch._dynamo.reset()
        function = dsc.optimize(backend="reference")(module().made(0.25))
        function(x, y)
        reports.append(dsc.explain(function))
    made, found = (r.graphs[0] for r in reports)
    assert (made.inputs, made.operations) == (found.inputs, found.operations)
    assert made.regions[0].operators == found.regions[0].operators
    assert reports[0].guards == reports[1].guards
    function(torch.randn(3, 9), y)
    function(torch.randn(3, 6), y)
    assert len(dsc.explain(function).graphs) == 2, "sizes of kept code count as seen"


PROGRAM = """\
import json, sys, torch, dsc
@dsc.optimize(memory_reuse=True, fusion_level=3)
def attention_layer(q, k, v):
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v
q = torch.linspace(-1, 1, 2 * 2 * 8 * 16).reshape(2, 2, 8, 16)
print(json.dumps([attention_layer(q, q, q).tolist(), "torch._dynamo" in sys.modules]))
"""


def test_a_new_process_runs_kept_code_without_dynamo(tmp_path: Path) -> None:
    file = tmp_path / "programs" / "attention.py"  # beside the cache, whose folder is called dsc
    file.parent.mkdir()
    file.write_text(PROGRAM)
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(file)], capture_output=True, text=True, check=True, env=os.environ
        )
        told.append(json.loads(done.stdout))
    (made, captured), (found, again) = told
    assert (captured, again) == (True, False)
    assert made == found
