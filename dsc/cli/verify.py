"""`dsc verify`: compare a compiled model with an oracle, on a text, and its weights with those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Context, Exit, Option

from dsc.cli import console, options
from dsc.cli.ranks import speaks
from dsc.errors import UsageError
from dsc.files import read_text
from dsc.ir.types import PRECISIONS, DType

if TYPE_CHECKING:
    from dsc.api import CompiledModel
    from dsc.ir.program import Program
    from dsc.runtime.emission import Progress
    from dsc.verification import Comparison, Noise

# The opening of the Declaration of Independence: public, and ordinary English.
_TEXT = """When in the Course of human events, it becomes necessary for one people to dissolve
the political bands which have connected them with another, and to assume among the powers of the
earth, the separate and equal station to which the Laws of Nature and of Nature's God entitle them,
a decent respect to the opinions of mankind requires that they should declare the causes which
impel them to the separation."""


def verify(
    context: Context,
    model: options.Model,
    against: Annotated[
        Literal["reference", "hf"],
        Option("--against", help="The oracle: our interpreter in fp32, or stock transformers."),
    ] = "reference",
    text: Annotated[
        Path | None,
        options.unset(
            "--text", metavar="FILE", exists=True, dir_okay=False, help="Compare on this text."
        ),
    ] = None,
    tokens: Annotated[int, Option("--tokens", min=2, help="Of the text, at most.")] = 256,
    checkpoint: Annotated[
        Path | None,
        options.unset("--checkpoint", metavar="DIR", help="The source of OUT, where it has moved."),
    ] = None,
    revision: options.Revision = None,
    require: Annotated[
        float,
        Option("--require", min=0.0, max=1.0, help="Greedy agreement below this is a failure."),
    ] = 1.0,
    most_excluded: Annotated[
        float,
        Option(
            "--most-excluded",
            min=0.0,
            max=1.0,
            help="A larger share of positions left out as near-ties is a failure.",
        ),
    ] = 0.5,
    weights: Annotated[
        bool,
        Option("--weights", help="Only compare the weights of OUT with its source, bit for bit."),
    ] = False,
    hashes: Annotated[bool, Option("--hashes", help="Also hash every file of OUT.")] = False,
    json: options.Json = False,
    trust: options.Trust = False,
) -> None:
    """Compare OUT, or MODEL compiled now, with an oracle in fp32; exit 1 where it is wrong.

    It is wrong where logits are further off than rounding to the model's element type explains
    (in bf16 and fp16 measured: the reference backend in that type against itself in fp32), where
    greedy tokens disagree at positions that are no near-ties, or where too few positions are clear
    to say anything. An artifact of several ranks runs as that many processes.

    Where weights or rows are rounded to codes, as --quant asks, the oracle is the program's own
    text, interpreted in fp32 over the weights that it stores: so what is wrong is wrong in kernels,
    and what codes cost is told beside it, as the distance from the source, which is no failure.

    What OUT stores, codes and scales, is made from the source again and compared bit for bit, a
    block at a time, before anything runs: a tensor that differs is named with where it does. Where
    there is no source, --hashes tells which tensor is not what was compiled.

    JSON keys: max_logit_diff, greedy_agreement, excluded, perplexity, all against the source;
    oracle (source or text), text (the same against that, where it is the oracle), ok, failures.

    Examples:

        dsc verify v3-tvm --text book.txt

        dsc verify path/to/checkpoint --against hf --json
    """
    from dsc import api, verification
    from dsc.asked import cache_format_of
    from dsc.cli.measuring import tell_stand_in
    from dsc.cli.ranks import launch_ranks, must_launch
    from dsc.frontends.hub import located

    with console.progress_bar() as progress:
        folder = located(model, revision, progress)[0]
    model = str(folder)
    is_artifact = (folder / "dsc.json").is_file()
    if weights and not is_artifact:
        raise UsageError("--weights reads an artifact", where=str(folder))
    if hashes:
        _check_hashes(folder, is_artifact)
    if is_artifact and must_launch(folder):
        launch_ranks(context, folder, hashes=False)  # of which no rank has them all
        return
    if not is_artifact:
        check_oracle(against, str(checkpoint or model))
    with console.progress_bar() as progress:
        progress("compiling" if not is_artifact else "loading")
        compiled = (
            api.load(folder, trust=trust) if is_artifact else api.compile(model, progress=progress)
        )
        if not weights:
            tell_stand_in(compiled.executable, "nothing to be compared")
        source = source_of(compiled, checkpoint)
        check_oracle(against, source)
        made = made_again(compiled, source, progress) if is_artifact else None
        wrong = heard_of_all(other_weights(compiled, made, progress))
        if weights:
            _tell_weights(compiled, wrong, json)
            return
        ids, is_text = token_ids(compiled, text, tokens)
        progress("running the compiled model")
        ours = verification.session_logits(compiled, ids)
        if not speaks():  # the other ranks have done their part
            return
        progress(f"running the oracle ({against})")
        kept = cache_format_of(compiled.program)
        angles = angles_of(compiled)
        oracle = oracle_logits(against, source, ids, angles, kept)
        if oracle.shape != ours.shape:
            raise _other_model(compiled, source, ours.shape, oracle.shape)
        dtype = verification.compute_dtype(compiled.program)
        text_is_oracle = compiled.program.mesh.ranks == 1 and verification.rounds(
            made or compiled.program
        )
        if text_is_oracle:
            progress("running the program's own text (reference)")
            said, noise = verification.held_to_text(compiled.program, ids)
            own = verification.compare(ours, said, ids, noise, is_text=is_text)
            result = verification.compare(ours, oracle, ids, None, is_text=is_text)
        else:
            if dtype != "fp32":
                progress(f"measuring what {dtype} does (reference)")
            config = compiled.manifest["config"]
            noise = noise_of(dtype, against, source, ids, oracle, config, angles, kept)
            result = own = verification.compare(ours, oracle, ids, noise, is_text=is_text)
    formats = stored_as(compiled)
    failures = [*wrong, *own.failures(require, most_excluded)]
    if failures and not text_is_oracle:
        failures += _what_codes_cost(formats, kept if against != "reference" else "bf16")
    if json:
        facts: dict[str, Any] = {
            "against": against,
            "dtype": dtype,
            "formats": formats,
            "cache_format": kept,
        }
        facts |= {"oracle": "text" if text_is_oracle else "source", **result.as_dict()}
        if text_is_oracle:
            facts["text"] = own.as_dict()
            facts["checks"] = facts["text"]["checks"]
        console.print_json({**facts, "ok": not failures, "failures": failures})
    elif text_is_oracle:
        told = [*_figures(result), "", "its own text over the weights that it stores, in fp32:"]
        told = [
            "the source, of which codes cost so much (told, and no verdict):",
            *told,
            *_lines(own, dtype),
        ]
        console.stdout().print("\n".join(told))
    else:
        console.stdout().print("\n".join(_lines(result, dtype)))
    if failures:
        console.stderr().print("\n".join(failures))
        raise Exit(1)


def _what_codes_cost(formats: list[str], kept: str) -> Iterator[str]:
    """What else than an error a failure may be, where the source is the oracle."""
    if kept != "bf16":
        yield f"caches are kept in {kept}: what codes cost is part of this"
    if formats:
        yield (
            f"weights are stored as {', '.join(formats)}: where the source has them finer, what"
            " codes cost is part of this (dsc compile --calibrate measures that)"
        )


def made_again(compiled: CompiledModel, source: str, progress: Progress) -> Program | None:
    """The program of an artifact, its weights made of the source; `None` where it has none."""
    from dsc import verification
    from dsc.frontends.load import load_program
    from dsc.runtime import artifact

    if compiled.manifest.get("weights") is None:
        return None
    folder = compiled.folder
    assert folder is not None
    dtype = PRECISIONS[verification.compute_dtype(compiled.program)]
    read = load_program(source, dtype=dtype, progress=progress, **angles_of(compiled)).program
    return artifact.over(folder, compiled.manifest, read.source)


def angles_of(compiled: CompiledModel) -> dict[str, Any]:
    """The options of `dsc.compile` that say which angles positions have, as they were given.

    A scaling may be chosen; of a model with two sets of angles the context chooses one.
    """
    found = {"rope_scaling": compiled.program.meta.get("rope_scaling")}
    return {"max_context": compiled.max_context, **{k: v for k, v in found.items() if v}}


def other_weights(compiled: CompiledModel, made: Program | None, progress: Progress) -> list[str]:
    """What an artifact stores otherwise than it is `made` of the source, in words."""
    from dsc.runtime import packing

    if made is None:
        return []
    assert compiled.folder is not None
    path = compiled.folder / compiled.manifest["weights"]
    return [str(each) for each in packing.others(made, path, progress)]


def heard_of_all(wrong: list[str]) -> list[str]:
    """What is wrong on any rank, on rank 0, which tells it; nothing on the others."""
    from dsc.runtime.collectives import share

    each = share("other weights", wrong)
    if len(each) == 1:
        return wrong
    told = [f"rank {rank}: {line}" for rank, lines in enumerate(each) for line in lines]
    return told if speaks() else []


def _tell_weights(compiled: CompiledModel, wrong: list[str], json: bool) -> None:
    """Say which weights differ, once for all ranks where none does; exit 1 where some do."""
    count = len(compiled.program.weights)
    if json and speaks():
        console.print_json({"weights": count, "ok": not wrong, "failures": wrong})
    elif not wrong and speaks():
        console.stdout().print(f"{count} weights are those of the source, bit for bit")
    if wrong:
        console.stderr().print("\n".join(wrong))
        raise Exit(1)


def _lines(result: Comparison, dtype: str) -> Iterator[str]:
    """The comparison in words: its numbers, then what they were held against."""
    from dsc import verification

    yield from _figures(result)
    for check in result.checks:
        found = f"{check.found:.3g}, at most {check.bound:.3g}"
        yield f"{'right' if check.ok else 'WRONG':18} {check.what}: {found}"
    if result.excluded:
        yield (
            f"{round(result.excluded * result.positions)} of {result.positions} positions were"
            " left out: there the oracle's two best tokens lie closer than"
            f" {verification.MARGIN:g} times the error that {dtype} leaves in a logit, so that"
            " rounding alone may swap them"
        )


def _figures(result: Comparison) -> Iterator[str]:
    for name, value in result.as_dict().items():
        if name != "checks":
            yield f"{name:18} {value}"


def stored_as(compiled: CompiledModel) -> list[str]:
    """The codes that weights of a model are stored as."""
    types = compiled.program.weight_types().values()
    return sorted({t.dtype.value for t in types if t.format is not None})


def token_ids(compiled: CompiledModel, text: Path | None, limit: int) -> tuple[list[int], bool]:
    """Return up to `limit` ids and whether they are text; without a tokenizer they are random."""
    from dsc.cli.measuring import random_ids, vocabulary

    limit = min(limit, compiled.max_context)
    if compiled.tokenizer is not None:
        content = read_text(str(text)) if text is not None else _TEXT
        ids = list(compiled.tokenizer.encode(content).ids[:limit])
        if len(ids) < 2:
            raise UsageError(
                f"{len(ids)} tokens are too few to compare",
                where=str(text) if text is not None else f"--max-context {compiled.max_context}",
                hint="take a longer text, or compile for a longer context",
            )
        return ids, True
    if text is not None:
        raise UsageError("the model has no tokenizer to read the text with", where=str(text))
    vocab = vocabulary(compiled.program)
    return [int(i) for i in random_ids(vocab, 1, limit)[0]], False


def source_of(compiled: CompiledModel, checkpoint: Path | None) -> str:
    """Return what a model was compiled from, or where that has moved."""
    if checkpoint is not None:
        return str(checkpoint)
    if not compiled.source:
        raise UsageError(
            "the artifact does not say what it was compiled from",
            hint="name it with --checkpoint",
        )
    return compiled.source


def check_oracle(against: str, source: str) -> None:
    """Refuse, before anything is compiled or run, what stock transformers cannot be compared on.

    Raises:
        UsageError, ConfigError, CheckpointError: the source is no checkpoint folder, or one whose
            headers do not fit its configuration.
    """
    if against == "reference":
        return
    if not (Path(source) / "config.json").is_file():
        raise UsageError(
            "stock transformers reads checkpoint folders only",
            where=source,
            hint="name one with --checkpoint, or compare with --against reference",
        )
    from dsc.frontends.huggingface import load_checkpoint

    load_checkpoint(source, DType.f32)


def oracle_logits(
    against: str, source: str, ids: list[int], angles: Mapping[str, Any], kept: str = "bf16"
) -> Any:
    """Run the oracle over the ids; logits [S, vocab]. The reference's caches are `kept` so too."""
    from dsc import api, verification

    if against == "reference":
        asked = {"dtype": "fp32", "cache_format": kept, **angles}
        exact = api.compile(source, backend="reference", **asked)
        return verification.session_logits(exact, ids)
    return verification.transformers_logits(Path(source), ids, **angles)


