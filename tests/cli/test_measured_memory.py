"""What a verb says of its own memory."""

from __future__ import annotations

from pathlib import Path

from dsc.cli.bench import peak_rss


def test_the_peak_is_told_in_bytes() -> None:
    """`VmHWM` of /proc is the same figure, in kB (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    assert 0.9 < peak_rss() / (held * 1024) < 1.1
