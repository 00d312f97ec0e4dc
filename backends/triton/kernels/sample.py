"""Tokens chosen from logits on the device, as `dsc.ir.choosing` does it on the host.

Four kernels: which tokens of a row may stay, what is left out of it, the best of each part of it,
the best of all. Nothing is sorted: the bits of a float that are read as an integer have its order,
so that the least score that is kept is found by halving the integers, 32 looks. Most rows are read
two or three times for that: of columns that lie BLOCK apart the largest is known after one look,
and where `count` of these largest, or the mass that is asked for, lie from a score on, the least
that is kept is no smaller. So few tokens are from there on, in general, that looks at them are
looks at registers; where they are more than BLOCK, looks go over the row. All this only where
something is to be left out.

Scores are logits by temperature in units of 1 / UNIT, a power of two, so that none overflows at the
least temperature; sums and comparisons are those of scores, bit for bit.

A row whose largest logit is no finite number, as where one is NaN, gives -1: its parts say so.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2139095041)
"""The integer of minus infinity."""


@triton.jit
def _key(s):
    """The bits of scores as integers of the same order."""
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _score(key):
    """The score of such an integer."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _scored(x, temperature, UNIT: tl.constexpr):
    """Scores of logits and their integers; a zero has no sign."""
    s = tl.div_rn(x.to(tl.float32) * UNIT, temperature) + 0.0
    return s, _key(s)


@triton.jit
def _scores(x_at, at, temperature, V: tl.constexpr, UNIT: tl.constexpr):
    """Scores of tokens and their integers; those of minus infinity at V and behind."""
    return _scored(tl.load(x_at + at, mask=at < V, other=float("-inf")), temperature, UNIT)


