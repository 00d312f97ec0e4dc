"""Kernels with faults that the interpreter, program after program, does not show.

Each computes y = 2 x over 64 numbers, 16 a program, or means to. `clean` and `last_arriver` do.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def clean(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2.0 * tl.load(x + at, mask=at < N), mask=at < N)


@triton.jit
def last_arriver(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Whoever comes last reads what all others have stored before they counted."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scratch + at, 2.0 * tl.load(x + at))
    came = tl.atomic_add(counter, 1)
    if came == tl.num_programs(0) - 1:
        every = tl.arange(0, N)
        tl.store(y + every, tl.load(scratch + every))


@triton.jit
def overlap(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Each program also stores the first number of the next one's, the same as that one would."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, 2 * BLOCK)
    keep = (at < N) & (at <= (tl.program_id(0) + 1) * BLOCK)
    tl.store(y + at, 2.0 * tl.load(x + at, mask=keep), mask=keep)


@triton.jit
def race(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes what the one before it has stored, which in the grid's order is there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = 2.0 * tl.load(x + at)
    tl.store(scratch + at, value)
    before = tl.maximum(tl.program_id(0) - 1, 0) * BLOCK
    tl.store(y + at, value + 0.0 * tl.load(scratch + before))


@triton.jit
def unwritten(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """The last number is left out."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2.0 * tl.load(x + at), mask=at < N - 1)


@triton.jit
def outside(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """A number behind x is loaded, and not used."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at + 1)
    tl.store(y + at, 2.0 * tl.load(x + at) + 0.0 * value)


@triton.jit
def order(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Which program takes which numbers is who comes when; none does what another does."""
    came = tl.atomic_add(counter, 1)
    at = came * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) * (2.0 + 0.001 * tl.program_id(0)))


@triton.jit
def store_to_operand(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    tl.store(x + at, value)
    tl.store(y + at, 2.0 * value)


@triton.jit
def lanes(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Two lanes store to each place: the second happens to win in the interpreter."""
    lane = tl.arange(0, 2 * BLOCK)
    at = tl.program_id(0) * BLOCK + lane % BLOCK
    tl.store(y + at, tl.load(x + at) * tl.where(lane < BLOCK, 1.0, 2.0))


@triton.jit
def undefined(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """Scratch is read, times nothing, that nobody has written."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(scratch + at)
    tl.store(y + at, tl.where(rest == rest, 2.0, 2.0) * tl.load(x + at))


@triton.jit
def uncounted(x, y, scratch, counter, N: tl.constexpr, BLOCK: tl.constexpr):
    """A counter that nobody has set to zero."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(scratch, 1.0)
    tl.store(y + at, 2.0 * tl.load(x + at))
