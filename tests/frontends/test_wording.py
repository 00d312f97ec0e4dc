"""What Dynamo says, in the user's words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from dsc.frontends.wording import condition, input_name, same_object, told_inputs, unchanged


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("L['x'].size()[0] == 4", "x.shape[0] == 4"),
        ("0/1: L['x'].stride()[12] == G['y']  # at f.py:3", "x.stride(12) == y"),
        ("L['self']._modules['a']._parameters['w']._buffers['b']", "self.a.w.b"),
        ("G['__import_a_dot_b'].f == 1", "a.b.f == 1"),
        ("  a   ==\tb\nand the stack", "a == b"),
    ],
)
def test_a_condition_is_told_by_the_users_names(text: str, told: str) -> None:
    assert condition(text) == told


def test_hooks_are_the_modules() -> None:
    assert unchanged("L['m']._modules['a']._forward_hooks") == "m.a is unchanged"
    assert unchanged("L['m'].hooks_of_mine") == "m.hooks_of_mine is unchanged"


@pytest.mark.parametrize(
    ("guard", "pair"),
    [
        ("x is y", ("x", "y")), ("x is not y", None), ("x is None", None), ("x is Nonesuch",
        ("x", "Nonesuch")), ("x is y or z", None), ("x == y", None),
    ],
)  # fmt: skip
def test_two_names_of_one_object(guard: str, pair: tuple[str, str] | None) -> None:
    assert same_object(guard) == pair


def placeholder(source: str, value: Any = None) -> fx.Node:
    node = fx.Graph().placeholder("arg0")
    node.meta["grapharg"] = SimpleNamespace(source=SimpleNamespace(name=source))
    node.meta["example_value"] = value
    return node


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['x']", "x"), ("L['self']._modules['a']._parameters['w']", "a.w"), ("L['self']", "self"),
        ("L['fn'].weight", "weight"), ("L['model'].w", "model.w"), ("L[\"x\"].y", "x.y"),
        ("", "arg0"),
    ],
)  # fmt: skip
def test_an_input_is_called_by_its_path(source: str, name: str) -> None:
    assert input_name(placeholder(source)) == name


def test_inputs_are_told_with_their_types_and_sizes_only_once() -> None:
    x = torch.empty(2, 3, dtype=torch.bfloat16)
    inputs = [placeholder("L['x']", x), placeholder("L['x'].size()[0]", 2),
              placeholder("L['n']", 7)]  # fmt: skip
    assert told_inputs(inputs, {}) == ("x bfloat16[2, 3]", "n 7")
    assert told_inputs(inputs, {"2": "x.shape[0]", "3": "m"}) == ("x bfloat16[any, m]", "n 7")
