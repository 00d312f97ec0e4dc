"""The tokens of a text, taken one by one; every error has a line, a column and a caret."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from dsc.errors import ParseError

MAX_CHARACTERS = 256 * 2**20
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
      | (?P<value>%[\w.$-]+) | (?P<weight>@[\w.$/-]+)
      | (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<float>-?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|inf\b|nan\b))
      | (?P<int>[0-9]+)
      | (?P<word>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<sign>//|[-+*{}()\[\],:=])""",
    re.VERBOSE,
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Token:
    """A lexeme and where it starts."""

    kind: str
    text: str
    at: int


class Tokens:
    """Those of one text, and which one is next."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_CHARACTERS:
            raise ParseError(
                f"a text of {len(text)} characters, {MAX_CHARACTERS} at most",
                where="line 1, column 1",
            )
        self.text = text
        self.tokens = self._lex()
        self.i = 0

    def _lex(self) -> list[Token]:
        tokens: list[Token] = []
        at = 0
        while at < len(self.text):
            found = _TOKEN.match(self.text, at)
            if found is None:
                raise self.error("a character that starts nothing", Token("", "", at))
            kind = found.lastgroup or ""
            if kind != "space":
                tokens.append(Token(kind, found.group(), at))
            at = found.end()
        tokens.append(Token("end", "the end", at))
        return tokens

    def peek(self) -> Token:
        """The next one, which stays."""
        return self.tokens[self.i]

    def next(self) -> Token:
        """The next one; the end again and again."""
        token = self.tokens[self.i]
        if token.kind != "end":
            self.i += 1
        return token

    def take(self, kind: str, wanted: str) -> Token:
        """The next one, of a kind. Raises `ParseError` with what is `wanted`."""
        token = self.peek()
        if token.kind != kind:
            raise self.error(f"{wanted} expected, {token.text} found", token)
        return self.next()

    def integer(self, wanted: str) -> int:
        """A whole number of 64 bits. Raises `ParseError`."""
        token = self.take("int", wanted)
        if len(token.text) > 19:
            raise self.error("an integer that does not fit 64 bits", token)
        return int(token.text)

    def string(self) -> str:
        """What stands between quotes. Raises `ParseError`."""
        token = self.take("string", "a string")
        return self.guarded(token, lambda: str(json.loads(token.text)))

    def sign(self, text: str) -> None:
        """Pass a sign. Raises `ParseError` where it is not the next."""
        if not self.skip(text):
            raise self.error(f"{text} expected, {self.peek().text} found")

    def word(self, text: str) -> None:
        """Pass a word. Raises `ParseError` where it is not the next."""
        if not self.skip_word(text):
            raise self.error(f"{text} expected, {self.peek().text} found")

    def at_sign(self, text: str) -> bool:
        """Whether a sign is next."""
        return self.peek().kind == "sign" and self.peek().text == text

    def at_word(self, text: str) -> bool:
        """Whether a word is next."""
        return self.peek().kind == "word" and self.peek().text == text

    def skip(self, text: str) -> bool:
        """Pass a sign where it is next; whether it was."""
        found = self.at_sign(text)
        self.i += found
        return found

    def skip_word(self, text: str) -> bool:
        """Pass a word where it is next; whether it was."""
        found = self.at_word(text)
        self.i += found
        return found

    def items(self, end: str) -> Iterator[None]:
        """Once for each item of a list, up to the sign `end`; commas part them."""
        while not self.skip(end):
            yield
            if not self.at_sign(end):
                self.sign(",")

    def end(self) -> None:
        """Raise `ParseError` unless the text ends."""
        if self.peek().kind != "end":
            raise self.error(f"nothing more expected, {self.peek().text} found")

    def guarded(self, token: Token, build: Callable[[], T]) -> T:
        """What is built; a `ValueError` is a `ParseError` at a token."""
        try:
            return build()
        except ValueError as problem:
            raise self.error(str(problem), token) from None

    def error(self, what: str, at: Token | None = None, hint: str | None = None) -> ParseError:
        """An error at a token, or at the next, with its line as a picture."""
        place = (at or self.peek()).at
        line = self.text.count("\n", 0, place) + 1
        start = self.text.rfind("\n", 0, place) + 1
        end = self.text.find("\n", place)
        shown = self.text[start : end if end >= 0 else len(self.text)]
        column = place - start
        lo = max(0, column - 60)
        picture = f"{shown[lo : lo + 120]}\n{' ' * (column - lo)}^"
        return ParseError(what, f"line {line}, column {column + 1}", hint, picture)
