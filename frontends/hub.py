"""A model by its name on the Hugging Face Hub, or by its place in the Hub's cache.

`huggingface_hub` does the transfer: its cache and settings (`HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`
or `hf auth login`, `HF_ENDPOINT` for a mirror, `HF_HUB_OFFLINE`) hold as everywhere. What is asked
for is settled here: files by an allow-list of names (`folder.py`, and safetensors), never code and
never a pickle, each no larger than its bound, of one commit. A name is checked before any request.

What an interruption leaves is used: files that are whole are not asked for again, and a connection
that breaks off is taken up where it stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsc.errors import CheckpointError, DscError, FileError, UsageError, one_of
from dsc.files import check_room
from dsc.frontends.folder import CONFIG_FILE, LIMITS, read_bounded
from dsc.ir.safetensors import INDEX_FILE, SINGLE_FILE, inside
from dsc.runtime.emission import Progress
from dsc.strict_json import parse_object

NAME = re.compile(r"(?=.{3,96}\Z)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
"""ORG/NAME; the rest of the Hub's rules is in `is_name`."""
REVISION = re.compile(r"[A-Za-z0-9][\w./+-]{0,199}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = re.compile(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", re.ASCII)
PREFIX = "models--"
"""How the folders of models in the Hub's cache begin: `models--ORG--NAME`."""


def located(
    model: str | Path,
    revision: str | None = None,
    progress: Progress | None = None,
    weights: bool = True,
) -> tuple[Path, list[str]]:
    """Where a model is on this machine, downloaded if need be, and notes on how it was found.

    Without `weights` none are asked for by name, of a model of hundreds of gigabytes.

    A path that exists is that place, and of a repository in the Hub's cache
    (`models--ORG--NAME`) the snapshot of the revision; any other ORG/NAME is a name on the Hub.
    What is neither comes back as it is.

    Raises:
        UsageError: a revision that is none, or of what has none; a name that the Hub does not know.
        CheckpointError: the repository lacks a file, or has a file beyond its bound.
        FileError: the Hub cannot be reached, refuses, or is off and the cache has not all.
    """
    path = Path(model)
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(
            f"{revision!r} is no revision", hint="give a branch, a tag or a commit of the model"
        )
    if (path / "snapshots").is_dir() and not (path / CONFIG_FILE).exists():
        return snapshot_of(path, revision), []
    if path.exists() or not is_name(str(model)):
        if revision is not None:
            raise UsageError(
                "a revision is of a model on the Hub",
                where=str(model),
                hint="leave out --revision, or give ORG/NAME",
            )
        return path, []
    return _found(str(model), revision, progress, weights)


def is_name(text: str) -> bool:
    """Whether a text is a name on the Hub by the Hub's own rules, and no file that dsc reads.

    >>> [is_name(t) for t in ("deepseek-ai/DeepSeek-V3", "../x", "a/b/c", "a/b.py", "a--b/c", "v3")]
    [True, False, False, False, False, False]
    """
    odd = "--" in text or ".." in text or text.endswith((".git", ".py", ".dsc", "-", "."))
    return NAME.fullmatch(text) is not None and not odd


def model_name(folder: Path) -> str:
    """What a checkpoint folder is called: a snapshot by its repository, not by its commit.

    >>> model_name(Path("/cache/models--org--V3/snapshots/e815")), model_name(Path("R1"))
    ('V3', 'R1')
    """
    repository = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if repository.name.startswith(PREFIX):
        return repository.name.rpartition("--")[2]
    return folder.name


def snapshot_of(repository: Path, revision: str | None = None) -> Path:
    """The snapshot of a revision, `main` by default, in a repository's folder of the Hub's cache.

    Raises:
        UsageError: there is none, or none of them is told by `refs`.
    """
    snapshots = repository / "snapshots"
    held = sorted(e.name for e in snapshots.iterdir() if e.is_dir() and not e.is_symlink())
    ref = repository / "refs" / (revision or "main")
    told = revision
    if os.path.lexists(ref):
        path = inside(ref.parent, ref.name, str(ref))
        with path.open("rb") as stream:
            told = stream.read(256).decode("utf-8", "backslashreplace").strip()
    if told is None and len(held) == 1:
        told = held[0]
    if told is None or told not in held:
        raise UsageError(
            f"the cache holds no snapshot of revision {revision or 'main'}",
            where=str(repository),
            hint=one_of(told or "", held) if held else "download the model again",
        )
    return snapshots / told


