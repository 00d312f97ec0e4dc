"""Places that cannot be written: one message, exit 2, before the work, nothing half-written."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

import dsc.replacing
from dsc.cli import main
from dsc.errors import FileError, UsageError
from dsc.files import (
    check_room,
    check_writable,
    made,
    named,
    nearest,
    translated,
    why_no_file,
    write_text,
)
from dsc.replacing import replacing
from dsc.runtime import artifact
from tests.runtime.test_session import small_lm

from .conftest import FakeApi, Invoke

SMALL_LM = Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc"
LONG = "x" * 250  # a name that is legal, but not with what a temporary sibling adds


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "file").write_text("kept")


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and standard error."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().err


def listed() -> set[Path]:
    return {p for p in Path.cwd().rglob("*") if "state" not in p.parts}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk is, but for this process alone."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/none/out", LONG])
@pytest.mark.parametrize(
    "line",
    [
        "compile m.py --backend tvm -o PLACE",
        "compile m.py -o PLACE",
        "export m.py -o PLACE",
        "profile OUT --trace PLACE",
        "diff file file -o PLACE",
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_work(
    line: str,
    place: str,
    api: FakeApi,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = listed()
    words = [place if word == "PLACE" else word for word in line.split()]
    status, error = ended(capsys, *words)
    assert status == 2, error
    assert f"where:  {place}" in error
    assert "to do:" in error
    assert "Traceback" not in error
    assert (api.asked, api.loaded) == ([], [])
    assert listed() == before


def test_a_dump_folder_that_cannot_be_is_told_before_tracing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ("compile", "none.py", "-o", "out", "--dump-dir", "file/dump")
    status, error = ended(capsys, *line)
    assert (status, "where:  file/dump" in error) == (2, True), error


@pytest.mark.parametrize("missing", ["", "a/b/"])
def test_a_disk_that_fills_leaves_nothing(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = listed()
    with largest_file(1000):
        status, error = ended(
            capsys, "compile", str(SMALL_LM), "--backend", "null", "-o", f"{missing}out"
        )
    assert status == 2, error
    assert f"where:  {missing}out" in error
    assert "ulimit -f" in error
    assert listed() == before


def test_a_disk_that_fills_keeps_what_was_there(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("compile", str(SMALL_LM), "--backend", "null", "-o", "out")
    assert ended(capsys, *line)[0] == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    with largest_file(1000):
        assert ended(capsys, *line, "--force")[0] == 2
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before
    assert [p.name for p in Path.cwd().iterdir() if p.name.startswith(".")] == []


def test_room_is_looked_at_before_it_is_filled(tmp_path: Path) -> None:
    check_room(tmp_path / "x", 1000, "weights")
    with pytest.raises(FileError, match="the disk has"):
        check_room(tmp_path / "x", 1 << 60, "weights")
    with largest_file(2_500_000), pytest.raises(FileError) as refused:
        check_room(tmp_path / "x", 7_000_000, "weights")
    assert refused.value.what == "weights: 7.0 MB needed, a file may have 2.5 MB"


def test_a_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    with largest_file(1000), pytest.raises(FileError):
        write_text(page, "y" * 2000)
    assert not page.parent.exists()
    write_text(page, "first")
    with largest_file(1000), pytest.raises(FileError, match="cannot write"):
        write_text(page, "y" * 2000)
    assert page.read_text() == "first"
    assert list(page.parent.iterdir()) == [page]
    write_text("/dev/null", "second")


def test_what_cannot_take_its_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.parent == tmp_path and source != out:  # what is new, in the place of the old
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    out.mkdir()
    (out / "kept").write_text("kept")
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(dsc.replacing, "_exchange", lambda *_: False)
    with pytest.raises(FileError, match="No space left"), replacing(out):
        pass
    assert (out / "kept").read_text() == "kept"
    assert {p.name for p in tmp_path.iterdir()} == {"out", "file"}


def test_room_for_the_weights_is_looked_at_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = dsc.compile(small_lm(), backend="reference", max_context=32)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FileError, match=r"the weights: .* needed, the disk has 0\.0 MB left"):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_has_the_rights_of_any_other_and_a_link_stays_one(tmp_path: Path) -> None:
    link, file = tmp_path / "link", tmp_path / "elsewhere" / "file"
    file.parent.mkdir()
    link.symlink_to(file)
    before = os.umask(0o027)
    try:
        for text in ("first", "second"):
            write_text(link, text)
            assert (link.is_symlink(), file.read_text()) == (True, text)
            assert file.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyError), made(tmp_path / "a" / "b" / "c"):
        raise KeyError
    assert [p.name for p in (tmp_path / "a").iterdir()] == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="directory"):
        check_writable(tmp_path)


def test_an_error_names_the_file_it_is_about(tmp_path: Path) -> None:
    with pytest.raises(FileError) as told, named(tmp_path / "out"):
        (tmp_path / "elsewhere").read_text()
    assert told.value.where == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("error", "where", "reading", "told"),
    [
        (OSError(errno.ENOSPC, "full", "x"), None, False, ("write: full", "x", "free some space")),
        (OSError(errno.EIO, "odd", b"x"), "y", False, ("read or write: odd", "x", "")),
        (OSError(errno.ENOENT, "no", "file/x"), None, False, ("read or write: no", "file/x", "m")),
        (OSError(errno.ENOENT, "no", "x"), None, False, ("read or write: no", "x", "give the")),
        (OSError(errno.ENOENT, "no", "none/x"), None, True, ("read: no", "none/x", "give the")),
        (OSError(errno.EROFS, "no", "a/.out.1/x"), "a/out", True, ("read: no", "a/out", "give a")),
        (OSError("odd"), "y", False, ("read or write: odd", "y", "")),
        (OSError(), None, False, ("read or write: OSError", None, "")),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_told_in_words(
    error: OSError, where: str | None, reading: bool, told: tuple[str, str | None, str]
) -> None:
    found = translated(error, where, reading)
    assert (found.what, found.where) == (f"cannot {told[0]}", told[1])
    assert (found.hint or "").startswith(told[2])
    assert (found.hint is None) == (not told[2])


def test_a_folder_for_temporary_files_that_is_none_is_told() -> None:
    found = translated(OSError(errno.ENOENT, "No usable temporary directory found in [...]"))
    assert (found.where, found.hint) == (None, "set TMPDIR to a folder that you may write to")
    other = translated(OSError(errno.ENOENT, "No usable temporary directory found", "x"))
    assert other.where == "x"


@pytest.mark.parametrize(("free", "largest"), [(10**6, -1), (10**7, 10**6), (10**6, 10**6)])
def test_room_that_is_just_enough_is_enough(
    free: int, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resource.RLIM_INFINITY == -1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (largest, -1))
    check_room(tmp_path / "x", 10**6, "weights")
    with pytest.raises(FileError) as refused:
        check_room(tmp_path / "x", 10**6 + 1, "weights")
    less = "the disk has 1.0 MB left" if free == 10**6 else "a file may have 1.0 MB"
    assert refused.value.what == f"weights: 1.0 MB needed, {less}"


def test_what_keeps_a_path_from_being_a_file_is_told(tmp_path: Path) -> None:
    Path("nowhere").symlink_to("none")
    Path("link").symlink_to("file")
    os.mkfifo("pipe")
    assert {name: why_no_file(tmp_path / name) for name in (
        "file", "link", "none", "nowhere", ".", "pipe", "file/x", "a\0b",
    )} == {
        "file": "", "link": "", "none": "is missing", "nowhere": "is a link that leads nowhere",
        ".": "is a folder, not a file", "pipe": "is a pipe or a device, not a file",
        "file/x": "cannot be read: Not a directory", "a\0b": "is missing",
    }  # fmt: skip


def test_the_nearest_folder_that_there_is(tmp_path: Path) -> None:
    assert nearest(tmp_path / "a" / "b") == nearest(tmp_path) == tmp_path
    assert nearest(Path("/none/x")) == Path("/")
    assert nearest(Path("none/x")) == Path()


def test_a_folder_takes_a_place_with_the_rights_of_any_other(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for text in ("first", "second"):
        with replacing(out) as folder:
            assert folder.parent == out.parent
            (folder / text).write_text(text)
        assert [each.name for each in out.iterdir()] == [text]
        assert out.stat().st_mode & 0o777 == 0o755
        assert list(out.parent.iterdir()) == [out]
    with pytest.raises(KeyError), replacing(out):
        raise KeyError
    assert [each.name for each in out.iterdir()] == ["second"]
    assert list(out.parent.iterdir()) == [out]


def test_limits_are_told_in_the_words_of_options(
    capsys: pytest.CaptureFixture[str], api: FakeApi, artifact: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UsageError("max_context is 9", hint="compile with a larger max_context")

    api.load = refuse  # type: ignore[assignment]
    status, error = ended(capsys, "generate", str(artifact), "--prompt", "a")
    assert status == 2
    assert "--max-context is 9" in error
    assert "a larger --max-context" in error
    assert "max_context" not in error


@pytest.mark.parametrize(
    "line",
    [
        ["opt", "f"],
        ["opt", "deep/f"],
        ["generate", "file", "--file", "f"],
        ["diff", str(SMALL_LM), str(SMALL_LM), "--profiles", "f", "f"],
    ],
    ids=lambda line: " ".join(map(str, line[:2])),
)
def test_what_is_only_read_need_not_be_made(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every verb reads files in the same words, be they absent or no text."""
    status, error = ended(capsys, *line)
    assert status == 2
    assert error.lstrip().startswith("dsc: cannot read: No such file or directory\n"), error
    assert error.endswith("to do:  give the path of a file that is there\n")
    Path("f").write_bytes(b"caf\xe9")
    if "deep/f" not in line:
        status, error = ended(capsys, *line)
        assert status == 2
        assert error.lstrip().startswith("dsc: this is no UTF-8 text: byte 3 is 0xe9\n"), error


