"""The public API: `dsc.compile`, beside `dsc.load` and the `CompiledModel` that both return.

What only compiling needs is imported when something is compiled: a loaded model starts sooner.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dsc import backends
from dsc.backends.base import Backend, EmitOptions, Warms
from dsc.compiled import CompiledModel, check_kinds, load
from dsc.errors import MemoryLimitError, UnsupportedOperator, UsageError
from dsc.files import check_fillable
from dsc.ir.limits import Limits
from dsc.ir.program import Program
from dsc.ir.types import PRECISIONS
from dsc.runtime.emission import Progress
from dsc.runtime.plan import Plan
from dsc.settings import debug_mode, memory_limit
from dsc.targets import Target, parse_target

if TYPE_CHECKING:
    from dsc.frontends.facts import Facts

__all__ = ["CompiledModel", "compile", "compile_program", "load"]

PREFERENCE = ("tvm", "onnxruntime", "reference")
"""Backends by preference where the user names none."""


def compile(
    model: Any,
    *,
    config: str | Path | None = None,
    weights: str | Path | None = None,
    revision: str | None = None,
    backend: str | None = None,
    target: str | Sequence[str] | None = None,
    fusion_level: int = 3,
    dtype: str | None = None,
    max_batch: int = 4,
    max_context: int | None = None,
    prefill_chunk: int = 512,
    rope_scaling: str | None = None,
    cache: str = "contiguous",
    cache_format: str = "bf16",
    threads: int | None = None,
    fallback: str | None = None,
    ranks: int = 1,
    parallel: str = "tp+ep",
    quant: str = "none",
    keep: Sequence[str] = (),
    group_size: int | None = None,
    quant_embedding: str = "none",
    activation_bits: int = 8,
    calibrate: Any = None,
    nsamples: int = 4,
    seqlen: int | None = None,
    avg_bits: float | None = None,
    print_ir_after: Sequence[str] = (),
    dump_dir: str | Path | None = None,
    verify_each: bool = False,
    backend_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a model for a backend.

    Args:
        model: a checkpoint folder, ORG/NAME of the Hugging Face Hub, a `.py` file with
            `build(config)`, a built-in name, a `.dsc` file, a transformers causal LM, or a
            `Program`.
        config: a preset's name or a config.json, for models built from code.
        weights: a folder of safetensors files, or "none" to compile without values.
        revision: a branch, a tag or a commit of a model on the Hub; its main branch by default.
        backend: triton, tvm, onnxruntime, reference or null; the best that runs here by default.
        target: one or more of cpu, cuda:sm_90, …; by default the first of the backend's, or where
            that is a GPU the one at hand.
        fusion_level: 0 to 3. onnxruntime fuses for itself, whatever the level. Where a
            level is not taken, report.json has `level` and `level_asked`.
        dtype: fp32, bf16 or fp16; the checkpoint's own by default.
        max_batch: sequences in one step, at most.
        max_context: tokens a sequence may hold, at most; the model's own limit by default.
        prefill_chunk: tokens of a prompt that are processed at once.
        rope_scaling: a scaling that extends a checkpoint's context, and by how much: "yarn:4",
            "linear:2" or "llama3:8". The model's own scaling needs no word.
        cache: "contiguous", max_context rows for each sequence; "paged", pages of 64 rows that
            a session's sequences take as they grow; or, of ONNX exports, which grow caches step by
            step by default, "in-place": new rows are written where there is room for them.
        cache_format: what latent caches are kept in: "fp8" or "int8", codes and a scale for each
            128 elements of a row; "bf16", the compute type. Rope keys stay in the compute type.
        threads: CPU threads of the compiled code.
        fallback: a backend for what `backend` refuses; only whole programs so far.
        ranks: processes that run the model together, each with its part of the weights.
        parallel: how ranks share it: "tp+ep" (heads, rows and vocabulary split, experts dealt
            out), "tp" (experts split as well) or "ep" (only the experts shared).
        quant: "int8" or "int4" stores the weights of linears and experts in codes of so many bits,
            with a scale in fp16 for each `group_size` columns of a row; the head's in 8 bits. "fp8"
            stores blocks of 128 x 128, and takes rows so too; the head stays. A
            backend that does not read such weights gets their rounded values, and a note says so.
        keep: weights that stay as they are: names or beginnings of names of their tensors in the
            checkpoint, such as "lm_head" or "model.layers.0", or patterns: "*.self_attn.*". With
            ":int8" behind it, "*.down_proj:int8", such weights stay in 8 bits under int4; "fp8"
            takes the head too where "lm_head:fp8" is given.
        group_size: columns of a row that share a scale; as many as the backend wants by default: on
            onnxruntime 128, or 64 or 32 where experts have no whole groups, and 32 elsewhere.
        quant_embedding: "int8" or "int4" stores the embedding's table in such codes too, whatever
            `quant` is; a head that is tied to it is the same tensor, and has the same codes. For
            onnxruntime, reference and null.
        activation_bits: 8, rows that codes multiply are codes too, on backends with kernels for
            it; 16, they stay in the compute type.
        calibrate: a text's path, a text, or token ids, on which the model runs with each product
            quantised alone; what harms most is kept, of int4 in 8 bits first, and then in the
            compute type. `report["quantisation"]` has it all. For a program that is no language
            model: its inputs by name, or a list of such.
        nsamples: windows of the text that are taken, spread evenly.
        seqlen: tokens of each; 256 by default, or what a step takes.
        avg_bits: bits a weight of linears and experts, scales counted, up to which the worst are
            kept (auto-round's term); half a bit more than `quant` takes by default.
        print_ir_after: passes after which the text IR is printed, or "all".
        dump_dir: a folder for numbered text after each pass.
        verify_each: interpret before and after each pass and compare.
        backend_options: what only one backend reads, such as opset and caches of onnxruntime.
        progress: called with (what, done, total).

    Raises:
        DscError: one of its classes, with what is wrong, where, and what to do.
    """
    from dsc import pipeline
    from dsc.asked import check_cache_format, check_quant, check_widths
    from dsc.calibration.asked import trial_of
    from dsc.frontends.load import load_program
    from dsc.passes.shard import check_parallel, check_parts
    from dsc.report import build_report
    from dsc.rewrite.manager import NOT_PASSES, Watch

    sizes = {"max_batch": max_batch, "prefill_chunk": prefill_chunk, "ranks": ranks}
    sizes |= {"activation_bits": activation_bits, "nsamples": nsamples}
    check_kinds(int, False, fusion_level=fusion_level, **sizes)
    check_kinds(int, True, max_context=max_context, threads=threads, seqlen=seqlen)
    check_kinds(int, True, group_size=group_size)
    words = {"cache": cache, "cache_format": cache_format, "parallel": parallel, "quant": quant}
    check_kinds(str, False, quant_embedding=quant_embedding, **words)
    check_kinds(str, True, backend=backend, dtype=dtype, fallback=fallback, revision=revision)
    check_kinds(str, True, rope_scaling=rope_scaling)
    _check_options(fusion_level, dtype, max_batch, max_context, prefill_chunk)
    check_parallel(ranks, parallel)
    pipeline.check_names(print_ir_after, NOT_PASSES)
    check_quant(quant, keep, quant_embedding)
    check_cache_format(cache_format)
    check_widths(group_size, activation_bits, quant, quant_embedding)
    trial = trial_of(calibrate, quant, nsamples, seqlen, avg_bits)

    def check_facts(facts: Facts) -> None:
        if facts.num_attention_heads is not None:
            check_parts(facts.num_attention_heads, facts.experts or 0, ranks, parallel)

    folder = Path(dump_dir) if dump_dir is not None else None
    if folder is not None:
        check_fillable(folder)
    start = time.perf_counter()
    chosen = backends.get(backend) if backend else best_backend()
    targets = _targets(target, chosen)
    spare = backends.get(fallback) if fallback else None
    extra = dict(backend_options or {})
    _check_extra(extra, chosen, targets[0])
    loaded = load_program(
        model,
        config=config,
        weights=weights,
        revision=revision,
        dtype=PRECISIONS[dtype] if dtype else None,
        max_batch=max_batch,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        rope_scaling=rope_scaling,
        check_facts=check_facts,
        untraced=lambda: warm(chosen.name, model=extra.get("tune", True)),
        progress=progress,
    )
    traced = time.perf_counter()
    watch = Watch(tuple(print_ir_after), folder, verify_each or debug_mode(), progress)
    limits = loaded.program.limits
    options = pipeline.PipelineOptions(
        fusion_level=fusion_level,
        prefill_chunk=min(prefill_chunk, limits.prefill_chunk),
        cache=cache,
        cache_format=cache_format,
        ranks=ranks,
        parallel=parallel,
        quant=quant,
        keep=tuple(keep),
        group_size=group_size,
        quant_embedding=quant_embedding,
        activation_bits=activation_bits,
        codes=extra.get("form") not in chosen.capabilities(targets[0]).plain_forms,
        watch=watch,
    )
    found = None
    if trial is not None:
        from dsc.calibration.calibrate import measured

        found, options = measured(loaded, chosen, targets[0], options, trial, progress)
    calibrated = time.perf_counter()
    try:
        done = pipeline.prepare(loaded.program, chosen, targets[0], options)
    except UnsupportedOperator as refused:
        if spare is None:
            raise
        chosen = spare
        targets = _targets(None, chosen)
        known = chosen.capabilities(targets[0]).options
        extra = {name: value for name, value in extra.items() if name in known}
        done = pipeline.prepare(loaded.program, chosen, targets[0], options)
        loaded.notes.append(f"the whole program runs on {fallback}: {refused.what}")
    optimised = time.perf_counter()
    program, emitted, records = done
    loaded.notes.extend(pipeline.quantised(records, chosen.name))

    def admit(plan: Plan) -> None:
        check_plans(plan, emitted)
        check_memory(program, plan, targets[0], limits)

    asked = EmitOptions(targets, threads, progress, extra=extra, admit=admit)
    if progress is not None:
        progress("planning", 0, 0)
    emission = chosen.emit(emitted, asked)
    if ranks > 1:  # run.py knows one process
        emission = replace(emission, runner="")
    seconds = {
        "trace": round(traced - start, 3),
        "passes": round(optimised - calibrated, 3),
        "emit": round(time.perf_counter() - optimised, 3),
    }
    notes = [*loaded.notes, *emission.notes]
    report = build_report(program, records, seconds, notes, emission.plan)
    if found is not None:
        seconds["calibrate"] = round(calibrated - traced, 3)
        report |= {"seconds": seconds, "quantisation": found}
    return CompiledModel(
        program=program,
        backend=chosen.name,
        report=report,
        targets=tuple(str(t) for t in targets),
        source=loaded.source,
        _emission=emission,
        _files=loaded.files,
    )