def _found(
    name: str, revision: str | None, progress: Progress | None, weights: bool
) -> tuple[Path, list[str]]:
    """A repository's files: from the Hub, or from the cache where the Hub is off or away."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        why, to_do = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE once to download"
        return _cached(name, revision, weights, why, to_do), []
    try:
        with _told(name, revision):
            if progress is not None:
                progress(f"asking {constants.ENDPOINT} for {name}", 0, 0)
            listed = HfApi().model_info(name, revision=revision, files_metadata=True)
            return _Repository(name, revision, listed, progress).downloaded(weights), []
    except _Away as away:
        why, to_do = f"{constants.ENDPOINT} {away}", "see to the connection"
        folder = _cached(name, revision, weights, why, to_do)
        return folder, [f"{constants.ENDPOINT} {away}: {name} is what the cache has of it"]
    except LocalEntryNotFoundError as problem:
        raise FileError(f"a download failed: {problem}", name, "try again: it goes on") from None


class _Away(Exception):
    """The Hub did not answer; says in words what it did instead."""


class _Repository:
    """A model's repository as the Hub lists it, at one commit."""

    def __init__(
        self, name: str, revision: str | None, listed: Any, progress: Progress | None
    ) -> None:
        self.name, self.revision, self.progress = name, revision, progress
        self.sizes: dict[str, int | None] = {s.rfilename: s.size for s in listed.siblings or ()}
        if not isinstance(listed.sha, str) or not COMMIT.fullmatch(listed.sha):
            raise CheckpointError(f"the Hub names no commit but {listed.sha!r}", name)
        self.commit = listed.sha
        self._done = self._total = 0

    def downloaded(self, weights: bool = True) -> Path:
        """The snapshot's folder, with everything that dsc reads of it. Raises as `located`."""
        if CONFIG_FILE not in self.sizes:
            raise CheckpointError(
                f"the repository has no {CONFIG_FILE}", self.name, "name one for transformers"
            )
        small = [file for file in LIMITS if file in self.sizes]
        self._count(small)
        # Asked for by the revision, so that the cache notes which commit that is.
        self._fetch(CONFIG_FILE, self.revision or "main")
        folder = Path(self._fetch(CONFIG_FILE, self.commit)).parent
        for file in small:
            self._fetch(file, self.commit)
        files = shards(folder, self.sizes, self.name) if weights else []
        self._count(files)
        for file in files:
            self._fetch(file, self.commit)
        return folder

    def _count(self, files: list[str]) -> None:
        """Look at the sizes of files before the first of them is asked for."""
        from huggingface_hub import constants, try_to_load_from_cache

        absent = [
            file
            for file in files
            if not isinstance(try_to_load_from_cache(self.name, file, revision=self.commit), str)
        ]
        for file in absent:
            _check_size(self.name, file, self.sizes[file] or 0)
        self._done, self._total = 0, sum(self.sizes[file] or 0 for file in absent)
        if absent:
            check_room(Path(constants.HF_HUB_CACHE) / self.name, self._total, "the download")

    def _fetch(self, file: str, revision: str) -> str:
        from huggingface_hub import hf_hub_download

        class Bar(_Bar):
            """The bar of this file."""

            limit, where = LIMITS.get(file), f"{self.name}/{file}"
            moved = staticmethod(self._moved(file))

        made: Any = Bar
        return hf_hub_download(self.name, file, revision=revision, tqdm_class=made)

    def _moved(self, file: str) -> Callable[[int], None]:
        def moved(count: int) -> None:
            self._done += count
            if self.progress is not None:
                done = min(self._done, self._total)
                self.progress(f"downloading: {file}", done, self._total)

        return moved


class _Bar:
    """What `huggingface_hub` takes for a bar of tqdm: our progress, and the end of a file too long.

    The bytes are counted before they are written, so a server that sends more than it announced
    fills no disk.
    """

    limit: int | None
    where: str
    moved: Callable[[int], None]

    def __init__(self, *_: Any, **given: Any) -> None:
        self.total, self.n = given.get("total"), given.get("initial") or 0
        self.format_dict: dict[str, Any] = {}

    def update(self, count: float | None = 1) -> None:
        """Count bytes. Raises `CheckpointError` beyond the file's bound."""
        self.n += int(count or 0)
        if self.limit is not None and self.n > self.limit:
            raise _too_large(self.where, self.n, self.limit)
        self.moved(int(count or 0))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    close = refresh = clear = set_description = set_description_str = set_postfix_str = _nothing
    update_transfer = set_transfer_postfix_str = _nothing
    """What Xet has received is not counted beside what it has written."""


