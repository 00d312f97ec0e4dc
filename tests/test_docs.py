"""Every code block of the documentation runs, and what it shows is what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    "another output": "```python\nprint(1)\n```\n```output\n2\n```",
    "another command's output": "```console\n$ echo one\ntwo\n```",
    "an unknown option": "```sh\ndsc compile out --no-such-option\n```",
    "an unknown verb": "```sh\ndsc frobnicate out\n```",
    "an unknown target": "```sh\nmake nothing\n```",
    "output that is not shown": "```python\nprint(1)\n```",
    "IR that does not verify": "```dsc\ngraph g(%x: f32[2]) { %y = relu %z\n return %y }\n```",
    "a block without a language": "```\nx\n```",
    "an error that is not shown": "```python\n1 / 0\n```",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_page_that_is_wrong_is_noticed(text: str, tmp_path: Path) -> None:
    def holds() -> bool:
        return all(shown.holds for shown in run_page(read_page(_page(tmp_path, text))))

    try:
        noticed = not holds()
    except Exception:
        noticed = True
    assert noticed


def test_blocks_of_a_page_share_names_and_files(tmp_path: Path) -> None:
    text = (
        '```python title="mine.py"\nx = 2\n```\n```python\nfrom mine import x\n```\n'
        "```python\nprint(x)\n```\n```output\n2\n```\n```console\n$ cat mine.py\nx = 2\n```"
    )
    assert [s.holds for s in run_page(read_page(_page(tmp_path, text)))] == [True, True]


def test_what_is_left_out_is_any_text() -> None:
    assert agrees("a …\n…\nz", "a b\nc\nd\nz\n")
    assert not agrees("a …\nz", "a b\nc\nz")