def compile_program(
    program: Program,
    backend: str | None = None,
    fusion_level: int = 3,
    memory_reuse: bool = True,
    target: str = "cpu",
) -> CompiledModel:
    """Compile a program that is already traced: what `@dsc.optimize` and torch.compile use."""
    from dsc import pipeline
    from dsc.report import build_report

    chosen = backends.get(backend) if backend else best_backend()
    if program.is_causal_lm:
        program = program.limited(Limits())
    options = pipeline.PipelineOptions(fusion_level=fusion_level)
    place = parse_target(target)
    done, records = pipeline.run(program, chosen, place, options)

    def admit(plan: Plan) -> None:
        check_plans(plan, done)
        check_memory(done, plan, place, Limits(1, 1, 1))

    emission = chosen.emit(done, EmitOptions((place,), reuse=memory_reuse, admit=admit))
    return CompiledModel(
        program=done,
        backend=chosen.name,
        report=build_report(done, records, {}, [], emission.plan),
        _emission=emission,
    )


def warm(backend: str | None, model: bool = False) -> None:
    """Have a backend start what a compile is about to need, while a function or model is traced."""
    chosen = backends.get(backend) if backend else best_backend()
    if isinstance(chosen, Warms):
        chosen.warm(model)


def check_plans(plan: Plan, program: Program) -> None:
    """Raise `VerificationError` for a plan that a lowering or the planner got wrong."""
    from dsc.runtime.check_plan import check_plan

    for name, entry in plan.entries.items():
        check_plan(entry, program.ranges(name), name)


