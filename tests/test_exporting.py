"""`dsc.export`: functions, modules and models as ONNX, and what goes along for servers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dsc
from dsc.cli import main
from dsc.errors import UsageError, VerificationError
from dsc.exporting import NO_TOKENIZER, exported, traced
from dsc.frontends.beside import files_beside
from dsc.frontends.torch_export import UNPLACED

pytest.importorskip("onnxruntime")


@dsc.optimize(fusion_level=3)
def attention_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend over all keys."""
    scores = dsc.matmul(q, k.transpose(-2, -1)) / (q.shape[-1] ** 0.5)
    return dsc.softmax(scores, dim=-1) @ v


def outputs_of(path: Path, inputs: dict[str, Any]) -> list[Any]:
    """Return what ONNX Runtime alone gives."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == list(inputs)
    results: list[Any] = session.run(None, {n: x.numpy() for n, x in inputs.items()})
    return results


def test_a_decorated_function_runs_at_sizes_that_have_names(tmp_path: Path) -> None:
    example = [torch.randn(2, n, 8) for n in (3, 5, 5)]
    keys = {0: "B", 1: torch.export.Dim("T")}
    shapes = {"q": {0: "B", 1: "S"}, "k": keys, "v": keys}
    out = dsc.export(attention_layer, tmp_path / "a", args=example, dynamic_shapes=shapes)
    q, k, v = (torch.randn(4, n, 8) for n in (1, 7, 7))
    wanted = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    (found,) = outputs_of(out / "onnx" / "attention_layer.onnx", {"q": q, "k": k, "v": v})
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert dsc.load(out).run({"q": q, "k": k, "v": v})["out"].shape == wanted.shape
    line = [sys.executable, str(out / "example.py")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.stdout == "out float32 (2, 2, 8)\n", done.stderr
    assert "| `k` | float32 | [B, T, 8] |" in (out / "README.md").read_text()


def test_a_module_has_its_weights_and_its_names(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.LayerNorm(9))
    out = dsc.export(
        module,
        tmp_path / "a",
        args=[torch.randn(2, 6)],
        dynamic_shapes={"input": {0: torch.export.Dim("N", max=32)}},
        output_names=["features"],
        server="triton-server",
    )
    x = torch.randn(5, 6)
    (found,) = outputs_of(out / "Sequential" / "1" / "Sequential.onnx", {"input": x})
    np.testing.assert_allclose(found, module(x).detach(), atol=1e-6)
    config = (out / "Sequential" / "config.pbtxt").read_text()
    assert 'name: "features"' in config
    assert "max_batch_size: 32" in config


def test_a_function_gives_its_own_results_alone(tmp_path: Path) -> None:
    """Indices are constants or computed, and the function has no name that a graph could have."""
    x, i = torch.randn(3, 4), torch.tensor([0, -1])
    function: Any = lambda x, i: (x[:, [0, 2]].flip(1), x[i - 1])  # noqa: E731
    out = dsc.export(function, tmp_path / "a", args=[x, i], dynamic_shapes={"i": {0: "N"}})
    found = outputs_of(out / "onnx" / "_lambda_.onnx", {"x": x, "i": i})
    for one, wanted in zip(found, function(x, i), strict=True):
        np.testing.assert_array_equal(one, wanted)
    assert len(dsc.load(out).run({"x": x, "i": i})) == 2


class Scaled(nn.Module):
    """A module whose parameters are called as its argument and its result are."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.out = (nn.Parameter(torch.randn(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return x * self.x + self.out


def test_parameters_may_be_called_as_inputs_are(tmp_path: Path) -> None:
    module, x = Scaled(), torch.randn(3, 4)
    out = dsc.export(module, tmp_path / "a", args=[x])
    (found,) = outputs_of(out / "onnx" / "Scaled.onnx", {"x": x})
    np.testing.assert_allclose(found, module(x).detach(), atol=1e-6)


