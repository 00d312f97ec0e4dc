"""Operator declarations: one declaration, four consumers.

`op(signature, traits, reference=…, doc=…, example=…)` states an operator's operands, attributes and
result types in one line, and by its traits what passes and plans may know of it. The printer and
parser take attribute kinds from it, the verifier its types, the interpreter its reference. A
signature reads

    rms_norm(x: F[*n, d], weight: F[d]; eps: float) -> F[*n, d]

Element types are concrete (`f32`), variables (`T`, or `F` for floats alone) or `any`; dims are
names, integers, `*names` for any number of axes, or, in results, expressions over names and integer
attributes (`p+s`). `?` marks an optional operand, `...` after a type a variadic one. What a
signature cannot say is said by `infer`.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dsc.ir import stored
from dsc.ir.calls import Call
from dsc.ir.dims import Dim, Sym, evaluate, free_symbols, parse_dim, substitute
from dsc.ir.formats import Packed
from dsc.ir.graph import Attrs, Operand
from dsc.ir.kinds import KIND_WORDS, KINDS, is_dim, is_exact
from dsc.ir.traits import Role, Traits, Within
from dsc.ir.types import DType, TensorType

MOST_KNOWN = 4096
"""Calls of an operator whose result types are remembered."""

InferFn = Callable[[Sequence[Any], Mapping[str, Any]], tuple[TensorType, ...]]


class TypeMismatch(Exception):
    """Operands or attributes do not fit an operator's signature."""


@dataclass(frozen=True, slots=True)
class TypePattern:
    """`T[*n, d]`: an element type or variable, and dims to match."""

    dtype: str
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.dims)}]"


@dataclass(frozen=True, slots=True)
class OperandDef:
    """One declared operand."""

    name: str
    pattern: TypePattern
    optional: bool = False
    variadic: bool = False


@dataclass(frozen=True, slots=True)
class AttrDef:
    """One declared attribute: its kind and its default (`None`: required)."""

    name: str
    kind: str
    default: Any = None