# --- standard output ------------------------------------------------------------------------------


def run(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which `dsc` is the command."""
    checkout = str(Path(dsc.__path__[0]).parent)
    given = {**os.environ, "PYTHONPATH": checkout, "XDG_STATE_HOME": str(folder), **environment}
    text = f'set -o pipefail; dsc() {{ "{sys.executable}" -m dsc "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=given, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_told(unbuffered: str, tmp_path: Path) -> None:
    done = run(f"dsc opt {SMALL_LM} > /dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert "where:  standard output" in done.stderr
    assert len(done.stderr.splitlines()) == 3


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    done = run(f"dsc opt {SMALL_LM} | head -1; dsc --help | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams_are_no_crash(tmp_path: Path) -> None:
    done = run(f"dsc opt {SMALL_LM} >&- && dsc opt none.dsc 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_state_folder_that_cannot_be_written_is_told_when_compiling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(artifact, "CODE_SUFFIXES", {".dsc"})  # a program passes for code
    line = ("compile", str(SMALL_LM), "--backend", "null", "--force", "-o", "out")
    for state, told in (("state", False), ("file", True)):
        monkeypatch.setenv("XDG_STATE_HOME", str(Path.cwd() / state))
        status, error = ended(capsys, *line)
        assert status == 0
        assert ("load it with --trust" in error) is told


# --- the crash report -----------------------------------------------------------------------------


def test_bytes_that_are_no_text_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    status, error = ended(capsys, "generate", "out", "--prompt", os.fsdecode(b"caf\xe9"))
    assert status == 2
    assert error.splitlines() == [
        "dsc: argument 4 holds bytes that are no UTF-8: caf\\xe9",
        "  to do:  give the text in UTF-8",
    ]


@pytest.mark.parametrize("closed", ["", "2>&-", "2> /dev/full"])
def test_a_crash_that_cannot_be_saved_is_no_second_crash(closed: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = (
        "import sys, tempfile; from dsc.cli import doctor, main; tempfile.tempdir = 'file';"
        " doctor.examine = lambda *_: 1 / 0; main(['doctor', '\\udcff', '--json'][::2])"
    )
    done = run(f'"{sys.executable}" -c "{code}" {closed}', tmp_path, XDG_STATE_HOME="file")
    assert done.returncode == 1
    assert done.stdout == ""
    if not closed:
        assert "not saved:" in done.stderr
        assert done.stderr.count("Traceback") == 1
        assert "ZeroDivisionError" in done.stderr


def test_a_crash_report_holds_arguments_of_any_bytes(tmp_path: Path) -> None:
    from dsc.cli.crash import save_crash

    folder, line = save_crash(ValueError("\udcff"), ["opt", "\udcff"])
    assert os.fsencode("\udcff") in (folder / "repro.sh").read_bytes()
    assert line.startswith("dsc opt")


# --- what is offered ------------------------------------------------------------------------------


def test_help_shows_no_type_beside_a_flag(invoke: Invoke) -> None:
    from dsc.cli import VERBS

    for verb in VERBS:
        assert "bool" not in invoke(verb, "--help").output, verb
    assert "bool" not in invoke("--help").output


def test_python_m_dsc_is_the_command(tmp_path: Path) -> None:
    assert run("dsc --version", tmp_path).stdout.strip() == dsc.__version__
