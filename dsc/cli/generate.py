"""`dsc generate`: continue a prompt with a compiled model."""

from __future__ import annotations

import json as json_format
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from dsc.cli import options


@dataclass(slots=True)
class Clock:
    """When each token came, in seconds since `start`."""

    start: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)

    def timed(self, tokens: Iterable[int]) -> Iterator[int]:
        """Pass tokens on and note when each came."""
        for token in tokens:
            self.arrivals.append(time.perf_counter() - self.start)
            yield token

    def summary(self, prompt_tokens: int) -> dict[str, float | int]:
        """Return the counts, the time to the first token and the decode rate after it."""
        found: dict[str, float | int] = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(self.arrivals),
        }
        if self.arrivals:
            found["first_token_s"] = self.arrivals[0]
            found["prefill_tokens_per_s"] = prompt_tokens / self.arrivals[0]
        if len(self.arrivals) > 1:
            elapsed = self.arrivals[-1] - self.arrivals[0]
            found["decode_tokens_per_s"] = (len(self.arrivals) - 1) / elapsed
        return found


def generate(
    artifact: options.Artifact,
    prompt: Annotated[str, Option("--prompt", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", min=1, help="How many tokens at most.")
    ] = 64,
    temperature: Annotated[
        float, Option("--temperature", min=0.0, help="0: the likeliest token, always.")
    ] = 0.0,
    seed: Annotated[int, Option("--seed", min=0, help="Of the draws above temperature 0.")] = 0,
    stats: Annotated[bool, Option("--stats", help="Print rates on standard error.")] = False,
    ranks: options.Ranks = None,
    threads: options.Threads = None,
    pin: options.Pin = None,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Continue a prompt with the model in OUT; the text streams to standard output.

    An artifact of several ranks runs as that many processes, started here, or by torchrun.

    Example: dsc generate v3-tvm --prompt "Once upon a time" --max-new-tokens 40 --stats
    """
    from dsc import api, generation
    from dsc.cli import console
    from dsc.ir.ranks import current

    if must_launch(artifact, ranks):
        arguments = ["generate", str(artifact), "--prompt", prompt, "--seed", str(seed)]
        arguments += ["--max-new-tokens", str(max_new_tokens), "--temperature", str(temperature)]
        flags = {"--stats": stats, "--json": json, "--trust": trust}
        flags |= {"--pin": pin is True, "--no-pin": pin is False}
        arguments += [] if threads is None else ["--threads", str(threads)]
        launch_ranks([*arguments, *(name for name, on in flags.items() if on)], artifact)
        return
    compiled = api.load(artifact, trust=trust, **options.chosen(threads=threads, pin=pin))
    tokenizer = required_tokenizer(compiled.tokenizer, artifact)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise _empty_prompt()
    agree_on(prompt=prompt, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature)
    session = compiled.session(max_batch=1, max_context=len(ids) + max_new_tokens)
    clock = Clock()
    tokens = generation.generate(
        session,
        ids,
        max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop_ids(artifact),
    )
    speaks = current().rank == 0
    text = _stream(tokenizer, clock.timed(tokens), quiet=json or not speaks)
    summary = clock.summary(len(ids))
    if not speaks:
        return
    if json:
        console.print_json({"text": text, **summary})
    elif stats:
        lines = (f"{name} {value:.6g}" for name, value in summary.items())
        console.stderr().print("\n".join(lines))


def must_launch(artifact: Path, ranks: int | None) -> bool:
    """Whether the ranks are still to be started. Raises `UsageError` for a wrong number of them."""
    import os

    from dsc.errors import UsageError
    from dsc.runtime import collectives, sharded

    found = sharded.opened(artifact)
    if found is None:
        if ranks not in (None, 1):
            raise UsageError(
                f"{artifact} was compiled for one rank, --ranks {ranks} asked",
                hint=f"compile it with --ranks {ranks}",
            )
        return False
    if ranks is not None:
        sharded.check_ranks(found, ranks)
    return not collectives.launched(os.environ)


def launch_ranks(arguments: list[str], artifact: Path) -> None:
    """Run `dsc` with `arguments` once a rank of the artifact; exit as the first that fails."""
    from dsc.runtime import launch, sharded

    found = sharded.opened(artifact)
    assert found is not None
    status = launch.run(launch.command(arguments), found.ranks)
    if status:
        sys.exit(status)


def agree_on(**options: object) -> None:
    """Check that all ranks were given the same options, which are shown only as digests."""
    from dsc.runtime import collectives

    shown = {"seed", "max_new_tokens", "temperature"}
    facts = {
        name: str(value) if name in shown else collectives.digest(str(value))
        for name, value in options.items()
    }
    collectives.agree("options", facts)


def required_tokenizer(tokenizer: Any, artifact: Path) -> Any:
    """Return the tokenizer, or refuse an artifact that was compiled without one."""
    from dsc.errors import ArtifactError

    if tokenizer is None:
        raise ArtifactError(
            "the artifact holds no tokenizer",
            where=str(artifact),
            hint="compile a checkpoint that has a tokenizer.json",
        )
    return tokenizer


def manifest_config(artifact: Path) -> dict[str, Any]:
    """Return the model configuration that the manifest of an artifact records."""
    manifest = json_format.loads((artifact / "dsc.json").read_text(encoding="utf-8"))
    config: dict[str, Any] = manifest.get("config") or {}
    return config


def stop_ids(artifact: Path) -> frozenset[int]:
    """Return the ids that end a text: one, several or none, as the configuration says."""
    stop = manifest_config(artifact).get("eos_token_id")
    if stop is None:
        return frozenset()
    return frozenset(stop if isinstance(stop, list) else [stop])


def _stream(tokenizer: Any, tokens: Iterator[int], quiet: bool) -> str:
    """Print text as it becomes whole; a character may take several tokens."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if quiet or text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        sys.stdout.write(text[len(shown) :])
        sys.stdout.flush()
        shown = text
    text = str(tokenizer.decode(ids))
    if not quiet:
        sys.stdout.write(text[len(shown) :] + "\n")
    return text


def _empty_prompt() -> Exception:
    from dsc.errors import UsageError

    return UsageError("the prompt holds no token", hint="give a text with --prompt")
