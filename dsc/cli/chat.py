"""`dsc chat`: talk with a compiled model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Option

from dsc.cli import console, options
from dsc.cli.answers import check_sampling, check_stops, chosen_sampling
from dsc.errors import ArtifactError, UsageError


def chat(
    context: Context,
    model: options.Runnable,
    system: Annotated[
        str | None,
        options.unset("--system", metavar="TEXT", help="What the model is told before all else."),
    ] = None,
    load: Annotated[
        Path | None,
        options.unset("--load", metavar="FILE", help="Go on with what /save wrote."),
    ] = None,
    thinking: Annotated[
        bool | None,
        options.unset(
            "--thinking/--no-thinking",
            help="Have the model think before it answers, or not, where its template knows how."
            "  [default: the template's]",
        ),
    ] = None,
    set_value: Annotated[
        list[str] | None,
        options.unset(
            "--set",
            metavar="NAME=VALUE",
            help="A variable of the template, such as reasoning_effort=high; repeatable.",
        ),
    ] = None,
    hide_thinking: Annotated[
        bool, Option("--hide-thinking", help="Do not show what the model thinks.")
    ] = False,
    chat_template: Annotated[
        Path | None,
        options.unset(
            "--chat-template",
            metavar="FILE",
            help="A Jinja template in the place of the model's own.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        options.unset(
            "--max-new-tokens", min=1, help="For each answer.  [default: what the context takes]"
        ),
    ] = None,
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
    threads: options.Threads = None,
    pin: options.Pin = None,
    backend: options.Backend = None,
    dtype: options.Dtype = None,
    quant: options.Quant = "none",
    max_context: options.MaxContext = None,
    rope_scaling: options.RopeScaling = None,
    revision: options.Revision = None,
    output: options.KeepIn = None,
    trust: options.Trust = False,
) -> None:
    """Talk with the model in OUT, or with MODEL compiled now, by its own chat template.

    Ctrl-C ends an answer and keeps what came of it; at the prompt, twice, it leaves. Three double
    quotes begin and end a text of several lines, and so does a backslash at the end of each. /help
    lists the commands: /save, /load, /reset, /stats, /exit.

    Without a terminal each line of standard input is a turn, answers go to standard output, and
    what the model thinks to standard error.

    A model without a template simply continues what is said.

    Examples:

        dsc chat v3-tvm --temperature 0.6 --top-p 0.95

        dsc chat ORG/NAME --quant int8 --max-context 8192 -o out

        echo "What is a compiler?" | dsc chat out --no-thinking
    """
    given = locals().copy()  # every option, by its name
    from dsc.chat import Conversation
    from dsc.cli.given import opened, required_tokenizer, stop_ids
    from dsc.cli.measuring import tell_stand_in
    from dsc.cli.ranks import must_launch
    from dsc.cli.talk import Talk
    from dsc.frontends.generation_config import parse_settings

    asked = options.among(given, options.SAMPLING)
    values = values_of(set_value or [])
    check_stops(stop or [])
    check_sampling(asked, greedy)
    if must_launch(Path(model)):
        raise UsageError(
            "a talk has one rank",
            where=model,
            hint="compile the model without --ranks; dsc generate runs several",
        )
    compiling = options.among(given, options.COMPILING)
    start = time.perf_counter()
    compiled = opened(model, compiling, options.among(given, options.RUNNING), output)
    tokenizer = required_tokenizer(compiled, model)
    tell_stand_in(compiled.executable, "no text to be had")
    own = parse_settings(compiled.manifest.get("generation") or {}, model, ArtifactError)
    sampling = chosen_sampling(own, asked, greedy)
    template = template_of(compiled, chat_template)
    ends = [*(stop or []), *own.stop_strings]
    closing = [] if template is None else [template.tokens.get("eos_token", "")]
    session = compiled.session(max_batch=1)
    session.prepare([session.prefill_chunk])
    known = {} if thinking is None else {"thinking": thinking, "enable_thinking": thinking}
    known |= values
    conversation = Conversation(
        session,
        tokenizer,
        template,
        sampling,
        seed,
        ends,
        stop_ids(tokenizer, own.eos_token_id, [*ends, *closing]),
        max_new_tokens,
        known,
        [{"role": "system", "content": system}] if system else [],
    )
    talk = Talk(conversation, hide_thinking)
    if load is not None:
        talk.load(load)
    told = f"{model}: {session.max_context} tokens, {sampling}"
    console.stderr().print(f"{told} ({time.perf_counter() - start:.1f} s)", markup=False)
    if template is None:
        console.stderr().print(
            "the model came without a chat template: what you say is continued as it stands"
        )
    try:
        talk.run()
    finally:
        if template is not None:
            template.close()


GIVEN = ("messages", "add_generation_prompt")
"""Variables of a template that are made of what is said."""


def values_of(texts: list[str]) -> dict[str, Any]:
    """Variables of a template as `--set` spells them: JSON, else the text itself.

    >>> values_of(["a=high", "b=true", "c=1=2"])
    {'a': 'high', 'b': True, 'c': '1=2'}

    Raises `UsageError` for what is no name, and for variables that are made of what is said.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"--set {text}", hint="give NAME=VALUE")
        if name in GIVEN:
            raise UsageError(f"--set {text}: {name} is the conversation's own", hint="leave it out")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def template_of(compiled: Any, file: Path | None) -> Any:
    """The template of --chat-template, else the model's own; special tokens are the model's.

    Where the folder named no special tokens, they are those of the ids in its configuration.
    """
    from dsc.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate
    from dsc.files import read_text

    found = compiled.chat_template
    if file is not None:
        text = read_text(file)
        if len(text) > MAX_TEMPLATE_BYTES:
            raise UsageError(f"larger than the limit of {MAX_TEMPLATE_BYTES} bytes", str(file))
        found = ChatTemplate(text, {} if found is None else found.tokens)
    if found is not None:
        own = compiled.manifest.get("generation") or {}
        ids = {"bos_token": own.get("bos_token_id"), "eos_token": own.get("eos_token_id")}
        first = {k: i[0] if isinstance(i, list) and i else i for k, i in ids.items()}
        texts = {k: compiled.tokenizer.id_to_token(i) for k, i in first.items() if type(i) is int}
        found.tokens = {k: text for k, text in texts.items() if text} | dict(found.tokens)
    return found
