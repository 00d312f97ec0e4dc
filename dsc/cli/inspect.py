"""`dsc inspect`: the text IR of a model at any point, or what an artifact holds."""

from __future__ import annotations

import json as json_text
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from dsc.cli import console, options
from dsc.errors import ArtifactError, UsageError, one_of
from dsc.files import read_text
from dsc.targets import Target


def inspect(
    model: options.Model,
    entry: Annotated[
        str | None,
        Option("--entry", metavar="E", help="Only this entry: decode, extend, prefill."),
    ] = None,
    after: Annotated[
        str | None,
        Option("--after", metavar="PASS", help="A model's IR after this pass, not the last."),
    ] = None,
    report: Annotated[
        bool, Option("--report", help="What each pass did, and what each layer costs.")
    ] = False,
    kernels: Annotated[
        bool,
        Option(
            "--kernels", help="What kernels take (triton), or the files that the backend emitted."
        ),
    ] = False,
    config: options.Config = None,
    weights: options.Weights = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    quant: options.Quant = "none",
    quant_embedding: options.QuantEmbedding = "none",
    cache_format: options.CacheFormat = "bf16",
    ranks: options.Ranks = None,
    json: options.Json = False,
) -> None:
    """Print the text IR of MODEL, or what an artifact OUT holds.

    Of an artifact: what runs it, its limits, where and how texts go on, and its entries, whose text
    IR --entry prints.
    `--kernels` of one by triton tells of each kernel its registers, spills, shared memory,
    occupancy and matrix instructions, which tiles were chosen and could be, and of a decode step
    and a prefill chunk what they move over what they must, and how long they could take on each
    card that it was compiled for.

    Examples:

        dsc inspect models/v3.py --entry decode --after absorb_mla

        dsc inspect v3 --config 671b --weights none --quant fp8 --ranks 8 --report

        dsc inspect v3-tvm --kernels
    """
    if json and report == kernels:
        hint = "the text IR is printed as it is, and a JSON document is of one of them"
        raise UsageError("--json goes with --report or --kernels", hint=hint)
    folder = Path(model)
    forms = {"quant": quant, "quant_embedding": quant_embedding, "cache_format": cache_format}
    plain = {"quant": "none", "quant_embedding": "none", "cache_format": "bf16"}
    asked = {name: form for name, form in forms.items() if form != plain[name]}
    given = options.chosen(config=config, weights=weights, revision=revision, ranks=ranks, **asked)
    if kernels and entry is not None:
        raise UsageError("kernels are of all entries", hint="give --kernels or --entry, not both")
    if (folder / "dsc.json").is_file():
        idle = [
            f"--{name.replace('_', '-')}" for name in (*given, *(["backend"] if backend else []))
        ]
        if idle:
            raise UsageError(
                f"{', '.join(idle)}: for models; an artifact is what it was compiled for",
                where=model,
            )
        _inspect_artifact(folder, entry, after, report, kernels, json)
        return
    if kernels:
        raise UsageError(
            "--kernels reads an artifact",
            where=model,
            hint="compile it first: dsc compile " + model,
        )
    if report and after is not None:
        raise UsageError("a report is of all passes", hint="give --report or --after, not both")
    _check_names(model, backend or "null", after, entry)
    if report:
        _show_report(_compiled_report(model, backend or "null", given), entry, json)
        return
    print(_select(_lowered(model, backend or "null", after, given), entry), end="")


def _check_names(model: str, backend: str, after: str | None, entry: str | None) -> None:
    """Raise `UsageError` for names that no compile of this model has, before there is one.

    A text has entries of its own, whatever its stage.
    """
    from dsc import backends, pipeline

    pipeline.check_names([] if after is None else [after], ["input"])
    chosen = backends.get(backend)
    if entry is None or model.endswith(".dsc"):
        return
    whole = after is not None and not pipeline.has_entries(after)
    made = chosen.capabilities(Target("cpu")).entries
    if whole and entry in made:
        raise UsageError(
            f"after {after} there is no entry {entry!r} yet",
            hint="entries exist from specialise_entries on; leave out --entry, or take a later"
            " pass",
        )
    if not whole:
        _check_entry(entry, made)


def _check_entry(entry: str, known: Collection[str]) -> None:
    if entry not in known:
        raise UsageError(f"no entry {entry!r}", hint=one_of(entry, known))


def _inspect_artifact(
    folder: Path, entry: str | None, after: str | None, report: bool, kernels: bool, as_json: bool
) -> None:
    from dsc.runtime import sharded

    ranks = sharded.opened(folder)
    folder = folder if ranks is None else ranks.rank(0)  # all ranks hold the same program
    if after is not None:
        raise UsageError(
            "an artifact holds only its final program",
            where=str(folder),
            hint="name the model with --after, not the artifact",
        )
    manifest = read_object(folder, "dsc.json")
    facts = card(manifest, folder)
    if report and as_json:
        known = {name: manifest.get(name) or {} for name in ("limits", "generation", "needs")}
        _show_report({**read_object(folder, "report.json"), **known}, entry, as_json)
    elif report:
        print("\n".join(f"{name:<20}  {value}" for name, value in facts.items()))
        _show_report(read_object(folder, "report.json"), entry, as_json)
    if kernels:
        _show_kernels(folder, manifest, as_json)
    if report or kernels:
        return
    if entry is not None:
        head = "".join(f"# {name:<8} {value}\n" for name, value in facts.items())
        print(head + _select(read_text(folder / "program.dsc"), entry), end="")
        return
    from dsc.cli.report_tables import clean

    entries = clean(", ".join(map(str, manifest.get("entries") or [])))
    facts |= {"entries": f"{entries}; --entry prints the text IR of one"}
    facts |= {"text IR": f"{folder / 'program.dsc'} has all"}
    print("\n".join(f"{name:<8} {value}" for name, value in facts.items()))


