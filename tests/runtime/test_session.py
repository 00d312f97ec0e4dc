"""Sessions over a hand-written language model: chunks, ragged batches, entries, errors."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import dsc
from dsc.errors import MemoryLimitError, UsageError
from dsc.ir.interface import Guard
from dsc.ir.limits import Limits
from dsc.ir.parser import parse_program
from dsc.ir.program import Program
from dsc.ir.weights import random_source, sources
from dsc.runtime.session import Session

TEXT = (Path(__file__).resolve().parent.parent / "data" / "small_lm.dsc").read_text()
BACKENDS = ["reference", "onnxruntime", "tvm"]


def small_lm() -> Program:
    """One MLA layer over a vocabulary of 9, seeded weights."""
    program = parse_program(TEXT)
    keys = {s.key: s.type for e in program.weights.values() for s in sources(e)}
    return parse_program(TEXT, random_source(keys))


@pytest.fixture(scope="module", params=BACKENDS)
def compiled(request: pytest.FixtureRequest) -> dsc.CompiledModel:
    return dsc.compile(
        small_lm(), backend=request.param, max_batch=4, max_context=32, prefill_chunk=8
    )


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(1))


def test_chunks_equal_the_whole(compiled: dsc.CompiledModel) -> None:
    tokens = ids(2, 21)
    whole = compiled.session().prefill(tokens, all_logits=True)
    assert whole.shape == (2, 21, 9)
    session = compiled.session()
    parts = [
        session.prefill(tokens[:, a:b], all_logits=True) for a, b in [(0, 3), (3, 11), (11, 21)]
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)


def test_a_ragged_batch_equals_its_rows(compiled: dsc.CompiledModel) -> None:
    tokens, lengths = ids(4, 13), [3, 13, 1, 9]
    session = compiled.session()
    together = [session.prefill(tokens, lengths=lengths)]
    together += [session.decode(torch.tensor([1, 2, 3, 4])) for _ in range(3)]
    assert session.lengths == [6, 16, 4, 12]
    for row, n in enumerate(lengths):
        alone = compiled.session()
        apart = [alone.prefill(tokens[row, :n])] + [alone.decode([row + 1]) for _ in range(3)]
        for ours, theirs in zip(together, apart, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-5)


def test_decode_equals_prefill(compiled: dsc.CompiledModel) -> None:
    tokens = ids(1, 12)
    whole = compiled.session().prefill(tokens, all_logits=True)[0]
    session = compiled.session()
    rows = [session.prefill(tokens[:, :1])] + [session.decode(tokens[:, i]) for i in range(1, 12)]
    torch.testing.assert_close(torch.cat(rows), whole, rtol=0, atol=1e-5)


def test_what_goes_in_says_what_comes_out(compiled: dsc.CompiledModel) -> None:
    session = compiled.session()
    assert isinstance(session.prefill(np.zeros((1, 3), dtype=np.int64)), np.ndarray)
    assert isinstance(session.decode(torch.tensor([1])), torch.Tensor)
    assert isinstance(session.decode([1]), torch.Tensor), "a list is answered as before"
    assert isinstance(session.decode(Spoken(torch.tensor([1]))), np.ndarray)
    assert session.decode(np.array([[2]])).shape == (1, 9)
    assert isinstance(session.decode([1]), np.ndarray)


class Spoken:
    """An array of another library, which speaks DLPack."""

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    def __dlpack__(self, **asked: Any) -> object:
        return self.held.__dlpack__(**asked)

    def __dlpack_device__(self) -> Any:
        return self.held.__dlpack_device__()


def test_reset_forgets(compiled: dsc.CompiledModel) -> None:
    session = compiled.session()
    first = session.prefill(ids(1, 5))
    session.decode([1])
    session.reset()
    assert session.lengths == []
    torch.testing.assert_close(session.prefill(ids(1, 5)), first, rtol=0, atol=0)


def test_a_prompt_of_which_a_chunk_fails_can_be_given_again(
    compiled: dsc.CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a card has no room for it: sequences are as they were, with their logits."""
    session, tokens, lengths = compiled.session(), ids(2, 25), [21, 12]
    session.prefill(tokens[:, :4])
    before = session.logits(0)
    run, failures = session._steps._call, [False, False, True]

    def call(*step: Any) -> Any:
        if failures.pop(0):
            raise MemoryLimitError("full")
        return run(*step)

    with monkeypatch.context() as patched:
        patched.setattr(session._steps, "_call", call)
        with pytest.raises(MemoryLimitError, match="full"):
            session.prefill(tokens[:, 4:], lengths)
    assert not failures
    assert session.lengths == [4, 4]
    assert torch.equal(session.logits(0), before)
    found = session.prefill(tokens[:, 4:], lengths)
    whole = compiled.session().prefill(tokens, [25, 16])
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_the_context_can_be_filled_and_not_passed(compiled: dsc.CompiledModel) -> None:
    session = compiled.session(max_context=10)
    session.prefill(ids(1, 9))
    session.decode([1])
    with pytest.raises(UsageError, match="max_context is 10"):
        session.decode([1])
    assert session.lengths == [10]


