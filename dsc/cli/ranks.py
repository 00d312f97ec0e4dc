"""Verbs on an artifact of several ranks: the same command, started once a rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def launched(verb: str, artifact: Path, **given: object) -> bool:
    """Run `dsc VERB artifact` with the options `given` as all the ranks of an artifact.

    False, and nothing done, where the artifact is of one rank or this process is one of several
    already. Rank 0 speaks; exits as the first rank that fails.
    """
    from dsc.cli.generate import launch_ranks, must_launch

    if not must_launch(artifact, None):
        return False
    launch_ranks([verb, str(artifact), *spelled(given)], artifact)
    return True


def spelled(given: Mapping[str, object]) -> list[str]:
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
