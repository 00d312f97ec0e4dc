"""Every code block of the documentation runs, and what it shows is what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsc.errors import ParseError
from tests.documents import PAGES, agrees, read_page, run_page
from tests.test_conventions import name


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_what_a_page_shows_is_what_comes_out(path: Path) -> None:
    page = read_page(path)
    for package in page.needs:
        pytest.importorskip(package, reason=f"this page needs {package}")
    for shown in run_page(page):
        place = f"{name(path)}:{shown.block.line}"
        assert shown.holds, f"{place} shows\n{shown.block.text}\nand out comes\n{shown.found}"


def _page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


WRONG = {
    "another output": ("```python\nprint(1)\n```\n```output\n2\n```", ""),
    "another command's output": ("```console\n$ echo one\ntwo\n```", ""),
    "an unknown option": ("```sh\ndsc compile out --no-such-option\n```", "no-such-option"),
    "an unknown verb": ("```sh\ndsc frobnicate out\n```", "no verb frobnicate"),
    "an unknown target": ("```sh\nmake nothing\n```", "make nothing"),
    "output that is not shown": ("```python\nprint(1)\n```", "prints unshown"),
    "IR that does not verify": (
        "```dsc\ngraph g(%x: f32[2]) {\n %y = silu %z\n return %y\n}\n```",
        "%z",
    ),
    "a block without a language": ("```\nx\n```", "a block of no language"),
    "an error that is not shown": ("```python\n1 / 0\n```", "division by zero"),
}
"""Pages, and what is said of them; nothing where what is shown is not what comes out."""


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong_is_noticed(text: str, words: str, tmp_path: Path) -> None:
    path = _page(tmp_path, text)
    if not words:
        assert [shown.holds for shown in run_page(read_page(path))] == [False]
        return
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError, ParseError), match=words):
        list(run_page(read_page(path)))


def test_blocks_of_a_page_share_names_and_files(tmp_path: Path) -> None:
    text = (
        '```python title="mine.py"\nx = 2\n```\n```python\nfrom mine import x\n```\n'
        "```python\nprint(x)\n```\n```output\n2\n```\n```console\n$ cat mine.py\nx = 2\n```"
    )
    assert [s.holds for s in run_page(read_page(_page(tmp_path, text)))] == [True, True]


def test_what_is_left_out_is_any_text() -> None:
    assert agrees("a …\n…\nz", "a b\nc\nd\nz\n")
    assert not agrees("a …\nz", "a b\nc\nz")
