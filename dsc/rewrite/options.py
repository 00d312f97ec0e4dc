"""Passes as text: names, each with the options that are not its defaults.

    raise_rope,append_cache_in_place{slack=64},fuse{level=1,limits=tvm}

What runs is told in this form (dumps, reports, lines that reproduce a failure), and the form reads
back as the same passes. A value is a whole number, true or false, a word, or words in brackets:
`[decode,prefill]`. An option that says what a backend's kernels take is the backend's name. Passes
are separated by commas or lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from dsc.errors import UsageError, one_of

T = TypeVar("T")
SYNTAX = "pass,pass{option=value,option=[word,word]}"
_PASS = re.compile(r"[\s,]*(?P<name>\w+)[ \t]*(?:\{(?P<options>[^{}]*)\}[ \t]*)?(?:[,\n]|$)")
_OPTION = re.compile(r"\s*(?P<name>\w+)\s*=\s*(?P<value>\[[^\[\]]*\]|[^\s,\[\]]+)\s*(?:,|$)")
_NOTHING = re.compile(r"[\s,]*$")
_UNNAMED = "unnamed"

Words = Mapping[str, str]
"""The options of one pass as they are written, by name."""
Abilities = Callable[[str, str], object]
"""`ability(backend, member)`: what a backend of this name says of itself in its capabilities."""


def option(default: T, among: Iterable[Any] = (), least: int | None = None, of: str = "") -> T:
    """A field of a pass that is restricted: to values, by a least one, or a backend's to say.

    `of` names the member of a backend's capabilities whose value the option takes. A `field` with
    such metadata is an option as well.
    """
    made: T = field(default=default, metadata={"among": tuple(among), "least": least, "of": of})
    return made


@dataclass(frozen=True)
class Option:
    """An option of a pass. `kind` is `int`, `bool`, `str`, or `tuple` for words in brackets."""

    name: str
    kind: type
    default: Any
    among: tuple[Any, ...] = ()
    least: int | None = None
    of: str = ""

    @property
    def allowed(self) -> str:
        """What it may be, in words."""
        if self.of:
            return "a backend's name"
        if self.kind is bool:
            return "true or false"
        if self.kind is tuple:
            return f"in brackets, a list of {', '.join(self.among) or 'names'}"
        if self.among:
            return f"one of {', '.join(map(str, self.among))}"
        if self.kind is int:
            return "a whole number" + ("" if self.least is None else f", at least {self.least}")
        return "a word"

    def __str__(self) -> str:
        """The option with its default and what it may be.

        >>> print(Option("level", int, 3, (0, 1, 2, 3)))
        level=3 (one of 0, 1, 2, 3)
        """
        usual = "" if self.default is None or self.of else f"={_word(self.default)}"
        return f"{self.name}{usual} ({self.allowed})"

    def admits(self, value: Any) -> bool:
        """Whether it may have this value."""
        if self.of or value is None:
            return value == self.default or bool(self.of)
        if self.kind is tuple:
            words = isinstance(value, tuple) and all(isinstance(x, str) for x in value)
            return words and (not self.among or set(value) <= set(self.among))
        if type(value) is not self.kind or (self.among and value not in self.among):
            return False
        return not isinstance(value, int) or self.least is None or value >= self.least

    def read(self, word: str, ability: Abilities) -> Any:
        """The value that a word stands for; the word itself where it is none of this kind."""
        if self.of:
            return ability(word, self.of)
        if self.kind is bool:
            return {"true": True, "false": False}.get(word, word)
        if self.kind is int:
            return int(word) if re.fullmatch(r"-?[0-9]{1,18}", word) else word
        if self.kind is tuple and word.startswith("["):
            return tuple(x.strip() for x in word[1:-1].split(",") if x.strip())
        return word


def options_of(kind: type) -> Mapping[str, Option]:
    """The options of a class of passes, by name. Raises `TypeError` for one without a text form."""
    hints = get_type_hints(kind)
    return {f.name: _option(kind, f, hints[f.name]) for f in fields(kind)}


def _option(kind: type, f: Field[Any], hint: Any) -> Option:
    known = [a for a in get_args(hint) if a is not type(None)]
    plain = get_origin(hint) or hint
    if plain not in (int, bool, str, tuple) and known:
        plain = get_origin(known[0]) or known[0]
    if plain not in (int, bool, str, tuple) and not f.metadata.get("of"):
        raise TypeError(f"option {f.name} of {kind.__name__} has no text form")
    usual = f.default if f.default_factory is MISSING else f.default_factory()
    return Option(f.name, plain, usual, **f.metadata)


def check_values(each: Any) -> None:
    """Raise `UsageError` for an option of a pass whose value it may not have."""
    for known in options_of(type(each)).values():
        value = getattr(each, known.name)
        if not known.admits(value):
            raise UsageError(
                f"{each.name}: {known.name} is {_word(value)}",
                hint=f"{known.name} of {each.name} is {known.allowed}",
            )


def text_of(each: Any) -> str:
    """A pass as text: its name, and the options that are not the defaults."""
    given = [
        f"{known.name}={_word(value)}"
        for known in options_of(type(each)).values()
        if (value := getattr(each, known.name)) != known.default
    ]
    return f"{each.name}{{{','.join(given)}}}" if given else str(each.name)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value) if isinstance(value, int | str) else str(value.of or _UNNAMED)


def read_calls(text: str) -> Iterator[tuple[str, Words]]:
    """The names of passes in a text, each with its options. Raises `UsageError` with the place."""
    at = 0
    while not _NOTHING.match(text, at):
        found = _PASS.match(text, at)
        if found is None:
            raise UsageError(
                f"passes cannot be read from {text[at:]!r} on", hint=f"write them as {SYNTAX}"
            )
        yield found["name"], _words(found["name"], found["options"] or "")
        at = found.end()


def _words(name: str, text: str) -> Words:
    words: dict[str, str] = {}
    at = 0
    while not _NOTHING.match(text, at):
        found = _OPTION.match(text, at)
        if found is None or found["name"] in words:
            wrong = "stands twice" if found else "cannot be read"
            raise UsageError(
                f"{name}: {text[at:].strip()!r} {wrong}", hint=f"write options as {SYNTAX}"
            )
        words[found["name"]] = found["value"]
        at = found.end()
    return words


def made(kind: type[T], name: str, words: Words, ability: Abilities) -> T:
    """A pass with the options that are written. Raises `UsageError`: which, and what is allowed."""
    known = options_of(kind)
    for word in words:
        if word not in known:
            hint = one_of(word, known) if known else "write its name alone"
            raise UsageError(f"{name} has no option {word!r}", hint=hint)
    values: dict[str, Any] = {}
    for key, word in words.items():
        try:
            values[key] = known[key].read(word, ability)
        except UsageError as problem:
            raise UsageError(
                f"{name}: {key} is {word}: {problem.what}", hint=problem.hint
            ) from None
    return kind(**values)