def noise_of(
    dtype: str,
    against: str,
    source: str,
    ids: list[int],
    oracle: Any,
    config: Mapping[str, Any],
    angles: Mapping[str, Any],
    kept: str = "bf16",
) -> Noise:
    """What rounding explains: measured with the reference backend, in fp32 derived.

    Beside stock transformers, which keeps numbers, codes of caches are part of what is measured.
    """
    from dsc import api, verification

    if dtype == "fp32" and (against == "reference" or kept == "bf16"):
        return verification.Noise.in_fp32(oracle, verification.layers_of(config))
    asked = {"dtype": dtype, "cache_format": kept, **angles}
    rounded = api.compile(source, backend="reference", **asked)
    exact = oracle if against == "reference" else oracle_logits("reference", source, ids, angles)
    return verification.Noise.of(verification.session_logits(rounded, ids), exact)


def _other_model(compiled: CompiledModel, source: str, ours: Any, oracle: Any) -> Exception:
    return UsageError(
        f"logits {list(ours)} of the artifact, {list(oracle)} of its source: another model",
        where=source,
        hint="name the checkpoint that it was compiled from with --checkpoint",
    )


def _check_hashes(folder: Path, is_artifact: bool) -> None:
    if not is_artifact:
        raise UsageError("--hashes reads an artifact", where=str(folder))
    from dsc.runtime.artifact import check_hashes

    check_hashes(folder)
