"""The exit status is 0, 2 for a user's mistake, 1 for our bug; nothing heavy is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dsc
from dsc.cli import VERBS, build_app, doctor, main
from dsc.errors import ConfigError, InternalError

from .conftest import Invoke


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    checkout = Path(dsc.__path__[0]).parent
    environment = {**os.environ, "XDG_STATE_HOME": str(cwd), "PYTHONPATH": str(checkout)}
    line = [sys.executable, "-c", "from dsc.cli import command; command()", *arguments]
    return subprocess.run(
        line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_version(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, dsc.__version__)


def test_the_process_does_what_was_registered_and_ends_with_the_status() -> None:
    program = (
        "import atexit, sys, dsc.cli\n"
        "def main():\n"
        "    atexit.register(print, 'registered')\n"
        "    print('printed', end=' ')\n"
        "    sys.exit(3)\n"
        "dsc.cli.main = main\n"
        "dsc.cli.command()"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (3, b"printed registered\n")


@pytest.mark.parametrize("rank", [None, "0"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_nothing_half_written(
    number: signal.Signals, rank: str | None, tmp_path: Path
) -> None:
    """But for one of several ranks, which ends at once: who launched it cleans up."""
    program = (
        "import os, time, dsc.cli\n"
        "from pathlib import Path\n"
        "from dsc.replacing import replacing\n"
        "def work(args, prog_name):\n"
        "    with replacing(Path(args[0])) as folder:\n"
        "        (folder / 'half').touch()\n"
        "        os.kill(os.getpid(), int(args[1]))\n"
        "        time.sleep(60)\n"
        "dsc.cli.build_app = lambda: work\n"
        "dsc.cli.command()"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "new" / "out"), str(int(number))]
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={k: v for k, v in os.environ.items() if k != "RANK"} | ({"RANK": rank} if rank else {}),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-number, "", "")
    assert bool(list(tmp_path.iterdir())) is (rank is not None)


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("compile",), ("compile", "x", "--fusion-level", "4"), ("bench", "--batch=0")],
)
def test_a_wrong_command_line_exits_with_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_an_existing_output_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = run("compile", "x.py", "-o", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `dsc doctor` raise."""

    def examine(*_: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", examine)


def test_a_users_mistake_prints_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ConfigError("head_dim is 0", "config.json", "set it to 64"), monkeypatch)
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "dsc: head_dim is 0",
        "  where:  config.json",
        "  to do:  set it to 64",
    ]


def test_our_bug_leaves_a_traceback_and_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    fail_with(ZeroDivisionError("by nought"), monkeypatch)
    with pytest.raises(SystemExit) as exited:
        main(["doctor", "--json"])
    assert exited.value.code == 1
    (saved,) = tmp_path.glob("dsc/crashes/*/traceback.txt")
    assert "ZeroDivisionError: by nought" in saved.read_text()
    assert "dsc doctor --json" in (saved.parent / "repro.sh").read_text()
    message = capsys.readouterr().err
    assert str(saved) in message
    assert "Traceback" not in message


def test_a_crash_in_a_pass_leaves_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    bug = InternalError("fuse failed", "%y = relu %x", "dsc opt repro.dsc -p fuse")
    fail_with(bug, monkeypatch)
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 1
    (program,) = tmp_path.glob("dsc/crashes/*/repro.dsc")
    assert program.read_text() == "%y = relu %x"
    assert f"dsc opt {program} -p fuse" in capsys.readouterr().err


def test_a_state_folder_that_cannot_be_written_is_no_second_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    fail_with(KeyError("x"), monkeypatch)
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 1
    assert "dsc-crash-" in capsys.readouterr().err


def test_every_verb_has_help_with_an_example(invoke: Invoke) -> None:
    assert {command.name for command in build_app().registered_commands} == set(VERBS)
    for verb in VERBS:
        shown = invoke(verb, "--help")
        assert shown.exit_code == 0
        assert f"dsc {verb}" in shown.output.partition("Example")[2], verb


def test_how_torch_says_that_memory_is_out_is_known() -> None:
    """An upgrade that words it otherwise fails here, not as a bug of dsc."""
    import torch

    from dsc import cli

    with pytest.raises(RuntimeError, match=cli._OUT_OF_MEMORY):
        torch.empty(1 << 52, dtype=torch.int8)
