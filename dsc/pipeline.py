"""THE list of passes, read top to bottom; and the functions that run it.

A program comes in as it was traced and leaves as the backend wants it. Each slot of the list is a
pass, when it applies, and the options that it gets from what the backend can do and what a user
asked. Passes are named lazily, so that reading this file is knowing the order and importing it
costs nothing. `dsc opt -p`, dumps and lines that reproduce a failure name passes with their options
as text (`dsc/rewrite/options.py`).
"""

from __future__ import annotations

import importlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from dsc.asked import (
    CACHE_FORMATS,
    CODED_ROWS,
    FP8,
    GROUPED,
    HEAD,
    IN_PLACE,
    PAGED,
    QUANT,
    WIDE,
    check_cache_codes,
    check_cache_format,
    check_embedding,
    check_fusion_level,
    check_laid_out,
    check_layout,
    check_quant,
    check_states,
    check_widths,
)
from dsc.backends.base import Backend, Capabilities, check_supported
from dsc.errors import UsageError, one_of
from dsc.ir.formats import CODINGS, is_whole
from dsc.ir.interface import Storage
from dsc.ir.paging import PAGE
from dsc.ir.program import Program
from dsc.ir.regions import RegionLimits
from dsc.ir.stages import Stage
from dsc.ir.weights import stored_type
from dsc.rewrite import options as texts
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.explain import explain_pass
from dsc.rewrite.manager import NOT_PASSES, Manager, PassRecord, Watch
from dsc.rewrite.pass_cache import PassCache, Prepared
from dsc.rewrite.regions import inline_graph
from dsc.targets import Target, parse_target

LEAST_GROUP = 32
"""The fewest columns of a group where nobody says how many."""
EPILOGUES = 2
"""Backends that fuse from this level on split a merged projection at no cost."""
HORIZONTAL = 3
"""From this level on operators side by side become one: a shared expert joins the routed ones."""


@dataclass(frozen=True)
class PipelineOptions:
    """What a user asked of the passes; `codes`: whether weights may stay in stored formats."""

    fusion_level: int = 3
    prefill_chunk: int = 512
    cache: str = "contiguous"
    cache_format: str = "bf16"
    ranks: int = 1
    parallel: str = "tp+ep"
    quant: str = "none"
    keep: tuple[str, ...] = ()
    group_size: int | None = None
    quant_embedding: str = "none"
    activation_bits: int = 8
    codes: bool = True
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        check_fusion_level(self.fusion_level)
        check_quant(self.quant, self.keep, self.quant_embedding)
        check_cache_format(self.cache_format)
        check_widths(self.group_size, self.activation_bits, self.quant, self.quant_embedding)


class Setting(NamedTuple):
    """What decides which passes run, and with which options."""

    program: Program
    can: Capabilities
    asked: PipelineOptions


class Part(StrEnum):
    """What a pass is there for. A session runs the program as it is before `EMIT`."""

    RAISE = "raise"
    OPTIMISE = "optimise"
    LOWER = "lower"
    EMIT = "emit"


@dataclass(frozen=True)
class Slot:
    """A place in the list: a pass, when it applies, and which options it then gets."""

    part: Part
    name: str
    applies: Callable[[Setting], bool] = lambda _: True
    options: Callable[[Setting], Mapping[str, Any]] = lambda _: {}

    @property
    def place(self) -> str:
        """Where the pass is, as `module:Class`."""
        return f"dsc.passes.{self.name}:{''.join(map(str.capitalize, self.name.split('_')))}"


def _has_codes(s: Setting) -> bool:
    """Whether weights are stored in a format, or will be."""
    kept = map(stored_type, s.program.weights.values())
    asked = (s.asked.quant, s.asked.quant_embedding)
    return asked != ("none", "none") or any(t is not None for t in kept)


def _group(s: Setting) -> int:
    """Columns of a group: what was asked, or the most that the backend wants and experts divide by.

    Experts whose rows are no whole groups would have no kernel for all of them at once.
    """
    if s.asked.group_size is not None:
        return s.asked.group_size
    stacks = [e.type.shape for e in s.program.weights.values() if e.type.rank > 2]
    size = s.can.group
    while size > LEAST_GROUP and not all(is_whole(d, size) for shape in stacks for d in shape[1:]):
        size //= 2
    return size


