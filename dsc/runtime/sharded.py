"""The artifact of a program for several ranks: one folder a rank, and a manifest that lists them.

    OUT/dsc.json      how many ranks, how they share the program, the hash of each rank's manifest
    OUT/rank_0/ …     an artifact of its own, with this rank's weights

All ranks hold the same program text and code; only their packed weights differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsc._version import __version__
from dsc.errors import ArtifactError, UsageError
from dsc.replacing import replacing
from dsc.runtime import collectives
from dsc.runtime.artifact import check_free
from dsc.runtime.emission import MANIFEST
from dsc.runtime.plan import FORMAT, check_format
from dsc.runtime.weight_files import weight_files


@dataclass(frozen=True)
class Sharded:
    """The manifest of an artifact for several ranks."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return int(self.manifest["ranks"])

    def rank(self, rank: int) -> Path:
        """The folder of one rank."""
        return self.folder / f"rank_{rank}"


def write(
    out: Path,
    ranks: int,
    one: Callable[[Path, int], object],
    facts: Mapping[str, Any],
    force: bool = False,
) -> Path:
    """Write the folder `out`: `one(folder, rank)` writes each rank's artifact.

    Whole or not at all. `facts` go into the manifest. Raises `ArtifactError`.
    """
    with replacing(out, partial(check_free, out, force)) as folder:
        listed = []
        for rank in range(ranks):
            each = folder / f"rank_{rank}"
            one(each, rank)
            listed.append(_listing(each))
        manifest = {"format": FORMAT, "dsc": __version__, "ranks": ranks, "folders": listed}
        text = json.dumps({**facts, **manifest}, indent=1, sort_keys=True)
        (folder / MANIFEST).write_text(text)
    return out


def opened(folder: Path) -> Sharded | None:
    """The manifest of a folder of ranks; `None` for anything else. Raises `ArtifactError`."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if "ranks" not in manifest or "files" in manifest:
            return None
        ranks, listed = int(manifest["ranks"]), manifest["folders"]
        if ranks < 1 or [each["folder"] for each in listed] != [f"rank_{r}" for r in range(ranks)]:
            raise ValueError(f"{ranks} ranks, {len(listed)} folders")
        check_format(manifest["format"], str(folder))
        for each in listed:
            str(each["manifest"]), str(each["weights"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise ArtifactError(f"{MANIFEST} is damaged: {problem}", where=str(folder)) from None
    return Sharded(folder, manifest)


def enter(found: Sharded) -> Path:
    """Join the other ranks, agree with them on what is run, and return this rank's folder.

    Raises `UsageError` where this process is not one of the ranks, `RankError` where ranks differ.
    """
    import os

    if collectives.current().size == 1 and not collectives.launched(os.environ):
        raise UsageError(
            f"{found.folder} was compiled for {found.ranks} ranks",
            hint=f"run it with `dsc generate {found.folder} --ranks {found.ranks}`, or load it in"
            f" a script under `torchrun --nproc-per-node {found.ranks}`",
        )
    group = collectives.join()
    check_ranks(found, group.size)
    own = found.rank(group.rank)
    program = (own / "program.dsc").read_bytes() if (own / "program.dsc").is_file() else b""
    collectives.agree(
        "artifact",
        {
            "version": __version__,
            "program": collectives.digest(program),
            "weights": _weights_digest(found, group.rank),
        },
    )
    return own


def check_ranks(found: Sharded, asked: int) -> None:
    """Raise `UsageError` unless as many ranks run as the artifact was made for."""
    if asked != found.ranks:
        raise UsageError(
            f"{asked} ranks for an artifact of {found.ranks}",
            where=str(found.folder),
            hint=f"open it with ranks={found.ranks} (--ranks), or compile it with ranks={asked}",
        )


def _weights_digest(found: Sharded, rank: int) -> str:
    """What all ranks must have in common: the weights of every rank, this one's as they are here.

    So a rank whose folder was replaced, or that reads another artifact, has another digest.
    """
    listed = [dict(each) for each in found.manifest["folders"]]
    listed[rank] = _listing(found.rank(rank))
    return collectives.digest(json.dumps([each["weights"] for each in listed]))


def _listing(folder: Path) -> dict[str, Any]:
    """A rank's folder as the manifest lists it: the hashes of its manifest and its weights."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"the artifact lacks {folder.name}", where=str(folder.parent))
    data = path.read_bytes()
    own = json.loads(data)
    hashes = [str(facts["sha256"]) for _, facts in sorted(weight_files(own).items())]
    several = collectives.digest(json.dumps(hashes)) if hashes else "none"
    weights = hashes[0] if len(hashes) == 1 else several
    return {
        "folder": folder.name,
        "manifest": hashlib.sha256(data).hexdigest(),
        "weights": weights,
    }
