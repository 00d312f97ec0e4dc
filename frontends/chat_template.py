"""The chat template of a checkpoint folder, as the artifact keeps it.

transformers writes it to `chat_template.jinja`; before that it stood in `tokenizer_config.json`,
as a text or as a list of named texts, and for processors in `chat_template.json`. A template is a
program from a stranger. Here it is only moved: `dsc/chat_template.py` says how it is run.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dsc.chat_template import DEFAULT, MAX_TEMPLATE_BYTES, TOKENS
from dsc.errors import ConfigError, DscError
from dsc.frontends.folder import (
    OLDER_TEMPLATE,
    SPECIAL_TOKENS,
    TEMPLATE,
    TOKENIZER_SETTINGS,
    read_bounded,
    read_object,
)
from dsc.strict_json import JsonObject


def find_chat(folder: Path) -> tuple[bytes | None, str]:
    """A folder's templates and the texts of its special tokens as JSON; and what to tell of them.

    What cannot be kept is told: a model compiles without.
    """
    try:
        settings = read_object(folder / TOKENIZER_SETTINGS, missing_ok=True)
        templates = _templates(folder, settings)
        if not templates:
            return None, ""
        tokens = _tokens(read_object(folder / SPECIAL_TOKENS, missing_ok=True)) | _tokens(settings)
    except DscError as refused:
        return None, f"the chat template is not used: {refused.what} ({refused.where})"
    return json.dumps({"templates": templates, "tokens": tokens}).encode(), ""


def _templates(folder: Path, settings: JsonObject) -> dict[str, str]:
    """Templates by name; a folder has one without a name as a rule. Raises `ConfigError`."""
    file = folder / TEMPLATE
    if os.path.lexists(file):
        try:
            return {DEFAULT: read_bounded(file).decode("utf-8")}
        except UnicodeDecodeError:
            raise ConfigError("it is no UTF-8", str(file)) from None
    older = read_object(folder / OLDER_TEMPLATE, missing_ok=True)
    told = settings.get("chat_template") or older.get("chat_template")
    if isinstance(told, list):
        pairs = [(e.get("name"), e.get("template")) for e in told if isinstance(e, dict)]
    else:
        pairs = [(DEFAULT, told)] if told else []
    where = str(folder / TOKENIZER_SETTINGS)
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise ConfigError("chat_template must be a text, or a list of names and templates", where)
    found = {str(name): str(text) for name, text in pairs}
    if sum(map(len, found.values())) > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"larger than the limit of {MAX_TEMPLATE_BYTES} bytes", where)
    return found


def _tokens(settings: JsonObject) -> dict[str, str]:
    """The special tokens that a file names, by their role: `bos_token` and the like."""
    found = {}
    for name in TOKENS:
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
