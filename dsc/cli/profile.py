"""`dsc profile`: where the time of a compiled model goes, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from dsc.cli import options

if TYPE_CHECKING:
    from dsc.runtime.profiler import Event, Profiler, Row

Phase = Literal["decode", "prefill"]
Group = Literal["operator", "kernel", "module", "layer"]
Sort = Literal["total", "self", "calls", "bytes", "flops", "name"]


def profile(
    artifact: options.Artifact,
    phase: Annotated[Phase, Option("--phase", help="Which steps are profiled.")] = "decode",
    prompt_len: Annotated[int, Option("--prompt-len", min=1, help="Tokens to prefill.")] = 512,
    context: Annotated[
        int, Option("--context", min=1, help="Tokens in the cache when decoding begins.")
    ] = 128,
    batch: Annotated[int, Option("--batch", min=1, help="Sequences in a step.")] = 1,
    tokens: Annotated[int, Option("--tokens", min=1, help="Decode steps, or prefills.")] = 16,
    group_by: Annotated[Group, Option("--group-by", help="What a row of the table is.")] = (
        "operator"
    ),
    sort_by: Annotated[Sort, Option("--sort-by", help="The order of the rows.")] = "self",
    row_limit: Annotated[int, Option("--row-limit", min=0, help="Rows at most; 0: all.")] = 0,
    trace: Annotated[
        Path | None,
        Option(
            "--trace",
            metavar="FILE",
            help="Write a trace for Perfetto or chrome://tracing.",
            show_default=False,
        ),
    ] = None,
    threads: options.Threads = None,
    pin: options.Pin = None,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Profile decode steps, or prefills, of the model in OUT on random tokens.

    Rates are shown as shares of the memory bandwidth and the matrix peak that this machine reads
    at the same time. tvm, onnxruntime and reference time every step; triton and null the whole
    entry, which then is the only row.

    Examples:

        dsc profile v3-tvm --context 4096 --group-by module

        dsc profile v3-tvm --phase prefill --trace trace.json
    """
    from dsc import api
    from dsc.cli import console
    from dsc.cli.bench import vocabulary
    from dsc.cli.generate import manifest_config
    from dsc.files import check_writable
    from dsc.runtime.probes import available, machine
    from dsc.runtime.profiler import Profiler

    if trace is not None:
        check_writable(trace)
    compiled = api.load(artifact, trust=trust, **options.chosen(threads=threads, pin=pin))
    vocab = vocabulary(manifest_config(artifact))
    with console.progress_bar() as progress:
        progress(phase)
        if phase == "decode":
            profiler = _decode(compiled, Profiler(), vocab, batch, context, tokens)
        else:
            profiler = _prefill(compiled, Profiler(), vocab, batch, prompt_len, tokens)
        progress("reading the machine's speed")
        found = machine(threads or available())
    if trace is not None:
        profiler.export_chrome_trace(trace)
    rows = profiler.rows(sort_by, row_limit, group_by)
    memory = memory_facts(compiled, profiler.events, batch)
    if json:
        facts = {"read_bytes_per_s": found.bandwidth, "matrix_flop_per_s": found.matrix}
        table = [_row(row) for row in rows]
        console.print_json({"rows": table, "memory": memory, "machine": facts})
        return
    profiler.print_stats(sort_by, row_limit, group_by, found)
    line = (f"{name.replace('_', ' ')} {console.human_bytes(n)}" for name, n in memory.items())
    console.stdout().print("memory: " + ", ".join(line))


def _decode(
    compiled: Any, profiler: Profiler, vocab: int, batch: int, context: int, tokens: int
) -> Profiler:
    """Profile decode steps after one that is not counted."""
    from dsc.cli.bench import random_ids

    session = compiled.session(max_batch=batch, max_context=context + tokens + 1)
    session.prefill(random_ids(vocab, batch, context))
    ids = random_ids(vocab, batch, tokens + 1)
    session.decode(ids[:, tokens])
    with profiler:
        for i in range(tokens):
            session.decode(ids[:, i])
    return profiler


def _prefill(
    compiled: Any, profiler: Profiler, vocab: int, batch: int, length: int, times: int
) -> Profiler:
    """Profile prefills into empty caches after one that is not counted."""
    from dsc.cli.bench import random_ids

    ids = random_ids(vocab, batch, length)
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
        "bytes": row.bytes,
        "flops": row.flops,
    }
