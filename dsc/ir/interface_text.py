"""The text form of a program's interface, as it is printed and as it is read back.

interface {
  limits {max_batch=4, max_context=4096, prefill_chunk=512}
  mesh {ranks=2, parallel="tp+ep"}
  guard decode {step=1}
  guard prefill {}
  state %past.0.latent as "present.0.latent" : bf16[512] {storage="paged", rows=64}
}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from dsc.ir.interface import Guard, Interface, Mesh, State, Storage
from dsc.ir.limits import Limits

if TYPE_CHECKING:
    from dsc.ir.lexer import Token
    from dsc.ir.parser import _Parser


def print_interface(interface: Interface) -> list[str]:
    """The lines of an interface; none where it says nothing."""
    lines = list(_lines(interface))
    return ["interface {", *(f"  {line}" for line in lines), "}"] if lines else []


def _lines(interface: Interface) -> Iterator[str]:
    if interface.limits is not None:
        yield f"limits {_braced(asdict(interface.limits))}"
    if interface.mesh != Mesh():
        yield f"mesh {_braced(asdict(interface.mesh))}"
    for guard in interface.guards:
        bounds = {k: n for k, n in asdict(guard).items() if k != "entry"}
        yield f"guard {guard.entry} {_braced(bounds)}"
    for state in interface.states:
        stored = _braced({"storage": str(state.storage), "rows": state.rows or None})
        yield f"state %{state.input} as {json.dumps(state.output)} : {state.type} {stored}"


def _braced(values: dict[str, Any]) -> str:
    given = (f"{k}={json.dumps(v)}" for k, v in values.items() if v is not None)
    return "{" + ", ".join(given) + "}"


def parse_interface(parser: _Parser) -> Interface:
    """Read an interface. Raises `ParseError`."""
    parser.word("interface")
    parser.sign("{")
    found = Interface()
    while not parser.skip("}"):
        at = parser.take("word", "limits, mesh, guard or state")
        match at.text:
            case "limits":
                found = replace(found, limits=_read(parser, at, Limits))
            case "mesh":
                found = replace(found, mesh=_read(parser, at, Mesh))
            case "guard":
                entry = parser.take("word", "the name of an entry").text
                guard = _read(parser, at, Guard, entry=entry)
                found = replace(found, guards=(*found.guards, guard))
            case "state":
                found = replace(found, states=(*found.states, _state(parser, at)))
            case _:
                raise parser.error(f"limits, mesh, guard or state expected, {at.text} found", at)
    return found


def _state(parser: _Parser, at: Token) -> State:
    name = parser.take("value", "an input").text[1:]
    parser.word("as")
    output = parser.string()
    parser.sign(":")
    row = parser.tensor_type()
    found: State = _read(parser, at, State, input=name, output=output, type=row)
    if found.storage not in list(Storage):
        raise parser.error(f"storage is one of {', '.join(Storage)}", at)
    return replace(found, storage=Storage(found.storage))


def _read(parser: _Parser, at: Token, kind: Any, **given: Any) -> Any:
    """A part with the values that follow in braces: words, and numbers of at least 0."""
    values = parser.attributes()
    wrong = [k for k, v in values.items() if not isinstance(v, str) and (type(v) is not int)]
    try:
        if wrong:
            raise TypeError(f"{wrong[0]} is no number")
        return kind(**given, **values)
    except TypeError as problem:
        raise parser.error(f"{at.text}: {problem}", at) from None
