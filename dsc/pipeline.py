"""THE list of passes, read top to bottom; and the functions that run it.

A program comes in as it was traced and leaves as the backend wants it. Passes are named lazily, by
`module:Class`, so that reading this file is knowing the order and importing it costs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dsc.backends.base import Backend, Capabilities, No
from dsc.errors import UnsupportedOperator, UsageError, one_of
from dsc.ir.paging import page_rows
from dsc.ir.program import Program
from dsc.ir.ranks import ranks_of
from dsc.ir.segments import cut
from dsc.ir.stages import Stage
from dsc.rewrite.base import Pass, PassReport
from dsc.rewrite.explain import explain_pass
from dsc.rewrite.manager import Manager, PassRecord, Watch
from dsc.rewrite.regions import inline_graph
from dsc.runtime.check_plan import check_plan
from dsc.targets import Target

RAISE = {
    "fold_empty": "dsc.passes.fold_empty:FoldEmpty",
    "fold_constants": "dsc.passes.fold_constants:FoldConstants",
    "canonicalise_views": "dsc.passes.canonicalise_views:CanonicaliseViews",
    "eliminate_common_subexpressions": (
        "dsc.passes.eliminate_common_subexpressions:EliminateCommonSubexpressions"
    ),
    "raise_rms_norm": "dsc.passes.raise_rms_norm:RaiseRmsNorm",
    "raise_swiglu": "dsc.passes.raise_swiglu:RaiseSwiglu",
    "raise_rope": "dsc.passes.raise_rope:RaiseRope",
    "raise_attention": "dsc.passes.raise_attention:RaiseAttention",
    "raise_append": "dsc.passes.raise_append:RaiseAppend",
    "raise_mla": "dsc.passes.raise_mla:RaiseMla",
    "raise_router": "dsc.passes.raise_router:RaiseRouter",
    "raise_experts": "dsc.passes.raise_experts:RaiseExperts",
    "raise_select_rows": "dsc.passes.raise_select_rows:RaiseSelectRows",
    "spell_out_sdpa": "dsc.passes.spell_out_sdpa:SpellOutSdpa",
    "eliminate_dead_code": "dsc.passes.eliminate_dead_code:EliminateDeadCode",
    "raise_canonical": "dsc.passes.raise_canonical:RaiseCanonical",
    "name_values": "dsc.passes.name_values:NameValues",
}
OPTIMISE = {
    "merge_shared_expert": "dsc.passes.merge_shared_expert:MergeSharedExpert",
    "specialise_entries": "dsc.passes.specialise_entries:SpecialiseEntries",
    "absorb_mla": "dsc.passes.absorb_mla:AbsorbMla",
    "append_cache_in_place": "dsc.passes.append_cache_in_place:AppendCacheInPlace",
    "page_cache": "dsc.passes.page_cache:PageCache",
    "shard": "dsc.passes.shard:Shard",
    "lower_moe_dispatch": "dsc.passes.lower_moe_dispatch:LowerMoeDispatch",
    "merge_projections": "dsc.passes.merge_projections:MergeProjections",
}
LOWER = {
    "fuse": "dsc.passes.fuse:Fuse",
}
PLAN = {
    "plan_memory": "dsc.passes.plan_memory:PlanMemory",
}
CACHES = ("contiguous", "paged")
"""Layouts of KV caches: a capacity of rows for each sequence, or pages that sequences take."""
PAGED = CACHES[1]
FUSION_LEVELS = range(4)
EPILOGUES = 2
"""Backends that fuse from this level on split a merged projection at no cost."""
HORIZONTAL = 3
"""From this level on operators side by side become one: a shared expert joins the routed ones."""
PASSES: Mapping[str, str] = {**RAISE, **OPTIMISE, **LOWER, **PLAN}


@dataclass(frozen=True)
class PipelineOptions:
    """What a user asked of the passes."""

    fusion_level: int = 3
    memory_reuse: bool = True
    prefill_chunk: int = 512
    cache: str = "contiguous"
    ranks: int = 1
    parallel: str = "tp+ep"
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        check_fusion_level(self.fusion_level)


def check_fusion_level(level: int) -> None:
    """Raise `UsageError` for a level that there is not."""
    if level not in FUSION_LEVELS:
        levels = ", ".join(map(str, FUSION_LEVELS))
        raise UsageError(f"fusion_level {level}", hint=f"one of {levels}")


def make(name: str, **options: Any) -> Pass:
    """The pass called `name`. Raises `UsageError`."""
    check_names([name])
    module, _, attribute = PASSES[name].partition(":")
    found: Pass = getattr(importlib.import_module(module), attribute)(**options)
    return found


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
    chosen: list[Pass] = []
    if program.stage < Stage.CANONICAL:
        chosen += [make(name) for name in RAISE]
    asked = options.fusion_level
    if capabilities.shared_experts and options.ranks == 1 and asked >= HORIZONTAL:
        chosen.append(make("merge_shared_expert"))
    chosen.append(make("specialise_entries", entries=capabilities.entries))
    if capabilities.absorbed:
        chosen.append(make("absorb_mla"))
    if options.cache == PAGED:
        chosen.append(make("page_cache"))
    elif capabilities.in_place_cache:
        chosen.append(make("append_cache_in_place", slack=options.prefill_chunk))
    if options.ranks != 1:
        chosen.append(make("shard", ranks=options.ranks, parallel=options.parallel))
    if capabilities.experts is not None:
        chosen.append(make("lower_moe_dispatch", kernels=capabilities.experts))
    level = min(asked, capabilities.fuse)
    if capabilities.fuse >= EPILOGUES:
        chosen.append(make("merge_projections"))
    chosen.append(make("fuse", level=level, limits=capabilities.regions, asked=asked))
    chosen.append(make("plan_memory", reuse=options.memory_reuse))
    return chosen


def run(
    program: Program, backend: Backend, target: Target, options: PipelineOptions
) -> tuple[Program, list[PassRecord]]:
    """Take a program through the passes for a backend. Raises `UnsupportedOperator`."""
    manager = Manager(options.watch)
    capabilities = backend.capabilities(target)
    if options.cache not in CACHES:
        raise UsageError(f"cache {options.cache!r}", hint=f"one of {', '.join(CACHES)}")
    if options.cache == PAGED and not capabilities.paged_cache:
        raise UsageError(
            f"the {backend.name} backend takes no caches in pages",
            hint="compile with --cache contiguous, or for a backend that takes pages: reference,"
            " null or tvm",
        )
    done = manager.run(program, passes_for(program, capabilities, options))
    if options.cache == PAGED:
        _check_paged(done, manager.records)
    emitted = for_emission(done, capabilities)
    check_supported(emitted, backend)
    for name, found in emitted.memory.items():
        check_plan(emitted.entries[name], found, emitted.symbols)
    return done.pruned(), manager.records


def _check_paged(program: Program, records: Sequence[PassRecord]) -> None:
    """Raise `UnsupportedOperator` with what `page_cache` met, unless the program has pages."""
    if any(page_rows(graph) for graph in program.entries.values()):
        return
    met = next(r.report.near for r in records if r.name == "page_cache")
    lines = [f"{m.reason} (at {m.where})" if m.where else m.reason for m in met]
    raise UnsupportedOperator(
        f"the caches of {program.name} cannot be put into pages:\n"
        + "\n".join(dict.fromkeys(lines) or ["it has no caches of latent attention"]),
        hint="compile with --cache contiguous",
    )


def for_emission(program: Program, capabilities: Capabilities) -> Program:
    """What a backend emits: the program, or its segments where it does not speak to other ranks."""
    if ranks_of(program) == 1 or capabilities.collectives:
        return program
    return make("plan_memory").run(cut(program), PassReport())


def check_supported(program: Program, backend: Backend) -> None:
    """Raise one `UnsupportedOperator` that lists every node the backend refuses, and why."""
    refused: dict[tuple[str, str], list[str]] = {}
    for graph in program.entries.values():
        for node in graph.nodes:
            answer = backend.supports(node)
            if isinstance(answer, No):
                refused.setdefault((node.op, answer.reason), []).append(node.loc or graph.name)
    if refused:
        lines = [
            f"{op}: {reason} (at {places[0]}{f' and {len(places) - 1} more' if places[1:] else ''})"
            for (op, reason), places in refused.items()
        ]
        raise UnsupportedOperator(
            f"the {backend.name} backend does not take:\n" + "\n".join(lines),
            hint="choose another backend; `dsc doctor` lists those that run here",
            places=[place for places in refused.values() for place in places],
        )


def apply(program: Program, names: Sequence[str], *, verify_each: bool = False) -> Program:
    """Run the named passes in order, each with its default options.

    A program that is further than a pass needs is taken back where that loses nothing. Raises
    `UsageError` where it cannot be, or is not far enough.
    """
    manager = Manager(Watch(verify_each=verify_each))
    for name in names:
        each = make(name)
        program = manager.run(_ready(program, each), [each])
    return program


def explain(program: Program, name: str) -> str:
    """Where a pass fires on a program, and which condition failed where it nearly does."""
    each = make(name)
    return str(explain_pass(_ready(program, each), each))


def stages_for(names: Sequence[str]) -> Sequence[Stage]:
    """The stages that a text may be at for the first of some passes, the earliest first."""
    return sorted(make(names[0]).needs) if names else tuple(Stage)


def _ready(program: Program, each: Pass) -> Program:
    """The program at a stage that a pass takes: its plan dropped, its regions opened again."""
    if program.stage in each.needs:
        return program
    if program.stage >= Stage.LOWERED and Stage.OPTIMIZED in each.needs:
        return replace(program.map_entries(inline_graph), memory={}).at(Stage.OPTIMIZED)
    wanted = " or ".join(s.name for s in sorted(each.needs))
    before = _before(each.name)
    hint = (
        f"run what leads there before it: -p {','.join([*before, each.name])}"
        if program.stage < min(each.needs)
        else f"take the text from before it: dsc inspect MODEL --after {before[-1]}"
    )
    raise UsageError(
        f"{each.name} takes a program at stage {wanted}, this one is at {program.stage.name}",
        hint=hint,
    )


def _before(name: str) -> list[str]:
    """What every compile of a traced model runs before the pass of this name."""
    order = [*RAISE, *(["specialise_entries"] if name == "absorb_mla" else [])]
    return order[: order.index(name)] if name in order else order
