"""Tokens chosen from logits on the device, as `dsc.ir.choosing` does it on the host.

Three kernels: what is left out of a row, the best of each part of it, the best of all. Nothing is
sorted: the bits of a float that are read as an integer have its order, so that the least score that
is kept is found by halving the integers, 32 looks at a row. Looks cost a row's bytes from the
second-level cache, and are made only where something is to be left out.

Scores are logits by temperature in units of 1 / UNIT, a power of two, so that none overflows at the
least temperature; sums and comparisons are those of scores, bit for bit.

A row whose largest logit is no finite number, as where one is NaN, gives -1: its parts say so.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def _scores(x_at, at, temperature, V: tl.constexpr, UNIT: tl.constexpr):
    """Scores of tokens, and their bits as integers of the same order; a zero has no sign."""
    x = tl.load(x_at + at, mask=at < V, other=float("-inf"))
    s = tl.div_rn(x.to(tl.float32) * UNIT, temperature) + 0.0
    bits = s.to(tl.int32, bitcast=True)
    return s, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def sample_limits(
    logits,
    sampling,
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

    Scores above limits f32[rows], and of those equal to it tokens from first i32[rows] on.
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
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, V, BLOCK):
            s, b = _scores(x_at, start + v, temperature, V, UNIT)
            top = tl.maximum(top, s)
        peak = tl.max(top, axis=0)
        bits = peak.to(tl.int32, bitcast=True)
        highest = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        low = tl.full((), -2139095041, tl.int64)  # of minus infinity
        high = highest
        if count > 0.0:
            while low < high:
                middle = (low + high + 1) >> 1
                held = tl.zeros((BLOCK,), tl.int32)
                for start in range(0, V, BLOCK):
                    s, b = _scores(x_at, start + v, temperature, V, UNIT)
                    held += ((b >= middle) & (start + v < V)).to(tl.int32)
                enough = tl.sum(held, axis=0) >= count
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
        least = low
        if mass < 1.0:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, V, BLOCK):
                s, b = _scores(x_at, start + v, temperature, V, UNIT)
                total += tl.where(b >= least, tl.exp((s - peak) / UNIT), 0.0)
            wanted = mass * tl.sum(total, axis=0)
            high = highest
            above = 0.0
            while low < high:
                middle = (low + high) >> 1
                larger = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, V, BLOCK):
                    s, b = _scores(x_at, start + v, temperature, V, UNIT)
                    larger += tl.where(b > middle, tl.exp((s - peak) / UNIT), 0.0)
                fits = tl.sum(larger, axis=0) < wanted
                high = tl.where(fits, middle, high)
                low = tl.where(fits, low, middle + 1)
            equal = tl.zeros((BLOCK,), tl.int32)
            larger = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, V, BLOCK):
                s, b = _scores(x_at, start + v, temperature, V, UNIT)
                larger += tl.where(b > low, tl.exp((s - peak) / UNIT), 0.0)
                equal += ((b == low) & (start + v < V)).to(tl.int32)
            above = tl.sum(larger, axis=0)
            alike = tl.sum(equal, axis=0)
            bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.int32)
            weight = tl.exp((bits.to(tl.float32, bitcast=True) - peak) / UNIT)
            room = tl.ceil((wanted - above) / weight)
            kept = tl.minimum(tl.maximum(room, 1.0), alike.to(tl.float32)).to(tl.int32)
            if kept < alike:
                left = 0
                right = V
                while left < right:
                    middle = (left + right) // 2
                    equal = tl.zeros((BLOCK,), tl.int32)
                    for start in range(0, V, BLOCK):
                        at = start + v
                        s, b = _scores(x_at, at, temperature, V, UNIT)
                        equal += ((b == low) & (at >= middle) & (at < V)).to(tl.int32)
                    few = tl.sum(equal, axis=0) <= kept
                    right = tl.where(few, middle, right)
                    left = tl.where(few, left, middle + 1)
                begin = left
        bits = tl.where(low < 0, low ^ 0x7FFFFFFF, low).to(tl.int32)
        limit = bits.to(tl.float32, bitcast=True)
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