def test_triton_is_told_what_rows_share_however_little(tmp_path: Path) -> None:
    out = dsc.export(
        lambda x: x + 1e-4 * x.mean(0),
        tmp_path / "a",
        args=[torch.randn(2, 6)],
        dynamic_shapes={"x": {0: "B"}},
        output_names=['a\n"b"'],
        server="triton-server",
    )
    config = (out / "_lambda_" / "config.pbtxt").read_text()
    assert '# No dynamic batching: rows of B see each other in a "b".\n' in config
    assert r'name: "a\n\"b\""' in config


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"args": [torch.ones(2)]}, "do not fit"),
        ({"args": [torch.ones(2)] * 3, "dynamic_shapes": {"x": {0: "B"}}}, "no such argument"),
        ({"dynamic_shapes": {"q": {0: "B"}}}, "of a function's"),
        ({"args": [torch.ones(2)] * 3, "dynamic_shapes": {"q": {0: "a size"}}}, "calls a size"),
        ({"args": [torch.ones(2)] * 3, "dynamic_shapes": {"q": {-1: "B"}}}, "names axis -1 of q"),
        ({"args": [torch.ones(2)] * 3, "dynamic_shapes": {"q": "B"}}, "says Dim.* of q"),
        ({"args": [torch.ones(2)] * 3, "dynamic_shapes": [{0: "B"}]}, "is no mapping"),
        ({"args": [np.ones((2, 2))] * 3}, "cannot be traced: ValueError"),
        ({"args": [torch.ones(2, 2)] * 3, "backend": "tvm"}, "writes no ONNX"),
    ],
)
def test_what_cannot_be_exported_is_said(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        dsc.export(attention_layer, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def branching(x: Tensor) -> Tensor:
    """Go one way or the other."""
    return x * 2 if x.sum() > 0 else x


def test_a_branch_on_data_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = logging.Handler()
    logged.emit = lambda record: pytest.fail(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger(UNPLACED[0]), "handlers", [logged])
    with pytest.raises(UsageError, match="branching takes a number out of a tensor") as refused:
        dsc.export(branching, tmp_path / "a", args=[torch.ones(2, 3)])
    assert "\n" not in refused.value.what
    assert "test_exporting.py" in str(refused.value.where)
    assert "x.sum() > 0" in str(refused.value.where)


def test_an_export_is_checked_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsc.backends.onnxruntime import check

    def negative(x: Tensor) -> Tensor:
        return -x

    asked: Any = {"args": [torch.ones(2, 3)], "check": True}
    dsc.export(negative, tmp_path / "a", **asked)
    monkeypatch.setattr(check, "_shapes", lambda path: (False, "they do not follow"))
    with pytest.raises(VerificationError, match=r"shapes of .*: they do not follow") as refused:
        dsc.export(negative, tmp_path / "b", **asked)
    assert refused.value.where == str(tmp_path / "b")
    with pytest.raises(UsageError, match="check reads the weights too"):
        dsc.export("a.dsc", tmp_path / "c", check=True)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda x: None, "_lambda_ gives no tensor"),
        (lambda x: int("x"), "_lambda_ cannot be traced: ValueError: invalid"),
    ],
)
def test_a_function_that_fails_or_gives_nothing_is_told(
    function: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        dsc.export(function, tmp_path / "a", args=[torch.ones(2)])


def test_no_function_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a int is no function of tensors"):
        dsc.export(3, tmp_path / "a", args=[torch.ones(2)])
    with pytest.raises(UsageError, match="relu does not tell its parameters"):
        dsc.export(torch.relu, tmp_path / "a", args=[torch.ones(2)])


def test_files_beside_a_checkpoint_are_those_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": "mine.Mine"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "special_tokens_map.json").write_text("[1]")
    (tmp_path / "added_tokens.json").symlink_to("/etc/hostname")
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit")
    found, notes = files_beside(tmp_path, ())
    names = ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
    assert list(found) == names
    assert json.loads(found["tokenizer_config.json"]) == {"tokenizer_class": "Mine"}
    assert [n.partition(" ")[0] for n in notes] == ["special_tokens_map.json", "added_tokens.json"]


def test_a_language_model_without_a_tokenizer_is_noted(root: Path) -> None:
    compiled = exported(root / "tests" / "data" / "small_lm.dsc")
    assert NO_TOKENIZER in compiled.report["notes"]
    assert NO_TOKENIZER not in exported(traced(torch.nn.ReLU(), [torch.ones(2)])).report["notes"]


def test_a_tokenizer_alone_gets_settings() -> None:
    found, notes = files_beside(None, ["tokenizer.json"])
    assert json.loads(found["tokenizer_config.json"])["tokenizer_class"]
    assert not notes
    assert files_beside(None, ()) == ({}, [])


FILE = """
import torch

dynamic_shapes = {"x": {0: "B"}}

def build(config):
    return torch.nn.Sequential(torch.nn.Linear(config["width"], 4), torch.nn.SiLU())

def example_inputs(config):
    return (torch.randn(2, config["width"]),)
"""


def test_a_file_with_example_inputs_is_exported_by_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, config = tmp_path / "m.py", tmp_path / "c.json"
    path.write_text(FILE.replace('"x"', '"input"'))
    config.write_text('{"width": 6}')
    line = ["export", str(path), "--config", str(config), "-o", str(tmp_path / "a"), "--check"]
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 0, capsys.readouterr().err
    (found,) = outputs_of(tmp_path / "a/onnx/Sequential.onnx", {"input": torch.randn(5, 6)})
    assert found.shape == (5, 4)
    path.write_text(FILE)
    for text, problem in (
        (FILE, "dynamic_shapes names x"),
        (FILE.replace('"x": {0', '"input": {2'), "dynamic_shapes names axis 2 of input"),
        (FILE.replace('["width"]', '["depth"]'), "m.py:7"),
        (FILE.replace("return (torch", "return 1, (torch").replace("1, ", "3 #"), "build gives a"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit) as ended:
            main([*line, "--force"])
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err
    path.write_text(FILE)
    with pytest.raises(UsageError, match="brings its weights"):
        dsc.export(path, tmp_path / "b", config=str(config), weights="none")
