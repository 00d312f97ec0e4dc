"""Declared states: a session keeps rings and fixed states, and sets them back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsc
from dsc.errors import ParseError, UnsupportedOperator, UsageError, VerificationError
from dsc.ir.graph import Value
from dsc.ir.interface import Guard, Interface, State, Storage, updates
from dsc.ir.parser import parse_graph, parse_operands, parse_program
from dsc.ir.printer import print_program
from dsc.ir.program import Program
from dsc.ir.verifier import verify
from dsc.ir.weights import random_source, sources
from dsc.runtime.session import Session

WINDOW, CHUNK, ROWS = 6, 4, 10
TEXT = """
program "sums" {stage=CANONICAL}
interface {
  limits {max_batch=3, max_context=64, prefill_chunk=4}
  state %past.sum as "present.sum" : f32[8] {storage="fixed"}
  state %past.window as "present.window" : f32[8] {storage="ring", rows=10}
}
symbols {B=[1,3], L=[1,4], S=[1,4]}
weights {
  @embed : f32[20,8] = source "embed" : f32[20,8]
  @head : f32[20,8] = source "head" : f32[20,8]
}
graph step(%input_ids: i64[B,S], %positions: i64[B,S], %lengths: i64[B], %logits_at: i64[B,L],
  %new: i64[B], %past.sum: f32[B,8], %past.window: f32[B,10,8]) {
  %x = embedding %input_ids, @embed
  %i = arange {start=0, end=S, dtype=i64}
  %count = reshape %new {shape=[B,1]}
  %is_new = lt %i, %count
  %weight = cast %is_new {dtype=f32}
  %weight3 = reshape %weight {shape=[B,S,1]}
  %own = mul %x, %weight3
  %so_far = cumsum %own {axis=1}
  %before = reshape %past.sum {shape=[B,1,8]}
  %sums = add %so_far, %before
  %all = sum %own {axes=[1]}
  %present.sum = add %past.sum, %all
  %rows = full {shape=[], value=10, dtype=i64}
  %row = arange {start=0, end=10, dtype=i64}
  %at = remainder %positions, %rows
  %at3 = reshape %at {shape=[B,S,1]}
  %hit = eq %at3, %row
  %hits = cast %hit {dtype=f32}
  %written = einsum %hits, %x {eq="bsr,bsd->brd"}
  %one = full {shape=[], value=1.0, dtype=f32}
  %any = amax %hits {axes=[1]}
  %left = sub %one, %any
  %left3 = reshape %left {shape=[B,10,1]}
  %stays = mul %past.window, %left3
  %present.window = add %stays, %written
  %position3 = reshape %positions {shape=[B,S,1]}
  %apart = sub %position3, %row
  %age = remainder %apart, %rows
  %window = full {shape=[], value=6, dtype=i64}
  %near = lt %age, %window
  %one_more = full {shape=[], value=1, dtype=i64}
  %end = add %position3, %one_more
  %there = lt %age, %end
  %seen = logical_and %near, %there
  %share = cast %seen {dtype=f32}
  %latest = einsum %share, %present.window {eq="bsr,brd->bsd"}
  %both = add %sums, %latest
  %wanted = select_rows %both, %logits_at
  %logits = linear %wanted, @head
  return %logits, %present.sum updates %past.sum, %present.window updates %past.window
}
"""


def program() -> Program:
    read = parse_program(TEXT)
    types = {s.key: s.type for e in read.weights.values() for s in sources(e)}
    return replace(read, source=random_source(types))


def session(count: int = 3) -> Session:
    model = dsc.compile(program(), backend="reference", max_batch=3, max_context=64)
    return model.session(count)


def expected(ids: torch.Tensor) -> torch.Tensor:
    """Logits after each token: of the sum of all so far and that of the latest six."""
    read = program()
    x = read.source.load("embed")[ids]
    latest = torch.stack([x[max(0, i + 1 - WINDOW) : i + 1].sum(0) for i in range(len(ids))])
    return (x.cumsum(0) + latest) @ read.source.load("head").T


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(length))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_padding_touches_neither_a_ring_nor_a_fixed_state() -> None:
    """A ragged prompt in chunks of 4, then steps of one: each sequence is as if alone."""
    ids, lengths = tokens(3, 23), [11, 3, 9]
    held = session()
    logits = held.prefill(ids[:, :11], lengths=lengths)
    for step in range(12):
        for row, length in enumerate(lengths):
            assert close(logits[row], expected(ids[row, : length + step])[-1])
        if step < 11:
            following = torch.stack([ids[r, n + step] for r, n in enumerate(lengths)])
            logits = held.decode(following)


def test_a_row_of_a_state_may_be_in_blocks_along_it() -> None:
    ((t, _),), _ = parse_operands("f8e4m3{1x128,f32}[B,C,512]")
    state = State.of(Value("past", t), "present", Storage.CONTIGUOUS)
    assert str(state.type) == "f8e4m3{1x128,f32}[512]"
    assert state.nbytes == 512 + 4 * 4
    ((t, _),), _ = parse_operands("f8e4m3{2x128,f32}[B,C,512]")
    with pytest.raises(ValueError, match="no stored format of f8e4m3 codes along 1 axes"):
        State.of(Value("past", t), "present", Storage.CONTIGUOUS)


def test_sequences_come_and_go_with_their_states() -> None:
    ids = tokens(4, 9)
    held = session()
    first, second, third = (held.add(ids[row, : 5 + row]) for row in range(3))
    held.decode({third: int(ids[2, 7])})  # the others wait
    held.remove(first)
    fourth = held.add(ids[3])
    assert held.sequences == [third, second, fourth]
    logits = held.decode({second: int(ids[1, 6]), third: int(ids[2, 8]), fourth: 5})
    assert close(logits[second], expected(ids[1, :7])[-1])
    assert close(logits[third], expected(ids[2])[-1])
    assert close(logits[fourth], expected(torch.cat([ids[3], torch.tensor([5])]))[-1])


def test_a_snapshot_restored_is_as_if_the_suffix_had_never_been() -> None:
    ids = tokens(2, 30)
    held, alone = session(), session()
    names = [held.add(ids[0, :13]), held.add(ids[1, :6])]
    snapshot = held.snapshot(names[0])
    for i in range(13, 30):  # past a whole turn of the ring
        held.decode({names[0]: int(ids[0, i])})
    held.restore(snapshot)
    alone.add(ids[0, :13])
    alone.add(ids[1, :6])
    assert held.lengths == alone.lengths == [13, 6]
    assert torch.equal(held.decode([3, 4]), alone.decode([3, 4]))


def test_a_snapshot_of_tokens_that_were_replaced_is_refused() -> None:
    """As many tokens as then are there again, but they are others."""
    held = session()
    name = held.add(tokens(1, 5)[0])
    early = held.snapshot(name)
    held.decode({name: 3})
    late = held.snapshot(name)
    held.decode({name: 4})
    held.restore(late)
    held.restore(early)
    for token in (7, 8, 9):
        held.decode({name: token})
    with pytest.raises(UsageError, match=r"6 tokens for a sequence that was cut to 5"):
        held.restore(late)
    held.restore(early)
    assert held.lengths == [5]


def test_a_snapshot_of_another_session_is_refused() -> None:
    """Both have a sequence 0, and this one more tokens than the other had."""
    held, other = session(), session()
    name = held.add(tokens(1, 5)[0])
    assert other.add(tokens(1, 9)[0]) == name
    with pytest.raises(UsageError, match="a snapshot of another session"):
        other.restore(held.snapshot(name))
    assert other.lengths == [9]


def test_what_cannot_be_cut_says_so() -> None:
    held = session()
    name = held.add(tokens(1, 5)[0])
    with pytest.raises(UsageError, match=r"past.sum, past.window cannot be cut") as refused:
        held.truncate(name, 3)
    assert "session.snapshot" in (refused.value.hint or "")
    snapshot = held.snapshot(name)
    held.remove(name)
    with pytest.raises(UsageError, match="no sequence 0"):
        held.restore(snapshot)


@pytest.mark.parametrize("backend", ["onnxruntime", "triton", "tvm"])
def test_a_backend_that_holds_no_such_state_says_so(backend: str) -> None:
    pytest.importorskip({"triton": "triton", "tvm": "tvm", "onnxruntime": "onnx"}[backend])
    with pytest.raises(UnsupportedOperator, match=r"holds no such states as past.sum \(fixed\)"):
        dsc.compile(program(), backend=backend)


def test_the_interface_reads_back_as_it_was_printed() -> None:
    declared = program().declaring(guards=(Guard("step", 4, batch=2, context=9), Guard("other")))
    text = print_program(declared)
    assert parse_program(text).interface == declared.interface
    assert print_program(parse_program(text)) == text


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('"fixed"', '"heap"', "storage is one of grown, contiguous, paged, ring, fixed"),
        ("max_batch=3", "batch=3", "unexpected keyword argument 'batch'"),
        ("max_batch=3", "max_batch=B", "max_batch is no number"),
        ("limits {", "bounds {", "limits, mesh, guard or state expected, bounds found"),
    ],
)
def test_a_damaged_interface_is_refused_where_it_stands(old: str, new: str, what: str) -> None:
    with pytest.raises(ParseError, match=what) as refused:
        parse_program(TEXT.replace(old, new, 1))
    assert "line" in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('f32[8] {storage="fixed"}', 'f32[9] {storage="fixed"}'),
        ("rows=10", "rows=11"),
        ('as "present.sum"', 'as "present.window"'),
        ('  state %past.sum as "present.sum" : f32[8] {storage="fixed"}\n', ""),
    ],
)
def test_states_are_what_the_entries_update(old: str, new: str) -> None:
    assert old in TEXT
    with pytest.raises(VerificationError, match="is not declared as this state"):
        verify(parse_program(TEXT.replace(old, new, 1)))


def test_a_guard_admits_by_step_batch_and_context() -> None:
    guard = Guard("decode", step=1, batch=2, context=100)
    assert guard.admits(1, 2, 100)
    assert not any(guard.admits(*step) for step in ((2, 1, 5), (1, 3, 5), (1, 1, 101)))
    chosen = program().declaring(guards=(Guard("few", 1), Guard("step")))
    assert [chosen.choose_entry(n, 1, 0) for n in (1, 2)] == ["step", "step"], "few is no entry"


def test_updates_that_nobody_declared_are_states_where_they_can_only_be_of_tokens() -> None:
    text = """graph g(%c: f32[B,C,8], %p: f32[B,P,8], %x: f32[B,S,8], %r: f32[B,10,8],
      %s: f32[B,8]) {
      %a = neg %c
      %b = concat %p, %x {axis=1}
      %d = neg %r
      %e = neg %s
      return %a updates %c, %b updates %p, %d updates %r, %e updates %s
    }"""
    found = {s.input: s.storage for s in updates(parse_graph(text))}
    assert found == {"c": Storage.CONTIGUOUS, "p": Storage.GROWN}


def test_an_update_of_a_step_that_is_no_state_is_to_be_declared() -> None:
    declared = program().states
    assert [s.storage for s in declared] == [Storage.FIXED, Storage.RING]
    assert declared[1] == State("past.window", "present.window", declared[0].type, Storage.RING, 10)
    undeclared = replace(program(), interface=Interface())
    assert not undeclared.states
    with pytest.raises(VerificationError, match=r"past\.sum.*declare the state"):
        verify(undeclared)
