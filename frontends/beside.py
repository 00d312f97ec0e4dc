"""What other runtimes read beside a model: a checkpoint's own files, by an allow-list of names.

They are JSON objects and one template, of bounded size and from inside the folder. None is code,
and `auto_map`, which names Python files that do not come along, is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from dsc.chat_template import MAX_TEMPLATE_BYTES
from dsc.errors import ConfigError, DscError
from dsc.frontends.chat_template import SPECIAL, TEMPLATE
from dsc.frontends.config import read_bounded
from dsc.frontends.generation_config import GENERATION_FILE
from dsc.frontends.tokenizer import SETTINGS, TOKENIZER
from dsc.strict_json import parse_object

OBJECTS = (GENERATION_FILE, SETTINGS, SPECIAL, "added_tokens.json")
PLAIN_SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""Of a tokenizer.json alone: the class of transformers that takes any."""


def files_beside(folder: Path | None, known: Collection[str]) -> tuple[dict[str, bytes], list[str]]:
    """The files of a checkpoint `folder` by name, and notes on those that are damaged.

    `known` are names of what goes along already; a tokenizer among them gets settings.
    """
    found: dict[str, bytes] = {}
    notes: list[str] = []
    for name in (*OBJECTS, TEMPLATE):
        if folder is None or not os.path.lexists(folder / name):
            continue
        try:
            found[name] = _template(folder) if name == TEMPLATE else _object(folder / name)
        except DscError as refused:
            notes.append(f"{name} is not copied: {refused.what}")
    if TOKENIZER in known and SETTINGS not in found:
        found[SETTINGS] = json.dumps(PLAIN_SETTINGS).encode()
    return found, notes


def _object(file: Path) -> bytes:
    said = parse_object(read_bounded(file), str(file), ConfigError)
    kept = {key: value for key, value in said.items() if key != "auto_map"}
    return json.dumps(kept, indent=2, ensure_ascii=False).encode()


def _template(folder: Path) -> bytes:
    return read_bounded(folder / TEMPLATE, MAX_TEMPLATE_BYTES)
