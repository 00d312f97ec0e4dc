"""The police of the house: what the repository promises about itself, checked file by file."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dsc
from dsc import pipeline
from dsc.ir.op import registry

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = ("frontends", "passes", "backends", "models")
CODE = ("dsc", *SIBLINGS, "tests", "bench")
HEAVY = ("torch", "triton", "tvm", "onnxruntime", "transformers")


def tracked() -> list[Path]:
    """Return the files of the repository: git's, and new ones that it does not ignore."""
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return [path for top in CODE for path in (ROOT / top).rglob("*.py")]
    paths = (ROOT / name for name in done.stdout.split("\0") if name)
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


TRACKED = tracked()
SOURCES = [path for path in TRACKED if path.suffix == ".py"]
PASSES = [path for path in SOURCES if path.parts[len(ROOT.parts)] == "passes"]


def name(path: Path) -> str:
    """Spell a path as the repository does."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """Return the module that a source file is imported as: `passes/fuse.py` is dsc.passes.fuse."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in SIBLINGS:
        parts.insert(0, "dsc")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def is_pass(path: Path) -> bool:
    """Tell a pass from the package file and from what passes share (a leading underscore)."""
    return not path.stem.startswith("_")


# --- size -----------------------------------------------------------------------------------------


def test_no_file_is_over_600_lines_and_no_pass_over_300() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    passes = {path for path in PASSES if is_pass(path)}
    long = [f"{name(p)}: {n}" for p, n in lengths.items() if n > (300 if p in passes else 600)]
    assert not long, long


# --- who may import whom --------------------------------------------------------------------------

# For each layer, the parts of dsc that it may see; a module under none of these is not judged.
# Everybody may see EVERYBODY, and import the bare package to ask where it lies.
LAYERS = {
    "dsc.errors": (),
    "dsc.settings": (),
    "dsc.ir": ("dsc.ir",),
    "dsc.rewrite": ("dsc.ir", "dsc.rewrite"),
    "dsc.targets": ("dsc.ir",),
    "dsc.passes": ("dsc.ir", "dsc.rewrite", "dsc.passes", "dsc.targets"),
    "dsc.asked": ("dsc.ir", "dsc.rewrite", "dsc.backends.base"),
    "dsc.pipeline": (
        "dsc.asked",
        "dsc.ir",
        "dsc.rewrite",
        "dsc.passes",
        "dsc.targets",
        "dsc.backends.base",
    ),
    "dsc.models": ("dsc.models", "dsc.ir", "dsc.frontends"),
}
BACKEND = (
    "dsc.ir",
    "dsc.targets",
    "dsc.rewrite",
    "dsc.runtime",
    "dsc.backends.base",
)
# The runtime runs what was compiled, and must not need the compiler.
RUNTIME_NEVER = (
    "dsc.passes",
    "dsc.asked",
    "dsc.pipeline",
    "dsc.frontends",
    "dsc.cli",
    "dsc.api",
    "dsc.compiled",
    "dsc.models",
    "dsc.report",
    "dsc.rewrite",
    "dsc.backends",
)
EVERYBODY = (
    "dsc.errors",
    "dsc.files",
    "dsc.settings",
    "dsc.strict_json",
    "dsc.hardware",
    "dsc.kept",
    "dsc.processes",
    "dsc.toolchain",
    "dsc._version",
    "dsc.user_folders",
)


