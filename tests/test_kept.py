"""What is kept between runs: whole or not at all, by its full key, within its bound."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsc import kept
from dsc.cli import build_app
from dsc.errors import UsageError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DSC_CACHE", raising=False)
    monkeypatch.delenv("DSC_CACHE_BYTES", raising=False)
    monkeypatch.setattr(kept, "_measured", False)
    return tmp_path / "dsc"


def test_what_is_put_under_a_key_is_had_under_no_other() -> None:
    kept.put("kernels", {"a": 1, "b": [2]}, b"one")
    assert kept.get("kernels", {"b": [2], "a": 1}) == b"one"
    assert kept.get("kernels", {"a": 1, "b": [3]}) is None
    assert kept.get("traces", {"a": 1, "b": [2]}) is None


def test_a_damaged_short_or_foreign_file_is_a_miss(folder: Path) -> None:
    kept.put("kernels", {"a": 1}, b"right" * 100)
    (file,) = (folder / "kernels").iterdir()
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert kept.get("kernels", {"a": 1}) is None
        file.write_bytes(whole[:at])
        assert kept.get("kernels", {"a": 1}) is None
    kept.put("kernels", {"a": 2}, b"another")
    other = next(f for f in (folder / "kernels").iterdir() if f != file)
    file.write_bytes(other.read_bytes())  # whole, of another key
    assert kept.get("kernels", {"a": 1}) is None
    file.unlink()
    file.mkdir()
    assert kept.get("kernels", {"a": 1}) is None
    kept.put("kernels", {"a": 1}, b"right")


def test_what_was_used_longest_ago_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        kept.put("kernels", {"n": n}, bytes(1000))
        (newest,) = {f for f in (folder / "kernels").iterdir() if f.stat().st_mtime > 1e6}
        os.utime(newest, (n, n))
    assert kept.get("kernels", {"n": 0}) is not None  # used now
    monkeypatch.setenv("DSC_CACHE_BYTES", "4500")
    monkeypatch.setattr(kept, "_measured", False)
    kept.put("traces", {"n": 4}, bytes(1000))
    held = [n for n in range(4) if kept.get("kernels", {"n": n}) is not None]
    assert held == [0, 2, 3]
    assert kept.get("traces", {"n": 4}) is not None


def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module as a process that has just begun has it."""
    spec = importlib.util.spec_from_file_location("fresh", kept.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", module)
    spec.loader.exec_module(module)
    return module


OVERHEAD = len(b"dsc kept 1\n") + 32 + 8 + len('{"n": 1}')
"""Bytes of an entry besides its data: a mark, a hash, the length of the key, the key."""


def test_an_entry_may_be_as_large_as_the_largest_and_no_larger(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.put("kernels", {"n": 1}, bytes(50))
    assert [entry.size for entry in kept.entries()] == [OVERHEAD + 50]
    monkeypatch.setattr(kept, "MOST", OVERHEAD + 50)
    assert kept.get("kernels", {"n": 1}) == bytes(50)
    kept.put("kernels", {"n": 2}, bytes(50))
    kept.put("kernels", {"n": 3}, bytes(51))
    assert kept.get("kernels", {"n": 2}) == bytes(50)
    assert kept.get("kernels", {"n": 3}) is None
    assert len(kept.entries()) == 2
    monkeypatch.setattr(kept, "MOST", OVERHEAD + 49)
    assert kept.get("kernels", {"n": 1}) is None


def test_a_process_looks_at_the_folder_first_and_with_each_64th_of_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that is reached removes nothing; one that is passed, what was used longest ago."""
    monkeypatch.setenv("DSC_CACHE_BYTES", str(64 * 200))
    begun = fresh(monkeypatch)
    begun.put("kernels", {"n": 1}, bytes(100 - OVERHEAD))  # looks, and begins to count anew
    rest = 64 * 200 - 300
    (folder / "kernels" / "old").write_bytes(bytes(rest))
    os.utime(folder / "kernels" / "old", (1, 1))
    begun.put("kernels", {"n": 2}, bytes(100 - OVERHEAD))
    begun.put("kernels", {"n": 3}, bytes(100 - OVERHEAD))  # 200 since then: looks, and is full
    assert [entry.size for entry in begun.entries()] == [rest, 100, 100, 100]
    begun.put("kernels", {"n": 4}, bytes(199 - OVERHEAD))
    assert len(begun.entries()) == 5
    fresh(monkeypatch).put("kernels", {"n": 5}, bytes(60 - OVERHEAD))
    assert sorted(entry.size for entry in begun.entries()) == [60, 100, 100, 100, 199]


def test_entries_come_by_their_last_use_and_removing_counts_bytes(folder: Path) -> None:
    for n, kind in ((3, "traces"), (1, "kernels"), (2, "traces")):
        kept.put(kind, {"n": n}, bytes(n))
        (file,) = (each for each in kept.entries() if each.used > 1e6)
        os.utime(file.path, (n, n))
    (folder / "link").symlink_to(folder / "traces")
    (folder / "file").write_bytes(b"x")
    found = [(entry.kind, entry.size - OVERHEAD, entry.used) for entry in kept.entries()]
    assert found == [("kernels", 1, 1), ("traces", 2, 2), ("traces", 3, 3)]
    assert kept.clear("traces") == 2 * OVERHEAD + 5
    assert kept.clear() == OVERHEAD + 1
    assert kept.clear() == 0
    assert (folder / "file").exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o700])
def test_who_else_may_write_is_told(mode: int, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    assert kept.refused() == ("" if mode == 0o700 else f"others may write to {folder}")


@pytest.mark.parametrize(
    ("problem", "told"),
    [(OSError(2, "no home", "~"), "no home"), (OSError("odd"), "odd")],
)
def test_a_folder_that_cannot_be_seen_is_told(
    problem: OSError, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Path:
        raise problem

    monkeypatch.setattr(kept, "cache_folder", fails)
    assert kept.refused() == told
    assert (kept.get("kernels", {}), kept.entries(), kept.clear()) == (None, [], 0)


def test_the_folder_is_its_users_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        kept.put("kernels", {"n": 1}, b"x")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (folder, folder / "kernels")] == [0o700] * 2


@pytest.mark.parametrize("given", ["0", "17", None])
def test_the_limit_is_what_was_given(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if given is not None:
        monkeypatch.setenv("DSC_CACHE_BYTES", given)
    assert kept.limit() == (2 << 30 if given is None else int(given))


@pytest.mark.parametrize(
    ("variable", "given"),
    [("DSC_CACHE_BYTES", each) for each in ("-1", "1.5", "", "٣", "9" * 5000)]
    + [("DSC_CACHE", each) for each in ("OFF", "0", "no")],
)
def test_a_setting_that_is_none_is_refused_before_anything_is_made(
    variable: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, given)
    with pytest.raises(UsageError, match=f"{variable} is '{given}'"):
        kept.get("kernels", {"n": 1})


def test_what_a_killed_writer_left_goes_in_time(folder: Path) -> None:
    kept.put("kernels", {"a": 1}, b"x")
    stale, fresh = (folder / "kernels" / name for name in (".stale", ".fresh"))
    stale.write_bytes(b"half")
    fresh.write_bytes(b"half")
    os.utime(stale, (1, 1))
    kept._measured = False
    kept.put("kernels", {"a": 2}, b"x")
    assert not stale.exists()
    assert fresh.exists()
    assert len(kept.entries()) == 2


def test_a_folder_that_others_may_write_to_is_not_used(folder: Path) -> None:
    kept.put("kernels", {"a": 1}, b"x")
    folder.chmod(0o777)
    assert "others may write" in kept.refused()
    assert kept.get("kernels", {"a": 1}) is None
    folder.chmod(0o700)
    assert kept.get("kernels", {"a": 1}) == b"x"


def test_a_cache_that_takes_nothing_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_text("a file where the folder should be")
    kept.put("kernels", {"a": 1}, b"x")
    assert kept.get("kernels", {"a": 1}) is None
    assert kept.entries() == []
    assert kept.refused() == f"{folder} is no folder"
    folder.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert kept.refused() == f"{folder.parent} cannot be written to"
    folder.symlink_to(folder)
    assert kept.refused() == os.strerror(errno.ELOOP)
    monkeypatch.setenv("DSC_CACHE", "off")
    assert kept.refused() == "DSC_CACHE is off"


def test_a_cache_that_can_only_be_read_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    kept.put("kernels", {"a": 1}, b"x")

    def fails(path: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", fails)
    assert kept.get("kernels", {"a": 1}) == b"x"


def test_sources_are_told_apart_by_any_file_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "HOME", tmp_path)
    folders = ["a", "b"]
    files = [tmp_path / folder / "inner" / "code.py" for folder in folders]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("x = 1")
    seen = {kept.sources(*folders)}
    for file in files:
        file.write_text("x = 2")
        assert kept.sources(*folders) in seen, "read once a process"
        assert kept.edited(*folders)
        kept.sources.cache_clear()
        assert not kept.edited(*folders)
        assert kept.sources(*folders) not in seen
        seen.add(kept.sources(*folders))
    file.rename(file.with_name("moved.py"))
    assert kept.edited(*folders)
    with pytest.raises(AssertionError, match="no sources"):
        kept.sources("misspelled")


WRITER = """
import itertools, random
from dsc import kept
for n in itertools.count():
    key = {"n": random.randrange(5)}
    kept.put("kernels", key, bytes([key["n"]]) * 200_000)
    found = kept.get("kernels", {"n": n % 5})
    assert found in (None, bytes([n % 5]) * 200_000), "half an entry"
"""


def test_writers_at_once_and_killed_leave_whole_entries() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER]) for _ in range(4)]
    time.sleep(1.5)
    for writer in writers:
        assert writer.poll() is None, "a reader met half an entry"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    for n in range(5):
        assert kept.get("kernels", {"n": n}) in (None, bytes([n]) * 200_000)
    assert any(kept.get("kernels", {"n": n}) for n in range(5))


def test_the_verb_shows_what_is_kept_and_removes_it() -> None:
    kept.put("kernels", {"a": 1}, b"x")
    kept.put("traces", {"a": 1}, b"x")

    def run(*words: str) -> str:
        done = CliRunner().invoke(build_app(), ["cache", *words])
        assert done.exit_code == 0, done.output
        return done.output

    assert json.loads(run("--json"))["kinds"]["kernels"]["entries"] == 1
    assert "kernels" in run()
    run("--clear", "--kind", "kernels")
    kinds = json.loads(run("--json"))["kinds"]
    assert (kinds["kernels"]["entries"], kinds["traces"]["entries"]) == (0, 1)
    assert CliRunner().invoke(build_app(), ["cache", "--kind", "nothing"]).exit_code != 0
