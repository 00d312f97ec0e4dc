"""A compiled model: what `dsc.compile` gives and `dsc.load` opens, and how it is run.

What only compiling needs is not imported here: a loaded model starts sooner.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc import backends
from dsc.errors import ArtifactError, UsageError
from dsc.ir.program import Program
from dsc.ir.segments import cut
from dsc.runtime import artifact as artifacts
from dsc.runtime import sharded
from dsc.runtime.emission import Emission, Progress, check_unchanged
from dsc.runtime.executable import Executable, StandIn, set_threads
from dsc.runtime.segmented import SegmentedExecutable
from dsc.runtime.session import Session
from dsc.runtime.tokens import check_limits
from dsc.targets import parse_target

if TYPE_CHECKING:
    from dsc.chat_template import ChatTemplate

log = logging.getLogger(__name__)


@dataclass(repr=False)
class CompiledModel:
    """A compiled program: in memory until saved, or opened from an artifact folder."""

    program: Program
    backend: str
    report: Mapping[str, Any]
    targets: tuple[str, ...] = ("cpu",)
    source: str = ""
    _emission: Emission | None = None
    _files: Mapping[str, Path | bytes] = field(default_factory=dict)
    _artifact: artifacts.Artifact | None = None
    _told: bool = False

    def __repr__(self) -> str:
        """A line: its name, what runs it and its entries; the program is in `program`."""
        place = "" if self.folder is None else f" in {self.folder}"
        entries = ", ".join(self.program.entries)
        targets = ", ".join(self.targets)
        return f"<{self.program.name}{place}: {entries} by {self.backend} for {targets}>"

    def save(self, path: str | Path, force: bool = False, progress: Progress | None = None) -> Path:
        """Write the artifact folder `path`, whole or not at all. Raises `ArtifactError`."""
        out = Path(path)
        artifacts.check_free(out, force)
        if self._emission is None:
            raise UsageError("this model was loaded from an artifact; copy its folder instead")
        ranks = self.program.mesh.ranks
        if ranks == 1:
            return self._write(out, None, force, progress)
        facts = {
            "backend": self.backend,
            "name": self.program.name,
            "config": self.program.meta.get("config", {}),
            "parallel": self.program.mesh.parallel,
        }
        return sharded.write(
            out, ranks, lambda each, rank: self._write(each, rank, False, progress), facts, force
        )

    def _write(self, out: Path, rank: int | None, force: bool, progress: Progress | None) -> Path:
        """Write one artifact folder: the whole model's, or a rank's."""
        assert self._emission is not None
        return artifacts.write(
            out,
            self.program,
            self._emission,
            backend=self.backend,
            targets=self.targets,
            report=self.report,
            source=self.source,
            extra_files=self._files,
            force=force,
            with_weights=self.has_weights,
            rank=rank,
            progress=progress,
        )

    @property
    def max_batch(self) -> int:
        """Sequences in one step, at most."""
        return self.program.limits.max_batch

    @property
    def max_context(self) -> int:
        """Tokens that a sequence may hold, at most."""
        return self.program.limits.max_context

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prompt that are processed at once, at most."""
        return self.program.limits.prefill_chunk

    @property
    def has_weights(self) -> bool:
        """Whether weight values are at hand (not compiled with `weights="none"`)."""
        return self.program.has_weights

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """The artifact's manifest; before saving, what of it is known."""
        if self._artifact is not None:
            return self._artifact.manifest
        known = {name: self.program.meta.get(name, {}) for name in ("config", "generation")}
        return {**known, "source": self.source}

    @property
    def folder(self) -> Path | None:
        """The artifact that it was opened from: of several ranks this one's."""
        return None if self._artifact is None else self._artifact.folder

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` that came with the model, or `None`.

        Raises `ArtifactError` where it is damaged, or the artifact was replaced.
        """
        from dsc.frontends.folder import TOKENIZER
        from dsc.frontends.tokenizer import parse_tokenizer

        found = self._file(TOKENIZER)
        if found is None:
            return None
        return parse_tokenizer(found, ArtifactError, "compile the model again")

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template that came with the model, or `None`.

        Raises `ArtifactError` where it is damaged, or the artifact was replaced.
        """
        from dsc.chat_template import CHAT, parse_chat

        found = self._file(CHAT)
        return None if found is None else parse_chat(found)

    def _file(self, name: str) -> Path | bytes | None:
        """A file that goes, or went, with the model into the artifact."""
        if self._artifact is None:
            return self._files.get(name)
        check_unchanged(self._artifact.folder, self._artifact.manifest)
        path = self._artifact.folder / name
        return path if path.is_file() else None

    @cached_property
    def executable(self) -> Executable:
        """The loaded code. A model that was not saved is written to a temporary folder first."""
        if self._artifact is not None:
            return self._loaded(self._artifact)
        base = Path(tempfile.mkdtemp(prefix="dsc-"))
        try:
            folder = _own_folder(self.save(base / "artifact"))
            found = self._loaded(artifacts.read(folder, trust=True))
        except BaseException:
            shutil.rmtree(base, ignore_errors=True)
            raise
        weakref.finalize(found, shutil.rmtree, base, True)  # a session may outlive this model
        return found

    def _loaded(self, opened: artifacts.Artifact) -> Executable:
        """What the backend makes of an artifact. Raises `ArtifactError` where it was replaced."""
        check_unchanged(opened.folder, opened.manifest)
        chosen = backends.get(self.backend)
        collectives = chosen.capabilities(parse_target(self.targets[0])).collectives
        whole = opened.program.mesh.ranks == 1 or collectives
        program = opened.program if whole else cut(opened.program)
        found = chosen.load(opened.folder, opened.manifest, program)
        check_unchanged(opened.folder, opened.manifest)  # nor while it was read
        return found if whole else SegmentedExecutable(found, opened.program)

    def run(self, inputs: Mapping[str, Any], entry: str | None = None) -> dict[str, Any]:
        """Run one entry (the first by default) on arrays by name; results are of their kind.

        Torch tensors alone give torch tensors; NumPy arrays, lists and what speaks DLPack give
        NumPy arrays. A cache that is written in place comes back as what was given.
        """
        return self.executable.run(entry or next(iter(self.program.entries)), inputs)

    def set_threads(self, threads: int | None = None, pin: bool | None = None) -> None:
        """Run on this many threads, with workers pinned to cores or not; `None`: the default.

        Holds for all sessions of this model. Raises `UsageError` where that is impossible: the
        backend has no threads, or its thread pool was started smaller.
        """
        check_kinds(int, True, threads=threads)
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads asked", hint="give at least 1")
        set_threads(self.executable, threads, pin)

    def session(
        self,
        max_batch: int | None = None,
        max_context: int | None = None,
        threads: int | None = None,
        pin: bool | None = None,
    ) -> Session:
        """A session over this model, which owns a KV cache; `set_threads` first where asked.

        What stands in for a GPU that is not there is told to the log `dsc`, once a model. Raises
        `UsageError` for more than the model was compiled for.
        """
        check_kinds(int, True, max_batch=max_batch, max_context=max_context, threads=threads)
        batch = self.max_batch if max_batch is None else max_batch
        context = self.max_context if max_context is None else max_context
        check_limits(self.program, batch, context)
        if threads is not None or pin is not None:
            self.set_threads(threads, pin)
        found = self.executable
        if isinstance(found, StandIn) and found.computes and not self._told:
            log.warning("%s", found.stand_in)
            self._told = True
        return Session(found, self.program, batch, context)


def load(
    path: str | Path, trust: bool = False, threads: int | None = None, pin: bool | None = None
) -> CompiledModel:
    """Open an artifact folder. Raises `ArtifactError`.

    An artifact that holds machine code loads only if this user built it here, or with `trust`. One
    for several ranks opens in a process that is one of them (`torchrun`), after all have agreed on
    what they run: `UsageError` and `RankError` otherwise. `threads` and `pin` are those of
    `CompiledModel.set_threads`.
    """
    opened = artifacts.read(_own_folder(Path(path)), trust)
    model = CompiledModel(
        program=opened.program,
        backend=opened.backend,
        report={},
        targets=tuple(opened.manifest["targets"]),
        source=str(opened.manifest.get("source", "")),
        _artifact=opened,
    )
    if threads is not None or pin is not None:
        model.set_threads(threads, pin)
    return model


def _own_folder(folder: Path) -> Path:
    """The folder that this process loads: its rank's, where there are several."""
    found = sharded.opened(folder)
    return folder if found is None else sharded.enter(found)


def check_kinds(kind: type, optional: bool, **given: object) -> None:
    """Raise `UsageError` for options of another kind than they must be, None where `optional`."""
    words = {int: "a whole number", str: "a text"}[kind]
    for name, value in given.items():
        left_out = optional and value is None
        if not left_out and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UsageError(f"{name} is {value!r}", hint=f"give {words}")