def shards(folder: Path, held: Mapping[str, object], where: str) -> list[str]:
    """The files of the weights among those `held`: what the index names, or `model.safetensors`.

    Raises:
        CheckpointError: there are none, or the index names a file that is not held; says which.
    """
    if INDEX_FILE in held:
        text = read_bounded(folder / INDEX_FILE)
        told = parse_object(text, f"{where}/{INDEX_FILE}", CheckpointError).get("weight_map")
        named = told.values() if isinstance(told, dict) else ()
        files = sorted({str(file) for file in named})
        missing = [f for f in files if f not in held or not WEIGHTS.fullmatch(f)]
        if missing or not files:
            what = f"{missing[0]!r}, which is missing" if missing else "no file"
            raise CheckpointError(f"the index names {what}", f"{where}/{INDEX_FILE}")
        return files
    if SINGLE_FILE in held:
        return [SINGLE_FILE]
    files = sorted(file for file in held if WEIGHTS.fullmatch(file))
    if not files:
        other = sorted(f for f in held if f.endswith((".bin", ".pt", ".pth", ".gguf")))
        what = f"only {other[0]}, which is not read" if other else "no weights"
        raise CheckpointError(
            f"{what}: there is no *.safetensors file", where, "name a model that has safetensors"
        )
    return files


def _cached(name: str, revision: str | None, weights: bool, why: str, to_do: str) -> Path:
    """The snapshot that the cache has, whole. Raises `FileError` that says what it lacks."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG_FILE, revision=revision)
    at = f" at {revision}" if revision else ""
    if not isinstance(found, str):
        raise FileError(
            f"there is no folder {name!r} here, {why}, and {name}{at} is not in the cache",
            hint=f"see to the spelling, if a folder was meant; else {to_do}",
        )
    folder = Path(found).parent
    if not weights:
        return folder
    try:
        shards(folder, {each.name: None for each in folder.iterdir() if each.exists()}, str(folder))
    except CheckpointError as lacking:
        raise FileError(
            f"{why}, and the cache has not all of {name}{at}: {lacking.what}", str(folder), to_do
        ) from None
    return folder


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """What the Hub, or the way to it, refuses, in words; `_Away` where it does not answer."""
    from huggingface_hub import errors

    try:
        yield
    except DscError:
        raise
    except errors.GatedRepoError:
        raise FileError(
            "the model is gated, and this machine has no access",
            name,
            "accept its terms on the Hub, then log in (hf auth login) or set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"there is no folder {name!r} here, and the Hub has no model of that name for you",
            hint="see to the spelling; for a private model log in (hf auth login) or set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(
            f"{name} has no revision {revision!r}", hint="give a branch, a tag or a commit"
        ) from None
    except errors.RemoteEntryNotFoundError as problem:
        raise CheckpointError(f"a file is gone: {_line(problem)}", name, "try again") from None
    except errors.HfHubHTTPError as problem:
        raise _Away(f"answers {problem.response.status_code}") from None
    except OSError as problem:
        if isinstance(problem, errors.LocalEntryNotFoundError) or not _of_network(problem):
            raise
        raise _Away(f"cannot be reached ({_line(problem)})") from None
    except Exception as problem:  # the classes of the HTTP client are those of its package
        if not _of_network(problem):
            raise
        raise _Away(f"cannot be reached ({_line(problem)})") from None


def _of_network(problem: Exception) -> bool:
    package = type(problem).__module__.partition(".")[0]
    client = package.startswith(("http", "requests"))
    return client or isinstance(problem, ConnectionError | TimeoutError)


def _line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _check_size(name: str, file: str, size: int) -> None:
    limit = LIMITS.get(file)
    if limit is not None and size > limit:
        raise _too_large(f"{name}/{file}", size, limit)


def _too_large(where: str, size: int, limit: int) -> CheckpointError:
    return CheckpointError(
        f"{size} bytes or more, where such a file may have {limit}", where, "name another model"
    )
