"""What tells calls and functions apart, without a capture: arguments, results, what is reached."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dsc
from dsc.frontends import calls, reach
from dsc.frontends.dynamo import _reason_for_eager
from dsc.frontends.fingerprint import Unknown
from dsc.frontends.options import Options
from dsc.frontends.reach import Reach, holds

X = torch.zeros(2, 3)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own quantised tensors will go
    QUANTISED = torch._empty_affine_quantized((2,), scale=1.0, zero_point=0, dtype=torch.qint8)


def marked() -> Tensor:
    found: Any = torch.zeros(2)
    found.note = "mine"
    return found  # type: ignore[no-any-return]


ODD: dict[str, tuple[Any, str]] = {
    "sparse": (torch.zeros(2, 2).to_sparse(), "sparse or quantised"),
    "quantised": (QUANTISED, "sparse or quantised"),
    "negated": (torch.zeros(2, dtype=torch.complex64).conj().imag, "negated or conjugated"),
    "conjugated": (torch.zeros(2, dtype=torch.complex64).conj(), "negated or conjugated"),
    "elsewhere": (torch.zeros(2, device="meta"), "neither on the CPU nor"),
    "gradients": (torch.zeros(2).requires_grad_(), "require gradients (call it under"),
}  # fmt: skip
"""Tensors that are not compiled for, and what is said of them."""


@pytest.mark.parametrize("name", ODD)
def test_inputs_that_nothing_is_compiled_for_are_told_apart(name: str) -> None:
    odd, words = ODD[name]
    with torch.enable_grad():
        for inputs in ([odd], [X, 3, odd], [odd, X]):
            assert words in _reason_for_eager(inputs, Options())
        assert _reason_for_eager([X, 3], Options()) == _reason_for_eager([], Options()) == ""
        assert calls.kind_of((X, odd), {}) is None
        assert calls.kind_of((X,), {"odd": odd}) is None
    with torch.no_grad():
        assert bool(_reason_for_eager([odd], Options())) == (name != "gradients")


def test_a_kind_of_call_is_what_capture_sees_of_its_arguments() -> None:
    y = torch.zeros(3, 2, dtype=torch.int32).t()
    given = calls.kind_of((1.0, X, y, X, "s"), {"k": None, "x": X})
    x = (1, torch.float32, (2, 3), (3, 1), False)
    assert given == (
        (("float", "1.0"), x, (2, torch.int32, (2, 3), (1, 2), False), x, ("str", "'s'"),
         ("NoneType", "None"), x), 5, ("k", "x"),
    )  # fmt: skip
    with torch.inference_mode():
        ((inside,), count, names) = calls.kind_of((torch.zeros(2, 3),), {})
    assert (inside, count, names) == ((0, *x[1:4], True), 1, ())
    others: list[Any] = [[1], nn.Parameter(X, False), marked(), torch.zeros, {}]
    for other in others:
        assert calls.kind_of((other,), {}) is None


def test_a_call_within_a_mode_or_a_transform_is_like_no_other() -> None:
    class Dispatch(TorchDispatchMode):
        pass

    class Function(TorchFunctionMode):
        pass

    assert calls.kind_of((3,), {}) is not None
    for mode in (Dispatch(), Function()):  # type: ignore[no-untyped-call]
        with mode:
            assert calls.kind_of((3,), {}) is None
    seen = []

    def inside(x: Tensor) -> Tensor:
        seen.append(calls.kind_of((3,), {}))
        return x

    torch.vmap(inside)(X)
    with torch._dynamo.set_stance("force_eager"):
        assert calls.kind_of((3,), {}) is None
    assert seen == [None]
    assert calls.kind_of((3,), {}) is not None


def test_settings_of_captures_that_somebody_changed_are_seen() -> None:
    assert not calls._configured()
    config: Any = torch._dynamo.config
    with config.patch(assume_static_by_default=not config.assume_static_by_default):
        assert calls._configured()
    with config.patch(assume_static_by_default=config.assume_static_by_default):
        assert not calls._configured()


def test_variables_that_speak_to_dsc_and_torch_are_of_the_key_but_for_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = calls._environment()
    for name in ("DSC_Z", "TORCH_Z", "TORCH_CACHE_Z", "MY_DSC_Z", "DSCACHE"):
        monkeypatch.setenv(name, "1")
    found = calls._environment()
    assert {k: v for k, v in found.items() if k not in before} == {"DSC_Z": "1", "TORCH_Z": "1"}


def test_a_result_is_told_as_data_and_built_again() -> None:
    made, leaves = [torch.ones(1), torch.ones(2)], [7, X, torch.ones(3)]
    result = {"a": (made[1], [leaves[1], 3, None, "t", 0.5, True]), "b": leaves[2], "c": made[0]}
    tree = calls._tree(result, made, leaves, [])
    assert tree == ["dict", [
        ["a", ["tuple", [["output", 1], ["list", [["argument", 1], *(
            ["constant", each] for each in (3, None, "t", 0.5, True))]]]]],
        ["b", ["argument", 2]], ["c", ["output", 0]],
    ]]  # fmt: skip
    again = calls._built(tree, made, leaves)
    assert list(again) == ["a", "b", "c"]
    assert (type(again["a"]), type(again["a"][1])) == (tuple, list)
    assert again["a"][0] is made[1]
    assert again["a"][1][0] is X
    assert again["a"][1][1:] == [3, None, "t", 0.5, True]
    assert again["b"] is leaves[2]


def test_a_result_that_is_no_tree_of_what_is_known_is_not_kept() -> None:
    part: list[int] = []
    for value, words in (
        ([part, part], "a container that stands in a result twice"),
        ({1: 2}, "a result of type dict"),
        ({2, 3}, "a result of type set"),
        ([torch.ones(1)], "an input that is no argument"),
    ):
        with pytest.raises(Unknown, match=f"^{words}$"):
            calls._tree(value, [], [1, X], [])


# --- what a function reaches ----------------------------------------------------------------------


def function(body: str, **space: Any) -> Any:
    """The function `f` of a text, among globals."""
    names: dict[str, Any] = {"torch": torch, "math": math, "dsc": dsc, **space}
    exec(compile(body, "user.py", "exec"), names)
    return names["f"]


FOLLOWED = [
    "def f(x): return x + 1",
    "def f(x): return x - 1",
    "def f(x, y=1): return x + 1",
    "def f(x, y=2): return x + 1",
    "def f(x, y=(1, 2)): return x + 1",
    "def f(x, y=((1, 2),)): return x + 1",
    "def f(x, *, y=1): return x + 1",
    "def f(x, *, y=2): return x + 1",
    "def f(x, *, z=1): return x + 1",
    "G = 1\ndef f(x): return x + G",
    "G = 2\ndef f(x): return x + G",
    "G = 1.0\ndef f(x): return x + G",
    "G = torch.float32\ndef f(x): return x + G",
    "def f(x): return x + math.pi",
    "def f(x): return x + math.sqrt(2)",
    "def f(x): return x + torch.pi",
    "def f(x): return torch.exp(x)",
    "def f(x): return torch.ops.aten.exp.default(x)",
    "def f(x): return torch.ops.aten.exp(x)",
    "def f(x): return torch.nn.functional.silu(x)",
    "def f(x): return torch.nn.functional.relu(x)",
    "def f(x): return len(x)",
    "def f(x): return max(x)",
    "def f(x): return int(x)",
    "def f(x): raise ValueError",
    "def f(x): return isinstance(x, torch.Tensor)",
    "def g(x): return x\ndef f(x): return g(x)",
    "def g(x): return -x\ndef f(x): return g(x)",
    "def g(x): return g(x)\ndef f(x): return g(x)",
    "def f(x): return [y + 1 for y in x]",
    "def o(n):\n    def f(x): return x + n\n    return f\nf = o(3)",
    "def o(n):\n    def f(x): return x + n\n    return f\nf = o(4)",
    "def f(x):\n    y = x\n    return (lambda: y)()",
    "def f(x): return x\nf.note = 1",
    "def f(x): return x\nf.note = 2",
    "def f(x): return x.exp()",
    "def o(m):\n    def f(x): return x + m.pi\n    return f\nf = o(math)",
    "def f(x): return dsc.softmax(x, dim=-1)",
    "def f(x): return dsc.silu(x)",
]


def test_functions_that_compute_with_something_else_have_other_digests() -> None:
    digests = {body: Reach(function(body)).digest for body in FOLLOWED}
    same: dict[str, list[str]] = {}
    for body, digest in digests.items():
        same.setdefault(digest, []).append(body)
        assert Reach(function(body)).digest == digest
    assert [bodies for bodies in same.values() if len(bodies) > 1] == []


UNTOLD = {
    "def f(x):\n    global G\n    G = x": "STORE_GLOBAL G",
    "def f(x): x.a = 1": "STORE_ATTR a",
    "def f(x):\n    import os": "IMPORT_NAME os",
    "def o(n):\n    def f(x):\n        nonlocal n\n        n = x\n    return f\nf = o(1)":
        "STORE_DEREF n",
    "def o(n):\n    def f(x):\n        def h():\n            nonlocal n\n            n = x\n"
    "        return h\n    return f\nf = o(1)": "STORE_DEREF n",
    "def o(n):\n    def f(x): return n\n    del n\n    return f\nf = o(1)": "n is not there",
    "def f(x): return x.grad": "the attribute grad",
    "def f(x): return x.__dict__": "the attribute __dict__",
    "def f(x): return len(math)": "the module math as a value",
    "def f(x): return nope": "nope is not there",
    "def f(x): return math.nope": "math.nope is not there",
    "G = [1]\ndef f(x): return G": "a value of type list",
    "G = (1, [1])\ndef f(x): return G": "a value of type list",
    "def f(x): return print(x)": "a value of type builtin_function_or_method",
    "def f(x): return [].append(G)\nG = [].append": "a value of type builtin_function_or_method",
    "def f(x): return object()": "a value of type type",
    "class E(ValueError): pass\ndef f(x): raise E": "a value of type type",
    "class int: pass\ndef f(x): return int()": "a value of type type",
    "def f(x): return torch.ops.quantized.add(x)": "quantized::add",
    "def f(x): return torch.ops.quantized.add.default(x)": "quantized::add",
    "G = []\ndef g(x): return G\ng.__module__ = 'dsc.frontends.ops'\ndef f(x): return g(x)":
        "a value of type list",
    "def f(x, y=[]): return x": "a value of type list",
    "def f(x, *, y=[]): return x": "a value of type list",
    "def f(x): return x\nf.note = []": "a value of type list",
    "def g(x): return x.data_ptr()\ndef f(x): return [g(y) for y in x]": "the attribute data_ptr",
}  # fmt: skip


@pytest.mark.parametrize("body", UNTOLD)
def test_what_cannot_be_told_by_value_is_named(body: str) -> None:
    with pytest.raises(Unknown) as caught:
        Reach(function(body))
    assert str(caught.value) == UNTOLD[body]


def test_so_many_functions_are_walked_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = "\n".join(f"def f{i}(x): return f{i + 1}(x)" for i in range(4))
    body = chain + "\ndef f4(x): return x\nf = f0"
    monkeypatch.setattr(reach, "MOST", 4)
    assert Reach(function(body)).digest
    monkeypatch.setattr(reach, "MOST", 3)
    with pytest.raises(Unknown, match=r"^it reaches too many functions$"):
        Reach(function(body))


def test_operators_that_somebody_added_may_be_meant_by_any(monkeypatch: pytest.MonkeyPatch) -> None:
    f = function("def f(x): return torch.ops.aten.exp.default(x)")
    monkeypatch.setattr(reach, "added", lambda: True)
    with pytest.raises(Unknown, match=r"^aten::exp$"):
        Reach(f)


BODY = """
G = 1000
def g(x, y=3, *, z=4): return x + G
def f(x): return g(x.exp()) + math.pi
f.note = 5
"""


def changes(space: dict[str, Any]) -> Mapping[str, Callable[[], Any]]:
    return {
        "a global": lambda: space.update(G=1001),
        "an equal global": lambda: space.update(G=int("1000")),
        "no global": lambda: space.pop("G"),
        "a function": lambda: space.update(g=lambda x: x),
        "code": lambda: setattr(space["g"], "__code__", (lambda x: x).__code__),
        "defaults": lambda: setattr(space["g"], "__defaults__", (9,)),
        "a keyword's default": lambda: space["g"].__kwdefaults__.update(z=8),
        "no defaults of keywords": lambda: setattr(space["g"], "__kwdefaults__", None),
        "an attribute": lambda: space["f"].__dict__.update(note=6),
        "no attribute": lambda: space["f"].__dict__.clear(),
    }


@pytest.mark.parametrize("name", changes({}))
def test_whether_all_is_there_as_it_was_is_seen_by_identity(name: str) -> None:
    f = function(BODY)
    watches = Reach(f).watches
    assert holds(watches)
    changes(f.__globals__)[name]()
    assert not holds(watches)
