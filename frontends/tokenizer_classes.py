"""Tokenizers that only transformers' own classes know how to read, as `tokenizer.json`.

A sentencepiece model (`tokenizer.model`), or `vocab.json` with `merges.txt`, means nothing without
the class that says how text is split, normalised and put together again. The class is one of the
installed transformers, by the name in `tokenizer_config.json` or, where that is none of them, by
the `model_type`; what it reads is a copy of the folder that holds bounded data files and the
settings listed here alone, so that no setting can name another file, and no code of the folder
is there to be found.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsc.errors import CheckpointError, ConfigError
from dsc.frontends.folder import (
    ADDED_TOKENS,
    CONFIG_FILE,
    MERGES,
    SENTENCEPIECE,
    SPECIAL_TOKENS,
    TOKENIZER_SETTINGS,
    VOCABULARY,
    read_bounded,
    read_object,
)
from dsc.strict_json import JsonObject

DATA = (SENTENCEPIECE, VOCABULARY, MERGES, SPECIAL_TOKENS, ADDED_TOKENS)
KEPT = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "add_bos_token",
    "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens",
)  # fmt: skip
"""Settings of `tokenizer_config.json` that say something about text, and name no file."""


def readable(folder: Path) -> str:
    """The file of a folder that a class of transformers could read, or ""."""
    if os.path.lexists(folder / SENTENCEPIECE):
        return SENTENCEPIECE
    both = os.path.lexists(folder / VOCABULARY) and os.path.lexists(folder / MERGES)
    return VOCABULARY if both else ""


def converted(folder: Path, settings: JsonObject) -> bytes:
    """What transformers' class for the folder makes of its files, as `tokenizer.json`.

    Raises:
        CheckpointError: the class cannot read them.
        ConfigError: a file is damaged or too large, or no class of transformers is named.
    """
    raw = read_object(folder / CONFIG_FILE)
    found = _class_for(settings.get("tokenizer_class"), raw.get("model_type"))
    with _copied(folder, settings) as place, _sentencepiece_as_data():
        try:
            made: Any = found.from_pretrained(str(place), local_files_only=True)
            text: str = made.backend_tokenizer.to_str()
        except BaseException as problem:  # transformers raises whatever went wrong
            if not isinstance(problem, Exception) and not is_panic(problem):
                raise
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise CheckpointError(f"{found.__name__} cannot read it: {reason[:200]}") from None
    return text.encode()


def is_panic(problem: BaseException) -> bool:
    """Whether this is what a panic in Rust becomes, which is no `Exception`."""
    return type(problem).__name__ == "PanicException"


def _class_for(named: object, model_type: object) -> Any:
    """The installed class by its name, else by the model's type. Raises `ConfigError`."""
    from transformers.models.auto.tokenization_auto import (
        TOKENIZER_MAPPING_NAMES,
        tokenizer_class_from_name,
    )

    known = {str(name) for name in TOKENIZER_MAPPING_NAMES.values() if name}
    plain = named.removesuffix("Fast") if isinstance(named, str) else ""
    if plain not in known and isinstance(model_type, str):
        plain = str(TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix("Fast")
    if plain not in known:
        raise ConfigError(f"transformers has no tokenizer_class {named!r:.60}")
    return tokenizer_class_from_name(plain)


@contextmanager
def _copied(folder: Path, settings: JsonObject) -> Iterator[Path]:
    """A folder of its own with the data of `folder` and what of its settings is kept."""
    with tempfile.TemporaryDirectory(prefix="dsc-tokenizer-") as name:
        place = Path(name)
        for file in DATA:
            if os.path.lexists(folder / file):
                (place / file).write_bytes(read_bounded(folder / file))
        kept = {key: settings[key] for key in KEPT if key in settings}
        (place / TOKENIZER_SETTINGS).write_text(json.dumps(kept), encoding="utf-8")
        yield place


@contextmanager
def _sentencepiece_as_data() -> Iterator[None]:
    """While it holds, transformers reads a sentencepiece model by its protobuf schema alone.

    Its reader asks for the package sentencepiece, of which it uses nothing.
    """
    from transformers import convert_slow_tokenizer

    class Reader(convert_slow_tokenizer.SentencePieceExtractor):  # type: ignore[misc]
        """The same without asking for the package."""

        def __init__(self, model: str) -> None:
            self.proto = convert_slow_tokenizer.import_protobuf().ModelProto()
            self.proto.ParseFromString(Path(model).read_bytes())

    before = convert_slow_tokenizer.SentencePieceExtractor
    convert_slow_tokenizer.SentencePieceExtractor = Reader
    try:
        yield
    finally:
        convert_slow_tokenizer.SentencePieceExtractor = before
