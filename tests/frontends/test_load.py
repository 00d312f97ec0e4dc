"""Whatever can be named as a model; traces that are kept between runs."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsc import kept
from dsc.errors import ConfigError, UsageError
from dsc.frontends import load, python_file, self_check, trace_cache
from dsc.frontends.causal_lm import CausalLMStep
from dsc.frontends.conversion_steps import Join, Stack
from dsc.frontends.conversions import Conversions, Converter
from dsc.frontends.family import load_config
from dsc.frontends.huggingface import stock_causal_lm
from dsc.frontends.load import Asked, load_program
from dsc.frontends.stock import clean
from dsc.ir.limits import Limits
from dsc.ir.op import type_of
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import DictSource, Source, evaluate
from dsc.models.configs import TINY_CHECKPOINT
from tests.family import small
from tests.runtime.test_session import small_lm

KEY = {"config": {"a": 1}, "versions": {"torch": "2"}}
PARAMETERS = {"head": TensorType(DType.bf16, (3, 2))}


def trace() -> trace_cache.Trace:
    """A program with one constant."""
    source = DictSource({"inv": torch.tensor([1.0, 0.5])})
    stack = Converter(r"(?P<g0>a.*b$)", ("ab",), sources=("a.*.b",), steps=(Stack(0), Join(1)))
    table = Conversions(converters=(stack,), tied={"head": "embed"})
    return trace_cache.Trace(replace(small_lm(), source=source), PARAMETERS, conversions=table)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry in a cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trace_cache.store(KEY, trace())
    (entry,) = (tmp_path / "dsc" / trace_cache.KIND).iterdir()
    return entry


def test_a_kept_trace_comes_back(cached: Path) -> None:
    found = trace_cache.load(KEY)
    assert found is not None
    program = found.program
    assert print_program(program) == print_program(small_lm())
    assert found.parameters == PARAMETERS
    assert found.conversions == trace().conversions
    assert evaluate(program.weights["inv"], program.source).tolist() == [1.0, 0.5]
    with pytest.raises(KeyError):
        evaluate(program.weights["head"], program.source)


@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.zeros(0, 3), torch.ones(2).bfloat16()])
def test_a_constant_comes_back_bit_for_bit(cached: Path, value: torch.Tensor) -> None:
    program = small_lm()
    weights = {**program.weights, "c": Source("c", type_of(value))}
    program = replace(program, weights=weights, source=DictSource({"c": value}))
    trace_cache.store({"another": 1}, trace_cache.Trace(program, {}))
    found = trace_cache.load({"another": 1})
    assert found is not None
    assert torch.equal(found.program.source.load("c"), value)


@pytest.mark.parametrize("entry", ["", "{}", "[" * 4000, '{"sources": {}, "program": "x"}'])
def test_a_damaged_entry_misses(cached: Path, entry: str) -> None:
    kept.put(trace_cache.KIND, KEY, entry.encode())
    assert trace_cache.load(KEY) is None
    cached.write_bytes(cached.read_bytes()[:-1])
    assert trace_cache.load(KEY) is None


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `alien` that a trace of it was kept of, and that nobody has imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path / "site")
    package = tmp_path / "site" / "alien"
    package.mkdir(parents=True)
    for name, text in (("__init__", "from alien import part"), ("part", "x = 1"), ("other", "")):
        (package / f"{name}.py").write_text(text)
        os.utime(package / f"{name}.py", (1, 1))
    key = trace_cache.key_of_installed("alien")
    assert key is not None
    importlib.import_module("alien")
    assert trace_cache.key_of_installed("alien") is None  # it may have been changed in memory
    trace_cache.store(key, trace())
    forget_alien()
    assert trace_cache.load(key) is not None
    yield package
    forget_alien()


def forget_alien() -> None:
    for name in ("alien", "alien.part"):
        sys.modules.pop(name, None)


def test_installed_code_that_was_edited_is_traced_anew(installed: Path) -> None:
    key = trace_cache.key_of_installed("alien", config="c")
    assert key is not None
    (installed / "other.py").write_text("y = 1")  # was never imported
    key = trace_cache.key_of_installed("alien")
    assert key is not None
    assert trace_cache.load(key) is not None
    (installed / "part.py").write_text("x = 2")
    assert trace_cache.load(key) is None
    importlib.import_module("alien")
    trace_cache.store(key, trace())  # when was it edited: before it was read, or since?
    assert trace_cache.load(key) is None
    (installed / "part.py").write_text("x = 1")
    assert trace_cache.load(key) is not None
    (installed / "part.py").unlink()
    assert trace_cache.load(key) is None


@contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_key_of_installed_code_has_every_ingredient(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = trace_cache.key_of_installed("alien", config="c")
    assert key == trace_cache.key_of_installed("alien", config="c")
    assert key != trace_cache.key_of_installed("alien", config="d")
    (installed.parent / "torch-99.dist-info").mkdir()
    with_package = trace_cache.key_of_installed("alien", config="c")
    assert with_package != key
    monkeypatch.setattr(kept, "sources", lambda *folders: "edited")
    with_edit = trace_cache.key_of_installed("alien", config="c")
    assert with_edit != with_package
    shutil.copytree(installed, installed.parent / "first" / "alien")
    monkeypatch.syspath_prepend(installed.parent / "first")
    moved = trace_cache.key_of_installed("alien", config="c")
    assert moved != with_edit
    for state in (torch.autocast("cpu", torch.bfloat16), torch.device("meta"), in_double()):
        with state:
            assert trace_cache.key_of_installed("alien", config="c") != moved
    assert trace_cache.key_of_installed("alien", config="c") == moved
    monkeypatch.setattr(sys, "version", "4.0")
    found = trace_cache.key_of_installed("alien", config="c")
    assert found is not None
    assert found["python"] == "4.0"


@pytest.mark.parametrize(
    ("model", "code"), [(TINY_CHECKPOINT, "transformers"), ("v3", "dsc.models.v3")]
)
def test_a_kept_trace_needs_neither_torch_nor_the_modelling_code(
    model: str | Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept with a program that stands in for it, and read by another process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = load_config(TINY_CHECKPOINT)
    module = CausalLMStep(stock_causal_lm(config, DType.bf16))
    known = clean(config.model_dump())
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, code)
        step = load._Step(lambda: module, known, DType.bf16, Asked(1, 64, 8), code)
        verdict = trace_cache.key_of_installed(code, config=known.described)
    assert step.key is not None
    assert step.kept is None
    self_check._keep(verdict, self_check.Verdict())
    stand_in = replace(small_lm(), source=DictSource({}))
    kept_of = trace_cache.Trace(stand_in, step.parameters, conversions=step.conversions)
    trace_cache.store(step.key, kept_of)
    reader = (
        "import sys; from dsc.frontends.load import load_program;"
        f" program = load_program({str(model)!r}, max_context=64).program;"
        " names = {'torch', 'transformers', 'dsc.models.v3', 'dsc.frontends.causal_lm'};"
        " print(len(program.weights), program.limits.max_context, names & {*sys.modules})"
    )
    told = subprocess.run([sys.executable, "-c", reader], stdout=subprocess.PIPE, check=True)
    assert told.stdout.decode() == f"{len(small_lm().weights)} 64 set()\n"


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    trace_cache.store(KEY, trace())
    assert trace_cache.load(KEY) is None


def test_the_key_tells_of_every_source(hashed_sources: Callable[[], set[str]]) -> None:
    key = trace_cache.key_of(nn.Sequential(nn.Linear(2, 2)), dtype="f32")
    assert key is not None
    assert any(f.endswith("linear.py") for f in key["module"]["sources"])
    files = hashed_sources()
    assert {"frontends/torch_export.py", "ir/ops/traced.py", "ir/parser.py"} <= files
    assert any(name.startswith("torch-") for name in key["packages"])


CHANGES: dict[str, Callable[[Any], None]] = {
    "an attribute": lambda m: setattr(m.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "a nested value": lambda m: m.model.config.rope_parameters.update(factor=9.0),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(2),
    "a method": lambda m: setattr(m.model.norm, "forward", lambda x: x),
    "a class": lambda m: setattr(m.model, "norm", nn.Identity()),
    "a parameter's type": lambda m: m.lm_head.to(torch.float16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_module_that_was_changed_has_another_key(change: Callable[[Any], None]) -> None:
    """The configuration that a trace is asked for stays the same all along."""
    first, same, changed = (CausalLMStep(stock_causal_lm(small())) for _ in range(3))
    change(changed)
    key = trace_cache.key_of(first, config="c")
    assert key is not None
    assert trace_cache.key_of(same, config="c") == key
    assert trace_cache.key_of(changed, config="c") != key


NET = """
import functools, torch
SCALE = 1.0
NOBODYS = None
def twice(x):
    return 2 * x