@dataclass(frozen=True, slots=True)
class OpDef:
    """A declared operator. `reference` is plain torch on CPU: the meaning of the operator.

    `aliases` maps a result index to the operand index that it updates in place; `example` gives
    operand types and attributes in text form, from which the tests build one call. `within` says
    which values operands that are indices may have, by name, and `gives` which values results have
    that may be indices of others, by position. `elements`: what other results hold of those of the
    first operand: "order" (all, in row-major order), "all" or "some"; empty: they are computed.
    `without` says, by optional operand, what names of the signature are where it is not given.
    `traits` say all else that passes, costs and plans may know of it. `kernels` are those that an
    operator from outside brings along, by backend (`dsc.ir.kernels`).
    """

    name: str
    operands: tuple[OperandDef, ...]
    attrs: tuple[AttrDef, ...]
    results: tuple[TypePattern, ...]
    traits: Traits
    reference: Callable[..., Any]
    doc: str
    example: str
    custom_infer: InferFn | None = None
    aliases: tuple[tuple[int, int], ...] = ()
    signature: str = ""
    within: Mapping[str, Within] = field(default_factory=dict)
    gives: Mapping[int, Within] = field(default_factory=dict)
    elements: str = ""
    without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    kernels: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[Any, tuple[TensorType, ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    @property
    def named_sizes(self) -> bool:
        """Whether every axis of the operands has a name: then 0 and 1 are sizes like others."""
        return not any(o.pattern.dims == ("...",) for o in self.operands)

    def attr(self, name: str) -> AttrDef | None:
        """The declaration of attribute `name`, or `None`."""
        return next((a for a in self.attrs if a.name == name), None)

    def with_defaults(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """`attrs` with the defaults of absent attributes filled in."""
        return {a.name: attrs.get(a.name, a.default) for a in self.attrs}

    def widened(self, attrs: Mapping[str, Any]) -> dict[str, Any]:
        """`attrs` with whole numbers given for float attributes made floats."""
        floats = {a.name for a in self.attrs if a.kind == "float"}
        whole = {k: float(v) for k, v in attrs.items() if k in floats and is_exact(v)}
        return {**attrs, **whole}

    def infer(
        self, types: Sequence[TensorType | None], attrs: Mapping[str, Any]
    ) -> tuple[TensorType, ...]:
        """The result types for operand types and attributes. Raises `TypeMismatch`."""
        key = (tuple(types), attrs) if isinstance(attrs, Attrs) else None
        if key is None or self.traits.role is Role.REGION:
            return self._told(types, attrs)
        made = self._known.get(key)  # after every pass it is asked the same of most nodes
        if made is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            made = self._known[key] = self._told(types, attrs)
        return made

    def run(self, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Any:
        """What the reference makes of operands; of those in a format it gets the numbers."""
        if any(isinstance(x, Packed) for x in operands):
            wanted = self._pad([None if x is None else type_of(x) for x in operands])
            names = self.operand_names(len(operands))
            operands = stored.operands_of(names, operands, [t for _, t in wanted], self.traits)
        return self.reference(*operands, **attrs)

    def call(
        self,
        types: Sequence[TensorType | None],
        attrs: Mapping[str, Any],
        results: Sequence[TensorType],
    ) -> Call:
        """One use of the operator under the names of its signature."""
        pairs, names = self._pad(types), self.operand_names(len(types))
        given = {n: t for n, (_, t) in zip(names, pairs, strict=False) if t is not None}
        return Call(given, self.with_defaults(attrs), tuple(results), self._bound(pairs, []))

    def index_of(self, operand: str) -> int:
        """The position of an operand. Raises `KeyError`."""
        for index, declared in enumerate(self.operands):
            if declared.name == operand:
                return index
        raise KeyError(f"{self.name} has no operand {operand}")

    def operand_names(self, count: int) -> tuple[str, ...]:
        """The names of `count` operands in order; those of a variadic one are numbered: xs[0]."""
        names = [o.name for o in self.operands]
        if self.operands and self.operands[-1].variadic:
            several = names.pop()
            names += [f"{several}[{i}]" for i in range(count - len(names))]
        return tuple(names[:count])

    def has_operand(self, name: str) -> bool:
        """Whether the signature has an operand of this name."""
        return any(o.name == name for o in self.operands)

    def _told(
        self, types: Sequence[TensorType | None], attrs: Mapping[str, Any]
    ) -> tuple[TensorType, ...]:
        try:
            return self._infer(types, attrs)
        except (ArithmeticError, LookupError, TypeError, ValueError) as problem:
            raise TypeMismatch(str(problem)) from problem

    def _infer(
        self, types: Sequence[TensorType | None], attrs: Mapping[str, Any]
    ) -> tuple[TensorType, ...]:
        self._check_attrs(attrs)
        padded = self._pad(types)
        deferred: list[tuple[str, Dim, Dim]] = []
        bound = self._bound(padded, deferred)
        for name, wanted, found in deferred:
            _check_deferred(name, wanted, found, bound)
        full = self.with_defaults(attrs)
        if self.custom_infer is not None:
            return self.custom_infer(_trim([t for _, t in padded]), full)
        scope = {**bound, **{k: v for k, v in full.items() if isinstance(v, int)}}
        made = tuple(_instantiate(pattern, scope, full) for pattern in self.results)
        return stored.with_rows([o.name for o in self.operands], types, made, self.traits)

    def _bound(
        self,
        types: Sequence[tuple[OperandDef, TensorType | None]],
        deferred: list[tuple[str, Dim, Dim]],
    ) -> dict[str, Any]:
        """What the names of the signature are; what is not a name alone goes to `deferred`."""
        bound: dict[str, Any] = {}
        for declared, given in types:
            if given is not None:
                _match(declared, given, bound, deferred)
            elif not declared.optional:
                raise TypeMismatch(f"operand {declared.name} is missing")
        for name in self.without.keys() - {d.name for d, given in types if given is not None}:
            for letter, text in self.without[name].items():
                _bind(f"without {name}", letter, substitute(_dim_expression(text), bound), bound)
        return bound

    def _pad(
        self, types: Sequence[TensorType | None]
    ) -> list[tuple[OperandDef, TensorType | None]]:
        """Operands and their types, absent ones included; of those in a format as unpacked."""
        pairs = self._pairs(types)
        if self.traits.role is Role.REGION or not any(t is not None and t.format for t in types):
            return pairs
        names, letters = [o.name for o, _ in pairs], [o.pattern.dtype for o, _ in pairs]
        plain = stored.in_numbers(names, letters, [t for _, t in pairs], self.traits)
        return [(o, t) for (o, _), t in zip(pairs, plain, strict=True)]

    def _pairs(
        self, types: Sequence[TensorType | None]
    ) -> list[tuple[OperandDef, TensorType | None]]:
        if self.operands and self.operands[-1].variadic:
            head = self.operands[:-1]
            if len(types) <= len(head):
                raise TypeMismatch(f"{len(types)} operands, at least {len(head) + 1} needed")
            rest = [(self.operands[-1], t) for t in types[len(head) :]]
            return [*zip(head, types, strict=False), *rest]
        if len(types) > len(self.operands):
            raise TypeMismatch(f"{len(types)} operands, at most {len(self.operands)} taken")
        missing = [None] * (len(self.operands) - len(types))
        return list(zip(self.operands, [*types, *missing], strict=True))

    def _check_attrs(self, attrs: Mapping[str, Any]) -> None:
        for name, value in attrs.items():
            declared = self.attr(name)
            if declared is None:
                raise TypeMismatch(f"unknown attribute {name}")
            if not KINDS[declared.kind](value):
                wanted = KIND_WORDS[declared.kind]
                raise TypeMismatch(f"attribute {name}={value!r} is not {wanted}")
        for declared in self.attrs:
            if declared.default is None and declared.name not in attrs:
                raise TypeMismatch(f"attribute {declared.name} is missing")


def type_of(x: Any) -> TensorType:
    """The type of a tensor, or of one in a format."""
    return x.type if isinstance(x, Packed) else TensorType(DType.of(x.dtype), tuple(x.shape))


def _trim(types: Sequence[TensorType | None]) -> list[TensorType | None]:
    """`types` without the absent operands at the end."""
    present = list(types)
    while present and present[-1] is None:
        present.pop()
    return present


_DTYPE_NAMES = frozenset(d.value for d in DType)


def op(
    signature: str,
    traits: Traits,
    *,
    reference: Callable[..., Any],
    doc: str,
    example: str,
    infer: InferFn | None = None,
    aliases: tuple[tuple[int, int], ...] = (),
    within: Mapping[str, Within] | None = None,
    gives: Mapping[int, Within] | None = None,
    elements: str = "",
    without: Mapping[str, Mapping[str, str]] | None = None,
    kernels: Mapping[str, Any] | None = None,
) -> OpDef:
    """Declare an operator from its signature. Raises `ValueError` on a malformed one."""
    parsed = re.fullmatch(r"(\w+)\((.*?)\)\s*->\s*(.*)", signature, re.DOTALL)
    if parsed is None:
        raise ValueError(f"malformed signature: {signature}")
    name, inside, results = parsed.groups()
    operand_text, _, attr_text = inside.partition(";")
    results = results.strip()
    if results.startswith("("):
        results = results[1:-1]
    operands = tuple(_operand(t) for t in _split(operand_text))
    attributes = tuple(_attr(t) for t in _split(attr_text))
    _check_names(name, [*(o.name for o in operands), *(a.name for a in attributes)])
    return OpDef(
        name,
        operands,
        attributes,
        tuple(_pattern(t) for t in _split(results)),
        traits,
        reference,
        doc,
        example,
        infer,
        aliases,
        " ".join(signature.split()),
        within or {},
        gives or {},
        elements,
        without or {},
        kernels or {},
    )


def _check_names(name: str, of_parts: Sequence[str]) -> None:
    for each in (name, *of_parts):
        if not each.isascii() or not each.isidentifier():
            raise ValueError(f"{each!r} is no name")
        if of_parts.count(each) > 1:
            raise ValueError(f"two operands or attributes are called {each}")


_added: dict[str, OpDef] = {}


@cache
def registry() -> Mapping[str, OpDef]:
    """All operators by name, those from outside included."""
    return ChainMap(_added, _own())


@cache
def _own() -> dict[str, OpDef]:
    from dsc.ir.ops import OPERATORS

    return dict(OPERATORS)


def added() -> Mapping[str, OpDef]:
    """The operators from outside, by name."""
    return _added


def add(definition: OpDef) -> None:
    """Add an operator from outside. Raises `ValueError` for a name that is taken."""
    known = registry().get(definition.name)
    if known is not None:
        raise ValueError(f"{definition.name} is declared already: {known.signature}")
    _added[definition.name] = definition
    defaults.cache_clear()


def lookup(name: str) -> OpDef:
    """The declaration of `name`. Raises `TypeMismatch` when there is none."""
    found = _own().get(name) or _added.get(name)  # ten times as fast as the two in a chain
    if found is None:
        from dsc.ir.extensions import load_extensions

        load_extensions()
        found = _added.get(name)
    if found is None:
        raise TypeMismatch(f"unknown operator {name}")
    return found


def kernel_of(name: str, backend: str) -> Any:
    """The kernel for a backend that operator `name` brings along, or `None`."""
    found = registry().get(name)
    return None if found is None else found.kernels.get(backend)


def brings_none(name: str, backend: str) -> str:
    """What to add to a refusal for want of a kernel: that an operator from outside may bring it."""
    return f"; its declaration brings none for {backend}" if name in _added else ""


@cache
def traits_of(name: str) -> Traits:
    """The traits of operator `name`. Raises `TypeMismatch` when there is none."""
    return lookup(name).traits


def named(*roles: Role) -> frozenset[str]:
    """The names of all operators of some roles."""
    return frozenset(name for name, found in registry().items() if found.traits.role in roles)


@cache
def operand_index(name: str, operand: str) -> int:
    """The position of an operand of operator `name`. Raises `KeyError`, `TypeMismatch`."""
    return lookup(name).index_of(operand)


@cache
def defaults(name: str) -> Mapping[str, Any]:
    """The attributes of operator `name` that have a default, and it; none for an unknown one."""
    found = registry().get(name)
    return {a.name: a.default for a in found.attrs if a.default is not None} if found else {}


def infer(
    name: str, operands: Sequence[Operand | None], attrs: Attrs | Mapping[str, Any]
) -> tuple[TensorType, ...]:
    """Result types of calling operator `name`. Raises `TypeMismatch`, naming the operator."""
    definition = lookup(name)
    try:
        return definition.infer([None if x is None else x.type for x in operands], attrs)
    except TypeMismatch as error:
        types = ", ".join("_" if x is None else str(x.type) for x in operands)
        message = f"{name}({types}): {error}; declared {definition.signature}"
        raise TypeMismatch(message) from None
    except AttributeError:
        given: list[Any] = [*operands]
        numbers = [x for x in given if isinstance(x, int | float)]
        if not numbers:
            raise
        made = f"full(shape=(), value={numbers[0]}, dtype=...)"
        raise TypeMismatch(f"{name} of {numbers[0]}: operands are values, as {made} is") from None


def range_of(within: Within, call: Call) -> tuple[Dim, Dim]:
    """The least and the largest value of an index of a call."""
    scope = {k: v for k, v in {**call.dims, **call.attrs}.items() if is_dim(v)}
    first = next(iter(call.operands.values()), None)
    if first is not None and first.rank:
        scope["extent"] = first.shape[call.attrs.get("axis", 0)]
    low, high = (substitute(_dim_expression(t), scope) for t in (within.low, within.high))
    return low, high


def _match(
    declared: OperandDef,
    given: TensorType,
    bound: dict[str, Any],
    deferred: list[tuple[str, Dim, Dim]],
) -> None:
    pattern = declared.pattern
    _match_dtype(declared.name, pattern.dtype, given, bound)
    if pattern.dims == ("...",):
        return
    dims: list[str] = list(pattern.dims)
    shape = given.shape
    star = next((i for i, d in enumerate(dims) if d.startswith("*")), None)
    if star is None and len(dims) != len(shape):
        raise TypeMismatch(f"{declared.name} is {given}, {pattern} expected")
    if star is not None:
        tail = len(dims) - star - 1
        if len(shape) < star + tail:
            raise TypeMismatch(f"{declared.name} is {given}, {pattern} expected")
        middle = shape[star : len(shape) - tail]
        _bind(declared.name, dims[star], middle, bound)
        dims = dims[:star] + dims[star + 1 :]
        shape = shape[:star] + shape[len(shape) - tail :]
    for text, found in zip(dims, shape, strict=True):
        if text.isidentifier():
            _bind(declared.name, text, found, bound)
        else:
            deferred.append((declared.name, _dim_expression(text), found))


def _match_dtype(name: str, wanted: str, given: TensorType, bound: dict[str, Any]) -> None:
    if wanted == "any":
        return
    if wanted in _DTYPE_NAMES:
        if given.dtype.value != wanted:
            raise TypeMismatch(f"{name} has element type {given.dtype}, {wanted} expected")
        return
    if wanted == "F" and not given.dtype.is_float:
        raise TypeMismatch(f"{name} has element type {given.dtype}; cast to a float type first")
    previous = bound.setdefault(f"dtype {wanted}", given.dtype)
    if previous != given.dtype:
        raise TypeMismatch(f"{name} has element type {given.dtype}, {previous} expected")


def _bind(operand: str, name: str, found: Any, bound: dict[str, Any]) -> None:
    previous = bound.setdefault(name, found)
    if previous != found:
        raise TypeMismatch(f"{operand}: {name} is {_show(found)} here and {_show(previous)} before")


def _show(dims: Any) -> str:
    return f"({', '.join(map(str, dims))})" if isinstance(dims, tuple) else str(dims)


def _check_deferred(name: str, wanted: Dim, found: Dim, bound: dict[str, Any]) -> None:
    if free_symbols(wanted) - bound.keys():
        return  # an unknown that the operator's own `infer` solves for
    value = substitute(wanted, bound)
    if value != found:
        raise TypeMismatch(f"{name}: {found} where {wanted} = {value} is expected")


def _instantiate(
    pattern: TypePattern, scope: Mapping[str, Any], attrs: Mapping[str, Any]
) -> TensorType:
    dtype = scope.get(f"dtype {pattern.dtype}")
    if dtype is None:
        given = attrs.get(pattern.dtype)
        dtype = given if isinstance(given, DType) else DType(pattern.dtype)
    shape: list[Dim] = []
    for text in pattern.dims:
        if text.startswith("*"):
            shape.extend(scope[text])
        elif text in scope:
            shape.append(scope[text])
        else:
            shape.append(substitute(_dim_expression(text), scope))
    return TensorType(dtype, tuple(shape))


@cache
def _dim_expression(text: str) -> Dim:
    return parse_dim(text)


def _split(text: str) -> list[str]:
    """Split at top-level commas."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[(") - (c in "])")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


def _pattern(text: str) -> TypePattern:
    parsed = re.fullmatch(r"(\w+)\[(.*)\]", text.strip())
    if parsed is None:
        raise ValueError(f"malformed type {text!r}")
    dims = tuple(d.replace(" ", "") for d in _split(parsed[2]))
    return TypePattern(parsed[1], dims)


def _operand(text: str) -> OperandDef:
    name, _, type_text = text.partition(":")
    type_text = type_text.strip()
    optional, variadic = type_text.endswith("?"), type_text.endswith("]...")
    type_text = type_text.removesuffix("?")
    if variadic:
        type_text = type_text.removesuffix("...")
    return OperandDef(name.strip(), _pattern(type_text), optional, variadic)


def _attr(text: str) -> AttrDef:
    name, _, rest = text.partition(":")
    kind, _, default = (part.strip() for part in rest.partition("="))
    if kind not in KINDS:
        raise ValueError(f"unknown attribute kind {kind!r}")
    return AttrDef(name.strip(), kind, _default(kind, default) if default else None)


def _default(kind: str, text: str) -> Any:
    match kind:
        case "int" | "dim" | "extent":
            return int(text)
        case "float":
            return float(text)
        case "bool":
            return text == "true"
        case "str":
            return text.strip('"')
        case "dtype":
            return DType(text)
    raise ValueError(f"no default can be written for kind {kind}")


def concrete(attrs: Mapping[str, Any], env: Mapping[str, int]) -> dict[str, Any]:
    """Attributes with every symbolic dim evaluated in `env`, ready for a reference."""

    def value(v: Any) -> Any:
        if isinstance(v, Sym):
            return evaluate(v, env)
        return tuple(value(x) for x in v) if isinstance(v, tuple) else v

    return {k: value(v) for k, v in attrs.items()}
