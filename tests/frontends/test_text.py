"""Programs in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsc.errors import FileError, ParseError, UsageError
from dsc.frontends.text import read_program
from dsc.ir.interpreter import Interpreter
from dsc.ir.printer import print_program
from dsc.ir.weights import DictSource

TEXT = """program "tiny" {stage=CANONICAL}
symbols {B=[1,8]}
weights {
  @w : f32[3,4] = source "w" : f32[3,4]
}
graph main(%x: f32[B,4]) {
  %y = linear %x, @w : f32[B,3]
  return %y
}
"""


def test_a_file_is_read_run_and_written_back(tmp_path: Path) -> None:
    file = tmp_path / "tiny.dsc"
    file.write_text(TEXT)
    w, x = torch.randn(3, 4), torch.randn(2, 4)
    program = read_program(file, DictSource({"w": w}))
    assert torch.equal(Interpreter(program).run("main", {"x": x})["y"], x @ w.T)
    assert print_program(program) == TEXT


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("graph", ParseError, r"tiny\.dsc"),
        (TEXT.replace("f32[B,3]", "f32[B,4]"), ParseError, r"linear[^|]*tiny\.dsc, line 7"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(
    text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.dsc"
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_program(file)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read"):
        read_program(tmp_path / "absent.dsc")
    (tmp_path / "binary.dsc").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no UTF-8 text"):
        read_program(tmp_path / "binary.dsc")
