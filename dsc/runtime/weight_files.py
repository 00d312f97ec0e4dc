"""The files of an artifact's weights: one, or several of limited size and their index.

Which tensors lie in which file, and where, follows from their types: it is known before a byte is
made, and for weights that are nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dsc.ir.program import Program
from dsc.ir.safetensors import INDEX_FILE
from dsc.runtime.contents import Stored
from dsc.runtime.emission import Place, Progress
from dsc.runtime.packing import ALIGNMENT, Places, Telling, stored_of, table, write_file
from dsc.runtime.shards import cut, index_of, shard_names


@dataclass(frozen=True)
class WeightFile:
    """A file that is to be written: its path in the artifact, its tensors, and their places."""

    path: str
    stored: Sequence[Stored]
    header: bytes
    places: Places

    @property
    def size(self) -> int:
        """Bytes that it will have, but for what pads its end."""
        return max((at + size for at, size in self.places.values()), default=len(self.header))


@dataclass(frozen=True)
class WeightFiles:
    """All files of a program's weights. `path` is what opens them: the one file, or the index."""

    path: str
    files: Sequence[WeightFile]

    @staticmethod
    def of(program: Program, path: str, limit: int | None = None, page: int = 1) -> WeightFiles:
        """The file `path`, or several beside it with `limit` bytes of tensors at most in each."""
        stored, place = stored_of(program), PurePosixPath(path)
        shards = [stored] if limit is None else cut(stored, limit)
        single = len(shards) == 1
        names = [place.name] if single else shard_names(len(shards))
        files = [
            WeightFile(str(place.with_name(name)), shard, *table(shard, ALIGNMENT, page))
            for name, shard in zip(names, shards, strict=True)
        ]
        return WeightFiles(path if single else str(place.with_name(INDEX_FILE)), files)

    @property
    def places(self) -> dict[str, Place]:
        """Where each tensor lies: the name of its file, the first byte, and how many."""
        return {
            name: (PurePosixPath(file.path).name, *place)
            for file in self.files
            for name, place in file.places.items()
        }

    def index(self) -> Mapping[str, bytes]:
        """The index of several files, by its path; nothing of one."""
        if len(self.files) == 1:
            return {}
        sizes = (size for file in self.files for _, size in file.places.values())
        return {self.path: index_of({n: place[0] for n, place in self.places.items()}, sum(sizes))}

    def write(
        self, folder: Path, program: Program, progress: Progress | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Write the files into a folder, one after another; of each its path and what it holds.

        `program` is whose weights they are: for one of several ranks, that rank's.
        """
        own = dict(stored_of(program))
        told = Telling(progress, sum(size for _, _, size in self.places.values()))
        for file in self.files:
            stored = [(name, own[name]) for name, _ in file.stored]
            written = write_file(
                folder / file.path, stored, file.header, file.places, program.source, told
            )
            yield file.path, written.facts
        told.end()


def weight_files(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Of the files in a manifest those that hold weights, by path."""
    return {name: facts for name, facts in manifest["files"].items() if "tensors" in facts}