RAISE = (
    "fold_empty",
    "fold_constants",
    "canonicalise_views",
    "eliminate_common_subexpressions",
    "raise_registered",
    "raise_rms_norm",
    "raise_layer_norm",
    "raise_activation",
    "raise_swiglu",
    "raise_rope",
    "raise_attention",
    "raise_append",
    "raise_mla",
    "raise_router",
    "raise_experts",
    "raise_select_rows",
    "spell_out_scatter",
    "spell_out_sdpa",
    "eliminate_dead_code",
    "raise_canonical",
    "name_values",
)
"""What makes canonical operators of what was traced, in this order."""
SLOTS = (
    *(Slot(Part.RAISE, name, lambda s: s.program.stage < Stage.CANONICAL) for name in RAISE),
    Slot(
        Part.OPTIMISE, "merge_shared_expert",
        lambda s: s.can.shared_experts and s.asked.ranks == 1
        and s.asked.fusion_level >= HORIZONTAL,
    ),
    Slot(Part.OPTIMISE, "hoist_select_rows"),
    Slot(Part.OPTIMISE, "specialise_entries", options=lambda s: s.can.kinds_of_steps),
    Slot(Part.OPTIMISE, "absorb_mla", lambda s: s.can.absorbed),
    Slot(
        Part.OPTIMISE, "append_cache_in_place",
        lambda s: s.can.states[0] is Storage.CONTIGUOUS or s.asked.cache in (PAGED, IN_PLACE),
        lambda s: {"slack": s.asked.prefill_chunk, "page": PAGE * (s.asked.cache == PAGED)},
    ),
    Slot(
        Part.OPTIMISE, "shard", lambda s: s.asked.ranks != 1,
        lambda s: {"ranks": s.asked.ranks, "parallel": s.asked.parallel},
    ),
    Slot(Part.OPTIMISE, "merge_projections", lambda s: s.can.fuse >= EPILOGUES),
    Slot(
        Part.OPTIMISE, "insert_fp8", lambda s: s.asked.quant == "fp8",
        lambda s: {
            "keep": tuple(x for x in s.asked.keep if not x.endswith(HEAD)),
            "heads": tuple(x.removesuffix(HEAD) for x in s.asked.keep if x.endswith(HEAD)),
        },
    ),
    Slot(
        Part.OPTIMISE, "quantize_weights",
        lambda s: s.asked.quant in GROUPED or s.asked.quant_embedding in GROUPED,
        lambda s: {
            "codes": QUANT[s.asked.quant] if s.asked.quant in GROUPED else "none",
            "table": QUANT[s.asked.quant_embedding] or "none",
            "group": _group(s),
            "keep": tuple(x for x in s.asked.keep if not x.endswith(WIDE)),
            "stays": s.can.formats or tuple(CODINGS),
            "wide": tuple(x.removesuffix(WIDE) for x in s.asked.keep if x.endswith(WIDE)),
        },
    ),
    Slot(
        Part.OPTIMISE, "choose_formats",
        options=lambda s: {
            "formats": s.can.formats if s.asked.codes else (), "tile": s.can.tile,
            "unsigned": s.can.unsigned, "limits": s.can.regions,
        },
    ),
    Slot(
        Part.OPTIMISE, "lower_moe_dispatch", lambda s: s.can.experts is not None,
        lambda s: {"kernels": s.can.experts},
    ),
    Slot(
        Part.OPTIMISE, "quantize_activations",
        lambda s: bool(s.can.activations) and s.asked.codes and _has_codes(s)
        and s.asked.activation_bits == CODED_ROWS,
        lambda s: {
            "weights": tuple(c for c in s.can.activations if s.asked.quant == "fp8" or c != FP8),
            "blocks": s.can.unsigned > 0, "powers": s.can.powers, "least": s.can.least,
        },
    ),
    Slot(Part.OPTIMISE, "pair_gates", lambda s: s.can.pairs and s.asked.codes and _has_codes(s)),
    Slot(
        Part.OPTIMISE, "quantize_cache", lambda s: CACHE_FORMATS[s.asked.cache_format] != "",
        lambda s: {"codes": CACHE_FORMATS[s.asked.cache_format]},
    ),
    Slot(
        Part.LOWER, "fuse",
        options=lambda s: {
            "level": min(s.asked.fusion_level, s.can.fuse),
            "limits": s.can.regions,
            "asked": s.asked.fusion_level if s.asked.fusion_level > s.can.fuse else None,
        },
    ),
    Slot(Part.LOWER, "own_outputs"),
    Slot(Part.EMIT, "cut_at_collectives", lambda s: s.asked.ranks != 1 and not s.can.collectives),
)  # fmt: skip
PASSES: Mapping[str, str] = {slot.name: slot.place for slot in SLOTS}
"""Every pass by name, in order, and where it is."""
_EMIT = tuple(slot.name for slot in SLOTS if slot.part is Part.EMIT)