def check_memory(program: Program, plan: Plan, target: Target, limits: Limits) -> None:
    """Raise `MemoryLimitError` when a plan needs more than the limit set for its device."""
    from dsc.report import state_bytes

    limit = memory_limit(target.kind)
    if limit is None:
        return
    weights = sum(cast(int, t.nbytes) for t in program.weight_types().values())
    arena = plan.needed_bytes

    def caches(max_context: int) -> int:
        return state_bytes(program, replace(limits, max_context=max_context))

    need = weights + arena + caches(limits.max_context)
    if need > limit:
        parts = (
            f"weights {weights / 1e6:.1f}, arena {arena / 1e6:.1f},"
            f" caches {caches(limits.max_context) / 1e6:.1f} MB"
        )
        shorter = range(limits.max_context)
        fitting = bisect_right(shorter, limit - weights - arena, key=caches) - 1
        if fitting > 0:
            fits = f"max_context={fitting} would fit"
        elif weights <= limit:
            fits = "a smaller prefill_chunk shrinks the arena; the weights stay"
        else:
            fits = "the weights alone are more: quant takes fewer bits, ranks share them"
        raise MemoryLimitError(
            f"{need / 1e6:.1f} MB on {target.kind}, the limit is {limit / 1e6:.1f} MB ({parts})",
            hint=f"raise it with dsc.set_memory_limit, or compile for less: {fits}",
        )


