"""The files of a checkpoint folder: what they are called, how large they may be, how one is read.

A folder is data from a stranger. These files are read and no others, beside safetensors; the Hub is
asked for no others (`hub.py`), and a conversion copies no others (`convert.py`). A file that leads
out of the folder, or is larger than its bound, is refused before it is read.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsc.chat_template import MAX_TEMPLATE_BYTES
from dsc.errors import ConfigError
from dsc.files import why_no_file
from dsc.ir.safetensors import INDEX_FILE, MAX_INDEX_BYTES, inside
from dsc.strict_json import JsonObject, parse_object

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MODELOPT_FILE = "hf_quant_config.json"
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
SENTENCEPIECE, RANKS, VOCABULARY, MERGES = (
    "tokenizer.model", "tiktoken.model", "vocab.json", "merges.txt",
)  # fmt: skip
TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"

MAX_CONFIG_BYTES = 4 << 20
"""Published configs are a few kilobytes, 60 with a long list of unquantised modules."""
MAX_TOKENIZER_BYTES = 256 << 20
MAX_VOCABULARY_BYTES = 64 << 20
"""Kimi-K2's ranks take 2.8 MB."""

LIMITS = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    GENERATION_FILE: MAX_CONFIG_BYTES,
    MODELOPT_FILE: MAX_CONFIG_BYTES,
    INDEX_FILE: MAX_INDEX_BYTES,
    TOKENIZER: MAX_TOKENIZER_BYTES,
    TOKENIZER_SETTINGS: MAX_CONFIG_BYTES,
    SPECIAL_TOKENS: MAX_CONFIG_BYTES,
    ADDED_TOKENS: MAX_CONFIG_BYTES,
    **dict.fromkeys((SENTENCEPIECE, RANKS, VOCABULARY, MERGES), MAX_VOCABULARY_BYTES),
    TEMPLATE: MAX_TEMPLATE_BYTES,
    OLDER_TEMPLATE: MAX_TEMPLATE_BYTES,
}
"""Files beside the weights, and the bytes that each may have. All but the first may be missing."""
COPIED = tuple(LIMITS.keys() - {CONFIG_FILE, MODELOPT_FILE, INDEX_FILE})
"""Those that say nothing of how weights are stored: they belong to a checkpoint in any form."""


def read_bounded(file: Path, limit: int | None = None) -> bytes:
    """The bytes of a regular file that must not exceed its bound; `ConfigError` otherwise.

    `limit` is that of a file of its name, or of a configuration. Raises `CheckpointError` for a
    link that leads out of the folder.
    """
    if reason := why_no_file(file):
        raise ConfigError(
            f"{file.name} {reason}", str(file), f"give a folder that holds a file {file.name}"
        )
    most = LIMITS.get(file.name, MAX_CONFIG_BYTES) if limit is None else limit
    with inside(file.parent, file.name, str(file)).open("rb") as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise ConfigError(f"larger than the limit of {most} bytes", str(file))
    return text


def read_object(file: Path, missing_ok: bool = False) -> JsonObject:
    """The JSON object in a file; with `missing_ok` an empty one where there is none.

    Raises as `read_bounded` does, and `ConfigError` for what is no JSON object.
    """
    if missing_ok and not os.path.lexists(file):
        return {}
    return parse_object(read_bounded(file), str(file), ConfigError)
