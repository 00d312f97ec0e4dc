"""What Dynamo calls things, in the user's words: `L['x'].size()[0]` is `x.shape[0]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

_EXPRESSIONS = (
    (re.compile(r"\b[LG]\['(\w+)'\]"), r"\1"),
    (re.compile(r"\._(?:modules|parameters|buffers)\['(\w+)'\]"), r".\1"),
    (re.compile(r"\.size\(\)\[(\d+)\]"), r".shape[\1]"),
    (re.compile(r"\.stride\(\)\[(\d+)\]"), r".stride(\1)"),
)
_IMPORTED = re.compile(r"\b__import_(\w+)")
_HOOKS = re.compile(r"\._\w*hooks\w*$")
_SIZE = re.compile(r"(.*)\.size\(\)\[\d+\]")
_FRAME = re.compile(r"^\d+/\d+: ")
_SAME = re.compile(r"(\S+) is (?!not\b|None\b)(\S+)")


def condition(text: str) -> str:
    """A condition or a reason, without its comment, its frame's number and the stack behind it."""
    line = text.partition("\n")[0].partition("  # ")[0]
    line = _FRAME.sub("", " ".join(line.split()))
    for pattern, put in _EXPRESSIONS:
        line = pattern.sub(put, line)
    return _IMPORTED.sub(lambda found: found[1].replace("_dot_", "."), line)


def unchanged(name: str) -> str:
    """The condition that a module is called as it was, with the hooks that it had."""
    return f"{_HOOKS.sub('', condition(name))} is unchanged"


def same_object(guard: str) -> tuple[str, str] | None:
    """Two inputs that are one object by a condition, if that is what it says."""
    found = _SAME.fullmatch(guard)
    return (found[1], found[2]) if found else None


def input_name(node: fx.Node) -> str:
    """What the user calls an input: `x`, or the path of a parameter in its model."""
    keys = re.findall(r"\[['\"](\w+)['\"]\]|\.(\w+)", _source(node))
    path = [a or b for a, b in keys if (a or b) not in ("_modules", "_parameters", "_buffers")]
    return ".".join(path[1:] if path[:1] in (["self"], ["fn"]) and path[1:] else path) or node.name


def size_names(inputs: Iterable[fx.Node]) -> dict[str, str]:
    """What the user calls each symbolic number of a captured graph: `n`, or `x.shape[0]`."""
    found: dict[str, str] = {}
    for node in inputs:
        value: Any = node.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            found.setdefault(str(value), condition(_source(node)) or node.name)
        sizes: Iterable[Any] = value.shape if isinstance(value, Tensor) else ()
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(str(size), f"{input_name(node)}.shape[{axis}]")
    return found


def told_inputs(inputs: Iterable[fx.Node], sizes: Mapping[str, str]) -> tuple[str, ...]:
    """The inputs of a captured graph: name, element type and shape, or number.

    Sizes are no inputs to a user: the first of a kind is `any`, others are told by that one.
    """
    told = []
    for node in inputs:
        value, name = node.meta.get("example_value"), input_name(node)
        if isinstance(value, Tensor):
            shape = ", ".join(
                _size(n, f"{name}.shape[{axis}]", sizes) for axis, n in enumerate(value.shape)
            )
            told.append(f"{name} {str(value.dtype).removeprefix('torch.')}[{shape}]")
        elif not _SIZE.fullmatch(_source(node)):
            told.append(f"{name} {_size(value, name, sizes)}")
    return tuple(told)


def _size(value: object, own: str, sizes: Mapping[str, str]) -> str:
    text = re.sub(r"\w+", lambda found: sizes.get(found[0], found[0]), str(value))
    return "any" if text == own else text


def _source(node: fx.Node) -> str:
    """Where Dynamo has an input from; empty where it does not say."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)
