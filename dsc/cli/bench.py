"""`dsc bench`: how fast a compiled model prefills and decodes on this machine."""

from __future__ import annotations

import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from dsc.cli import console, options

if TYPE_CHECKING:
    from dsc.runtime.protocol import Spread, Turn


def bench(
    command: Context,
    artifact: options.Artifact,
    prompt_len: Annotated[int, Option("--prompt-len", min=1, help="Tokens to prefill.")] = 512,
    context: Annotated[
        int, Option("--context", min=1, help="Tokens in the cache when decoding begins.")
    ] = 128,
    batch: Annotated[int, Option("--batch", min=1, help="Sequences in a step.")] = 1,
    tokens: Annotated[int, Option("--tokens", min=2, help="Decode steps of a round.")] = 20,
    rounds: Annotated[int, Option("--rounds", min=1, help="Rounds of decode steps.")] = 15,
    repeats: Annotated[int, Option("--repeats", min=1, help="Prefills measured.")] = 5,
    threads: options.Threads = None,
    pin: options.Pin = None,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Measure prefill and decode of the model in OUT with random tokens.

    Each round of decode steps, and each prefill, lies between two readings of the machine's memory
    bandwidth, over as many bytes as a step reads, and its matrix peak; rounds whose readings differ
    by more than 10% are dropped. What is left is given as medians with quartiles, and as a share of
    the limit: the time that reading weights and cache, or computing, takes at those readings. On a
    GPU they are its own: the speed of a copy, read and written, and of its matrix units. An
    artifact of several ranks runs as that many processes, each with its part of the machine.

    Example: dsc bench v3-tvm --prompt-len 512 --context 1024 --json
    """
    from dsc import api
    from dsc.cli.measuring import (
        check_fits,
        machine_threads,
        probes,
        random_ids,
        read_speed,
        tell_stand_in,
        unread,
        vocabulary,
    )  # fmt: skip
    from dsc.cli.ranks import launch_ranks, must_launch, speaks
    from dsc.runtime.limit import limit_seconds, prefill_work, step_work, working_set
    from dsc.runtime.probes import Machine, steadily

    if must_launch(artifact):
        launch_ranks(command, artifact)
        return
    start = time.perf_counter()
    compiled = api.load(artifact, trust=trust, **options.chosen(threads=threads, pin=pin))
    vocab, steps = vocabulary(compiled.program), context + tokens * (rounds + 1)
    check_fits(
        compiled,
        batch,
        (prompt_len, "--prompt-len"),
        (steps, f"--context, and --tokens in {rounds} --rounds and a warm-up"),
    )
    tell_stand_in(compiled.executable, "nothing to be measured")
    session = compiled.session(max_batch=batch, max_context=steps)
    loading = time.perf_counter() - start
    compiled.session(max_batch=batch, max_context=prompt_len).prefill(
        random_ids(vocab, batch, prompt_len)
    )
    memory = peak_rss()  # before the probe takes a gigabyte
    chunk = getattr(session, "prefill_chunk", prompt_len)
    prompt = prefill_work(compiled.program, batch, prompt_len, chunk)
    step = step_work(compiled.program, batch, 1, context + tokens * (rounds + 1) // 2)
    if not speaks():  # the same steps as rank 0, and no readings
        measure_prefill(compiled, vocab, batch, prompt_len, repeats, lambda: 1.0)
        measure_decode(session, vocab, batch, context, tokens, rounds, lambda: 1.0)
        return
    count, ranks = machine_threads(threads)
    first = prefill_work(compiled.program, batch, min(chunk, prompt_len), chunk)
    with (
        console.progress_bar() as progress,
        probes(compiled, count, ranks * working_set(step)) as found,
    ):
        progress("reading the machine's speed")
        with read_speed(compiled, count, ranks * working_set(first)) as whole:
            reading = steadily(whole)
        computing = steadily(found.product)
        coding = found.coded() if any(w.coded for w in (*prompt, *step)) else None
        bandwidth = steadily(found.read)
        speed = Machine(bandwidth, computing, count, found.size, found.dtype, coding, found.device)
        product = told(found.product, progress, "prefill", repeats)
        prefills = measure_prefill(compiled, vocab, batch, prompt_len, repeats, product)
        read = told(found.read, progress, "decode", rounds)
        decodes = measure_decode(session, vocab, batch, context, tokens, rounds, read)

    gain = (coding or computing) / computing  # of codes, whatever the clock is at the moment

    def least_prefill(matrix: float) -> float:
        return limit_seconds(prompt, reading / ranks, matrix / ranks, gain * matrix / ranks)

    def least_step(bandwidth: float) -> float:
        return limit_seconds(step, bandwidth / ranks, computing / ranks, gain * computing / ranks)

    note = unread(compiled)
    result = {
        "backend": compiled.backend,
        "device": compiled.targets[0],
        "ranks": ranks,
        "batch": batch,
        "threads": count,
        "load_s": loading,
        "peak_rss_bytes": memory,
        "machine": speed.as_dict(),
        "prefill": {
            "tokens": prompt_len,
            **summary(prefills, batch * prompt_len, None if note else least_prefill, note),
        },
        "decode": {
            "context": context,
            **summary(decodes, batch, None if note else least_step, note),
        },
    }
    if json:
        console.print_json(result)
        return
    _show(result)


def _show(result: Mapping[str, Any]) -> None:
    for phase in ("prefill", "decode"):
        found: Any = result[phase]
        dropped, rounds = found["rounds_dropped"], found["rounds"]
        left_out = f"{dropped} of {rounds} rounds dropped"
        if dropped == rounds:
            left_out = f"of all {rounds} rounds, none of which was steady: measure again"
        low, high = found["quartiles_ms"]
        share = "" if found["of_limit"] is None else f"   {found['of_limit']:.0%} of the limit"
        console.stdout().print(
            f"{phase:8} {found['tokens_per_s']:10.1f} tokens/s   {found['median_ms']:.3f} ms a step"
            f" (quartiles {low:.3f} to {high:.3f}){share}"
            f"   {left_out}"
        )
        if found["limit_note"]:
            console.stdout().print(f"{'':8} {found['limit_note']}")
    machine: Any = result["machine"]
    shared = f" on each of {result['ranks']} ranks" if result["ranks"] > 1 else ""
    coded = machine["coded_op_per_s"]
    codes = f" (of codes {coded / 1e9:.0f})" if coded else ""
    on = machine.get("device") or f"{result['threads']} threads"
    console.stdout().print(
        f"machine  read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s over"
        f" {console.human_bytes(machine['read_bytes'])}, {machine['matrix_dtype']} matrix product"
        f" {machine['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s{codes},"
        f" {on}; loaded in {result['load_s']:.2f} s,"
        f" peak RSS {console.human_bytes(result['peak_rss_bytes'])}{shared}"
    )


def told(
    probe: Callable[[], float], progress: Callable[[str, int, int], None], what: str, turns: int
) -> Callable[[], float]:
    """A probe that says how many turns are done, as it is called before and after each of them."""
    done = itertools.count()
    progress(what, 0, turns)

    def probed() -> float:
        progress(what, next(done), turns)
        return probe()

    return probed


def measure_prefill(
    compiled: Any,
    vocab: int,
    batch: int,
    length: int,
    repeats: int,
    probe: Callable[[], float],
) -> list[Turn[float]]:
    """Return turns of one prefill each of [batch, length] tokens into an empty cache."""
    from dsc.cli.measuring import random_ids
    from dsc.runtime.probes import seconds_of
    from dsc.runtime.protocol import take_turns

    ids = random_ids(vocab, batch, length)

    def once() -> list[float]:
        session = compiled.session(max_batch=batch, max_context=length)
        return [seconds_of(partial(session.prefill, ids))]

    once()
    return take_turns(probe, once, repeats)


def measure_decode(
    session: Any,
    vocab: int,
    batch: int,
    context: int,
    tokens: int,
    rounds: int,
    probe: Callable[[], float],
) -> list[Turn[float]]:
    """Return turns of `tokens` decode steps each, after `context` tokens and a warm-up."""
    from dsc.cli.measuring import random_ids
    from dsc.runtime.probes import seconds_of
    from dsc.runtime.protocol import take_turns

    session.prefill(random_ids(vocab, batch, context))
    ids = random_ids(vocab, batch, tokens)

    def steps() -> list[float]:
        return [seconds_of(partial(session.decode, ids[:, i])) for i in range(tokens)]

    steps()
    return take_turns(probe, steps, rounds)


def summary(
    turns: Sequence[Turn[float]],
    tokens: int,
    limit: Callable[[float], float] | None,
    unread: str = "",
) -> dict[str, Any]:
    """Summarise turns whose steps process `tokens` tokens each.

    `limit` gives the least seconds of a step at the speed that the probes read; None where they
    read no speed of the device that ran. `of_limit` is None then, and `limit_note` is `unread`.
    """
    from dsc.runtime.protocol import Spread, steady

    kept = steady(turns, float)
    used = kept or turns
    times = Spread.of([t for turn in used for t in turn.seconds])
    share, quartiles, note = None, None, unread
    if limit is not None:
        share, quartiles, note = judged(Spread.of([_share(turn, limit) for turn in used]))
    return {
        "tokens_per_s": tokens / times.median,
        "median_ms": times.median * 1e3,
        "quartiles_ms": [times.low * 1e3, times.high * 1e3],
        "of_limit": share,
        "of_limit_quartiles": quartiles,
        "limit_note": note,
        "limit_passed": limit is not None and bool(note),
        "steps": times.count,
        "rounds": len(turns),
        "rounds_dropped": len(turns) - len(kept),
    }


def judged(shares: Spread) -> tuple[float | None, list[float] | None, str]:
    """The share of the limit that may be told, its quartiles, and what has to be said about them.

    It is told as it was measured, above 1 as well; beyond `PASSED` the probes are wrong, which is
    said. Of steps that were faster yet the limit was none.

    >>> from dsc.runtime.protocol import Spread
    >>> judged(Spread(0.5, 0.4, 0.6, 9))
    (0.5, [0.4, 0.6], '')
    >>> judged(Spread(1.04, 0.9, 1.1, 9))[:2], judged(Spread(1.5, 1.4, 1.6, 9))[:2]
    ((1.04, [0.9, 1.1]), (None, None))
    """
    from dsc.runtime.protocol import DRIFT, faster

    note = faster(shares)
    if shares.median > 1.0 + DRIFT:
        return None, None, f"no share of a limit: {note}"
    note = f"the probes are wrong: {note}" if note else ""
    return shares.median, [shares.low, shares.high], note


def _share(turn: Turn[float], limit: Callable[[float], float]) -> float:
    """The limit of a step, at the speed around this turn, as a share of what the step took."""
    return limit((turn.before + turn.after) / 2) / statistics.median(turn.seconds)


def peak_rss() -> int:
    """Return the most bytes of memory that this process held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
