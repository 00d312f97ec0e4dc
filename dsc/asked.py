"""What may be asked of the passes, and what is refused of it: before they run, and after.

An option has few words, listed here. Whether a backend has what is asked for, its `Capabilities`
say; whether a program came to it, is seen when the passes have run, and their reports say why not.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsc.backends.base import Capabilities
from dsc.errors import UnsupportedOperator, UsageError, one_of
from dsc.ir.graph import Weight
from dsc.ir.interface import Storage
from dsc.ir.op import traits_of
from dsc.ir.program import Program
from dsc.ir.regions import FUSION_LEVELS
from dsc.ir.traits import Role
from dsc.rewrite.manager import PassRecord

CACHES = ("contiguous", "paged", "in-place")
"""Layouts of KV caches: a capacity of rows for each sequence, or pages that sequences take. Where a
backend grows caches unless it is told otherwise, it is told by the last."""
CACHE_FORMATS = {"bf16": "", "fp8": "f8e4m3", "int8": "i8"}
"""What latent caches are kept in, and the element type of the codes; none in the compute type."""
FP8 = "f8e4m3"
"""Codes whose rows become FP8 too, where that is asked for alone."""
QUANT = {"none": "", "fp8": FP8, "int8": "i8", "int4": "i4"}
"""What weights may be quantised to, and the element type of the codes."""
WIDE = ":int8"
"""How a pattern of `keep` ends whose weights stay in 8 bits, and not in the compute type."""
HEAD = ":fp8"
"""How one ends whose weights are a head that is FP8 as all else is: others stay."""
QUANTISED = " or ".join(word for word, codes in QUANT.items() if codes)
ACTIVATION_BITS = (8, 16)
"""Rows that codes multiply: codes as well, where kernels take them so, or in the compute type."""
CODED_ROWS = ACTIVATION_BITS[0]
GROUPED = ("int8", "int4")
"""What has groups of columns."""
PAGED, IN_PLACE = CACHES[1:]
LAID_OUT = {
    PAGED: (Storage.PAGED, "put into pages"),
    IN_PLACE: (Storage.CONTIGUOUS, "written in place"),
}
"""How the states of such layouts are stored, and what was done to them."""
CODING = ("quantize_weights", "choose_formats")
"""The passes that decide whether a table is in codes."""


def check_fusion_level(level: int) -> None:
    """Raise `UsageError` for a level that there is not."""
    if level not in FUSION_LEVELS:
        levels = ", ".join(map(str, FUSION_LEVELS))
        raise UsageError(f"fusion_level {level}", hint=f"one of {levels}")


def check_quant(quant: str, keep: Sequence[str], quant_embedding: str = "none") -> None:
    """Raise `UsageError` for what weights cannot be quantised to, or for keeping no pattern."""
    if quant not in QUANT:
        raise UsageError(f"quant {quant!r}", hint=one_of(quant, list(QUANT)))
    if quant_embedding not in ("none", *GROUPED):
        hint = one_of(quant_embedding, ["none", *GROUPED])
        raise UsageError(f"quant_embedding {quant_embedding!r}", hint=hint)
    if isinstance(keep, str) or not all(isinstance(each, str) for each in keep):
        raise UsageError(f"keep is {keep!r}", hint='give a list of texts, as in ["lm_head"]')
    wide = [each for each in keep if each.endswith(WIDE)]
    if wide and "int4" not in (quant, quant_embedding):
        raise UsageError(
            f"{wide[0]!r} says 8 bits, and quant is {quant}", hint=f"leave {WIDE} out, or give int4"
        )
    heads = [each for each in keep if each.endswith(HEAD)]
    if heads and quant != "fp8":
        raise UsageError(f"{heads[0]!r} says FP8, and quant is {quant}", hint="give quant fp8")
    if keep and quant == quant_embedding == "none":
        raise UsageError(
            f"{keep[0]!r} is kept, and nothing is quantised", hint=f"give quant: {QUANTISED}"
        )


def check_cache_format(name: str, backend: str = "", coded: Sequence[str] | None = None) -> None:
    """Raise `UsageError` for what caches cannot be kept in: at all, or by a backend.

    `coded` are the codes of caches that the backend reads.
    """
    if name not in CACHE_FORMATS:
        raise UsageError(f"cache_format {name!r}", hint=one_of(name, list(CACHE_FORMATS)))
    codes = CACHE_FORMATS[name]
    if coded is not None and codes and codes not in coded:
        raise UsageError(
            f"the {backend} backend takes no caches in {name}",
            hint='compile with cache_format="bf16" (--cache-format bf16), or for a backend that'
            " reads such codes: reference, null, tvm or triton",
        )


def cache_format_of(program: Program) -> str:
    """What the latent caches of a program are kept in."""
    kept = {s.type.dtype for s in program.states if s.type.format is not None}
    return next((name for name, codes in CACHE_FORMATS.items() if codes in kept), "bf16")


def check_widths(
    group_size: int | None, activation_bits: int, quant: str, quant_embedding: str = "none"
) -> None:
    """Raise `UsageError` for groups of columns, or bits of activations, that there are not."""
    if group_size is not None and group_size < 2:
        raise UsageError(f"group_size is {group_size}", hint="give at least 2, such as 32 or 128")
    if group_size is not None and quant not in GROUPED and quant_embedding not in GROUPED:
        told = f"group_size is {group_size}, and quant is {quant}"
        raise UsageError(told, hint=f"only {' and '.join(GROUPED)} have groups of columns")
    if activation_bits not in ACTIVATION_BITS:
        told = " or ".join(map(str, ACTIVATION_BITS))
        raise UsageError(f"activation_bits is {activation_bits}", hint=f"give {told}")


def check_states(program: Program, name: str, capabilities: Capabilities) -> None:
    """Raise `UnsupportedOperator` for states that a backend's executables cannot hold."""
    refused = [s for s in program.states if s.storage not in capabilities.states]
    if refused:
        told = ", ".join(f"{s.input} ({s.storage})" for s in refused)
        raise UnsupportedOperator(
            f"the {name} backend holds no such states as {told}",
            hint="choose another backend: reference holds every kind",
        )


