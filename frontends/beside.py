"""What other runtimes read beside a model: a checkpoint's own files, by an allow-list of names.

They are JSON objects and one template, of bounded size and from inside the folder. None is code,
and `auto_map`, which names Python files that do not come along, is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

from dsc.errors import DscError
from dsc.frontends.folder import (
    ADDED_TOKENS,
    GENERATION_FILE,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_SETTINGS,
    read_bounded,
    read_object,
)

OBJECTS = (GENERATION_FILE, TOKENIZER_SETTINGS, SPECIAL_TOKENS, ADDED_TOKENS)
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
            found[name] = (
                read_bounded(folder / name) if name == TEMPLATE else _object(folder / name)
            )
        except DscError as refused:
            notes.append(f"{name} is not copied: {refused.what}")
    if TOKENIZER in known and TOKENIZER_SETTINGS not in found:
        found[TOKENIZER_SETTINGS] = json.dumps(PLAIN_SETTINGS).encode()
    return found, notes


def _object(file: Path) -> bytes:
    kept = {key: value for key, value in read_object(file).items() if key != "auto_map"}
    return json.dumps(kept, indent=2, ensure_ascii=False).encode()
