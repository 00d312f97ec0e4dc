"""`dsc bench`: how fast a compiled model prefills and decodes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from typer import Option

from dsc.cli import options

_VOCAB_SEED = 0


def bench(
    artifact: options.Artifact,
    prompt_len: Annotated[int, Option("--prompt-len", min=1, help="Tokens to prefill.")] = 512,
    context: Annotated[
        int, Option("--context", min=1, help="Tokens in the cache when decoding begins.")
    ] = 128,
    batch: Annotated[int, Option("--batch", min=1, help="Sequences in a step.")] = 1,
    tokens: Annotated[int, Option("--tokens", min=2, help="Decode steps measured.")] = 32,
    repeats: Annotated[int, Option("--repeats", min=1, help="Prefills measured.")] = 5,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Measure prefill and decode of the model in OUT with random tokens.

    Medians and quartiles; one warm-up of each is not counted. Other load on the machine shows in
    the quartiles: compare results only where they are close.

    Example: dsc bench v3-tvm --prompt-len 512 --context 1024 --json
    """
    from dsc import api
    from dsc.cli import console
    from dsc.cli.generate import manifest_config

    compiled = api.load(artifact, trust=trust)
    vocab = vocabulary(manifest_config(artifact))
    with console.progress_bar() as progress:
        progress("prefill")
        prefill = measure_prefill(compiled, vocab, batch, prompt_len, repeats)
        progress("decode")
        decode = measure_decode(compiled, vocab, batch, context, tokens)
    result = {
        "backend": compiled.backend,
        "batch": batch,
        "prefill": {"tokens": prompt_len, **rates(prefill, batch * prompt_len)},
        "decode": {"context": context, **rates(decode, batch)},
    }
    if json:
        console.print_json(result)
        return
    for phase in ("prefill", "decode"):
        found: Any = result[phase]
        console.stdout().print(
            f"{phase:8} {found['tokens_per_s']:10.1f} tokens/s   "
            f"{found['median_ms']:.3f} ms a step "
            f"(quartiles {found['quartiles_ms'][0]:.3f} to {found['quartiles_ms'][1]:.3f})"
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
    compiled: Any, vocab: int, batch: int, length: int, repeats: int
) -> list[float]:
    """Return seconds of `repeats` prefills of [batch, length] tokens into an empty cache."""
    ids = random_ids(vocab, batch, length)
    times = []
    for _ in range(repeats + 1):
        session = compiled.session(max_batch=batch, max_context=length)
        times.append(_seconds(partial(session.prefill, ids)))
    return times[1:]


def measure_decode(compiled: Any, vocab: int, batch: int, context: int, steps: int) -> list[float]:
    """Return seconds of each of `steps` decode steps after `context` tokens."""
    session = compiled.session(max_batch=batch, max_context=context + steps + 1)
    session.prefill(random_ids(vocab, batch, context))
    ids = random_ids(vocab, batch, steps + 1)
    return [_seconds(partial(session.decode, ids[:, i])) for i in range(steps + 1)][1:]


def random_ids(vocab: int, batch: int, length: int) -> Any:
    """Return seeded ids, int64 [batch, length]: routing sees many experts, and runs repeat."""
    import numpy as np

    return np.random.default_rng(_VOCAB_SEED).integers(0, vocab, (batch, length), dtype=np.int64)


def rates(times: list[float], tokens: int) -> dict[str, Any]:
    """Summarise seconds a step, where a step processes `tokens` tokens."""
    median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    return {
        "tokens_per_s": tokens / median,
        "median_ms": median * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "steps": len(times),
    }


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