class Base(torch.nn.Module):
    gain = 1.0
    def part(self, x):
        return x + 1
class Net(Base):
    def forward(self, x):
        return twice(self.part(x)) * SCALE * self.gain
class Power:
    __slots__ = ("value",)
    def __init__(self, value):
        self.value = value
    def of(self, x):
        return x ** self.value
def times(scale):
    return lambda x, scale=scale: x * scale
"""
IN_MEMORY: dict[str, Callable[[Any, Any], None]] = {
    "a global": lambda python, net: setattr(python, "SCALE", 2.0),
    "a function": lambda python, net: exec("def twice(x): return 3 * x", vars(python)),
    "a method of a base": lambda python, net: exec("Base.part = lambda self, x: x", vars(python)),
    "an attribute of a class": lambda python, net: setattr(python.Net, "gain", 2.0),
    "a partial function": lambda python, net: setattr(net, "act", functools.partial(round, 3)),
    "a default": lambda python, net: setattr(net, "act", python.times(3)),
    "a slot": lambda python, net: setattr(net, "act", python.Power(3)),
    "a bound method": lambda python, net: setattr(net, "act", python.Power(3).of),
}
BEFORE: dict[str, Callable[[Any, Any], None]] = {
    "a partial function": lambda python, net: setattr(net, "act", functools.partial(round, 2)),
    "a default": lambda python, net: setattr(net, "act", python.times(2)),
    "a slot": lambda python, net: setattr(net, "act", python.Power(2)),
    "a bound method": lambda python, net: setattr(net, "act", python.Power(2).of),
}


@pytest.mark.parametrize("changed", IN_MEMORY)
def test_code_that_was_changed_in_memory_has_another_key(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changed_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "changed_net", raising=False)
    python = importlib.import_module("changed_net")
    net, same = python.Net(), python.Net()
    for each in (net, same):
        BEFORE.get(changed, lambda *_: None)(python, each)
    key = trace_cache.key_of(net)
    vars(python)["NOBODYS"] = threading.Lock()  # no code names it
    assert key is not None
    assert trace_cache.key_of(same) == key
    IN_MEMORY[changed](python, net)
    assert trace_cache.key_of(net) not in (key, None)


def test_a_function_of_installed_code_that_was_replaced_makes_another_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modelling

    module = CausalLMStep(stock_causal_lm(small()))
    key = trace_cache.key_of(module)
    monkeypatch.setattr(modelling, "apply_rotary_pos_emb_interleave", lambda q, k, *_: (q, k))
    assert trace_cache.key_of(module) != key


def test_sources_that_a_model_imports_are_in_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "far_away.py").write_text("def twice(x):\n    return 2 * x\n")
    (tmp_path / "nearer.py").write_text("from far_away import twice\n")
    (tmp_path / "top.py").write_text(
        "import torch, nearer\nclass Net(torch.nn.Module):\n"
        "    def forward(self, x):\n        return nearer.twice(x)\n"
    )
    key = trace_cache.key_of(importlib.import_module("top").Net())
    assert key is not None
    assert {Path(f).name for f in key["module"]["sources"]} == {
        "far_away.py", "nearer.py", "top.py",
    }  # fmt: skip


def test_what_else_was_imported_is_no_part_of_a_key() -> None:
    """In a checkout dsc is no installed package, and each of its modules leads to others."""
    module = CausalLMStep(stock_causal_lm(small()))
    importlib.import_module("dsc.passes.fuse")
    importlib.import_module("dsc.frontends.dynamo")
    key = trace_cache.key_of(module)
    assert key is not None
    reached = {Path(f).name for f in key["module"]["sources"]}
    assert "causal_lm.py" in reached
    assert not reached & {"fuse.py", "dynamo.py", "pipeline.py", "api.py"}


def test_what_cannot_be_told_is_not_kept() -> None:
    module = nn.Identity()
    for value in (threading.Lock(), [nn.Identity()], (n for n in [1])):
        module.secret = value  # type: ignore[assignment]
        assert trace_cache.key_of(module) is None


def test_a_program_loads_as_it_is() -> None:
    program = small_lm()
    loaded = load_program(program).program
    assert loaded.limits == program.limits.within(Limits())
    assert loaded.declaring(limits=None) == program


def test_a_text_loads_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "lm.dsc"
    path.write_text(print_program(small_lm()))
    program: Program = load_program(path).program
    assert not program.has_weights
    assert not isinstance(program.source, DictSource)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "no build"), ("1 / 0", "ZeroDivisionError"), ("build = 3", "no build")],
)
def test_a_file_that_builds_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        load_program(path)


def test_options_that_contradict_the_model() -> None:
    with pytest.raises(UsageError, match=r"its own config\.json"):
        load_program(TINY_CHECKPOINT, config="tiny")
    with pytest.raises(UsageError, match="its own weights"):
        load_program(TINY_CHECKPOINT, weights="elsewhere")
    with pytest.raises(UsageError, match="comes without weights"):
        load_program("v3", config="16b")
    with pytest.raises(ConfigError, match="another configuration"):
        load_program("v3", config="16b", weights=TINY_CHECKPOINT)
    with pytest.raises(UsageError, match="cannot compile a Linear"):
        load_program(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no model at"):
        load_program("nowhere")


def test_a_context_beyond_the_models_positions_is_refused() -> None:
    """In the words of the option and of the key, before anything is traced; up to it is right."""
    config = load_config(TINY_CHECKPOINT)
    known = clean(config.model_dump())
    positions = config.max_position_embeddings
    with pytest.raises(UsageError, match=f"max_context {positions + 1} is beyond the model's"):
        load_program(TINY_CHECKPOINT, max_context=positions + 1)
    for asked in (None, positions):
        assert Asked(1, asked, 8).limits(known.facts).max_context == positions


def test_what_a_compile_needs_is_started_before_modelling_code_is_imported() -> None:
    told: list[bool] = []
    made: list[bool] = []

    def build() -> Any:
        made.append(bool(told))
        return CausalLMStep(stock_causal_lm(load_config(TINY_CHECKPOINT), DType.bf16))

    asked = Asked(1, 64, 8, untraced=lambda: told.append(True))
    config = clean(load_config(TINY_CHECKPOINT).model_dump())
    step = load._Step(build, config, DType.bf16, asked)
    assert step.module is step.module
    assert (told, made) == ([True], [True])


def test_an_error_is_blamed_on_the_last_line_of_the_file_that_it_passed(tmp_path: Path) -> None:
    """Also through a cause; with `only_its_lines` what the file has no part in stays as it is."""
    file = tmp_path / "own.py"
    text = "def own(f):\n    try:\n        f()\n    except KeyError as e:\n        raise e\n"
    scope: dict[str, Any] = {}
    exec(compile(text, str(file.resolve()), "exec"), scope)

    def fail() -> None:
        raise ValueError("no")

    def caused() -> None:
        try:
            scope["own"](fail)
        except ValueError as problem:
            raise RuntimeError("so") from problem

    for only in (False, True):
        for run, told in (
            (lambda: scope["own"](fail), "ValueError: no"),
            (caused, "RuntimeError: so"),
        ):
            with (
                pytest.raises(UsageError) as caught,
                python_file.blaming(file, only_its_lines=only),
            ):
                run()
            assert caught.value.what == f"the file fails when it is run: {told}"
            assert caught.value.where == f"{file}:3"
    with pytest.raises(ValueError, match="no"), python_file.blaming(file, only_its_lines=True):
        fail()
    with pytest.raises(UsageError) as caught, python_file.blaming(file):
        fail()
    assert caught.value.where == str(file)
    with pytest.raises(MemoryError), python_file.blaming(file):
        raise MemoryError
