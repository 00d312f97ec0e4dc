"""Fixtures that every test may ask for."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")
os.environ["DSC_TUNE"] = "0"  # kernels by rule: the same code on every run


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the checkout, for tests that read its files."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of large reference material beside the checkout, where there is one.

    `DSC_SHARED` names another place. It holds `text/valid.txt` and `checkpoints/`; without it the
    test is skipped and the reason printed.
    """
    folder = Path(os.environ.get("DSC_SHARED", ROOT.parent / "shared"))
    if not (folder / "text").is_dir():
        pytest.skip(f"no reference text: {folder.name}/text is not beside the checkout")
    return folder


@pytest.fixture
def hashed_sources(monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Asks which of our files were hashed for keys of what is kept, from now on."""
    from dsc import kept

    hashed: list[str] = []

    def sources(*folders: str) -> str:
        hashed.extend(folders)
        return "a hash"

    def files() -> set[str]:
        every = (file for name in hashed for file in (kept.HOME / name).rglob("*.py"))
        return {str(file.relative_to(kept.HOME)) for file in every}

    monkeypatch.setattr(kept, "sources", sources)
    return files


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no collection of garbage walks it again.

    Every full one would, 0.3 s each, and took a tenth of what tests compute in their own process.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_sessionfinish() -> None:
    """Let a process end as others do, where modules look for what they have not freed."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an accelerator where there is none, and what is only run when asked for."""
    if item.get_closest_marker("exhaustive") and not os.environ.get("DSC_EXHAUSTIVE"):
        pytest.skip("a long variant of a sampled test: set DSC_EXHAUSTIVE=1")
    if item.get_closest_marker("gpu") is None:
        return
    from dsc.hardware import gpus

    if not gpus():
        pytest.skip("no GPU on this machine")
