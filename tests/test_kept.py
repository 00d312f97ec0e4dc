"""What is kept between runs: whole or not at all, by its full key, within its bound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    monkeypatch.setenv("DSC_CACHE", "off")
    assert kept.refused() == "DSC_CACHE is off"
    monkeypatch.setenv("DSC_CACHE_BYTES", "much")
    with pytest.raises(UsageError, match="DSC_CACHE_BYTES"):
        kept.limit()


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
