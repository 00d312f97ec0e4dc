"""`dsc generate`: continue prompts with a compiled model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from dsc.cli import console, options
from dsc.cli.answers import (
    Printer,
    Prompt,
    check_sampling,
    check_stops,
    chosen_sampling,
    cut_off,
    encoded,
    facts,
    read_prompts,
)
from dsc.errors import ArtifactError


def generate(
    context: Context,
    model: options.Runnable,
    prompt: Annotated[
        list[str] | None,
        options.unset(
            "--prompt",
            metavar="TEXT",
            help="The text to continue; repeat for several, '-' reads standard input.",
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        options.unset(
            "--file",
            metavar="F",
            help="A file whose text is continued; repeat for several. One newline at the end of a"
            " file, or of standard input, is left out.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, Option("--max-new-tokens", min=1, help="How many tokens at most, for each prompt.")
    ] = 64,
    stop: options.Stop = None,
    greedy: options.Greedy = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = 0,
    stats: Annotated[
        bool, Option("--stats", help="Print times of loading, prompts and decoding, to stderr.")
    ] = False,
    ranks: options.Ranks = None,
    threads: options.Threads = None,
    pin: options.Pin = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
    quant: options.Quant = "none",
    max_context: options.MaxContext = None,
    rope_scaling: options.RopeScaling = None,
    revision: options.Revision = None,
    output: options.KeepIn = None,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Continue prompts with the model in OUT, or with MODEL compiled now; the text streams.

    Prompts of --prompt come first, then those of --file, each in the order given.
    Several run together, as many as the model was compiled for (--max-batch), and each
    answer is printed under its prompt. An answer ends at a stop id or --stop ("stop"), or at
    --max-new-tokens or the model's --max-context ("length"). Options that are not given are those
    that the model's generation_config.json asks for; where it asks for none, text is greedy.

    An artifact of several ranks runs as that many processes, started here, or by torchrun. A MODEL
    is compiled first, by --backend, --dtype, --quant, --max-context, --rope-scaling and --revision
    as dsc compile has them, and what comes of it is gone afterwards unless -o keeps it.

    JSON keys: answers (each prompt, text, finish_reason, prompt_tokens, new_tokens), sampling (how
    tokens were chosen), and seconds and rates of loading, prompts and decoding, over all answers.

    Examples:

        dsc generate v3-tvm --prompt "Once upon a time" --max-new-tokens 40 --stats

        dsc generate v3-tvm --file a.txt --file b.txt --top-p 0.9 --seed 7 --stop "The end" --json
    """
    given = locals().copy()  # every option, by its name
    from dsc import generation
    from dsc.cli.given import opened, required_tokenizer, stop_ids
    from dsc.cli.measuring import tell_stand_in
    from dsc.cli.ranks import agree_on, launch_ranks, must_launch, speaks
    from dsc.frontends.generation_config import parse_settings

    asked = options.among(given, options.SAMPLING)
    compiling = options.among(given, options.COMPILING)
    running = options.among(given, options.RUNNING)
    ends = stop or []
    check_stops(ends)
    check_sampling(asked, greedy)
    prompts = read_prompts(prompt or [], file or [])
    if must_launch(Path(model), ranks):
        with in_files(prompts) as files:
            launch_ranks(context, Path(model), prompt=None, file=files)
        return
    start = time.perf_counter()
    compiled = opened(model, compiling, running, output)
    tokenizer = required_tokenizer(compiled, model)
    ids = [encoded(tokenizer, each, compiled.max_context) for each in prompts]
    own = parse_settings(compiled.manifest.get("generation") or {}, model, ArtifactError)
    sampling = chosen_sampling(own, asked, greedy)
    agree_on(prompt=ids, max_new_tokens=max_new_tokens, seed=seed, sampling=sampling, stop=ends)
    tell_stand_in(compiled.executable, "no text to be had")
    session = compiled.session(
        max_batch=min(len(ids), compiled.max_batch),
        max_context=min(max(map(len, ids)) + max_new_tokens, compiled.max_context),
    )
    session.prepare([len(each) for each in ids])
    ends = [*ends, *own.stop_strings]
    ending = stop_ids(tokenizer, own.eos_token_id, ends)
    answers = [
        generation.Answer(
            each,
            min(max_new_tokens, generation.room(len(each), compiled.max_context)),
            sampling.picker(seed, number),
            ending,
            generation.TextStream(tokenizer, each, ends),
        )
        for number, each in enumerate(ids)
    ]
    chosen = f"{sampling}, --seed {seed}" if sampling.draws else str(sampling)
    clock = generation.Clock(load_s=time.perf_counter() - start)
    printer = Printer(answers, prompts, quiet=json or not speaks())
    for index, text in generation.continue_all(session, answers, clock):
        printer.take(index, text)
    if not speaks():
        return
    if json:
        found = [facts(*pair) for pair in zip(prompts, answers, strict=True)]
        console.print_json({"answers": found, "sampling": chosen, **clock.summary()})
    remark = cut_off(answers, max_new_tokens, compiled.max_context)
    if remark:
        console.stderr().print(remark)
    if stats:
        counted = clock.summary() | {"new_tokens": sum(len(answer.ids) for answer in answers)}
        lines = (f"{name} {value:.6g}" for name, value in counted.items())
        console.stderr().print("\n".join([f"sampling {chosen}", *lines]), markup=False)


@contextmanager
def in_files(prompts: Sequence[Prompt]) -> Iterator[list[Path]]:
    """Files that hold the prompts: ranks have no standard input, and a line has a limit."""
    with tempfile.TemporaryDirectory(prefix="dsc-prompts-") as folder:
        files = [Path(folder) / str(number) for number in range(len(prompts))]
        for path, (_, text) in zip(files, prompts, strict=True):
            path.write_text(text + "\n", encoding="utf-8", newline="")
        yield files
