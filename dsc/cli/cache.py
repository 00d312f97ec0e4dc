"""`dsc cache`: what earlier compiles left for later ones, and how to be rid of it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from dsc import kept
from dsc.cli import console, options
from dsc.errors import UsageError
from dsc.user_folders import cache_folder

KINDS = {
    "traces": "models as they were traced",
    "passes": "models as the passes left them",
    "verdicts": "which architectures were found right",
    "catalogues": "what `dsc models` knows",
    "functions": "decorated functions and their code",
    "kernels": "object files of kernels",
    "cubins": "kernels for GPUs",
    "plans": "what programs launch on GPUs",
    "libraries": "linked libraries of kernels",
    "tuning": "what was fastest on this machine",
    "tiles": "what `dsc tune` found fastest on a card",
    "cpus": "what the compiler knows of CPUs",
    "probes": "loops that tell what this machine can do",
}


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept.")] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help=f"One of {', '.join(KINDS)}; all without it.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show what is kept between compiles, or remove it.

    All of it can be made again: the next compile is slower, nothing else. DSC_CACHE_BYTES bounds
    it (2 GiB by default), DSC_CACHE=off turns it off.

    Examples:

        dsc cache

        dsc cache --clear --kind kernels
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"nothing called {kind!r} is kept", hint=f"there are {', '.join(KINDS)}")
    if clear:
        freed = kept.clear(kind)
        if json:
            console.print_json({"freed_bytes": freed})
        else:
            console.stdout().print(f"removed {console.human_bytes(freed)}")
        return
    held: dict[str, list[kept.Entry]] = {name: [] for name in KINDS}
    for entry in kept.entries():
        held.setdefault(entry.kind, []).append(entry)
    folder, refused = str(cache_folder()), kept.refused()
    counts = {
        name: {"entries": len(found), "bytes": sum(entry.size for entry in found)}
        for name, found in held.items()
        if kind in (None, name)
    }
    if json:
        facts = {"folder": folder, "refused": refused, "limit_bytes": kept.limit()}
        console.print_json(facts | {"kinds": counts})
        return
    out = console.stdout()
    out.print(f"{folder}, at most {console.human_bytes(kept.limit())}")
    if refused:
        out.print(f"nothing is kept: {refused}")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("kind", "entries", "bytes", "what it is"):
        table.add_column(column, justify="right" if column in ("entries", "bytes") else "left")
    for name, found in counts.items():
        size = console.human_bytes(found["bytes"])
        table.add_row(name, str(found["entries"]), size, KINDS.get(name, ""))
    out.print(table)
