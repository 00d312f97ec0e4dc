"""Folders that take their place when they are whole: what is killed leaves nothing half-written."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dsc import replacing
from dsc.errors import ArtifactError, FileError
from dsc.replacing import clear
from dsc.runtime.artifact import check_free

KILLED = """
import os, resource, signal, sys, threading
from pathlib import Path
import numpy as np
from dsc.errors import FileError
from dsc.ir.parser import parse_program
from dsc.ir.weights import WeightSource
from dsc.runtime import artifact
from dsc.runtime.emission import Emission

TEXT = '''program "p" {{stage=CANONICAL}}
symbols {{N=[1,8]}}
weights {{{weights}
}}
graph main(%x: f32[N,4]) {{
  %y = mul %x, @w0 : f32[N,4]
  return %y
}}
'''.format(weights="".join(f"\\n  @w{i} : f32[4] = source \\"w{i}\\" : f32[4]" for i in range(6)))


class Numbers(WeightSource):
    types = {}

    def load(self, key):
        raise AssertionError

    def array(self, key, rows=slice(None)):
        return np.arange(4, dtype=np.float32)[rows] + mark


def write(at, force):
    steps = 0
    def progress(*_):
        nonlocal steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
    artifact.write(out, parse_program(TEXT, Numbers()), Emission({}), backend="reference",
                   targets=("cpu",), report={}, force=force, progress=progress)


out, seen, mark = Path(sys.argv[1]), [], 0
for old in (False, True):
    for at in (1, 3, 7):
        child = os.fork()
        if child == 0:
            mark = 1
            write(at, True)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        whole = artifact.check_hashes(out) if out.exists() else 0
        left = [p for p in out.parent.iterdir() if p != out]
        seen.append((died, bool(whole), len(left)))
    assert seen == [(True, old, 1)] * 3, seen
    seen.clear()
    write(0, True)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    assert artifact.check_hashes(out)
artifact.check_room = lambda *_: None  # the disk is full only once it is written to
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    write(0, True)
except FileError as error:
    print(str(error).splitlines()[0])
assert [p.name for p in out.parent.iterdir()] == [out.name]
assert threading.active_count() == 1
print("torch" in sys.modules)
"""


def test_a_pack_that_is_killed_leaves_what_was_there_and_the_next_one_is_whole(
    tmp_path: Path,
) -> None:
    """At the first weight, amid, and behind the last; over nothing, and over an artifact.

    So does one that finds no room to write.
    """
    (tmp_path / "in").mkdir()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    line = [sys.executable, "-c", KILLED, str(tmp_path / "in" / "out")]
    told = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    assert told.stdout == "cannot write: File too large\nFalse\n"


def leftover(out: Path, name: str) -> Path:
    """A folder that nobody writes, with a file in it."""
    found = out.parent / name
    (found / out.name).mkdir(parents=True)
    (found / out.name / "file").write_text("here")
    return found


def test_what_somebody_writes_or_is_not_ours_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = [
        ".out.unfinished.abcd_123",
        ".out.unfinished.x",
        ".out.cache",
        ".other.unfinished.abcdefgh",
    ]
    folders = [leftover(out, name) for name in names]
    (tmp_path / ".out.unfinished.12345678").symlink_to(folders[2])
    lock = os.open(folders[0], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    clear(out)
    assert all(folder.exists() for folder in folders)
    os.close(lock)
    clear(out)
    assert [folder.exists() for folder in folders] == [False, True, True, True]
    clear(tmp_path / "none" / "out")


@pytest.mark.parametrize("there", [True, False])
def test_what_was_moved_away_comes_back_unless_its_place_is_taken(
    tmp_path: Path, there: bool
) -> None:
    out = tmp_path / "out"
    leftover(out, ".out.replaced.abcdefgh")
    if there:
        out.mkdir()
    clear(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").exists() is not there


@pytest.mark.parametrize("at_once", [True, False])
def test_the_old_gives_way_at_once_or_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    out, elsewhere = tmp_path / "in" / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    out.parent.mkdir()
    out.symlink_to(elsewhere)
    for name in ("first", "second"):
        with replacing.replacing(out) as folder:
            (folder / name).touch()
        assert [path.name for path in out.iterdir()] == [name]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in elsewhere.iterdir()] == ["file"]


def test_what_cannot_be_put_back_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    monkeypatch.setattr(replacing, "_exchange", lambda *_: False)
    rename = os.rename

    def once(source: Path, target: Path) -> None:
        if target == out:
            raise OSError("the disk is gone")
        rename(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", once)
        with pytest.raises(FileError), replacing.replacing(out):
            pass
    assert not out.exists()
    clear(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").exists()


def test_what_another_put_there_meanwhile_stays(tmp_path: Path) -> None:
    """Two that write to one place at once, neither of which may replace anything."""
    out = tmp_path / "out"
    check = partial(check_free, out, False)
    with replacing.replacing(out, check) as early:
        late = replacing.replacing(out, check)
        late.__enter__()
        (early / "early").touch()
    with pytest.raises(ArtifactError, match="exists already"):
        late.__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == ["early"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_system_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        replacing._exchange(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileError), replacing.replacing(Path("/proc/out")):
        pass
