"""Limits of a device or its family, the debug mode, and the folders that are the user's own."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsc import processes, settings, user_folders
from dsc.errors import UsageError


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Leave the process as it was."""
    yield
    for device in ("cuda", "cuda:1"):
        settings.set_memory_limit(device, None)
    settings.set_debug_mode(False)


def test_a_device_has_its_own_limit_or_its_familys() -> None:
    settings.set_memory_limit("cuda", 2)
    settings.set_memory_limit("cuda:1", 0.5)
    assert settings.memory_limit("cuda:0") == 2_000_000
    assert settings.memory_limit("cuda:1") == 500_000
    assert settings.memory_limit("cpu") is None


@pytest.mark.parametrize("megabytes", [0, -1, float("nan"), float("inf"), "8", True])
def test_a_limit_is_a_positive_number(megabytes: Any) -> None:
    with pytest.raises(UsageError, match=f"memory limit of {megabytes} MB"):
        settings.set_memory_limit("cpu", megabytes)


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", None])
def test_a_limit_of_a_device_that_nobody_has_is_refused(device: Any) -> None:
    """It would never be asked for."""
    with pytest.raises(UsageError, match="the device"):
        settings.set_memory_limit(device, 8)


def test_the_debug_mode_switches() -> None:
    assert not settings.debug_mode()
    settings.set_debug_mode()
    assert settings.debug_mode()


@pytest.mark.parametrize(("given", "meant"), [(None, True), ("", True), ("1", True), ("0", False)])
def test_a_variable_switches_by_its_two_words(
    given: str | None, meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSC_TUNE", raising=False)
    if given is not None:
        monkeypatch.setenv("DSC_TUNE", given)
    assert settings.switched("DSC_TUNE", on="1", off="0") is meant
    monkeypatch.setenv("DSC_TUNE", "off")
    with pytest.raises(UsageError, match="DSC_TUNE is 'off'"):
        settings.switched("DSC_TUNE", on="1", off="0")


@pytest.mark.parametrize(
    ("folder", "variable", "default"),
    [
        (user_folders.state_folder, "XDG_STATE_HOME", ".local/state/dsc"),
        (user_folders.cache_folder, "XDG_CACHE_HOME", ".cache/dsc"),
    ],
)
def test_folders_of_the_user_are_where_xdg_says(
    folder: Any, variable: str, default: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv(variable, "")
    assert folder() == Path("/home/somebody") / default
    monkeypatch.delenv(variable)
    assert folder() == Path("/home/somebody") / default
    monkeypatch.setenv(variable, "/else/where")
    assert folder() == Path("/else/where/dsc")

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert folder() == Path("/else/where/dsc")
    monkeypatch.delenv(variable)
    with pytest.raises(FileNotFoundError) as told:
        folder()
    assert (told.value.errno, told.value.filename) == (errno.ENOENT, "~")


def test_a_child_imports_the_same_dsc_before_what_the_user_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = str(Path(settings.__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.setenv("OTHER", "kept")
    found = processes.child_environment()
    assert (found["PYTHONPATH"], found["OTHER"]) == (os.pathsep.join([root, "/mine"]), "kept")
    monkeypatch.delenv("PYTHONPATH")
    assert processes.child_environment()["PYTHONPATH"] == root
