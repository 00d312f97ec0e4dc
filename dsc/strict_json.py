"""Read JSON that somebody else wrote: bounded, one object, no key twice, no NaN.

A checkpoint folder is downloaded; its `config.json`, its shard index and the headers of its
safetensors files are input from outside. Python's parser silently keeps the last of two equal
keys and accepts `NaN`; both have hidden a second meaning in a file before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

from dsc.errors import DscError
from dsc.files import no_text

JsonObject = dict[str, object]
AGAIN = "correct the file, or get it again"
"""What to do about a file that somebody else wrote."""


def parse_object(text: bytes, where: str, error: type[DscError]) -> JsonObject:
    """Parse `text` (UTF-8) as one JSON object.

    Raises `error`, with `where` as its place, for anything else: bytes that are not UTF-8, text
    that is not JSON, nesting that exhausts the parser, a repeated key, NaN or infinity, or a top
    level that is not an object.
    """

    def unique(pairs: Sequence[tuple[str, object]]) -> JsonObject:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"the key {twice!r} appears twice in one JSON object", where, AGAIN)
        return found

    def refuse(constant: str) -> NoReturn:
        raise error(f"{constant} is not a JSON number", where, AGAIN)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as exc:
        raise error(no_text(exc), where, AGAIN) from None
    except RecursionError:
        raise error("JSON nested too deeply", where, AGAIN) from None
    except ValueError as exc:  # JSONDecodeError, and integers beyond Python's digit limit
        raise error(f"not valid JSON ({exc})", where, AGAIN) from None
    if not isinstance(value, dict):
        raise error(f"expected a JSON object, found {str(value)[:40]!r}", where, AGAIN)
    return value
