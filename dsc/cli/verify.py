"""`dsc verify`: compare a compiled model with an oracle, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Exit, Option

from dsc.cli import options

if TYPE_CHECKING:
    from dsc.api import CompiledModel

# The opening of the Declaration of Independence: public, and ordinary English.
_TEXT = """When in the Course of human events, it becomes necessary for one people to dissolve
the political bands which have connected them with another, and to assume among the powers of the
earth, the separate and equal station to which the Laws of Nature and of Nature's God entitle them,
a decent respect to the opinions of mankind requires that they should declare the causes which
impel them to the separation."""


def verify(
    model: options.Model,
    against: Annotated[
        Literal["reference", "hf"],
        Option("--against", help="The oracle: our interpreter in fp32, or stock transformers."),
    ] = "reference",
    text: Annotated[
        Path | None,
        Option(
            "--text",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Compare on this text.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, Option("--tokens", min=2, help="Of the text, at most.")] = 256,
    checkpoint: Annotated[
        Path | None,
        Option(
            "--checkpoint",
            metavar="DIR",
            help="The source of OUT, where it has moved.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        float,
        Option("--require", min=0.0, max=1.0, help="Greedy agreement below this is a failure."),
    ] = 1.0,
    hashes: Annotated[bool, Option("--hashes", help="Also hash every file of OUT.")] = False,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Compare OUT, or MODEL compiled now, with an oracle; exit 1 where greedy tokens disagree.

    JSON keys: max_logit_diff, greedy_agreement, excluded, perplexity, and more.

    Examples:

        dsc verify v3-tvm --text book.txt

        dsc verify path/to/checkpoint --against hf --json
    """
    from dsc import api, verification
    from dsc.cli import console

    folder = Path(model)
    is_artifact = (folder / "dsc.json").is_file()
    if hashes:
        _check_hashes(folder, is_artifact)
    with console.progress_bar() as progress:
        progress("compiling" if not is_artifact else "loading")
        compiled = (
            api.load(folder, trust=trust) if is_artifact else api.compile(model, progress=progress)
        )
        source = source_of(compiled, checkpoint)
        ids, is_text = token_ids(compiled, text, tokens)
        progress("running the compiled model")
        ours = verification.session_logits(compiled, ids)
        progress(f"running the oracle ({against})")
        oracle = oracle_logits(against, source, ids)
    result = verification.compare(ours, oracle, ids, is_text=is_text)
    if json:
        console.print_json({"against": against, **result.as_dict()})
    else:
        lines = (f"{name:18} {value}" for name, value in result.as_dict().items())
        console.stdout().print("\n".join(lines))
    if result.greedy_agreement < require:
        console.stderr().print(
            f"greedy tokens agree at {result.greedy_agreement:.2%} of the clear positions, "
            f"{require:.2%} required"
        )
        raise Exit(1)


def token_ids(compiled: CompiledModel, text: Path | None, limit: int) -> tuple[list[int], bool]:
    """Return up to `limit` ids and whether they are text; without a tokenizer they are random."""
    from dsc.cli.bench import random_ids
    from dsc.cli.opt import read_text
    from dsc.errors import UsageError

    if compiled.tokenizer is not None:
        content = read_text(str(text)) if text is not None else _TEXT
        return list(compiled.tokenizer.encode(content).ids[:limit]), True
    if text is not None:
        raise UsageError("the model has no tokenizer to read the text with", where=str(text))
    vocab = int(compiled.manifest["config"]["vocab_size"])
    return [int(i) for i in random_ids(vocab, 1, limit)[0]], False


def source_of(compiled: CompiledModel, checkpoint: Path | None) -> str:
    """Return what a model was compiled from, or where that has moved."""
    from dsc.errors import UsageError

    if checkpoint is not None:
        return str(checkpoint)
    if not compiled.source:
        raise UsageError(
            "the artifact does not say what it was compiled from",
            hint="name it with --checkpoint",
        )
    return compiled.source


def oracle_logits(against: str, source: str, ids: list[int]) -> Any:
    """Run the oracle over the ids; logits [S, vocab]."""
    from dsc import api, verification
    from dsc.errors import UsageError

    if against == "reference":
        exact = api.compile(source, backend="reference", dtype="fp32")
        return verification.session_logits(exact, ids)
    if not (Path(source) / "config.json").is_file():
        raise UsageError(
            "stock transformers reads checkpoint folders only",
            where=source,
            hint="name one with --checkpoint, or compare with --against reference",
        )
    return verification.transformers_logits(Path(source), ids)


def _check_hashes(folder: Path, is_artifact: bool) -> None:
    from dsc.errors import UsageError

    if not is_artifact:
        raise UsageError("--hashes reads an artifact", where=str(folder))
    from dsc.runtime.artifact import check_hashes

    check_hashes(folder)