def card(manifest: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """What an artifact is for: what runs it, its limits, where texts end and how they go on.

    Raises `ArtifactError` for settings that are none.
    """
    from dsc.cli.answers import chosen_sampling
    from dsc.cli.report_tables import clean
    from dsc.frontends.generation_config import parse_settings

    own = parse_settings(manifest.get("generation") or {}, str(folder), ArtifactError)
    ends = [*map(str, own.eos_token_id), *map(json_text.dumps, own.stop_strings)]
    sampling = chosen_sampling(own, {})
    limits = {f"--{k.replace('_', '-')}": v for k, v in (manifest.get("limits") or {}).items()}
    targets = (_target(manifest, str(target)) for target in manifest.get("targets") or [])
    runs = [str(manifest.get("backend")), *targets]
    states = [s for s in manifest.get("states") or [] if isinstance(s, Mapping)]
    kinds = (re.split(r"[{[]", str(s.get("type")))[0] for s in states)
    caches = [f"{s.get('storage')} {kind}" for s, kind in zip(states, kinds, strict=True)]
    lines = {
        "backend": ", ".join(runs + list((manifest.get("needs") or {}).values())),
        "limits": ", ".join(f"{name} {value}" for name, value in limits.items()) or "none",
        "stops": ("at " + ", ".join(ends)) if ends else "only at a limit",
        "chooses": str(sampling),
    }
    lines |= {"caches": ", ".join(dict.fromkeys(caches))} if caches else {}
    return {name: clean(line) for name, line in lines.items()}


def _target(manifest: Mapping[str, Any], target: str) -> str:
    """A target, with the card that its kernels were tuned on."""
    found: Any = manifest
    for name in ("meta", "targets", target, "tuned"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return f"{target} tuned on {found}" if isinstance(found, str) else target


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of an artifact. Raises `ArtifactError` and `FileError`."""
    try:
        found = json_text.loads(read_text(folder / name))
    except (UsageError, ValueError, RecursionError) as problem:
        raise ArtifactError(f"cannot read {name}: {problem}", where=str(folder)) from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{name} is no JSON object", where=str(folder))
    return found


def _compiled_report(model: str, backend: str, given: dict[str, Any]) -> Mapping[str, Any]:
    """Return the report of a model that is compiled for this, and not saved."""
    from dsc import api

    with console.progress_bar() as progress:
        return api.compile(model, backend=backend, progress=progress, **given).report


def _show_report(report: Mapping[str, Any], entry: str | None, as_json: bool) -> None:
    entries = report.get("entries", {})
    if entry is not None:
        _check_entry(entry, entries)
    if as_json:
        console.print_json(report)
        return
    from dsc.cli.report_tables import print_report

    try:
        print_report(console.tables(), report, entry)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ArtifactError(
            f"the report is not of this version: {type(problem).__name__}: {problem}",
            hint="read it with --json, or compile again",
        ) from None


def _show_kernels(folder: Path, manifest: Mapping[str, Any], as_json: bool) -> None:
    """Show what the backend tells of its kernels; where it tells nothing, their files."""
    from dsc import backends
    from dsc.backends.base import TellsKernels
    from dsc.cli.kernel_tables import print_kernels
    from dsc.ir.parser import parse_program

    name = str(manifest.get("backend"))
    backend: object = backends.get(name) if name in backends.names() else None
    if not isinstance(backend, TellsKernels):
        if as_json:
            hint = "leave out --json for a list of its files"
            raise UsageError(f"{name} tells nothing of its kernels", hint=hint)
        _list_kernels(folder)
        return
    program = parse_program(read_text(folder / "program.dsc"))
    try:
        report = backend.kernel_report(folder, program)
    except (KeyError, TypeError, ValueError, OSError) as problem:
        raise ArtifactError(
            f"kernels.json is not of this version: {type(problem).__name__}: {problem}",
            where=str(folder),
            hint="compile it again",
        ) from None
    if as_json:
        console.print_json(report)
    elif report["kernels"]:
        print_kernels(console.tables(), report)
    else:
        _list_kernels(folder)


def _list_kernels(folder: Path) -> None:
    """List the files in the backend's own folders, with their sizes."""
    common = {"weights"}
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name in common:
            continue
        for path in sorted(child.rglob("*")):
            if path.is_file():
                size = console.human_bytes(path.stat().st_size)
                print(f"{size:>10}  {path.relative_to(folder)}")


def _lowered(model: str, backend: str, after: str | None, given: dict[str, Any]) -> str:
    """Return the text IR of a model after pass `after`, or after the last one."""
    from dsc import api
    from dsc.rewrite.manager import pass_name

    with tempfile.TemporaryDirectory() as dump, console.progress_bar() as progress:
        api.compile(model, backend=backend, dump_dir=Path(dump), progress=progress, **given)
        texts = {
            pass_name(path): path.read_text("utf-8") for path in sorted(Path(dump).glob("*.dsc"))
        }
    if after is not None and after not in texts:
        raise UsageError(f"no pass {after!r} ran", where=model, hint="one of " + ", ".join(texts))
    return texts[after] if after is not None else list(texts.values())[-1]


def _select(text: str, entry: str | None) -> str:
    """Return the whole program, or one with a single entry of it: `dsc opt` reads either."""
    if entry is None:
        return text if text.endswith("\n") else text + "\n"
    from dsc.ir.parser import parse_program
    from dsc.ir.printer import print_program

    program = parse_program(text)
    _check_entry(entry, program.entries)
    alone = replace(program, entries={entry: program.entries[entry]})
    return print_program(alone.pruned())