@triton.jit
def sample_shortlist(
    logits,
    sampling,
    places,
    listed,
    facts,
    L,
    l_row,
    V: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens among which are all that top-k and top-p keep of each row; grid (rows,).

    places i32[rows, BLOCK] has them in their order, where listed i32[rows], which is how many they
    are, is BLOCK at most. facts f32[rows, 2] are the best score and, where there is no top-k, the
    mass of all.
    """
    row = tl.program_id(0).to(tl.int64)
    options = sampling + row // L * 4
    temperature = tl.load(options)
    count = tl.load(options + 1)
    mass = tl.load(options + 2)
    share = tl.load(options + 3)
    found = 0
    peak = 0.0
    total = 0.0
    if (temperature >= LEAST) & ((count > 0.0) | (mass < 1.0) | (share > 0.0)):
        x_at = logits + row * l_row
        v = tl.arange(0, BLOCK)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(x_at + start + v, mask=start + v < V, other=float("-inf"))
            largest = tl.maximum(largest, x.to(tl.float32))
        s, b = _scored(largest, temperature, UNIT)
        peak = tl.max(s, axis=0)
        if (count > 0.0) | (mass < 1.0):
            weights = tl.full((BLOCK,), 1.0, tl.float32)
            wanted = count
            if count == 0.0:
                masses = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, V, BLOCK):
                    each, key = _scores(x_at, start + v, temperature, V, UNIT)
                    masses += tl.exp((each - peak) / UNIT)
                total = tl.sum(masses, axis=0)
                weights = tl.exp((s - peak) / UNIT)
                wanted = mass * total * (1.0 + 2.0**-16)  # more than sums in another order are off
            low = tl.full((), LOWEST, tl.int64)
            high = _key(peak).to(tl.int64)
            while low < high:
                middle = (low + high + 1) >> 1
                enough = tl.sum(tl.where(b >= middle, weights, 0.0), axis=0) >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            for start in range(0, V, BLOCK):
                at = start + v
                each, key = _scores(x_at, at, temperature, V, UNIT)
                kept = ((key >= low) & (at < V)).to(tl.int32)
                to = found + tl.cumsum(kept, axis=0) - 1
                tl.store(places + row * BLOCK + to, at, mask=(kept > 0) & (to < BLOCK))
                found += tl.sum(kept, axis=0)
    tl.store(listed + row, found)
    tl.store(facts + row * 2, peak)
    tl.store(facts + row * 2 + 1, total)


@triton.jit
def _above(
    low, s, b, at, x_at, end, peak, temperature,
    V: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many scores are above one of an integer, and what they weigh."""
    more = ((b > low) & (at < V)).to(tl.int32)
    masses = tl.where(b > low, tl.exp((s - peak) / UNIT), 0.0)
    for start in range(BLOCK, end, BLOCK):
        after = start + tl.arange(0, BLOCK)
        each, key = _scores(x_at, after, temperature, V, UNIT)
        more += ((key > low) & (after < V)).to(tl.int32)
        masses += tl.where(key > low, tl.exp((each - peak) / UNIT), 0.0)
    return tl.sum(more, axis=0), tl.sum(masses, axis=0)


@triton.jit
def sample_limits(
    logits,
    sampling,
    places,
    listed,
    facts,
    limits,
    first,
    L,
    l_row,
    V: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each row keeps; grid (rows,).

    Scores above limits f32[rows], and of those equal to it tokens from first i32[rows] on. The
    first BLOCK tokens that are looked at stay in registers: the shortlist, or the row's first.
    """
    row = tl.program_id(0).to(tl.int64)
    options = sampling + row // L * 4
    temperature = tl.load(options)
    count = tl.load(options + 1)
    mass = tl.load(options + 2)
    share = tl.load(options + 3)
    limit = float("-inf")
    begin = 0
    if (temperature >= LEAST) & ((count > 0.0) | (mass < 1.0) | (share > 0.0)):
        x_at = logits + row * l_row
        v = tl.arange(0, BLOCK)
        found = tl.load(listed + row)
        few = found <= BLOCK
        there = v < tl.where(few, found, 0)
        at = tl.load(places + row * BLOCK + v, mask=there, other=V)
        at = tl.where(few, at, v)
        end = tl.where(few, 0, V)
        s, b = _scores(x_at, at, temperature, V, UNIT)
        peak = tl.load(facts + row * 2)
        low = tl.full((), LOWEST, tl.int64)
        high = _key(peak).to(tl.int64)
        if count > 0.0:
            while low < high:
                middle = (low + high + 1) >> 1
                more, _ = _above(middle - 1, s, b, at, x_at, end, peak, temperature, V, UNIT, BLOCK)
                low = tl.where(more >= count, middle, low)
                high = tl.where(more >= count, high, middle - 1)
        if mass < 1.0:
            total = tl.load(facts + row * 2 + 1)
            if count > 0.0:
                _, total = _above(low - 1, s, b, at, x_at, end, peak, temperature, V, UNIT, BLOCK)
            wanted = mass * total
            high = _key(peak).to(tl.int64)
            while low < high:
                middle = (low + high) >> 1
                _, larger = _above(middle, s, b, at, x_at, end, peak, temperature, V, UNIT, BLOCK)
                high = tl.where(larger < wanted, middle, high)
                low = tl.where(larger < wanted, low, middle + 1)
            more, larger = _above(low, s, b, at, x_at, end, peak, temperature, V, UNIT, BLOCK)
            alike, _ = _above(low - 1, s, b, at, x_at, end, peak, temperature, V, UNIT, BLOCK)
            alike -= more
            room = tl.ceil((wanted - larger) / tl.exp((_score(low) - peak) / UNIT))
            kept = tl.minimum(tl.maximum(room, 1.0), alike.to(tl.float32)).to(tl.int32)
            if kept < alike:
                left = 0
                right = V
                while left < right:
                    middle = (left + right) // 2
                    equal = ((b == low) & (at >= middle) & (at < V)).to(tl.int32)
                    for start in range(BLOCK, end, BLOCK):
                        after = start + v
                        _each, key = _scores(x_at, after, temperature, V, UNIT)
                        equal += ((key == low) & (after >= middle) & (after < V)).to(tl.int32)
                    fits = tl.sum(equal, axis=0) <= kept
                    right = tl.where(fits, middle, right)
                    left = tl.where(fits, left, middle + 1)
                begin = left
        limit = _score(low)
        if share > 0.0:
            floor = peak + tl.log(share) * UNIT
            begin = tl.where(floor > limit, 0, begin)
            limit = tl.maximum(limit, tl.minimum(floor, peak))
    tl.store(limits + row, limit)
    tl.store(first + row, begin)


@triton.jit
def sample_parts(
    logits,
    sampling,
    seeds,
    limits,
    first,
    best,
    place,
    L,
    l_row,
    V: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best score of each part of a row, and whose it is; grid (rows, parts).

    A part with NaN or infinity has minus infinity and the place -1. Where a temperature is
    given, scores have a Gumbel number each, of the token and the draw.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = row // L
    v = part * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.load(sampling + b * 4)
    x = tl.load(logits + row * l_row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    wrong = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0) > 0
    if temperature >= LEAST:
        x = tl.div_rn(x * UNIT, temperature) + 0.0
        limit = tl.load(limits + row)
        kept = (x > limit) | ((x == limit) & (v >= tl.load(first + row)))
        draw = tl.load(seeds + b * 2 + 1) + row % L
        still = tl.zeros((BLOCK,), tl.uint32)
        low = still + (draw & 0xFFFFFFFF).to(tl.uint32)
        high = still + ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32)
        key = tl.load(seeds + b * 2)
        w0, w1, w2, w3 = tl.philox(key, (v >> 2).to(tl.uint32), low, high, still)
        word = tl.where(v % 4 == 0, w0, tl.where(v % 4 == 1, w1, tl.where(v % 4 == 2, w2, w3)))
        u = tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)
        near = u * (1.0 + u * (0.5 + u * 0.3333333432674408))
        waited = tl.where(u < 2.0**-10, near, -tl.log(1.0 - u))
        x = tl.where(kept, x - tl.log(waited) * UNIT, float("-inf"))
    value, at = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    value = tl.where(wrong, float("-inf"), value)
    tl.store(best + row * tl.num_programs(1) + part, value)
    tl.store(place + row * tl.num_programs(1) + part, tl.where(wrong, -1, part * BLOCK + at))


@triton.jit
def sample_best(
    best,
    place,
    ids,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """ids i64[rows]: the token of the best part, of equals the first, or -1; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    value = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    top, at = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    places = tl.load(place + row * PARTS + part, mask=part < PARTS, other=0)
    found = tl.load(place + row * PARTS + at)
    wrong = (tl.min(places, axis=0) < 0) | (top == float("-inf"))
    tl.store(ids + row, tl.where(wrong, -1, found).to(tl.int64))
