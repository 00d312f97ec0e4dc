"""`dsc bench`: how fast a compiled model prefills and decodes on this machine."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from dsc.cli import options

if TYPE_CHECKING:
    from dsc.runtime.protocol import Turn

_VOCAB_SEED = 0


def bench(
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
    bandwidth and its matrix peak; rounds whose readings differ by more than 10% are dropped. What
    is left is given as medians with quartiles, and as a share of the limit: the time that reading
    weights and cache, or computing, takes at those readings.

    Example: dsc bench v3-tvm --prompt-len 512 --context 1024 --json
    """
    from dsc import api
    from dsc.cli import console
    from dsc.cli.generate import manifest_config
    from dsc.runtime.limit import limit_seconds, prefill_work, step_work
    from dsc.runtime.probes import MatrixProbe, ReadProbe, available, machine

    start = time.perf_counter()
    compiled = api.load(artifact, trust=trust, **options.chosen(threads=threads, pin=pin))
    vocab = vocabulary(manifest_config(artifact))
    session = compiled.session(max_batch=batch, max_context=context + tokens * (rounds + 1))
    loading = time.perf_counter() - start
    compiled.session(max_batch=batch, max_context=prompt_len).prefill(
        random_ids(vocab, batch, prompt_len)
    )
    memory = peak_rss()  # before the probe takes a gigabyte
    count = threads or available()
    found = machine(count)
    reading = found.bandwidth
    with (
        console.progress_bar() as progress,
        ReadProbe(count) as read,
        MatrixProbe(count) as product,
    ):
        progress("prefill")
        chunk = getattr(session, "prefill_chunk", prompt_len)
        prefills = measure_prefill(compiled, vocab, batch, prompt_len, repeats, product)
        progress("decode")
        decodes = measure_decode(session, vocab, batch, context, tokens, rounds, read)
    prompt = prefill_work(compiled.program, batch, prompt_len, chunk)
    step = step_work(compiled.program, batch, 1, context + tokens * (rounds + 1) // 2)
    result = {
        "backend": compiled.backend,
        "batch": batch,
        "threads": count,
        "load_s": loading,
        "peak_rss_bytes": memory,
        "machine": {"read_bytes_per_s": found.bandwidth, "matrix_flop_per_s": found.matrix},
        "prefill": {
            "tokens": prompt_len,
            **summary(prefills, batch * prompt_len, lambda m: limit_seconds(prompt, reading, m)),
        },
        "decode": {
            "context": context,
            **summary(decodes, batch, lambda b: limit_seconds(step, b, found.matrix)),
        },
    }
    if json:
        console.print_json(result)
        return
    _show(result)


def _show(result: Mapping[str, Any]) -> None:
    from dsc.cli import console

    for phase in ("prefill", "decode"):
        found: Any = result[phase]
        low, high = found["quartiles_ms"]
        console.stdout().print(
            f"{phase:8} {found['tokens_per_s']:10.1f} tokens/s   {found['median_ms']:.3f} ms a step"
            f" (quartiles {low:.3f} to {high:.3f})   {found['of_limit']:.0%} of the limit"
            f"   {found['rounds_dropped']} of {found['rounds']} rounds dropped"
        )
    machine: Any = result["machine"]
    console.stdout().print(
        f"machine  read {machine['read_bytes_per_s'] / 1e9:.1f} GB/s,"
        f" bf16 matrix product {machine['matrix_flop_per_s'] / 1e9:.0f} GFLOP/s,"
        f" {result['threads']} threads; loaded in {result['load_s']:.2f} s,"
        f" peak RSS {console.human_bytes(result['peak_rss_bytes'])}"
    )


def vocabulary(config: Mapping[str, Any]) -> int:
    """Return the number of tokens a model knows."""
    from dsc.errors import UsageError

    if "vocab_size" not in config:
        raise UsageError(
            "only causal language models are measured", where="dsc.json has no vocab_size"
        )
    return int(config["vocab_size"])


def measure_prefill(
    compiled: Any,
    vocab: int,
    batch: int,
    length: int,
    repeats: int,
    probe: Callable[[], float],
) -> list[Turn[float]]:
    """Return turns of one prefill each of [batch, length] tokens into an empty cache."""
    from dsc.runtime.protocol import take_turns

    ids = random_ids(vocab, batch, length)

    def once() -> list[float]:
        session = compiled.session(max_batch=batch, max_context=length)
        return [_seconds(partial(session.prefill, ids))]

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
    from dsc.runtime.protocol import take_turns

    session.prefill(random_ids(vocab, batch, context))
    ids = random_ids(vocab, batch, tokens)

    def steps() -> list[float]:
        return [_seconds(partial(session.decode, ids[:, i])) for i in range(tokens)]

    steps()
    return take_turns(probe, steps, rounds)


def random_ids(vocab: int, batch: int, length: int) -> Any:
    """Return seeded ids, int64 [batch, length]: routing sees many experts, and runs repeat."""
    import numpy as np

    return np.random.default_rng(_VOCAB_SEED).integers(0, vocab, (batch, length), dtype=np.int64)


def summary(
    turns: Sequence[Turn[float]], tokens: int, limit: Callable[[float], float]
) -> dict[str, Any]:
    """Summarise turns whose steps process `tokens` tokens each.

    `limit` gives the least seconds of a step at the speed that the probes read.
    """
    from dsc.runtime.protocol import Spread, steady

    kept = steady(turns, float)
    used = kept or turns
    times = Spread.of([t for turn in used for t in turn.seconds])
    shares = Spread.of([_share(turn, limit) for turn in used])
    return {
        "tokens_per_s": tokens / times.median,
        "median_ms": times.median * 1e3,
        "quartiles_ms": [times.low * 1e3, times.high * 1e3],
        "of_limit": shares.median,
        "of_limit_quartiles": [shares.low, shares.high],
        "steps": times.count,
        "rounds": len(turns),
        "rounds_dropped": len(turns) - len(kept),
    }


def _share(turn: Turn[float], limit: Callable[[float], float]) -> float:
    """The limit of a step, at the speed around this turn, as a share of what the step took."""
    return limit((turn.before + turn.after) / 2) / statistics.median(turn.seconds)


def peak_rss() -> int:
    """Return the most bytes of memory that this process held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
