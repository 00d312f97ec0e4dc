"""What a function computes with, as data: equal facts mean an equal capture of equal arguments.

A function reaches constants, defaults, cells of its closure, globals and attributes of modules, and
functions, whose own reach is walked too. Every instruction that loads one of these from outside is
followed to a value that is told in full: a number, a text, an element type, code. Torch's functions
are told by their names and code, so that one that was replaced is another fact. What cannot be told
by value, as an object that may change, makes a function `Unknown`; so does an instruction that
stores outside of the function.

A `Watch` looks whether something that was loaded is still the very same object.
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, TypeAlias

import torch

from dsc.frontends.fingerprint import Unknown, code_digest, names_of
from dsc.ir.op import added

Watch: TypeAlias = tuple[Callable[[], Any], Any]
Lookup: TypeAlias = Callable[[], Any]

PLAIN = frozenset({
    type(None), bool, int, float, complex, str, bytes, type(...), range, slice, torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip
"""Types whose values never change and are told by their texts."""
_HIDDEN = frozenset(
    """
    _base _is_view _version data_ptr grad grad_fn is_leaf is_pinned is_set_to is_shared names
    retains_grad storage storage_offset storage_type untyped_storage
    """.split()
)
"""Attributes of tensors that their kind does not tell."""
MOST = 400
"""Functions that are walked at most."""
_STORES = frozenset({
    "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "LOAD_NAME", "STORE_NAME",
    "DELETE_NAME", "IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR", "LOAD_BUILD_CLASS",
    "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS", "LOAD_FROM_DICT_OR_DEREF", "LOAD_LOCALS",
})  # fmt: skip
_BUILTINS = frozenset(
    """
    abs all any bool bytes complex dict divmod enumerate filter float frozenset int isinstance len
    list map max min pow range reversed round set slice sorted str sum tuple zip
    """.split()
)
"""Builtins that look at nothing but their arguments."""
_PURE = frozenset({"math", "_operator", "torch._C._nn", "torch._C._linalg", "torch._C._special"})
"""Modules of C functions that look at nothing but their arguments."""
_TORCHS = frozenset({"torch.nn.functional", "torch.functional", "torch._jit_internal"})
"""Torch's modules of functions in Python that may be called."""
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
_OURS = "dsc.frontends.ops"
_OPERATORS = ("aten::", "prims::", "dsc::")


