"""The documentation's code blocks: what each kind means, and how a page of them is run.

    python     runs in the page's module; with title="x.py" it is that file in the page's folder
    output     what the python block before it prints; the error's last line where it raises
    console    lines `$ command`, each with what the command prints
    dsc        text IR: parsed; with a title it is a file
    cpp, toml  with a title a file; TOML is parsed
    sh         commands that no test can run: the options of `dsc` and the targets of `make` exist
    text       no code

A line `…` in shown output stands for any lines, `…` within a line for anything. Comments in the
page: `<!-- needs: tvm, triton -->` skips it where a package is missing, `<!-- run with: a -> b -->`
puts b in the place of a in what runs.

`python -m tests.documents [PAGE ...]` writes what comes out into the pages, to be reviewed as a
difference.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
ANYTHING = "…"
LINKED = ("models", "tests")
"""Folders of the checkout that a page's folder shows."""
_TITLE = re.compile(r'title="([^"]+)"')
_NEEDS = re.compile(r"<!--\s*needs:\s*(.*?)\s*-->")
_RUN_WITH = re.compile(r"<!--\s*run with:\s*(.*?)\s+->\s+(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title where it has one, and its first line in the page."""

    language: str
    title: str
    text: str
    line: int


@dataclass
class Page:
    """A page's blocks in order, the packages that it needs, and what runs in the place of what."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    instead: list[tuple[str, str]] = field(default_factory=list)

    def as_run(self, text: str) -> str:
        """A block's text as it runs."""
        for shown, run in self.instead:
            text = text.replace(shown, run)
        return text


def read_page(path: Path) -> Page:
    """Read a page. Raises `ValueError` for a block without a language."""
    text = path.read_text("utf-8")
    page = Page(path, instead=_RUN_WITH.findall(text))
    for names in _NEEDS.findall(text):
        page.needs += [name.strip() for name in names.split(",")]
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            page.blocks.append(_block(token, path))
        elif token.type == "code_block":
            raise ValueError(f"{path.name}:{token.map}: an indented block: fence it")
    return page


def _block(token: Token, path: Path) -> Block:
    assert token.map is not None, "a fence has lines"
    language, _, rest = token.info.strip().partition(" ")
    line = token.map[0] + 2
    if language not in RUN and language not in ("output", "text"):
        raise ValueError(f"{path.name}:{line}: a block of {language or 'no language'}")
    title = _TITLE.search(rest)
    return Block(language, title[1] if title else "", token.content, line)


@dataclass(frozen=True)
class Shown:
    """What a page shows as output in a block, and what came out."""

    block: Block
    found: str

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return agrees(self.block.text, self.found)


def agrees(wanted: str, found: str) -> bool:
    r"""Whether `found` is what `wanted` shows, trailing blanks apart.

    >>> agrees("a … c", "a b c"), agrees("a\n…\nd", "a\nb\nc\nd"), agrees("a", "b")
    (True, True, False)
    """
    parts = []
    for line in _stripped(wanted):
        if line.strip() == ANYTHING:
            parts.append(r"(?:[^\n]*\n)*?")
        else:
            parts.append(".*?".join(map(re.escape, line.split(ANYTHING))) + r"\n")
    return re.fullmatch("".join(parts), "".join(f"{x}\n" for x in _stripped(found))) is not None


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def run_page(page: Page) -> Iterator[Shown]:
    """Run a page's blocks in its own folder; what it shows beside what came out."""
    name = re.sub(r"\W", "_", page.path.stem)
    module = ModuleType(f"page_{name}")
    sys.modules[module.__name__] = module
    with in_own_folder(), registrations_undone():
        try:
            yield from _run_blocks(page, module)
        finally:
            del sys.modules[module.__name__]


def _run_blocks(page: Page, module: ModuleType) -> Iterator[Shown]:
    for block, after in zip_longest(page.blocks, page.blocks[1:]):
        if block.title:
            Path(block.title).write_text(page.as_run(block.text), "utf-8")
        if block.language == "python" and not block.title:
            text = "\n" * (block.line - 1) + page.as_run(block.text)
            shown = after is not None and after.language == "output"
            found = _run_python(text, f"{page.path.name}", module, shown)
            if shown:
                assert after is not None
                yield Shown(after, found)
            elif found:
                raise AssertionError(f"{page.path.name}:{block.line} prints unshown:\n{found}")
        elif block.language in RUN:
            found = RUN[block.language](page.as_run(block.text))
            if block.language == "console":
                yield Shown(block, found)


def _run_python(text: str, file: str, module: ModuleType, may_raise: bool) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            exec(compile(text, file, "exec"), module.__dict__)
        except Exception as error:
            if not may_raise:
                raise
            print(f"{type(error).__name__}: {error}")
    return out.getvalue()


def _run_console(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if line.startswith("$ "):
            lines += [line, *_command(line[2:]).splitlines()]
    return "\n".join(lines)


def _command(line: str) -> str:
    """What a command prints; `dsc` runs in this process, what its output goes to in a shell."""
    found = re.fullmatch(r"(dsc .*?)(?: ([|>]) (.*))?", line)
    if found is None:
        return _shell(line)
    own, sign, rest = found.groups()
    arguments = _shell(f"printf '%s\\0' {own}").split("\0")[1:-1]
    printed, told = _dsc(arguments)
    if sign is None:
        return printed + told
    return told + _shell(rest if sign == "|" else f"cat > {rest}", printed)


def _shell(line: str, given: str = "") -> str:
    done = subprocess.run(
        ["bash", "-c", line],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def _dsc(arguments: Sequence[str]) -> tuple[str, str]:
    """What a verb prints, and what it says beside that."""
    from typer.testing import CliRunner

    from dsc.cli import as_typed, build_app
    from dsc.errors import DscError

    result = CliRunner(env={"COLUMNS": "100"}).invoke(build_app(), arguments)
    if isinstance(result.exception, DscError):
        return result.stdout, f"{result.stderr}dsc: {as_typed(str(result.exception))}\n"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout, result.stderr


def _check_ir(text: str) -> str:
    from dsc.ir.parser import parse_verified

    parse_verified(text)
    return ""


def _check_toml(text: str) -> str:
    tomllib.loads(text)
    return ""


def _check_commands(text: str) -> str:
    """Raise `AssertionError` for a command of ours that there is not."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in text.splitlines():
        words = [w for w in shlex.split(line, comments=True) if "=" not in w or w[0] == "-"]
        if words[:1] == ["make"]:
            assert set(words[1:]) <= set(targets), line
        elif words[:1] == ["dsc"]:
            used = {w.partition("=")[0] for w in words[2:] if re.match(r"--?[a-z]", w)}
            assert used <= options(words[1]), f"{line}: {used - options(words[1])}"
    return ""


@cache
def options(verb: str) -> frozenset[str]:
    """The options of a verb. Raises `AssertionError` for one that there is not."""
    import typer

    from dsc.cli import build_app

    commands = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
    assert verb in commands, f"dsc has no verb {verb}"
    return frozenset(name for parameter in commands[verb].params for name in parameter.opts)


RUN: dict[str, Callable[[str], str]] = {
    "python": lambda text: "",
    "console": _run_console,
    "dsc": _check_ir,
    "cpp": lambda text: "",
    "toml": _check_toml,
    "sh": _check_commands,
}
"""What runs or checks a block of each language, beside python's without a title."""


@contextmanager
def in_own_folder() -> Iterator[Path]:
    """A new folder as the working one, from which modules are imported; both are gone after."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="page-") as name:
        folder = Path(name).resolve()
        for shown in LINKED:
            (folder / shown).symlink_to(ROOT / shown)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        try:
            yield folder
        finally:
            os.chdir(before)
            sys.path.remove(str(folder))
            for key, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(f"{folder}/"):
                    del sys.modules[key]


@contextmanager
def registrations_undone() -> Iterator[None]:
    """Operators, rules and backends that are registered within are forgotten after."""
    from dsc.backends import BACKENDS
    from dsc.ir import op as declarations
    from dsc.rewrite import registered

    added, rules = dict(declarations._added), list(registered._rules)
    backends = dict(BACKENDS)
    try:
        yield
    finally:
        declarations._added.clear()
        declarations._added.update(added)
        registered._rules[:] = rules
        BACKENDS.clear()
        BACKENDS.update(backends)
        declarations.defaults.cache_clear()
        declarations.traits_of.cache_clear()


def rewrite(path: Path) -> None:
    """Put what comes out into a page, where it is not what the page shows."""
    lines = path.read_text("utf-8").splitlines()
    wrong = [shown for shown in run_page(read_page(path)) if not shown.holds]
    for shown in reversed(wrong):
        start = shown.block.line - 1
        lines[start : start + len(shown.block.text.splitlines())] = _stripped(shown.found)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{path.name}: {len(wrong)} blocks written")


if __name__ == "__main__":
    importlib.import_module("tests.conftest")
    for each in map(Path, sys.argv[1:] or PAGES):
        rewrite(each.resolve())
