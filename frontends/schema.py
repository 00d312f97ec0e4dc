"""What our schemas of a folder's JSON files share: strict types, and one sentence of what is wrong.

Such a file comes from outside, so nothing in it is taken on trust: every value has a type and a
range, and what does not fit is refused by its key instead of being computed wrongly later.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, ValidationError

from dsc.ir.types import DType

DTYPES = {"float32": DType.f32, "bfloat16": DType.bf16, "float16": DType.f16}
"""Element types that are computed in, by the names that `dtype` may have."""


class Schema(BaseModel):
    """Strict types (no "8" for 8, no true for 1), immutable, unknown keys ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


MUST = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "model_type": "an object",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""What a value must be, by the kind of pydantic's errors."""
_FORM = re.compile(r"int|str|(constrained|list|tuple|function).*")
"""How pydantic calls the forms that a value may have, behind the key."""
MOST = 20
"""Faults that are told one by one."""


def sentence(exc: ValidationError, section: str = "") -> str:
    """What pydantic found, one key after the other: what it must be, and what was found.

    Of more than `MOST` faults the first are told, and how many there are beside them.

    Keys are those of a `section`, where they do not stand at the top of the file.
    """
    must: dict[tuple[str, str], list[str]] = {}
    rest: list[str] = []
    for error in exc.errors(include_url=False):
        at = (str(p) for p in error["loc"] if not _FORM.fullmatch(str(p)))
        key = ".".join(filter(None, (section, *at)))
        if error["type"] == "missing":
            rest.append(f"{key} is missing")
        elif error["type"] in MUST:
            wanted = MUST[error["type"]].format(**error.get("ctx", {}))
            must.setdefault((key, f"{error['input']!r:.60}"), []).append(wanted)
        else:
            rest.append((f"{key}: " if key else "") + error["msg"].removeprefix("Value error, "))
    told = [
        f"{key} must be {' or '.join(dict.fromkeys(wanted))}, found {found}"
        for (key, found), wanted in must.items()
    ] + rest
    more = [f"and {len(told) - MOST} more"] if len(told) > MOST else []
    return "; ".join(told[:MOST] + more)
