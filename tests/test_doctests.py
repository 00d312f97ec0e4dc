"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.test_conventions import SOURCES, module_of, name

WITH_EXAMPLES = [
    path
    for path in SOURCES
    if module_of(path).startswith("dsc") and re.search(r"^ *>>> ", path.read_text("utf-8"), re.M)
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name)
def test_examples(path: Path) -> None:
    result = doctest.testmod(importlib.import_module(module_of(path)))
    assert result.attempted > 0
    assert result.failed == 0