def quantising(quant: str) -> str:
    """The pass that quantises weights to what is asked for."""
    return "insert_fp8" if quant == "fp8" else "quantize_weights"


def kind_of(name: str) -> type[Pass]:
    """The class of the pass called `name`. Raises `UsageError`."""
    check_names([name])
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def make(name: str, **options: Any) -> Pass:
    """The pass called `name`. Raises `UsageError`."""
    return kind_of(name)(**options)


def read(text: str, find: Callable[[str], Backend]) -> list[Pass]:
    """The passes that a text names, with their options; `find` gives a backend by name.

    Raises `UsageError`: the pass, the option, and what is allowed.
    """

    def ability(name: str, member: str) -> object:
        backend, _, target = name.partition("@")
        found = capabilities_of(find(backend), parse_target(target) if target else None)
        return getattr(found, member)

    calls = list(texts.read_calls(text))
    check_names([name for name, _ in calls])
    return [texts.made(kind_of(name), name, words, ability) for name, words in calls]


def capabilities_of(backend: Backend, target: Target | None = None) -> Capabilities:
    """What a backend can do for a target, by default its first.

    What it says of its kernels bears its name, so that options of passes can be told as text: that
    of the backend, and of the target where what it says depends on that.
    """
    usual = backend.capabilities(Target("cpu"))
    usual = backend.capabilities(parse_target(usual.targets[0]))
    can = usual if target is None else backend.capabilities(target)
    name = backend.name if can == usual else f"{backend.name}@{target}"
    limits, experts = can.regions, can.experts
    if limits.accepts is not None or limits != RegionLimits():
        limits = replace(limits, of=name)
    return replace(can, regions=limits, experts=experts and replace(experts, of=name))


def check_names(names: Sequence[str], also: Sequence[str] = ()) -> None:
    """Raise `UsageError` for a name that is neither a pass's nor one of `also`."""
    for name in names:
        if name not in PASSES and name not in also:
            raise UsageError(f"no pass is called {name!r}", hint=one_of(name, [*PASSES, *also]))


def has_entries(name: str) -> bool:
    """Whether a causal LM that was traced has its entries after this pass, and not one `step`."""
    order = list(PASSES)
    return name in order and order.index(name) >= order.index("specialise_entries")


def passes_for(
    program: Program, capabilities: Capabilities, options: PipelineOptions
) -> list[Pass]:
    """The passes that take `program` to what a backend of these capabilities runs."""
    setting = Setting(program, capabilities, options)
    return [make(s.name, **s.options(setting)) for s in SLOTS if s.applies(setting)]


def prepare(
    program: Program, backend: Backend, target: Target, options: PipelineOptions
) -> Prepared:
    """Take a program through the passes for a backend. Raises `UnsupportedOperator`."""
    manager = Manager(options.watch)
    capabilities = capabilities_of(backend, target)
    check_states(program, backend.name, capabilities)
    check_layout(options.cache, backend.name, capabilities)
    coded = capabilities.caches if options.codes else ()
    check_cache_format(options.cache_format, backend.name, coded)
    done = emitted = program = _in_numbers(program)
    passes = passes_for(program, capabilities, options)
    cache = PassCache(program, passes, backend, str(target)) if options.watch.is_quiet else None
    kept = None if cache is None else cache.load()
    if kept is not None:
        return kept
    for each, emitted in manager.steps(program, passes):
        if each.name not in _EMIT:
            done = emitted
    check_laid_out(done, manager.records, options.cache)
    check_cache_codes(done, manager.records, options.cache_format)
    if options.quant_embedding != "none":
        check_embedding(done, manager.records, backend.name)
    check_supported(emitted, backend)
    pruned = done.pruned()
    prepared = Prepared(pruned, pruned if emitted is done else emitted.pruned(), manager.records)
    if cache is not None:
        cache.store(prepared)
    return prepared


def until(
    program: Program, backend: Backend, target: Target, options: PipelineOptions, name: str
) -> tuple[Program, list[Pass]]:
    """The program as the pass called `name` gets it, and the passes from that one on."""
    program = _in_numbers(program)
    passes = passes_for(program, capabilities_of(backend, target), options)
    at = [each.name for each in passes].index(name)
    watch = Watch(progress=options.watch.progress)
    return Manager(watch).run(program, passes[:at]), passes[at:]


