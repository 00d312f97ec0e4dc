"""What a user asks of a calibration, checked before a model is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dsc.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """A text (or inputs by name), samples of it, and bits a weight at most."""

    given: Any
    nsamples: int = 4
    seqlen: int | None = None
    avg_bits: float | None = None


def trial_of(
    given: object, quant: str, nsamples: int = 4, seqlen: int | None = None, avg_bits: Any = None
) -> Asked | None:
    """What is asked; `None` where nothing is `given`. Raises `UsageError`."""
    if given is None:
        if avg_bits is not None:
            raise UsageError(
                f"avg_bits is {avg_bits!r}, and nothing says what harms most",
                hint="give calibrate, a text",
            )
        return None
    if quant == "none":
        raise UsageError("nothing is quantised, and so nothing to calibrate", hint="give quant")
    for name, value, least in (("nsamples", nsamples, 1), ("seqlen", seqlen, 2)):
        if value is not None and value < least:
            raise UsageError(f"{name} is {value}", hint=f"give at least {least}")
    is_number = isinstance(avg_bits, int | float) and not isinstance(avg_bits, bool)
    if avg_bits is not None and not (is_number and math.isfinite(avg_bits)):
        raise UsageError(f"avg_bits is {avg_bits!r}", hint="give a number, such as 5")
    return Asked(given, nsamples, seqlen, avg_bits)
