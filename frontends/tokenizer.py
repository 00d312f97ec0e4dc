"""The tokenizer of a checkpoint: its `tokenizer.json`, or one made from what it has instead.

A sentencepiece model, or a vocabulary with merges, is read by transformers' own class
(`tokenizer_classes.py`). Moonlight and Kimi-K2 publish the ranks of byte pairs (`tiktoken.model`),
the special tokens (`tokenizer_config.json`) and a Python file that knows the pattern by which text
is split first. That file is never run. The ranks go through transformers' own converter with the
pattern that its class has; for a class whose pattern is not known here nothing is guessed, since
another split is another text to the model.
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import Any

from dsc.errors import CheckpointError, ConfigError, DscError, FileError
from dsc.files import read_text
from dsc.frontends import tokenizer_classes
from dsc.frontends.folder import (
    RANKS,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    VOCABULARY,
    read_bounded,
    read_object,
)
from dsc.ir.safetensors import inside
from dsc.strict_json import JsonObject

OTHERS = ("tekken.json", "spiece.model", "sentencepiece.bpe.model", VOCABULARY, "vocab.txt")
"""Tokenizers that are not read, as far as their names tell them."""
SAVE_ONE = f"text can be read once a {TOKENIZER} lies beside it (save one with transformers)"
_LETTER, _MARKS = r"[^\r\n\p{L}\p{N}]?", r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "TikTokenTokenizer": "|".join((
        r"[\p{Han}]+",
        rf"{_LETTER}[\p{{Lu}}\p{{Lt}}{_MARKS}]*[\p{{Ll}}{_MARKS}]+{_ENDING}",
        rf"{_LETTER}[\p{{Lu}}\p{{Lt}}{_MARKS}]+[\p{{Ll}}{_MARKS}]*{_ENDING}",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
    )),
}  # fmt: skip
"""How text is split before byte pairs are merged, by `tokenizer_class`."""


def find_tokenizer(folder: Path) -> tuple[Path | bytes | None, str]:
    """A folder's tokenizer, as a file or as the JSON made for it; and what to tell of it.

    What cannot be converted is told, and what to do about it.

    Raises:
        CheckpointError, ConfigError: the files are damaged or contradict each other.
        FileError: one is there and cannot be read.
    """
    file, ranks = folder / TOKENIZER, folder / RANKS
    if os.path.lexists(file):
        inside(folder, TOKENIZER, str(file))
        parse_tokenizer(file, CheckpointError, "get it again, or take it out of the folder")
        return file, ""
    settings = read_object(folder / TOKENIZER_SETTINGS, missing_ok=True)
    if not os.path.lexists(ranks):
        return _by_class(folder, settings)
    name = settings.get("tokenizer_class")
    pattern = PATTERNS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return None, (
            f"{RANKS} is not used: how tokenizer_class {name!r:.60} splits text is not known; "
            + SAVE_ONE
        )
    made = _converted(ranks, pattern, _special(settings, str(folder / TOKENIZER_SETTINGS)))
    return made, f"{TOKENIZER} was made from {RANKS}"


def _by_class(folder: Path, settings: JsonObject) -> tuple[bytes | None, str]:
    """What transformers' class makes of a folder without ranks; and what to tell of it."""
    given = tokenizer_classes.readable(folder)
    if not given:
        other = next((name for name in OTHERS if os.path.lexists(folder / name)), None)
        return None, f"{other} is not read; {SAVE_ONE}" if other else ""
    try:
        made = tokenizer_classes.converted(folder, settings)
    except DscError as refused:
        return None, f"{given} is not used: {refused.what}; {SAVE_ONE}"
    return made, f"{TOKENIZER} was made from {given}"


def parse_tokenizer(found: Path | bytes, error: type[DscError], hint: str) -> Any:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`, a file's or what was made.

    Raises:
        FileError: the file cannot be read.
        DscError: it is damaged: `error`, with `hint`.
    """
    from tokenizers import Tokenizer

    try:
        text = found.decode() if isinstance(found, bytes) else read_text(found)
        return Tokenizer.from_str(text)
    except FileError:
        raise
    except BaseException as problem:  # tokenizers raises no class of its own, and panics
        if not isinstance(problem, Exception) and not tokenizer_classes.is_panic(problem):
            raise
        reason = problem.what if isinstance(problem, DscError) else f"{problem!s:.300}"
        where = TOKENIZER if isinstance(found, bytes) else str(found)
        raise error(f"the tokenizer is damaged: {reason}", where, hint) from None


def read_ranks(file: Path) -> dict[bytes, int]:
    """The byte pairs of a tiktoken file, lines of base64 and rank, and the rank of each.

    Raises:
        CheckpointError: a line is damaged, or the ranks are not 0, 1, 2, …
    """
    found: dict[bytes, int] = {}
    for number, line in enumerate(read_bounded(file).splitlines(), 1):
        where = f"{file}, line {number}"
        parts = line.split()
        if not parts:
            continue
        try:
            token, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            raise CheckpointError("a line must be base64 and a rank", where) from None
        if rank != len(found) or token in found:
            raise CheckpointError(f"rank {rank} where {len(found)} follows", where)
        found[token] = rank
    absent = [byte for byte in range(256) if bytes([byte]) not in found]
    if absent:
        raise CheckpointError(f"{len(absent)} single bytes have no rank", str(file))
    return found


def _special(settings: JsonObject, where: str) -> dict[int, str]:
    """The special tokens of `tokenizer_config.json` by id."""
    listed = settings.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ConfigError("added_tokens_decoder must be an object", where)
    found: dict[int, str] = {}
    for key, value in listed.items():
        content = value.get("content") if isinstance(value, dict) else None
        if not key.isdecimal() or len(key) > 9 or not isinstance(content, str) or not content:
            raise ConfigError(f"added_tokens_decoder.{key:.60} is no token with its id", where)
        found[int(key)] = content
    return found


def _converted(file: Path, pattern: str, special: dict[int, str]) -> bytes:
    """`tokenizer.json` by transformers' converter; special tokens get the ids that they have."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = read_ranks(file)
    last = max(special, default=len(ranks) - 1)
    if min(special, default=len(ranks)) < len(ranks) or last > len(ranks) + (1 << 16):
        raise ConfigError(
            f"added_tokens_decoder has ids outside {len(ranks)}, … which follow the byte pairs",
            str(file.with_name(TOKENIZER_SETTINGS)),
        )

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """The ranks are read here: the package tiktoken is not needed."""

        @staticmethod
        def load_tiktoken_bpe(_: str) -> dict[bytes, int]:
            return ranks

    names = [special.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), last + 1)]
    made: Any = Converter(str(file), pattern, extra_special_tokens=names).converted()
    wrong = [name for i, name in enumerate(names, len(ranks)) if made.token_to_id(name) != i]
    if wrong:
        raise ConfigError(
            f"added_tokens_decoder has {wrong[0]!r} twice", str(file.with_name(TOKENIZER_SETTINGS))
        )
    return str(made.to_str()).encode()
