"""Verbs on an artifact of several ranks: the same command, started once a rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typer import Context

from dsc.errors import UsageError


def must_launch(artifact: Path, ranks: int | None = None) -> bool:
    """Whether the ranks are still to be started; False where the artifact is of one.

    Raises `UsageError` where it was not compiled for `ranks`.
    """
    from dsc.runtime import collectives, sharded

    found = sharded.opened(artifact)
    if found is None:
        if ranks not in (None, 1):
            raise UsageError(
                f"{artifact} was compiled for one rank, --ranks {ranks} asked",
                hint=f"compile it with --ranks {ranks}",
            )
        return False
    if ranks is not None:
        sharded.check_ranks(found, ranks)
    return not collectives.launched(os.environ)


def launch_ranks(command: Context, artifact: Path, **instead: object) -> None:
    """Run this command once a rank of the artifact, with every option that it was given.

    `instead` has other values for some of its parameters. Exits as the first rank that fails.
    """
    from dsc.runtime import launch, sharded

    found = sharded.opened(artifact)
    assert found is not None
    given = {n: v for n, v in command.params.items() if n not in ("artifact", "model", "ranks")}
    line = [str(command.info_name), str(artifact), *spelled({**given, **instead})]
    status = launch.run(launch.command(line), found.ranks)
    if status:
        sys.exit(status)


def spelled(given: Mapping[str, Any]) -> list[str]:
    """Options as the command line spells them; None and False are left out, but for `pin`.

    >>> spelled({"row_limit": 3, "json": True, "pin": False, "trace": None, "stop": ["-", "x"]})
    ['--row-limit=3', '--json', '--no-pin', '--stop=-', '--stop=x']
    """
    words: list[str] = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            words += [f"--no-{option}"] if name == "pin" else []
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{option}={each}" for each in values]
    return words


def speaks() -> bool:
    """Whether this process tells the user: rank 0, or the only one."""
    from dsc.ir.ranks import current

    return current().rank == 0


def agree_on(**options: object) -> None:
    """Check that all ranks were given the same options, which are shown only as digests."""
    from dsc.runtime import collectives

    shown = {"seed", "max_new_tokens", "sampling"}
    facts = {
        name: str(value) if name in shown else collectives.digest(str(value))
        for name, value in options.items()
    }
    collectives.agree("options", facts)
