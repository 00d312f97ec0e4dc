"""`dsc models`: which decoders of the installed transformers compile, and why others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsc.cli import console, options
from dsc.errors import UsageError

if TYPE_CHECKING:
    from dsc.frontends.catalogue import Row
    from dsc.ir.program import Program


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TYPE]...",
            help="Types (model_type in config.json) or classes, checked where named whole;"
            " * stands for anything.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Check the types that nothing is kept of: seconds each."),
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table of the documentation's page.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Say which decoders of the installed transformers compile, and why others do not.

    A type compiles where the trace of a small model of it gives, in the reference interpreter, the
    logits of the stock class, and all passes take it. What was found is kept.

    Examples:

        dsc models gemma2 qwen3_moe

        dsc models --all 'qwen*'

        dsc models --all --markdown > docs/models.md
    """
    from dsc.frontends.catalogue import Catalogue, classes, matching

    catalogue = Catalogue()
    known = classes()
    whole = [name for name in names or [] if "*" not in name]
    chosen = list(matching(names or [], known))
    if not chosen:
        raise UsageError(
            f"no type of the installed transformers is called {' or '.join(names or [])}",
            hint="`dsc models` lists them; * stands for anything: 'qwen*'",
        )
    asked = chosen if every else list(matching(whole, known)) if whole else []
    if asked:
        with console.progress_bar() as progress:
            catalogue.check(asked, progress, _compiled)
    rows = [(name, known[name], catalogue.rows.get(name)) for name in chosen]
    found = [row for _, _, row in rows if row is not None]
    if json:
        console.print_json({"models": [_facts(*each) for each in rows]})
        return
    if markdown:
        from importlib.metadata import version

        print(page(found, version("transformers")))
        return
    _show(rows)


def _compiled(program: Program) -> None:
    from dsc.api import compile

    compile(program, backend="reference", max_context=64, prefill_chunk=16)


def _facts(name: str, known: str, row: Row | None) -> dict[str, object]:
    if row is None:
        return {"model_type": name, "class": known, "compiles": None}
    facts = {"model_type": name, "class": row.model_class, "compiles": row.compiles}
    told = {"reason": row.reason, "remark": row.remark, "error": row.error}
    return {**facts, **{key: value for key, value in told.items() if value}}


def _show(rows: list[tuple[str, str, Row | None]]) -> None:
    from rich.table import Table

    table = Table("type", "class", "compiles", "", box=None, padding=(0, 2, 0, 0))
    for name, known, row in rows:
        if row is None:
            table.add_row(name, known, "?", f"not checked yet: dsc models {name}")
            continue
        why = row.reason or row.remark
        table.add_row(name, row.model_class, "yes" if row.compiles else "no", why)
    console.tables().print(table, markup=False)
    checked = [row for _, _, row in rows if row is not None]
    yes = sum(row.compiles for row in checked)
    left = len(rows) - len(checked)
    told = [f"{yes} of {len(checked)} checked types compile"] if checked else []
    told += [f"{left} are not checked yet: --all checks them"] if left else []
    console.stdout().print("; ".join(told))


PAGE = """# Which models compile

A folder compiles by the `model_type` in its `config.json`. This is what `dsc models` found for
every causal language model class of transformers {version}: a type compiles where the trace of a
small model of it, with random weights, gives the logits of the stock class (a prompt, a chunk after
it, one token, sequences of different lengths, positions far on; within 1e-4 of the largest), and
all passes take it for the reference backend. The check is made again for every folder whose
configuration computes something else, and one that fails is refused with its sentence.

```sh
dsc models --all --markdown > docs/models.md
```
"""


def page(rows: list[Row], version: str) -> str:
    """The page docs/models.md: what compiles, then what does not and why."""
    yes = [row for row in rows if row.compiles]
    no = [row for row in rows if not row.compiles]
    lines = [PAGE.format(version=version), f"{len(yes)} of {len(rows)} types compile.", ""]
    lines += ["| type | class | |", "|---|---|---|", *map(line, yes)]
    if no:
        lines += ["", "These do not:", "", "| type | class | why |", "|---|---|---|"]
        lines += map(line, no)
    return "\n".join(lines)


def line(row: Row) -> str:
    """A row of the page."""
    told = (row.reason or row.remark).replace("|", "\\|").replace("<", "&lt;")
    return f"| {row.model_type} | {row.model_class} | {told} |"