def quantised(records: Sequence[PassRecord], backend: str) -> Iterator[str]:
    """What to tell a user of weights that were to be quantised, and of rows that were."""
    by_name = {record.name: record.report for record in records}
    rows = by_name.get("quantize_activations", PassReport())
    if rows.fired:
        yield "rows that codes multiply are codes too; --activation-bits 16 leaves them as they are"
    asked = [by_name[name] for name in ("insert_fp8", "quantize_weights") if name in by_name]
    if not asked:
        return
    counts = Counter[str]()
    for each in asked:
        counts.update(each.facts)
    found = [f"{counts[c]} in {word}" for word, c in QUANT.items() if counts[c]]
    near = sum(len(each.near) for each in asked)
    kept = f"; {near} that products read are kept" if near else ""
    yield f"weights: {' and '.join(found) or 'none quantised'}{kept}"
    chosen = {name for each in asked for name in each.places.get("quantise", ())}
    plain = [miss for miss in by_name["choose_formats"].near if miss.where in chosen]
    if plain:
        reasons = ", ".join(dict.fromkeys(miss.reason for miss in plain))
        yield f"{len(plain)} of them are packed dequantised for {backend}: {reasons}"


def run(
    program: Program, backend: Backend, target: Target, options: PipelineOptions
) -> tuple[Program, list[PassRecord]]:
    """`prepare`, for who emits nothing."""
    done = prepare(program, backend, target, options)
    return done.program, done.records


def apply(program: Program, passes: Sequence[Pass | str], *, verify_each: bool = False) -> Program:
    """Run passes in order; a name is the pass with its default options.

    A program that is further than a pass needs is taken back where that loses nothing. Raises
    `UsageError` where it cannot be, or is not far enough.
    """
    manager = Manager(Watch(verify_each=verify_each))
    for each in _made(passes):
        program = manager.run(_ready(program, each), [each])
    return program


def explain(program: Program, each: Pass | str) -> str:
    """Where a pass fires on a program, and which condition failed where it nearly does."""
    (made,) = _made([each])
    return str(explain_pass(_ready(program, made), made))


def stages_for(passes: Sequence[Pass]) -> Sequence[Stage]:
    """The stages that a text may be at for the first of some passes, the earliest first."""
    return sorted(passes[0].needs) if passes else tuple(Stage)


def _made(passes: Sequence[Pass | str]) -> Iterator[Pass]:
    return (make(each) if isinstance(each, str) else each for each in passes)


def _in_numbers(program: Program) -> Program:
    """The program over weights in no format: what passes take until formats are chosen."""
    stored = any(t.format is not None for t in program.weight_types().values())
    if not stored or program.stage >= Stage.LOWERED:
        return program
    return make("choose_formats", formats=()).run(program, PassReport())


def _ready(program: Program, each: Pass) -> Program:
    """The program as a pass takes it: its regions opened again, its weights in no format."""
    order = list(PASSES)
    if each.name in order[: order.index("choose_formats")]:
        program = _in_numbers(program)
    if program.stage in each.needs:
        return program
    if program.stage >= Stage.LOWERED and Stage.OPTIMIZED in each.needs:
        return program.map_entries(inline_graph).at(Stage.OPTIMIZED)
    wanted = " or ".join(s.name for s in sorted(each.needs))
    if each.name not in PASSES:
        hint = "a pass from outside takes a program as it stands"
    elif program.stage < min(each.needs):
        passes = shlex.quote(",".join([*_before(each.name, program), each.text]))
        hint = f"run what leads there before it: -p {passes}"
    else:
        *_, last = [NOT_PASSES[0], *_before(each.name, program.at(Stage.TRACED))]
        hint = f"take the text from before it: dsc inspect MODEL --after {last}"
    raise UsageError(
        f"{each.name} takes a program at stage {wanted}, this one is at {program.stage.name}",
        hint=hint,
    )


def _before(name: str, program: Program) -> list[str]:
    """What every compile of a program runs before the pass of this name, whatever the backend."""
    least = Setting(program, Capabilities(absorbed=False), PipelineOptions())
    earlier = SLOTS[: list(PASSES).index(name)]
    return [slot.name for slot in earlier if slot.applies(least)]