def best_backend() -> Backend:
    """The first backend of `PREFERENCE` whose packages are installed."""
    from importlib.util import find_spec

    here = (name for name in PREFERENCE if name == "reference" or find_spec(name) is not None)
    return backends.get(next(here))


def _targets(target: str | Sequence[str] | None, backend: Backend) -> tuple[Target, ...]:
    if target is None or target == "auto" or target == []:
        default = backend.capabilities(Target("cpu")).targets
        return (_at_hand(default) or parse_target(default[0]),)
    names = [target] if isinstance(target, str) else list(target)
    parsed = tuple(parse_target(n) for n in names)
    known = {t.partition(":")[0] for t in backend.capabilities(parsed[0]).targets}
    for each in parsed:
        if each.kind not in known:
            raise UsageError(
                f"the {backend.name} backend makes no code for {each}",
                hint=f"it takes {', '.join(sorted(known))}",
            )
    return parsed


def _at_hand(known: Sequence[str]) -> Target | None:
    """Of the targets of a backend for GPUs that of the first one here, if any."""
    from dsc.hardware import gpus

    if not parse_target(known[0]).is_gpu:
        return None
    return next((parse_target(gpu.target) for gpu in gpus() if gpu.target in known), None)


def _check_extra(given: Mapping[str, Any], backend: Backend, target: Target) -> None:
    """Raise `UsageError` for `backend_options` that the backend does not read."""
    known = backend.capabilities(target).options
    strange = sorted(str(name) for name in given if name not in known)
    if strange:
        raise UsageError(
            f"the {backend.name} backend has no option {', '.join(strange)}",
            hint=f"leave it out; there are {', '.join(known) or 'none'}",
        )


def _check_options(
    fusion_level: int,
    dtype: str | None,
    max_batch: int,
    max_context: int | None,
    prefill_chunk: int,
) -> None:
    from dsc.asked import check_fusion_level

    check_fusion_level(fusion_level)
    if dtype is not None and dtype not in PRECISIONS:
        raise UsageError(f"dtype {dtype!r}", hint=f"one of {', '.join(PRECISIONS)}")
    counts = {"max_batch": max_batch, "prefill_chunk": prefill_chunk, "max_context": max_context}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}", hint="give at least 1")