class Reach:
    """What a function reaches. Raises `Unknown` when made."""

    def __init__(self, function: FunctionType) -> None:
        self._facts: list[Any] = []
        self.watches: list[Watch] = []
        self._seen: dict[int, int] = {}
        self._function(function)
        for kind in torch.Tensor.__mro__[:-1]:
            self._facts += [(kind.__name__, name, _named(v)) for name, v in vars(kind).items()]

    @property
    def digest(self) -> str:
        """A hash of all facts."""
        return hashlib.sha256(json.dumps(self._facts).encode()).hexdigest()

    def _function(self, function: FunctionType) -> None:
        if self._known(function):
            return
        code = function.__code__
        self._facts.append((function.__module__, function.__qualname__, code_digest(code)))
        self.watches.append((lambda: function.__code__, code))
        self.watches.append((lambda: function.__defaults__, function.__defaults__))
        self._value(function.__defaults__)
        for name in sorted(function.__kwdefaults__ or {}):
            self._read(name, partial(_item, lambda: function.__kwdefaults__, name))
        for name in sorted(vars(function)):
            self._read(name, partial(_item, lambda: vars(function), name))
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._code(code, function, cells)

    def _known(self, function: FunctionType) -> bool:
        """Whether a function was walked before; it has a number from now on."""
        known = id(function) in self._seen
        number = self._seen.setdefault(id(function), len(self._seen))
        if number > MOST:
            raise Unknown("it reaches too many functions")
        self._facts.append(number)
        return known

    def _code(self, code: CodeType, function: FunctionType, cells: Mapping[str, Any]) -> None:
        """Every load from outside of a function, and of those that are made within it."""
        steps = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG")]
        for position, step in enumerate(steps):
            name = step.argval
            if step.opname in _STORES or (step.opname.endswith("_DEREF") and name in cells
                                          and step.opname != "LOAD_DEREF"):  # fmt: skip
                raise Unknown(f"{step.opname} {name}")
            if step.opname == "LOAD_GLOBAL":
                self._chain(name, _global(function, name), steps[position + 1 :])
            elif step.opname == "LOAD_DEREF" and name in cells:
                lookup = partial(getattr, cells[name], "cell_contents")
                self._chain(name, lookup, steps[position + 1 :])
            elif _is_attribute(step) and (name in _HIDDEN or name.startswith("__")):
                raise Unknown(f"the attribute {name}")
            elif _is_attribute(step) and hasattr(torch.Tensor, name):
                self.watches.append(
                    (partial(getattr, torch.Tensor, name), getattr(torch.Tensor, name))
                )
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                inner = {n: cells[n] for n in constant.co_freevars if n in cells}
                self._code(constant, function, inner)

    def _chain(self, name: str, lookup: Lookup, after: list[dis.Instruction]) -> None:
        """A value from outside; of a module, the attribute that is read next."""
        value = _found(name, lookup)
        for step in after:
            if not isinstance(value, ModuleType):
                break
            if not _is_attribute(step):
                raise Unknown(f"the module {name} as a value")
            name = f"{name}.{step.argval}"
            lookup = partial(_attribute, lookup, step.argval)
            value = _found(name, lookup)
        self._read(name, lookup)

    def _read(self, name: str, lookup: Lookup) -> None:
        value = _found(name, lookup)
        self._facts.append(name)
        self.watches.append((lookup, value))
        self._value(value)

    def _value(self, value: Any) -> None:
        kind = type(value)
        if kind in PLAIN:
            self._facts.append((kind.__name__, repr(value)))
        elif kind is tuple:
            self._facts.append(len(value))
            for each in value:
                self._value(each)
        elif kind is FunctionType:
            self._called(value)
        elif kind is BuiltinFunctionType and _is_pure(value):
            self._facts.append((value.__module__, value.__qualname__))
        elif kind is type and value.__name__ in _BUILTINS and _is_builtin(value):
            self._facts.append(("builtins", value.__name__))
        elif isinstance(value, type) and issubclass(value, BaseException) and _is_builtin(value):
            self._facts.append(("builtins", value.__name__))
        elif value is torch.Tensor:
            self._facts.append("torch.Tensor")
        elif isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            name = getattr(value, "_qualified_op_name", "") or str(value.name())  # type: ignore[no-untyped-call]
            if not name.startswith(_OPERATORS) or added():
                raise Unknown(name)
            self._facts.append(("operator", str(value)))
        else:
            raise Unknown(f"a value of type {kind.__qualname__}")

    def _called(self, function: FunctionType) -> None:
        """A function in Python: torch's, ours, or the user's."""
        inlined = vars(function).get("_torchdynamo_inline")
        file = function.__code__.co_filename
        if isinstance(inlined, FunctionType):  # a compiled function inside of one is its code
            self._function(inlined)
        elif function.__module__ in _TORCHS and file.startswith(_TORCH_FOLDER):
            self._torchs(function)
        elif function.__module__ == _OURS and file == _ours_file():
            self._facts.append((_OURS, function.__qualname__, code_digest(function.__code__)))
        else:
            self._function(function)

    def _torchs(self, function: FunctionType) -> None:
        """A function of torch, and those of torch that it calls by name."""
        if self._known(function):
            return
        self._facts.append((function.__qualname__, code_digest(function.__code__)))
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        names = sorted(set(names_of(function.__code__)) & function.__globals__.keys())
        for value in (*cells, *(function.__globals__[name] for name in names)):
            if type(value) is FunctionType and value.__module__ in _TORCHS:
                self._torchs(value)
            else:
                self._facts.append(repr(value) if type(value) in PLAIN else _named(value))


def holds(watches: Sequence[Watch]) -> bool:
    """Whether all that was loaded is there as it was."""
    try:
        return all(lookup() is value for lookup, value in watches)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _global(function: FunctionType, name: str) -> Lookup:
    space = function.__globals__

    def lookup() -> Any:
        return space[name] if name in space else getattr(builtins, name)

    return lookup


def _attribute(outer: Lookup, name: str) -> Any:
    return getattr(outer(), name)


def _item(outer: Lookup, name: str) -> Any:
    return outer()[name]


def _found(name: str, lookup: Lookup) -> Any:
    try:
        return lookup()
    except (AttributeError, KeyError, ValueError):
        raise Unknown(f"{name} is not there") from None


def _is_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _is_pure(function: Any) -> bool:
    """Whether a function in C looks at nothing but its arguments."""
    if function.__qualname__.startswith("_VariableFunctionsClass."):
        return True
    place = getattr(function.__self__, "__name__", "")
    if place == "builtins":
        return function.__name__ in _BUILTINS
    return isinstance(function.__self__, ModuleType) and place in _PURE


def _is_builtin(value: type) -> bool:
    return value.__module__ == "builtins" and getattr(builtins, value.__name__, None) is value


def _named(value: Any) -> tuple[str, ...]:
    """A part of torch by its kind and name, and by its code where it has some in Python."""
    function = getattr(value, "fget", value) if isinstance(value, property) else value
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", "")
    place = getattr(function, "__module__", "")
    return (
        type(value).__name__,
        str(place),
        str(name),
        code_digest(code) if code is not None else "",
    )


def _ours_file() -> str:
    from dsc.frontends import ops

    return ops.call.__code__.co_filename