@cache
def imported(path: Path) -> tuple[tuple[int, str], ...]:
    """Return (line, module) of every import in a file, also those inside functions."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name != "dsc")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, _target(start, alias.name)) for alias in node.names)


def _target(module: str, attribute: str) -> str:
    """Resolve `from dsc.ir import dims` to the submodule, where it is one."""
    inside = ROOT.joinpath(*module.split("."), attribute)
    is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
    return f"{module}.{attribute}" if is_module else module


def within(module: str, parts: tuple[str, ...]) -> bool:
    """Return whether a module is one of `parts` or inside one."""
    return any(module == part or module.startswith(part + ".") for part in parts)


def allowed(module: str) -> tuple[str, ...] | None:
    """Return what a module may see of dsc; None where there is no rule."""
    parts = module.split(".")
    if parts[:2] == ["dsc", "backends"] and len(parts) > 2:
        return (*BACKEND, ".".join(parts[:3]), *EVERYBODY)
    layer = next((layer for layer in LAYERS if within(module, (layer,))), None)
    return None if layer is None else (*LAYERS[layer], *EVERYBODY)


def test_nothing_imports_upward() -> None:
    wrong = []
    for path in SOURCES:
        module = module_of(path)
        may_see = allowed(module)
        for line, target in imported(path):
            if not within(target, ("dsc",)):
                continue
            upward = may_see is not None and not within(target, may_see)
            if upward or (within(module, ("dsc.runtime",)) and within(target, RUNTIME_NEVER)):
                wrong.append(f"{name(path)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_an_upward_import_would_be_seen() -> None:
    assert not within("dsc.pipeline", allowed("dsc.ir.graph") or ())
    assert not within("dsc.backends.tvm.emit", allowed("dsc.backends.triton.emit") or ())
    assert within("dsc.backends.tvm.emit", allowed("dsc.backends.tvm.lower") or ())
    assert _target("dsc.ir", "dims") in ("dsc.ir.dims", "dsc.ir")
    assert _target("dsc", "errors") == "dsc.errors"


def test_no_bare_sibling_is_imported() -> None:
    wrong = [
        f"{name(path)}:{line} imports {target}"
        for path in SOURCES
        for line, target in imported(path)
        if within(target, SIBLINGS)
    ]
    assert not wrong, wrong


# --- what importing costs -------------------------------------------------------------------------


def run_python(code: str) -> str:
    """Run code in a fresh interpreter that finds the checkout, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["dsc", "dsc.cli", "dsc.errors", "dsc.ir"])
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code) == ""


def test_importing_dsc_takes_under_half_a_second() -> None:
    code = "import time; t = time.process_time(); import dsc; print(time.process_time() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.5


