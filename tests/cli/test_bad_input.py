"""Bad input, from the command line: one clear error, exit 2, nothing written, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.cli import main
from dsc.errors import DscError
from dsc.frontends.generation_config import load_generation
from dsc.frontends.huggingface import load_checkpoint
from dsc.models.configs import TINY_CHECKPOINT

FP8 = Path(__file__).resolve().parent.parent / "data" / "tiny-v3-fp8"
Break = Callable[[Path], None]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def copy(source: Path, folder: Path) -> Path:
    """A checkpoint of one's own: small files copied, weights copied when they are changed."""
    folder.mkdir()
    for file in source.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a command line."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    code = ended.value.code
    return (0 if code is None else int(code)), capsys.readouterr().err


def _files() -> set[Path]:
    """What lies in the test's folder, but for Python's bytecode and the user's state."""
    return {p for p in Path.cwd().rglob("*") if not {"state", "__pycache__"} & set(p.parts)}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> None:
    """Compiling `folder` fails as it should, and says `words`."""
    before = _files()
    code, error = run(capsys, "compile", str(folder), "--backend", "reference", "-o", "out")
    assert code == 2, error
    assert "Traceback" not in error
    for word in words:
        assert word in error
    assert _files() == before


def edit_config(**changes: Any) -> Break:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.update(changes)
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return apply


def edit_header(change: Callable[[dict[str, Any]], None]) -> Break:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return apply


def tensor(**fields: Any) -> Break:
    return edit_header(lambda header: header["model.norm.weight"].update(fields))


def overwrite(name: str, data: bytes) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return apply


def truncate(size: int) -> Break:
    return lambda folder: os.truncate(folder / "model.safetensors", size)


