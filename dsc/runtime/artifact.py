"""The artifact: a folder that holds everything needed to run a compiled program.

It is written to a temporary sibling and renamed when complete, so that what is there is whole. The
manifest lists every file with its size and SHA-256, and has a hash of itself. Hashes give
integrity, not authenticity: an artifact that holds code loads only if this user built it, or with
`trust=True`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import dsc
from dsc._version import __version__
from dsc.errors import ArtifactError, UsageError
from dsc.files import check_makeable, check_room, copy_linked, is_led_out, named, why_no_file
from dsc.ir.index_ranges import index_ranges
from dsc.ir.parser import parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.ranks import at_rank
from dsc.ir.safetensors import open_safetensors
from dsc.ir.weights import MetaSource, WeightSource, leaf, source_types
from dsc.replacing import replacing
from dsc.runtime.emission import (
    EXAMPLE,
    MANIFEST,
    RUN_SCRIPT,
    Emission,
    Progress,
    check_unchanged,
)
from dsc.runtime.packing import damaged
from dsc.runtime.plan import FORMAT, PLAN, check_format
from dsc.runtime.tuned import Tuned
from dsc.runtime.weight_files import WeightFiles
from dsc.targets import parse_target
from dsc.user_folders import state_folder

CODE_SUFFIXES = frozenset({".so", ".cubin", ".hsaco", ".ptx", ".py"})
SEAL = "sha256"
REPORT = "report.json"
_OWN = re.compile(r"^from dsc\.([\w.]+) import .*\n+", re.MULTILINE)
MAX_MANIFEST = 64 * 2**20
TOOLS = ("torch", "transformers", "apache-tvm", "triton", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Artifact:
    """An artifact that was opened and checked."""

    folder: Path
    manifest: Mapping[str, Any]
    program: Program

    @property
    def backend(self) -> str:
        """Name of the backend that emitted it."""
        return str(self.manifest["backend"])


def check_free(out: Path, force: bool) -> None:
    """Raise `ArtifactError` when `out` exists and may not be replaced.

    Raises `FileError` where no folder can be put there.
    """
    with named(out):
        exists = out.exists()
    check_makeable(out)
    if not exists and out.is_symlink():
        raise ArtifactError(
            f"{out} is a link that leads nowhere", hint="remove it, or choose another place"
        )
    if not exists:
        return
    if not force:
        raise ArtifactError(
            f"{out} exists already",
            hint="choose another place, or replace it with force=True (--force)",
        )
    if not (out / MANIFEST).is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise ArtifactError(
            f"{out} is no artifact and is not replaced, not even with --force",
            hint="choose another place",
        )


def write(
    out: Path,
    program: Program,
    emission: Emission,
    *,
    backend: str,
    targets: tuple[str, ...],
    report: Mapping[str, Any],
    source: str = "",
    extra_files: Mapping[str, Path | bytes] | None = None,
    force: bool = False,
    with_weights: bool = True,
    rank: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write an artifact folder and return its path. Nothing is left behind on failure.

    `rank` says whose weights are packed, where the program is one for several ranks.
    """
    with replacing(out, partial(check_free, out, force)) as folder:
        files: dict[str, dict[str, Any]] = {}

        def add(name: str, data: bytes) -> None:
            target = _inside(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        emitted = dict(emission.files)
        stored = None
        if (with_weights and program.weights) or emission.finish is not None:
            stored = WeightFiles.of(
                program, emission.weights_path, emission.shard_size, emission.page
            )
        if stored is not None and emission.finish is not None:
            emitted |= emission.finish(stored.places)
        if stored is not None and with_weights and program.weights:
            own = program if rank is None else at_rank(program, rank)
            sizes = [file.size for file in stored.files]
            check_room(out, sum(sizes), "the weights", max(sizes))
            emitted |= stored.index()
            for file in stored.files:
                _inside(folder, file.path)
            files |= stored.write(folder, own, progress)
        for name, data in emitted.items():
            add(name, data)
        for name, content in (extra_files or {}).items():
            add(name, content if isinstance(content, bytes) else content.read_bytes())
        add("program.dsc", print_program(program).encode())
        add(REPORT, as_json(report))
        if emission.plan is not None:
            add(PLAN, emission.plan.to_json())
        if emission.runner and (with_weights or not program.weights):
            add(RUN_SCRIPT, run_script(emission.runner).encode())
        manifest = {
            "format": FORMAT,
            "dsc": __version__,
            "name": program.name,
            "backend": backend,
            "targets": list(targets),
            "entries": sorted(program.entries),
            "weights": stored.path if stored and with_weights and program.weights else None,
            "versions": _versions(),
            "needs": dict(emission.needs),
            "meta": dict(emission.meta),
            "config": program.meta.get("config", {}),
            "generation": program.meta.get("generation", {"eos_token_id": []}),
            "source": source,
            **_steps(program),
            "rank": rank,
            "files": files,
        }
        data = sealed(manifest)
        (folder / MANIFEST).write_bytes(data)
        _remember(data)
    return out


def rewrite(opened: Artifact, change: Tuned) -> None:
    """Put new files into an artifact that was opened: whole or not at all, weights as they lie.

    Its folder is made anew beside it, of the same files where they stay (links, where there can be
    any), and takes its name at once. What else somebody put into it stays. It is this user's own if
    it was before. Raises `FileError`.
    """
    own = _remembered((opened.folder / MANIFEST).read_bytes())
    target = opened.folder.resolve()
    with replacing(target) as folder:
        check_unchanged(opened.folder, opened.manifest)
        copy_linked(target, folder)
        files = dict(opened.manifest["files"])
        for name in list(files):
            if name in change.gone or any(
                x.endswith("/") and name.startswith(x) for x in change.gone
            ):
                del files[name]
                path = _inside(folder, name)
                path.unlink()
                with suppress(OSError):  # others are in it
                    for place in path.parents[: len(Path(name).parts) - 1]:
                        place.rmdir()
        for name, data in change.files.items():
            path = _inside(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # what was linked stays in the old folder as it is
            path.write_bytes(data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        meta = dict(opened.manifest["meta"])
        if change.targets:
            meta["targets"] = {**meta.get("targets", {}), **change.targets}
        data = sealed({**opened.manifest, "files": files, "meta": meta})
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_bytes(data)
        if own:
            _remember(data)


def read(folder: Path, trust: bool = False) -> Artifact:
    """Open an artifact: manifest, sizes, hashes of all but the weights, trust. `ArtifactError`."""
    manifest_path = _inside(folder, MANIFEST)
    if not manifest_path.is_file():
        raise ArtifactError(
            f"{folder} is no artifact: it has no {MANIFEST}",
            hint="give a folder that `dsc compile` wrote",
        )
    if manifest_path.stat().st_size > MAX_MANIFEST:
        raise ArtifactError(f"the manifest is larger than {MAX_MANIFEST} bytes", str(folder))
    data = manifest_path.read_bytes()
    manifest = _parse_manifest(data, folder)
    for name, facts in manifest["files"].items():
        _check_file(folder, name, facts, skip_hash="tensors" in facts)
    if _holds_code(manifest) and not trust and not _remembered(data):
        raise ArtifactError(
            "this artifact holds code that was not built by this user here",
            where=str(folder),
            hint="load it with trust=True (--trust) if you trust its author",
        )
    text = _inside(folder, "program.dsc").read_text()
    source = None
    if manifest["weights"] is not None:
        source = open_safetensors(_inside(folder, manifest["weights"]))
    return Artifact(folder, manifest, packed(parse_program(text), source))


def packed(program: Program, source: Any) -> Program:
    """The program with every weight read from `source` under its own name."""
    weights = {name: leaf(name, expr.type) for name, expr in program.weights.items()}
    known = source or MetaSource(source_types(weights.values()))
    return replace(program, weights=weights, source=known)


def over(folder: Path, manifest: Mapping[str, Any], source: WeightSource) -> Program:
    """The program of an artifact, its weights made from those of the checkpoint again.

    Raises `UsageError` where `source` has not the tensors that they are made from.
    """
    text = parse_program(_inside(folder, "program.dsc").read_text())
    wanted = source_types(text.weights.values())
    strange = [key for key, t in wanted.items() if source.types.get(key) != t]
    if strange:
        raise UsageError(
            f"no {strange[0]} : {wanted[strange[0]]} in the source: another model",
            where=str(folder),
            hint="name the checkpoint that it was compiled from with --checkpoint",
        )
    rank = manifest.get("rank")
    own = text if rank is None else at_rank(text, rank)
    return replace(own, source=source)


def loads_untrusted(folder: Path) -> bool:
    """Whether an artifact that was just written loads here without `trust`.

    One with code does not where the state folder, which keeps what this user built, takes nothing.
    """
    data = (folder / MANIFEST).read_bytes()
    return not _holds_code(json.loads(data)) or _remembered(data)


def check_hashes(folder: Path) -> int:
    """Verify the hash of every file, weights included; returns how many. Raises `ArtifactError`."""
    files = read(folder, trust=True).manifest["files"]
    for name, facts in files.items():
        _check_file(folder, name, facts, skip_hash=False)
    return len(files)


def run_script(runner: str) -> str:
    """The text of run.py: a backend's module, with the modules of dsc that it reads written out.

    Each of them once, behind those that it reads itself.
    """
    known: set[str] = set()

    def written_out(line: re.Match[str]) -> str:
        if line[1] in known:
            return ""
        known.add(line[1])
        module = Path(dsc.__file__).parent.joinpath(*line[1].split(".")).with_suffix(".py")
        text = module.read_text().partition("import annotations\n")[2].strip()
        return _OWN.sub(written_out, text) + "\n\n\n"

    whole = _OWN.sub(written_out, runner)
    return f'{whole.rstrip()}\n\n\nif __name__ == "__main__":\n    main(Model)\n'


def _steps(program: Program) -> dict[str, Any]:
    """The interface, by which run.py checks a step, and what indices may hold."""
    if not program.is_causal_lm:
        return {"limits": {}}
    general = list(program.entries.values())[-1]
    return {
        "limits": asdict(program.limits),
        **program.interface.to_json(),
        "checks": index_ranges(general, program.symbols).facts,
    }


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """dsc.json, with a hash of all that it says, by which damage to it is seen."""
    said = {key: value for key, value in manifest.items() if key != SEAL}
    return as_json({**said, SEAL: hashlib.sha256(as_json(said)).hexdigest()})


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if name.startswith("/") or ".." in Path(name).parts or is_led_out(folder, path):
        raise ArtifactError(f"the path {name!r} leads outside of the artifact", str(folder))
    return path


def _parse_manifest(data: bytes, folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(data)
        check_format(manifest["format"], str(folder))
        if "files" not in manifest and "ranks" in manifest:
            raise ArtifactError(
                f"{folder} holds {manifest['ranks']} ranks, each an artifact of its own",
                hint=f"open one of them, as {folder / 'rank_0'}",
            )
        if data != sealed(manifest):
            raise ArtifactError(
                f"{MANIFEST} is not what was compiled: its hash is another",
                where=str(folder),
                hint="compile it again",
            )
        for name, facts in manifest["files"].items():
            if not isinstance(name, str) or not isinstance(facts["bytes"], int):
                raise TypeError("files")
            str(facts["sha256"])
            dict(facts.get("tensors", {}))
        for key in ("backend", "name", "meta", "entries", "weights"):
            manifest[key]
        for limit in manifest["limits"].values():
            int(limit)
        parse_target(manifest["targets"][0])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
        raise ArtifactError(f"{MANIFEST} is damaged: {problem}", where=str(folder)) from None
    return manifest  # type: ignore[no-any-return]


def _check_file(folder: Path, name: str, facts: Mapping[str, Any], skip_hash: bool) -> None:
    path = _inside(folder, name)
    if reason := why_no_file(path):
        told = f"the artifact lacks {name}" if reason == "is missing" else f"{name} {reason}"
        raise ArtifactError(told, where=str(folder))
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise ArtifactError(f"{name} has {size} bytes, {facts['bytes']} recorded", str(folder))
    if skip_hash:
        return
    if "tensors" in facts:
        tensor = damaged(path, facts)
        wrong = f"the hash of {tensor}" if tensor else ""
    else:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wrong = "its hash" if found != facts["sha256"] else ""
    if wrong:
        raise ArtifactError(
            f"{name} is not what was compiled: {wrong} differs from the manifest's",
            where=str(folder),
            hint="compile it again",
        )


def _holds_code(manifest: Mapping[str, Any]) -> bool:
    names = (name for name in manifest["files"] if name not in (RUN_SCRIPT, EXAMPLE))
    return any(Path(name).suffix in CODE_SUFFIXES for name in names)


def _state_file(manifest: bytes) -> Path:
    return state_folder() / "built" / hashlib.sha256(manifest).hexdigest()


def _remember(manifest: bytes) -> None:
    """Note that this user built this manifest, where the state folder can be written."""
    try:
        path = _state_file(manifest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return


def _remembered(manifest: bytes) -> bool:
    try:
        return _state_file(manifest).exists()
    except OSError:
        return False


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found


def as_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file of an artifact. Raises `UsageError`."""
    try:
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except TypeError as problem:
        raise UsageError(f"a value that JSON cannot hold: {problem}") from None