def check_layout(cache: str, name: str, capabilities: Capabilities) -> None:
    """Raise `UsageError` for a layout of caches that there is not, or a backend has not, or has."""
    if cache not in CACHES:
        raise UsageError(f"cache {cache!r}", hint=one_of(cache, CACHES))
    if cache == PAGED and Storage.PAGED not in capabilities.states:
        raise UsageError(
            f"the {name} backend takes no caches in pages",
            hint='compile with cache="contiguous" (--cache contiguous), or for a backend that takes'
            " pages: reference, null, tvm or triton",
        )
    if cache == IN_PLACE and capabilities.states[0] is not Storage.GROWN:
        raise UsageError(
            f"caches {IN_PLACE} are of ONNX exports; the {name} backend never grows them",
            hint='compile with cache="contiguous" (--cache contiguous), or dsc.export it',
        )


def check_laid_out(program: Program, records: Sequence[PassRecord], cache: str) -> None:
    """Raise `UnsupportedOperator` with what kept the caches from a layout, unless they have it."""
    storage, told = LAID_OUT.get(cache, (None, ""))
    if storage is None or any(state.storage is storage for state in program.states):
        return
    met = next(r.report.near for r in records if r.name == "append_cache_in_place")
    lines = [f"{m.reason} (at {m.where})" if m.where else m.reason for m in met]
    raise UnsupportedOperator(
        f"the caches of {program.name} cannot be {told}:\n"
        + "\n".join(dict.fromkeys(lines) or ["it has no caches of attention"]),
        hint="leave out cache (--cache)",
    )


def check_cache_codes(program: Program, records: Sequence[PassRecord], name: str) -> None:
    """Raise `UnsupportedOperator` with what kept the caches in numbers, unless they are codes."""
    if CACHE_FORMATS[name] == "":
        return
    report = next(r.report for r in records if r.name == "quantize_cache")
    if report.fired:
        return
    lines = [f"{m.reason} (at {m.where})" if m.where else m.reason for m in report.near]
    if not lines:
        lines = ["it has no caches of latent attention"]
        raised = (m for r in records if r.name == "raise_mla" for m in r.report.near)
        lines += [f"that of {m.where} is computed head by head: {m.reason}" for m in raised][:1]
    raise UnsupportedOperator(
        f"the caches of {program.name} cannot be codes:\n" + "\n".join(dict.fromkeys(lines)),
        hint='compile with cache_format="bf16" (--cache-format bf16)',
    )


def check_embedding(program: Program, records: Sequence[PassRecord], backend: str) -> None:
    """Raise `UnsupportedOperator` with what kept tables in numbers, unless one is in codes."""
    nodes = [node for graph in program.entries.values() for node in graph.walk()]
    tables = {
        x for node in nodes if traits_of(node.op).role is Role.LOOKUP
        for x in node.operands if isinstance(x, Weight)
    }  # fmt: skip
    if any(x.type.format is not None for x in tables):
        return
    names = {x.name for x in tables}
    near = [m for record in records if record.name in CODING for m in record.report.near]
    lines = [f"{m.reason} (at {m.where})" for m in near if m.where in names]
    raise UnsupportedOperator(
        f"the embedding of {program.name} cannot be codes on {backend}:\n"
        + "\n".join(dict.fromkeys(lines) or ["it looks up no rows of a weight"]),
        hint="leave out quant_embedding, or compile for a backend that looks up rows in codes:"
        " onnxruntime, reference or null",
    )