def test_entries_are_opened_that_the_steps_to_come_run(compiled: dsc.CompiledModel) -> None:
    """Guards may tell steps apart by their sequences and by what these have behind them."""

    class Opens:
        opened: ClassVar[set[str]] = set()

        def open(self, entry: str) -> None:
            self.opened.add(entry)

    guards = (Guard("extend", batch=1, context=6), Guard("prefill", context=9), Guard("decode"))
    program = compiled.program.declaring(guards=guards)
    executable: Any = Opens()
    session = Session(executable, program, max_context=8)
    session.prepare([3])
    assert executable.opened == {"extend", "prefill"}
    session = Session(executable, program, max_context=16)
    session.prepare([3])
    assert executable.opened == {"extend", "prefill", "decode"}


@pytest.mark.parametrize(
    ("guards", "prompts", "opened"),
    [
        # A chunk is 8: 8 tokens are one, 11 are 8 and 3. Decode steps have one token.
        ([Guard("decode", step=1), Guard("extend", step=3)], [3], "decode extend"),
        ([Guard("decode", step=1), Guard("extend", step=3)], [8], "decode prefill"),
        ([Guard("decode", step=1), Guard("extend", step=3)], [11], "decode extend prefill"),
        # The first decode step after a prompt of 3 sees 4 tokens, the last one all 16.
        ([Guard("decode", step=1, context=4), Guard("extend", step=1)], [3],
         "decode extend prefill"),
        ([Guard("decode", step=1, context=3), Guard("extend", step=1)], [3], "extend prefill"),
        # A chunk sees the tokens before it as well, and not those that come after.
        ([Guard("decode", step=1), Guard("extend", context=8)], [16], "decode extend prefill"),
        ([Guard("decode", step=1), Guard("extend", context=7)], [16], "decode prefill"),
        # Sequences run one by one or all together.
        ([Guard("decode", batch=1), Guard("extend", batch=2)], [3, 3], "decode extend"),
        ([Guard("decode", batch=1), Guard("extend", batch=2)], [3, 3, 3], "decode prefill"),
    ],
)  # fmt: skip
def test_steps_to_come_are_those_of_the_chunks_and_of_decoding(
    guards: list[Guard], prompts: list[int], opened: str
) -> None:
    found = []

    class Opens:
        def open(self, entry: str) -> None:
            found.append(entry)

    limits = Limits(4, 16, 8)
    program = null_model().program.declaring(guards=(*guards, Guard("prefill")), limits=limits)
    executable: Any = Opens()
    Session(executable, program, max_context=16).prepare(prompts)
    assert sorted(found) == opened.split()


def test_the_guard_table_chooses(compiled: dsc.CompiledModel) -> None:
    limit = {g.entry: g.step for g in compiled.program.guards}["extend"]
    assert limit == 4  # 6 * (2 + 3) // (2 * 6 - 2 - 3)
    names = [compiled.program.choose_entry(n, 1, n) for n in (1, 2, limit, limit + 1)]
    assert names == ["decode", "extend", "extend", "prefill"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.decode([1]), "decode before prefill"),
        (lambda s: s.prefill([[]]), "an empty prompt"),
        (lambda s: s.prefill([[9]]), "vocabulary of 9"),
        (lambda s: s.prefill([[-1]]), "vocabulary of 9"),
        (lambda s: s.prefill([[0.5]]), "int64"),
        (lambda s: s.prefill(torch.zeros(5, 2, dtype=torch.int64)), "a batch of 5"),
        (lambda s: s.prefill([[1, 2]], lengths=[3]), "lengths"),
        (lambda s: s.prefill([[1, 2]], lengths=[0]), "lengths"),
        (lambda s: s.prefill([[1, 2]], lengths=[1, 2]), "lengths"),
        (lambda s: s.prefill(torch.zeros(1, 33, dtype=torch.int64)), "max_context is 32"),
        (lambda s: (s.prefill([[1]]), s.prefill([[1], [2]])), "2 sequences"),
        (lambda s: (s.prefill([[1]]), s.decode([1, 2])), "next_ids"),
    ],
)
def test_mistakes_are_told(call: object, words: str) -> None:
    assert callable(call)
    compiled = dsc.compile(small_lm(), backend="null", max_context=32)
    with pytest.raises(UsageError, match=words):
        call(compiled.session())


WRONG_IDS = {
    "nothing": None,
    "a text": "abc",
    "one number": 3,
    "a generator": (i for i in (1, 2)),
    "too large": [2**70],
    "beyond int64": [2**63],
    "true": [True, False],
    "true among numbers": [True, 2, 3],
    "a true row": [[1, 2], [3, np.True_]],
    "rows of two lengths": [[1, 2], [3]],
    "halves": torch.tensor([0.5]),
    "objects": np.array([1, 2], dtype=object),
    "another order of bytes": np.array([1, 2], dtype=">i8"),
    "no values": torch.zeros(1, 2, dtype=torch.int64, device="meta"),
    "only some values": torch.eye(2, dtype=torch.int64).to_sparse(),
    "too many axes": np.zeros((1, 1, 1), dtype=np.int64),
}