def test_every_module_imports_and_no_bare_sibling_is_loaded() -> None:
    modules = sorted({module_of(p) for p in SOURCES if module_of(p).split(".")[0] == "dsc"})
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
print(*[m for m in sys.modules if m.split(".")[0] in {SIBLINGS!r}])
"""
    assert run_python(code) == ""


# --- the public names -----------------------------------------------------------------------------


def test_the_lazy_table_the_checkers_imports_and_all_agree() -> None:
    tree = ast.parse((ROOT / "dsc" / "__init__.py").read_text("utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == dsc._LAZY
    assert sorted(dsc.__all__) == sorted([*seen, "__version__"])


def test_every_lazy_name_resolves() -> None:
    for public, module in dsc._LAZY.items():
        assert getattr(dsc, public) is getattr(importlib.import_module(module), public)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(dsc, "no_such_name")
    assert set(dsc.__all__) <= set(dir(dsc))


# --- passes ---------------------------------------------------------------------------------------

BLOCKS = ("Why it pays", "Preconditions", "Before", "After")


@pytest.mark.parametrize("path", [p for p in PASSES if is_pass(p)], ids=name)
def test_a_pass_tells_what_why_when_and_shows_it(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert doc.partition("\n")[0].strip(), "the first line says what the pass does"
    absent = [block for block in BLOCKS if not re.search(rf"^{block}\b", doc, re.MULTILINE)]
    assert not absent, f"no block {absent}"


@pytest.mark.parametrize("path", [p for p in PASSES if is_pass(p)], ids=name)
def test_a_pass_has_a_slot_in_the_pipeline(path: Path) -> None:
    places = [slot.place for slot in pipeline.SLOTS if slot.name == path.stem]
    assert len(places) == 1, f"{path.stem} stands {len(places)} times in dsc/pipeline.py"
    kind = pipeline.kind_of(path.stem)
    assert places == [f"{module_of(path)}:{kind.__name__}"]


def test_every_slot_of_the_pipeline_is_a_pass() -> None:
    assert set(pipeline.PASSES) == {path.stem for path in PASSES if is_pass(path)}


# --- operators ------------------------------------------------------------------------------------


def test_every_operator_has_doc_reference_and_example() -> None:
    incomplete = []
    for operator, definition in registry().items():
        has_body = any(attr.kind == "graph" for attr in definition.attrs)
        if not (definition.doc and callable(definition.reference)):
            incomplete.append(operator)
        elif not definition.example and not has_body:
            incomplete.append(f"{operator} (no example)")
    assert not incomplete, incomplete


# --- texts ----------------------------------------------------------------------------------------

# Spelt so that this file does not hold what it looks for.
FORBIDDEN = {
    "an unfinished mark": re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b"),
    "a path of one machine": re.compile(r"(?<![\w.])/(?:wor[k]|roo[t]|hom[e]/\w+|far[m])/"),
    "a registry's host": re.compile(r"pyp[i]\.org|pythonhoste[d]|artifactor[y]|index-ur[l]"),
}
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".sh", ".yml", ".yaml", ".dsc", ".json", ""}


def test_texts_hold_no_mark_no_machine_path_and_no_registry() -> None:
    found = []
    for path in TRACKED:
        if path.suffix not in TEXT or path.stat().st_size > 1_000_000:
            continue
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            found += [
                f"{name(path)}:{number}: {what}"
                for what, mark in FORBIDDEN.items()
                if mark.search(line)
            ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("an unfinished mark", ("# TO", "DO: later")),
        ("a path of one machine", ("open('/ro", "ot/x')")),
        ("a path of one machine", ("/ho", "me/somebody/x")),
        ("a registry's host", ("https://py", "pi.org/simple")),
    ],
)
def test_a_forbidden_text_would_be_seen(what: str, parts: tuple[str, str]) -> None:
    assert FORBIDDEN[what].search("".join(parts))


# --- tests that can fail --------------------------------------------------------------------------


class Functions:
    """Which functions of the tests can fail: they assert, expect an error, or call what does.

    `assert`, `raise`, `pytest.raises` and the like, functions called assert_, check or verify, a
    process run with check=True; or a function of the tests or the bench that can fail itself. What
    a name stands for is read off the definitions and imports of its file.
    """

    CHECKS = re.compile(r"(?:assert_?|check|verify|raises|warns|fail)(?:_|$)")
    OURS = ("tests", "bench")

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {module: ast.parse(text) for module, text in texts.items()}
        self.functions = {
            (module, node.name): node
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        self.imported = {
            (module, alias.asname or alias.name): (_absolute(module, node), alias.name)
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        self._known: dict[tuple[str, str], bool] = {}

    def idle(self) -> list[str]:
        """The test functions that cannot fail, as `module.function`."""
        tests = [key for key in self.functions if key[1].startswith("test_")]
        return [f"{module}.{test}" for module, test in tests if not self.can_fail(module, test)]

    def can_fail(self, module: str, function: str) -> bool:
        """Whether a function of a module can fail."""
        key = (module, function)
        if key not in self._known:
            self._known[key] = False  # what calls itself alone cannot
            node = self.functions.get(key)
            self._known[key] = node is not None and any(
                self._fails(module, each) for each in ast.walk(node)
            )
        return self._known[key]

    def _fails(self, module: str, node: ast.AST) -> bool:
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if not isinstance(node, ast.Call):
            return False
        called = node.func
        word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        if self.CHECKS.match(word):
            return not _expects_anything(node)
        if any(k.arg == "check" and ast.unparse(k.value) == "True" for k in node.keywords):
            return True
        if isinstance(called, ast.Attribute):
            return self.can_fail(module, word)
        origin, name = self.imported.get((module, word), (module, word))
        return within(origin, self.OURS) and self.can_fail(origin, name)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that is imported from, a relative one spelt out."""
    package = module.split(".")[: -node.level] if node.level else []
    return ".".join([*package, *([node.module] if node.module else [])])


