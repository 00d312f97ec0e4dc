"""What is compared: artifacts, texts, or stages of a dump, each opened as a program."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsc.errors import UsageError
from dsc.frontends.text import read_program
from dsc.ir.program import Program
from dsc.rewrite.manager import pass_name
from dsc.runtime import artifact
from dsc.runtime.plan import PLAN, EntryPlan, Plan


@dataclass(frozen=True)
class Side:
    """One of the two: `text` is the program as it is written, over no weight values.

    `program` is the same with the values that an artifact holds; `folder` is that artifact.
    """

    label: str
    text: Program
    program: Program
    folder: Path | None = None
    backend: str = ""
    has_values: bool = False

    @property
    def title(self) -> str:
        """The label, and what made the side what it is."""
        return f"{self.label} ({self.backend or self.text.stage.name})"

    @cached_property
    def _plan(self) -> Plan | None:
        path = None if self.folder is None else self.folder / PLAN
        return Plan.from_json(path.read_bytes()) if path is not None and path.is_file() else None

    def plan(self, entry: str) -> EntryPlan | None:
        """The plan that an artifact runs an entry by; `None` for a text, and for segments."""
        return None if self._plan is None else self._plan.entries.get(entry)


def open_side(name: str) -> Side:
    """An artifact folder, a .dsc file, or `DUMPS/PASS`: that pass's text in a folder of dumps.

    The code in an artifact is not loaded. Raises `UsageError`, `ArtifactError`, `ParseError`.
    """
    path = Path(name)
    if (path / "dsc.json").is_file():
        return _artifact(path)
    if path.is_dir():
        raise UsageError(
            f"{name} is no artifact",
            hint="name a folder that dsc compile wrote, a .dsc file, or a stage of a dump: D/PASS",
        )
    if not path.is_file():
        path = _stage(path)
    program = read_program(path)
    return Side(path.name, program, program)


def _artifact(folder: Path) -> Side:
    # Trust is asked for when code is loaded, to measure it; the text and the weights are data.
    opened = artifact.read(folder, trust=True)
    text = read_program(folder / "program.dsc")
    has_values = opened.manifest["weights"] is not None
    label = folder.name or str(folder)
    return Side(label, text, opened.program, folder, opened.backend, has_values)


def _stage(path: Path) -> Path:
    """The numbered file of a pass in a folder of dumps; the last one, where a pass ran twice."""
    found = sorted(p for p in path.parent.glob("*.dsc") if pass_name(p) == path.name)
    if found:
        return found[-1]
    stages = [pass_name(p) for p in sorted(path.parent.glob("*.dsc"))]
    hint = f"{path.parent} holds the stages {', '.join(stages)}" if stages else None
    raise UsageError(
        f"nothing at {str(path)!r} to compare",
        hint=hint or "name a folder that dsc compile wrote, or a .dsc file",
    )
