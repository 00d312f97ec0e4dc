"""What a kernel's assembly says of it: which matrix instructions it has, and of what types.

NVIDIA's PTX has `mma.sync`, `wgmma` (sm_90) and `tcgen05` (sm_100), AMD's code `v_mfma`. They are
counted as they stand in the text, not as often as they run.
"""

from __future__ import annotations

import re
from collections import Counter

_PTX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.([\w.:]+)")
_AMD = re.compile(r"\bv_s?mfmac?_(?:scale_)?[fi]\d+_\d+x\d+x\d+_?(\w+)")
_KIND = re.compile(r"kind::(\w+)")
CODES_8 = ("e4m3", "fp8", "bf8", "f8f6f4")


def matrix_instructions(assembly: str, kind: str) -> dict[str, int]:
    """How many there are of each: `wgmma e4m3`, `mma.sync bf16`, `tcgen05 f8f6f4`, `v_mfma f16`.

    `kind` is that of the target, `cuda` or `hip`.
    """
    found: Counter[str] = Counter()
    if kind == "cuda":
        for name, rest in _PTX.findall(assembly):
            found[f"{_short(name)} {_ptx_type(name, rest)}"] += 1
    else:
        for type_ in _AMD.findall(assembly):
            found[f"v_mfma {type_.removesuffix('_1k')}"] += 1
    return dict(sorted(found.items()))


def peak_of(instructions: dict[str, int]) -> str:
    """The type by which a card's peak goes: `fp8`, `int8`, `bf16`; empty without instructions."""
    types = " ".join(name.partition(" ")[2] for name in instructions)
    if not types:
        return ""
    if any(each in types for each in CODES_8):
        return "fp8"
    return "int8" if re.search(r"\b[isu]8", types) else "bf16"


def _short(name: str) -> str:
    return name if name == "mma.sync" else name.partition(".")[0]


def _ptx_type(name: str, rest: str) -> str:
    """The type of A: `mma.sync` ends in those of D, A, B and C, `wgmma` in those of D, A and B."""
    told = _KIND.search(rest)
    parts = rest.split(".")
    if name == "tcgen05.mma":
        return told[1] if told else parts[-1]
    return parts[-3] if name == "mma.sync" else parts[-2]