@pytest.mark.parametrize("given", WRONG_IDS)
def test_ids_that_are_no_numbers_are_told_in_words(given: str) -> None:
    session = null_session()
    for call in (session.add, session.prefill):
        with pytest.raises(UsageError, match="ids must be int64"):
            call(WRONG_IDS[given])
    session.add([1])
    with pytest.raises(UsageError, match="ids must be int64"):
        session.decode(WRONG_IDS[given])
    assert session.lengths == [1]


@pytest.mark.parametrize(
    "lengths",
    [[1.5, 2], [True, True], "ab", 2, [[1, 2]], [2**70, 1], [1, None], [1], [True, 2]],
    ids=str,
)
def test_lengths_that_are_no_numbers_are_told_in_words(lengths: object) -> None:
    session = null_session()
    with pytest.raises(UsageError, match="lengths"):
        session.prefill([[1, 2], [3, 4]], lengths=lengths)  # type: ignore[arg-type]
    assert session.lengths == []


def test_arrays_of_any_order_in_memory_are_taken(compiled: dsc.CompiledModel) -> None:
    array = np.arange(8).reshape(2, 4)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for view in (array[:, ::-1], array.T[:, :2].T, array[:, ::2], array.astype(np.int32)):
            found = compiled.session().prefill(view)
            wanted = compiled.session().prefill(np.array(view, dtype=np.int64, order="C"))
            np.testing.assert_array_equal(found, wanted)


@cache
def null_model() -> dsc.CompiledModel:
    """A model whose runs give zeros."""
    return dsc.compile(small_lm(), backend="null", max_context=32)


def null_session() -> Session:
    """A session of four sequences."""
    return null_model().session()


@pytest.mark.parametrize("option", ["max_batch", "max_context"])
@pytest.mark.parametrize("given", [1.5, True, "2"])
def test_a_limit_is_a_whole_number(option: str, given: object) -> None:
    with pytest.raises(UsageError, match=f"{option} is {given!r}\n.*give a whole number"):
        null_model().session(**{option: given})  # type: ignore[arg-type]


def test_a_session_must_fit_what_was_compiled() -> None:
    compiled = dsc.compile(small_lm(), backend="null", max_context=32)
    for batch, context in ((9, None), (None, 4000), (0, None), (None, 0)):
        with pytest.raises(UsageError, match="compiled for"):
            compiled.session(max_batch=batch, max_context=context)


@pytest.mark.parametrize("backend", ["null", "reference"])
def test_the_limit_is_what_was_compiled_for_whatever_the_chunk(backend: str) -> None:
    """Caches written in place have rows for a chunk's padding, which are nobody's context."""
    compiled = dsc.compile(small_lm(), backend=backend, max_context=32, prefill_chunk=8)
    assert compiled.session(max_context=32).max_context == 32
    for beyond in (33, 40):
        with pytest.raises(UsageError, match=f"max_context is {beyond}.*\n.*for 1 to 32"):
            compiled.session(max_context=beyond)
    with pytest.raises(UsageError, match="33 tokens, max_context is 32") as told:
        compiled.session().prefill([[0] * 33])
    assert told.value.hint == "give fewer tokens, or compile the model with a larger max_context"
    with pytest.raises(UsageError, match="11 tokens") as told:
        compiled.session(max_context=10).prefill([[0] * 11])
    assert told.value.hint is not None
    assert "open the session with a larger max_context: the model takes up to 32" in told.value.hint


@pytest.mark.parametrize("backend", ["null", "reference"])
def test_the_limits_are_the_programs_whoever_opens_the_session(
    backend: str, tmp_path: Path
) -> None:
    compiled = dsc.compile(
        small_lm(), backend=backend, max_batch=2, max_context=32, prefill_chunk=8
    )
    opened = dsc.load(compiled.save(tmp_path / "out"), trust=True)
    for model in (compiled, opened):
        made = dsc.Session(model.executable, model.program)
        assert (made.max_batch, made.max_context, made.prefill_chunk) == (1, 32, 8)
        assert dsc.Session(model.executable, model.program, 2, 32, 4).prefill_chunk == 4
        for batch, context in ((1, 33), (3, 32)):
            with pytest.raises(UsageError, match="compiled for"):
                dsc.Session(model.executable, model.program, batch, context)
        for chunk in (0, -4, 9, 2.0):
            with pytest.raises(UsageError, match="prefill_chunk is"):
                dsc.Session(model.executable, model.program, 2, 32, chunk)  # type: ignore[arg-type]
    assert opened.program.limits == Limits(2, 32, 8)
    assert opened.manifest["limits"] == asdict(opened.program.limits)
