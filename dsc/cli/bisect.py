"""`dsc bisect`: the first pass that changes what a model computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from dsc.cli import console, options
from dsc.errors import VerificationError
from dsc.files import check_fillable, write_text
from dsc.ir.types import PRECISIONS
from dsc.targets import Target, parse_target

if TYPE_CHECKING:
    from dsc.ir.program import Program
    from dsc.rewrite.base import Pass
    from dsc.rewrite.twin import Twin
    from dsc.rewrite.verify import Comparison

WORST = 5
"""Outputs that are listed, the worst first."""


@dataclass(frozen=True)
class Finding:
    """The pass that broke a program: what went wrong, the program on both sides of it.

    `after` is `None` where the pass failed, `errors` the difference by output where both ran;
    `text` is the pass with its options, as `dsc opt -p` takes it.
    """

    name: str
    text: str
    problem: str
    before: Program
    after: Program | None
    errors: tuple[tuple[str, float], ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The finding as JSON values."""
        found = {"pass": self.name, "text": self.text, "problem": self.problem}
        return {**found, "errors": dict(self.errors)}


def bisect(
    model: options.Model,
    config: options.Config = None,
    weights: options.Weights = None,
    revision: options.Revision = None,
    backend: options.Backend = None,
    target: options.Targets = None,
    dtype: options.Dtype = None,
    fusion_level: options.FusionLevel = 3,
    prefill_chunk: options.PrefillChunk = 512,
    cache: options.Cache = "contiguous",
    ranks: options.Ranks = None,
    parallel: options.Parallel = None,
    seed: Annotated[int, Option("--seed", help="Of the random inputs.")] = 0,
    output: Annotated[
        Path | None,
        options.unset(
            "-o",
            "--output",
            metavar="D",
            help="Where before.dsc and after.dsc go.  [default: ./MODEL-bisect]",
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Run the passes one by one, interpret before and after each, and name the first that differs.

    Exit 1 where one does; the programs around it are then written as before.dsc and after.dsc.

    Examples:

        dsc bisect models/v3.py --backend tvm

        dsc bisect layer.dsc --backend reference -o found
    """
    from dsc.frontends.hub import located

    folder = output or Path(f"{Path(model).stem or 'model'}-bisect")
    check_fillable(folder)
    with console.progress_bar() as progress:
        asked = options.chosen(ranks=ranks, parallel=parallel, fusion_level=fusion_level)
        asked |= {"prefill_chunk": prefill_chunk, "cache": cache}
        model = str(located(model, revision, progress)[0])
        program, passes = load_passes(
            model, config, weights, backend, target, dtype, asked, progress
        )
        finding, checked = search(program, passes, seed, progress)
    listed = [{"pass": name, "outcome": outcome} for name, outcome in checked]
    if finding is None:
        if json:
            console.print_json({"pass": None, "checked": listed})
        else:
            console.stdout().print(f"{len(checked)} passes keep what {program.name} computes:")
            for name, outcome in checked:
                console.stdout().print(f"  {name}: {outcome}", markup=False)
        return
    line = write_programs(folder, finding)
    if json:
        console.print_json({**finding.as_dict(), "checked": listed, "folder": str(folder)})
    else:
        text = "\n".join(_told(finding, line))
        console.stdout().print(text, markup=False)
    raise Exit(1)


def load_passes(
    model: str,
    config: str | None,
    weights: str | None,
    backend: str | None,
    target: list[str] | None,
    dtype: str | None,
    asked: dict[str, Any],
    progress: object,
) -> tuple[Program, list[Pass]]:
    """Read a model, and make the passes that a compile for the backend would run."""
    from dsc import api, backends, pipeline
    from dsc.frontends.load import load_program

    chosen = backends.get(backend) if backend else api.best_backend()
    default = chosen.capabilities(Target("cpu")).targets[0]
    wanted = parse_target(target[0] if target else default)
    loaded = load_program(
        model,
        config=config,
        weights=weights,
        dtype=PRECISIONS[dtype] if dtype else None,
        prefill_chunk=asked["prefill_chunk"],
        progress=progress,  # type: ignore[arg-type]
    )
    capabilities = pipeline.capabilities_of(chosen, wanted)
    chunk = min(asked["prefill_chunk"], loaded.program.limits.prefill_chunk)
    given = pipeline.PipelineOptions(**{**asked, "prefill_chunk": chunk})
    return loaded.program, pipeline.passes_for(loaded.program, capabilities, given)


def search(
    program: Program, passes: list[Pass], seed: int = 0, progress: object = None
) -> tuple[Finding | None, list[tuple[str, str]]]:
    """The first pass that breaks a program, and the passes before it with what came of each."""
    from dsc.rewrite.twin import Twin

    checked: list[tuple[str, str]] = []
    twin = Twin(seed)
    for index, each in enumerate(passes):
        if callable(progress):
            progress(each.name, index, len(passes))
        finding, after, outcome = step(program, each, twin)
        if finding is not None:
            return finding, checked
        checked.append((each.name, outcome))
        program = after
    return None, checked


def step(before: Program, each: Pass, twin: Twin) -> tuple[Finding | None, Program, str]:
    """Run one pass and compare; what was found, the program after, and the outcome in words."""
    from dsc.ir.verifier import verify
    from dsc.rewrite.base import PassReport

    def broken(problem: str, after: Program | None) -> tuple[Finding, Program, str]:
        return Finding(each.name, each.text, problem, before, after), before, ""

    if before.stage not in each.needs:
        wanted = ", ".join(s.name for s in sorted(each.needs))
        return broken(f"it needs stage {wanted}, the program is at {before.stage.name}", None)
    try:
        after = each.run(before, PassReport())
    except Exception as problem:  # whatever a broken pass raises is the finding
        return broken(f"it failed: {type(problem).__name__}: {problem}", None)
    if after is before:
        return None, after, "unchanged"
    try:
        verify(after)
    except VerificationError as problem:
        return broken(f"what it made does not verify: {problem}", after)
    try:
        found = twin.compare(each, before, after)
    except VerificationError as problem:  # too wide, and no small sizes fit: not the pass's fault
        return None, after, f"not compared: {problem.what}"
    if found.ok:
        return None, after, str(found)
    worst = worst_outputs(found)
    return Finding(each.name, each.text, str(found), before, after, worst), before, ""


def worst_outputs(found: Comparison) -> tuple[tuple[str, float], ...]:
    """Outputs as `entry.output` with their difference, the worst first, equal ones left out."""
    differing = [(f"{e}.{name}", error) for (e, name), error in found.errors.items() if error]
    return tuple(sorted(differing, key=lambda pair: -pair[1]))


def write_programs(folder: Path, finding: Finding) -> str:
    """Write before.dsc and after.dsc; the command that repeats the pass alone."""
    import shlex

    from dsc.ir.printer import print_program

    sides = {"before.dsc": finding.before, "after.dsc": finding.after}
    for name, program in sides.items():
        if program is not None:
            write_text(folder / name, print_program(program))
    file, passes = shlex.quote(str(folder / "before.dsc")), shlex.quote(finding.text)
    return f"dsc opt {file} -p {passes} --verify-each"


def _told(finding: Finding, line: str) -> list[str]:
    lines = [f"{finding.name} breaks the program: {finding.problem}"]
    if finding.errors:
        lines.append("worst outputs, difference relative to max(1, |value|max):")
        lines += [f"  {error:10.3g}  {name}" for name, error in finding.errors[:WORST]]
    return [*lines, f"repeat it with: {line}"]