def _expects_anything(call: ast.Call) -> bool:
    """Whether a call such as `raises((KeyError, Exception))` is content with any error at all."""
    kinds = {each.id for arg in call.args for each in ast.walk(arg) if isinstance(each, ast.Name)}
    return bool(kinds & {"Exception", "BaseException"}) and not call.keywords


def test_every_test_can_fail() -> None:
    found = Functions({module_of(p): p.read_text("utf-8") for p in SOURCES if in_tests(p)})
    assert len(found.functions) > 1000
    assert not found.idle()


def in_tests(path: Path) -> bool:
    """Tell the tests and what they share with the bars."""
    return within(module_of(path), Functions.OURS)


IDLE = {
    "a process": "def test_it():\n    subprocess.run(['x'], check=False)",
    "nothing": "def test_it():\n    run()",
    "a comment": 'def test_it():\n    """It raises, asserts and checks."""\n    run()  # assert',
    "a helper that only runs": "def helper():\n    run()\ndef test_it():\n    helper()",
    "any error": "def test_it():\n    with pytest.raises((KeyError, Exception)):\n        run()",
    "a helper of another file": "from tests.other import runs\ndef test_it():\n    runs()",
    "the compiler's own checks": "from dsc.api import compile\ndef test_it():\n    compile()",
}
ABLE = {
    "assert": "def test_it():\n    assert run()",
    "an error": "def test_it():\n    with pytest.raises(KeyError):\n        run()",
    "any error of one text": "def test_it():\n    with raises(Exception, match='x'):\n        f()",
    "a helper": "def helper():\n    assert 1\ndef test_it():\n    helper()",
    "a helper of another file": "from tests.other import holds\ndef test_it():\n    holds()",
    "a process": "def test_it():\n    subprocess.run(['x'], check=True)",
    "a check": "from tests.rewrite.harness import check_rule\ndef test_it():\n    check_rule()",
}
OTHER = "def runs():\n    pass\ndef holds():\n    assert 1"


@pytest.mark.parametrize("why", IDLE)
def test_a_test_that_cannot_fail_would_be_seen(why: str) -> None:
    assert Functions({"tests.x": IDLE[why], "tests.other": OTHER}).idle() == ["tests.x.test_it"]


@pytest.mark.parametrize("why", ABLE)
def test_a_test_that_can_fail_is_let_be(why: str) -> None:
    assert not Functions({"tests.x": ABLE[why], "tests.other": OTHER}).idle()


# --- more texts -----------------------------------------------------------------------------------


def test_what_pages_for_contributors_name_is_there() -> None:
    pages = (ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    text = "\n".join(page.read_text("utf-8") for page in pages)
    names = {n for n in re.findall(r"`([\w/.]+)`", text) if "/" in n and n[0] not in "./"}
    assert len(names) > 15
    places = {n: ROOT / n for n in names}
    assert [n for n, place in places.items() if not place.exists()] == []
    pairs = re.findall(r"`([A-Z_]+)` (?:or `([A-Z_]+)` )?in `([\w/.]+\.py)`", text)
    assert len(pairs) > 6
    for *tables, file in pairs:
        content = (ROOT / file).read_text("utf-8")
        assert all(re.search(rf"^{t}\b", content, re.MULTILINE) for t in tables if t), file


def test_make_has_its_targets() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"demo", "test", "bars", "lint", "types", "docs", "wheel", "setup"} <= targets


def test_the_siblings_are_symlinks_into_the_package() -> None:
    for sibling in SIBLINGS:
        link = ROOT / "dsc" / sibling
        assert link.is_symlink(), link
        assert os.readlink(link) == f"../{sibling}"
