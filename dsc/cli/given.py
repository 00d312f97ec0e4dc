"""What a verb that runs a model was given: an artifact to load, or a model to compile first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc.cli import console
from dsc.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from dsc.api import CompiledModel


def is_artifact(model: str) -> bool:
    """Whether it names a folder that `dsc compile` wrote, or one without a model in it."""
    folder = Path(model)
    if (folder / "dsc.json").is_file():
        return True
    held = ("config.json", "snapshots")
    return folder.is_dir() and not any((folder / name).exists() for name in held)


def opened(
    model: str,
    compiling: Mapping[str, Any],
    running: Mapping[str, Any],
    output: Path | None = None,
    force: bool = False,
) -> CompiledModel:
    """The model, ready to run; `compiling` and `running` are options of `dsc.compile` and `load`.

    A model is compiled, and said to be; `output` keeps what comes of it. Raises `UsageError` for
    options of compiling where there is nothing to compile.
    """
    from dsc import api

    if is_artifact(model):
        idle = [f"--{name.replace('_', '-')}" for name in compiling] + ["--output"] * bool(output)
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: for models; an artifact is what it was compiled for",
                where=model,
            )
        return api.load(Path(model), **running)
    if output is not None:
        from dsc.runtime.artifact import check_free

        check_free(output, force)  # before minutes go into compiling
    from dsc.frontends.load import READING

    kept = f"kept in {output}" if output else "for this once; -o OUT keeps what comes of it"
    with console.progress_bar() as progress:

        def told(what: str, done: int, total: int) -> None:
            if what == READING:  # it is there
                console.stderr().print(f"compiling {model}, {kept}", markup=False)
            progress(what, done, total)

        compiled = api.compile(model, progress=told, **compiling)
        if output is not None:
            progress(f"writing: {output}")
            compiled.save(output, force=force, progress=progress)
    for note in compiled.report.get("notes", []):
        console.stderr().print(f"note: {note}", markup=False)
    if output is not None:
        return api.load(output, **running)
    threads = {name: running[name] for name in ("threads", "pin") if name in running}
    if threads:
        compiled.set_threads(**threads)
    return compiled


def required_tokenizer(compiled: CompiledModel, model: str) -> Any:
    """The tokenizer, or `ArtifactError` for a model that came without one."""
    if compiled.tokenizer is None:
        raise ArtifactError(
            "the artifact holds no tokenizer",
            where=model,
            hint="compile a checkpoint that has a tokenizer.json",
        )
    return compiled.tokenizer


def stop_ids(tokenizer: Any, own: tuple[int, ...], texts: list[str]) -> set[int]:
    """Ids that end an answer: the model's, and those of stop texts that are a single token.

    Special tokens have no text for a stop text to be found in. A vocabulary of bytes spells them
    as letters: its "é" is the byte E9, with which other characters begin, and no end.
    """
    named = ((text, tokenizer.token_to_id(text)) for text in texts)
    found = {id: text for text, id in named if id is not None}
    return {*own, *(id for id, text in found.items() if tokenizer.decode([id]) in ("", text))}