BREAKS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "truncated weights": (truncate(100_000), ("model.safetensors", "cut short", "get it again")),
    "empty weights": (truncate(0), ("model.safetensors",)),
    "a header length beyond the file": (
        overwrite("model.safetensors", struct.pack("<Q", 1 << 50)),
        ("model.safetensors",),
    ),
    "a header that lies about a shape": (tensor(shape=[257]), ("model.norm.weight",)),
    "a header with a huge shape": (tensor(shape=[1 << 62]), ("model.norm.weight",)),
    "a header with a negative dim": (tensor(shape=[-256]), ("model.norm.weight",)),
    "offsets outside of the file": (
        tensor(data_offsets=[1 << 40, (1 << 40) + 512]),
        ("model.norm.weight",),
    ),
    "offsets backwards": (tensor(data_offsets=[512, 0]), ("model.norm.weight",)),
    "an unknown dtype": (tensor(dtype="F7"), ("model.norm.weight", "F7")),
    "a dtype of another size": (tensor(dtype="F32"), ("model.norm.weight",)),
    "a missing tensor": (
        edit_header(lambda h: h.__delitem__("model.layers.1.self_attn.kv_b_proj.weight")),
        ("model.layers.1.self_attn.kv_b_proj.weight",),
    ),
    "a misshapen tensor": (
        edit_config(moe_intermediate_size=64),
        ("model.layers.1.mlp", "[128,256]", "[64,256]"),
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "a garbage config": (
        overwrite("config.json", b"\xff{]"),
        ("config.json",),
    ),
    "a config out of range": (edit_config(num_attention_heads=0), ("num_attention_heads",)),
    "a config that contradicts itself": (edit_config(num_experts_per_tok=99), ("experts",)),
    "more layers than there are": (
        edit_config(num_hidden_layers=9),
        ("num_hidden_layers is 9", "model/config.json\n", "to do:  set num_hidden_layers to 4"),
    ),
    "a tokenizer that is cut short": (
        lambda f: os.truncate(f / "tokenizer.json", 1000),
        ("the tokenizer is damaged: EOF", "model/tokenizer.json\n", "to do:  get it again"),
    ),
    "a tokenizer that is no text": (
        overwrite("tokenizer.json", b"\xff{}"),
        ("the tokenizer is damaged: this is no UTF-8", "to do:  get it again"),
    ),
    "an unknown architecture": (edit_config(model_type="llama9"), ("'llama9'", "transformers")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_one_clear_error(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, words = BREAKS[name]
    folder = copy(TINY_CHECKPOINT, tmp_path / "model")
    broken(folder)
    refused(capsys, folder, *words)


def test_a_missing_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(FP8, tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(capsys, folder, "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_that_leads_outside(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(FP8, tmp_path / "model")
    shutil.copy(TINY_CHECKPOINT / "model.safetensors", tmp_path / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = place
    path.write_text(json.dumps(index))
    refused(capsys, folder, place)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("absent")


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (pipe, "is a pipe or a device, not a file"),
    "a link to itself": (loop, "cannot be read: Too many levels of symbolic links"),
    "a link to nothing": (dangling, "is a link that leads nowhere"),
    "a folder": (Path.mkdir, "is a folder, not a file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"]
)
def test_what_is_no_file_is_called_what_it_is(name: str, kind: str, tmp_path: Path) -> None:
    """Also where the file is optional: what somebody put there is not ignored without a word."""
    folder = copy(TINY_CHECKPOINT, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    make, words = NO_FILES[kind]
    make(folder / name)
    with pytest.raises(DscError, match=words) as told:
        load_generation(folder, load_checkpoint(folder).config.facts)
    assert name in str(told.value)


def test_a_pickle_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(TINY_CHECKPOINT, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    fired = tmp_path / "fired"
    payload = f"cos\nsystem\n(S'touch {fired}'\ntR."
    (folder / "pytorch_model.bin").write_bytes(payload.encode())
    refused(capsys, folder, "pickled")
    assert not fired.exists()


def test_code_of_a_checkpoint_is_never_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(TINY_CHECKPOINT, tmp_path / "model")
    fired = tmp_path / "fired"
    (folder / "modeling_evil.py").write_text(f"open({str(fired)!r}, 'w')\n")
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_config(auto_map=auto_map, model_type="evil", architectures=["Evil"])(folder)
    refused(capsys, folder, "evil")
    assert not fired.exists()


def test_an_unsupported_operator_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.py"
    path.write_text(
        "import torch\n"
        "from dsc.models.v3 import DeepseekV3ForCausalLM, MLP\n"
        "class Odd(MLP):\n"
        "    def forward(self, x):\n"
        "        return super().forward(torch.fft.fft(x.float()).real.to(x.dtype))\n"
        "def build(config):\n"
        "    model = DeepseekV3ForCausalLM(config).eval()\n"
        "    model.model.layers[0].mlp = Odd(config.hidden_size, config.intermediate_size)\n"
        "    return model\n"
    )
    refused(capsys, path, "fft", "model.layers.0.mlp", "odd.py:5")


def test_an_existing_output_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    refused(capsys, TINY_CHECKPOINT, "exists already")
    code, _ = run(
        capsys, "compile", str(TINY_CHECKPOINT), "--backend", "reference", "-o", "out", "--force"
    )
    assert code == 2
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("model", ["nowhere", "missing.py", "missing.dsc"])
def test_a_model_that_is_not_there(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, Path(model), model)


@pytest.mark.parametrize(
    "line",
    [
        "compile models/v3.py --backend nonsense",
        "compile v3 --backend tvm --target cuda:sm_90",
        "compile v3 --backend reference --target toaster",
        "compile v3 --backend reference --quant int3",
        "compile v3 --backend reference --keep lm_head",
        "compile v3 --backend reference --quant int8 --keep nothing",
        "compile v3 --backend reference --quant int8 --calibrate nowhere.txt",
        "compile v3 --backend reference --quant int8 --avg-bits 9",
        "compile v3 --backend reference --quant int8 --activation-bits 4",
        "compile v3 --config nonsense --backend reference",
        "compile v3 --config 671b --backend reference",
        "compile v3 --backend reference --print-ir-after nonsense",
        "generate nowhere --prompt x",
        "opt nowhere.dsc -p dce",
    ],
)
def test_options_that_cannot_be(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, *line.split())
    assert code == 2, error
    assert "Traceback" not in error
    assert not [p for p in Path.cwd().iterdir() if p.name != "state"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compile v3 --print-ir-after absorb_mia", "did you mean absorb_mla? One of fold_empty"),
        ("inspect v3 --after raise_mia", "did you mean raise_mla?"),
        ("opt small.dsc -p eliminate_dead_code,fuze", "did you mean fuse?"),
        ("opt small.dsc --explain fuze", "did you mean fuse?"),
        ("inspect v3 --entry decoed", "did you mean decode? One of decode, extend, prefill"),
        ("inspect v3 --entry decoed --report", "did you mean decode?"),
        ("inspect v3 --entry decode --after raise_mla", "leave out --entry, or take a later pass"),
        ("inspect v3 --backend nul", "did you mean null?"),
        ("compile v3 --ranks 3", "8 attention heads do not part into 3 ranks"),
        ("compile v3 --ranks 3 --parallel ep", "16 experts do not part into 3 ranks"),
        ("compile v3 --max-context 999999", "is beyond the model's"),
        ("compile v3 --weights odd", "temperature must be a number, found 'hot'"),
        ("compile odd", "temperature must be a number, found 'hot'"),
    ],
)
def test_a_mistake_in_few_bytes_is_found_before_weights_and_traces(
    line: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    for place in ("huggingface.open_safetensors", "causal_lm.trace_step"):
        monkeypatch.setattr(f"dsc.frontends.{place}", work)
    monkeypatch.setattr("dsc.pipeline.Manager.run", work)
    shutil.copy(FP8.parent / "small_lm.dsc", "small.dsc")
    (tmp_path / "odd").mkdir()
    shutil.copy(TINY_CHECKPOINT / "config.json", "odd")
    (tmp_path / "odd" / "generation_config.json").write_text('{"temperature": "hot"}')
    code, error = run(capsys, *line.split())
    assert code == 2, error
    assert words in error
    assert "to do:" in error


def test_weights_that_end_early_are_told_before_a_damaged_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that one before a trace."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("dsc.frontends.causal_lm.trace_step", work)
    shutil.copytree(TINY_CHECKPOINT, tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    code, error = run(capsys, "compile", "torn")
    assert (code, "the tokenizer is damaged" in error) == (2, True), error
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, error = run(capsys, "compile", "torn")
    assert (code, "model.safetensors" in error, "tokenizer" in error) == (2, True, False), error


def test_a_tampered_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(
        capsys, "compile", str(TINY_CHECKPOINT), "--backend", "reference", "-o", "out"
    )
    assert code == 0, error
    path = tmp_path / "out" / "program.dsc"
    path.write_text(path.read_text().replace("scale=2.5", "scale=2.6"))
    code, error = run(capsys, "generate", "out", "--prompt", "In the beginning")
    assert code == 2
    assert "program.dsc" in error
    assert "Traceback" not in error


def test_a_damaged_tokenizer_of_an_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = FP8.parent / "small_lm.dsc"
    out = dsc.compile(str(small), backend="reference", max_context=32).save(tmp_path / "out")
    (out / "tokenizer.json").write_text('{"version": ')
    for line in (("generate", "out", "--prompt", "x"), ("verify", "out", "--checkpoint", "m")):
        code, error = run(capsys, *line)
        assert code == 2, error
        assert "the tokenizer is damaged: EOF while parsing" in error
        assert "out/tokenizer.json\n  to do:  compile the model again" in error
        assert "Traceback" not in error


OPEN = """program "open" {stage=TRACED}
symbols {B=[0,2147483647], S=[0,2147483647], P=[0,2147483647]}
graph main(%x: f32[B,S,P]) {
  %a = exp %x : f32[B,S,P]
  %b = sum %a {axes=[2], keepdims=true} : f32[B,S,1]
  %c = add %a, %b : f32[B,S,P]
  %d = softmax %c {axis=-1} : f32[B,S,P]
  return %d
}
"""


def test_a_text_with_open_ranges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "open.dsc").write_text(OPEN)
    line = ("inspect", "open.dsc", "--report", "--backend")
    assert run(capsys, *line, "null")[0] == 0, "costs are expressions"
    code, error = run(capsys, *line, "tvm")
    assert code == 2, error
    assert "upper bound" in error
    assert "Traceback" not in error


def test_a_traced_causal_model_with_open_ranges_gets_the_limits_asked_for() -> None:
    from dsc.frontends.load import load_program

    traced = FP8.parent / "traced" / "v3.dsc"
    assert "P=[0,2147483647]" in traced.read_text()
    program = load_program(str(traced), max_batch=3, max_context=64).program
    assert (program.symbols["B"].hi, program.symbols["P"].hi) == (3, 64)


FILES = {
    "raises in build": (
        "def build(config):\n    raise ValueError('oops')\n",
        "ValueError: oops",
        2,
    ),
    "build takes nothing": ("def build(): pass\n", "takes 0 positional arguments", 0),
    "build returns no module": ("def build(config): return 1\n", "returned int, not a module", 0),
    "raises when imported": ("x = 1\nimport not_there\n", "No module named 'not_there'", 2),
    "a forward of another kind": (
        "import torch\ndef build(config): return torch.nn.Linear(2, 2)\n",
        "forward of Linear does not take input_ids",
        0,
    ),
    "raises in forward": (
        "import torch\nclass M(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.w = torch.nn.Linear(2, 2)\n"
        "    def forward(self, input_ids, positions, lengths, logits_at, *past):\n"
        "        return self.nope\n"
        "def build(config): return M()\n",
        "no attribute 'nope'",
        7,
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_users_own_file_is_blamed_with_its_line(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words, line = FILES[what]
    path = tmp_path / "own.py"
    path.write_text(text)
    code, error = run(capsys, "compile", str(path), "--backend", "reference", "--weights", "none")
    assert code == 2, error
    assert words in error
    assert (f"own.py:{line}\n" if line else "own.py\n") in error
    assert "Traceback" not in error


def test_parameters_that_the_weights_are_not_for_are_told_before_tracing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(FILES["raises in forward"][0])
    refused(capsys, path, "missing tensors (2):", "w.weight", "unexpected tensors (201):")


def test_a_word_that_an_option_does_not_take_is_told_as_we_would(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, error = run(capsys, "export", "m", "--quant", "int3")
    assert code == 2
    assert "Invalid value for '--quant': 'int3' is not one of 'none'" in error


def test_no_model_is_compiled_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "generate", "./no-model", "--prompt", "x")
    assert code == 2
    assert "no model at './no-model'" in error
    assert "compiling" not in error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder where nothing can be made")
def test_a_place_where_nothing_can_be_made_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "export", "small.dsc", "-o", "/proc/x")
    assert code == 2
    assert "nothing can be made here\n  where:  /proc/x\n  to do:  give another path" in error


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("compile small.dsc --weights folder", "a text is whole"),
        ("compile small.dsc --config tiny", "a text is whole"),
        ("compile small.dsc --dtype fp16", "element types of its own"),
        ("compile small.dsc --fallback nonsense", "unknown backend 'nonsense'"),
        ("compile made", "this is an artifact"),
        ("bisect made", "this is an artifact"),
        ("inspect made --config tiny --backend tvm", "--config, --backend: for models"),
        ("inspect made --kernels --entry decode", "kernels are of all entries"),
        ("export small.dsc --check", "check reads the weights too"),
        ("export small.dsc --format relax --opset 23", "are for ONNX"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FP8.parent / "small_lm.dsc", "small.dsc")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "dsc.json").write_text("{}")
    code, error = run(capsys, *line.split())
    assert code == 2, error
    assert words in error
    assert "Traceback" not in error
