"""`dsc profile`: where the time of a compiled model goes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Context, Option

from dsc.cli import console, options
from dsc.files import check_writable

if TYPE_CHECKING:
    from dsc.runtime.profiler import Event, Profiler, Row

Phase = Literal["decode", "prefill"]
Group = Literal["operator", "kernel", "module", "layer"]
Sort = Literal["total", "self", "calls", "bytes", "flops", "name"]


def profile(
    command: Context,
    artifact: options.Artifact,
    phase: Annotated[Phase, Option("--phase", help="Which steps are profiled.")] = "decode",
    prompt_len: Annotated[int, Option("--prompt-len", min=1, help="Tokens to prefill.")] = 512,
    context: Annotated[
        int, Option("--context", min=1, help="Tokens in the cache when decoding begins.")
    ] = 128,
    batch: Annotated[int, Option("--batch", min=1, help="Sequences in a step.")] = 1,
    tokens: Annotated[int, Option("--tokens", min=1, help="Decode steps, or prefills.")] = 16,
    warmup: Annotated[
        int, Option("--warmup", min=0, help="Steps, or prefills, run before and left out.")
    ] = 2,
    group_by: Annotated[Group, Option("--group-by", help="What a row of the table is.")] = (
        "operator"
    ),
    sort_by: Annotated[Sort, Option("--sort-by", help="The order of the rows.")] = "self",
    row_limit: Annotated[int, Option("--row-limit", min=0, help="Rows at most; 0: all.")] = 0,
    trace: Annotated[
        Path | None,
        options.unset(
            "--trace", metavar="FILE", help="Write a trace for Perfetto or chrome://tracing."
        ),
    ] = None,
    threads: options.Threads = None,
    pin: options.Pin = None,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Profile decode steps, or prefills, of the model in OUT on random tokens.

    A row tells what a step takes there: the median over the steps, the least, and what 95% of them
    kept within. Rates are shown as shares of the memory bandwidth, over as many bytes as a step
    reads, and the matrix peak that this machine reads at the same time, on a GPU of its copies and
    its matrix units. tvm, onnxruntime and reference time every operator, triton every launch, by
    events on the GPU. Of an artifact of several ranks, rank 0 is profiled.

    Examples:

        dsc profile v3-tvm --context 4096 --group-by module

        dsc profile v3-tvm --phase prefill --trace trace.json
    """
    from dsc import api
    from dsc.cli.measuring import (
        check_fits,
        machine_of,
        tell_stand_in,
        unread,
        vocabulary,
    )  # fmt: skip
    from dsc.cli.ranks import launch_ranks, must_launch, speaks
    from dsc.runtime.profiler import Profiler
    from dsc.runtime.stats import entry_rows, working_set

    if trace is not None:
        check_writable(trace)
    if must_launch(artifact):
        launch_ranks(command, artifact)
        return
    compiled = api.load(artifact, trust=trust, **options.chosen(threads=threads, pin=pin))
    vocab, note = vocabulary(compiled.program), unread(compiled)
    if phase == "decode":
        asked = (context + tokens + warmup, "--context, --tokens and --warmup")
    else:
        asked = (prompt_len, "--prompt-len")
    check_fits(compiled, batch, asked)
    tell_stand_in(compiled.executable, "nothing to be measured")
    found = None
    with console.progress_bar() as progress:
        progress(phase)
        if phase == "decode":
            profiler = _decode(compiled, Profiler(), vocab, batch, context, tokens, warmup)
        else:
            profiler = _prefill(compiled, Profiler(), vocab, batch, prompt_len, tokens, warmup)
        if not speaks():
            return
        if not note:
            progress("reading the machine's speed")
            coded = any(event.coded for event in profiler.events)
            found = machine_of(compiled, threads, working_set(profiler.events), coded)
    if trace is not None:
        profiler.export_chrome_trace(trace)
    memory = memory_facts(compiled, profiler.events, batch)
    if json:
        console.print_json(
            {
                "rows": [_row(row) for row in profiler.rows(sort_by, row_limit, group_by)],
                "steps": [_row(row) for row in entry_rows(profiler.events)],
                "warmup": warmup,
                "memory": memory,
                "machine": None if found is None else found.as_dict(),
            }
        )
        return
    profiler.print_stats(sort_by, row_limit, group_by, found, shares=found is not None)
    line = (f"{name.replace('_', ' ')} {console.human_bytes(n)}" for name, n in memory.items())
    console.stdout().print(f"{warmup} more were run before and left out")
    if note:
        console.stdout().print(note)
    console.stdout().print("memory: " + ", ".join(line))


def _decode(
    compiled: Any,
    profiler: Profiler,
    vocab: int,
    batch: int,
    context: int,
    tokens: int,
    warmup: int,
) -> Profiler:
    """Profile decode steps after some that are not counted."""
    from dsc.cli.measuring import random_ids

    session = compiled.session(max_batch=batch, max_context=context + tokens + warmup)
    session.prefill(random_ids(vocab, batch, context))
    ids = random_ids(vocab, batch, tokens + warmup)
    for i in range(warmup):
        session.decode(ids[:, tokens + i])
    with profiler:
        for i in range(tokens):
            session.decode(ids[:, i])
    return profiler


def _prefill(
    compiled: Any,
    profiler: Profiler,
    vocab: int,
    batch: int,
    length: int,
    times: int,
    warmup: int,
) -> Profiler:
    """Profile prefills into empty caches after some that are not counted."""
    from dsc.cli.measuring import random_ids

    ids = random_ids(vocab, batch, length)
    for _ in range(warmup):
        compiled.session(max_batch=batch, max_context=length).prefill(ids)
    sessions = [compiled.session(max_batch=batch, max_context=length) for _ in range(times)]
    with profiler:
        for session in sessions:
            session.prefill(ids)
    return profiler


def memory_facts(compiled: Any, events: Sequence[Event], batch: int) -> dict[str, int]:
    """Return bytes of weights, of one token's caches, and of what lives during a step at most."""
    from dsc.report import cache_bytes

    facts = {"weights": sum(int(t.nbytes) for t in compiled.program.weight_types().values())}
    facts["caches_a_token"] = batch * cache_bytes(compiled.program)
    live = [e.live for e in events if e.live is not None]
    return facts | ({"intermediates_at_most": max(live)} if live else {})


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "calls": row.calls,
        "total_s": row.seconds,
        "self_s": row.self_seconds,
        "runs": len(row.runs),
        "median_s": row.median,
        "least_s": row.least,
        "p95_s": row.p95,
        "bytes": row.bytes,
        "flops": row.flops,
    }
