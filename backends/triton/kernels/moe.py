"""Mixture of experts: choose; then pair by pair, or sorted by expert and gathered back.

The sort is a counting sort without atomics: the program of an expert counts the entries of smaller
experts (its segment's start) and then numbers its own entries in order with a prefix sum. It is
stable, deterministic, and its result needs no second launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl


@triton.jit
def route(
    logits,
    bias,
    shift,
    index,
    weights,
    rows,
    scale,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    KEEP: tl.constexpr,
    GROUP_SCORE: tl.constexpr,
    FILL: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Scores, group limit and top-k by repeated argmax over logits f32[rows, E].

    The bias selects and never weighs: weights come from the unbiased scores, are normalised (plus
    1e-20), then scaled. A group's score is the sum of its two largest biased scores ("top2") or its
    largest ("max"); experts of dropped groups compete with the value FILL. NaN is the largest
    score, as for the reference: each slot has an expert that there is. The SHARED experts from
    number E on follow, with weight 1.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    e = tl.arange(0, BLOCK_E)
    real = (e < E)[None, :]
    live = (row < rows)[:, None]
    x = tl.load(logits + row[:, None] * E + e[None, :], mask=live & real, other=0.0)
    if HAS_SHIFT:
        x += tl.load(shift + e, mask=e < E, other=0.0)[None, :]
    if SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        x = tl.where(real, x, float("-inf"))
        score = tl.exp(x - tl.max(x, axis=1)[:, None])
        score = score / tl.sum(score, axis=1)[:, None]
    choice = score
    if HAS_BIAS:
        choice = score + tl.load(bias + e, mask=e < E, other=0.0)[None, :]
    choice = tl.where(choice != choice, float("inf"), choice)
    choice = tl.where(real, choice, float("-inf"))
    if GROUPS > 1:
        g = tl.arange(0, BLOCK_G)[None, :]
        group_of = e // (E // GROUPS)
        standing = tl.full((BLOCK_ROWS, BLOCK_G), float("-inf"), dtype=tl.float32)
        for group in range(GROUPS):
            inside = tl.where((group_of == group)[None, :] & real, choice, float("-inf"))
            best = tl.max(inside, axis=1)
            if GROUP_SCORE == "top2":
                at = tl.argmax(inside, axis=1)
                rest = tl.where(e[None, :] == at[:, None], float("-inf"), inside)
                best += tl.max(rest, axis=1)
            standing = tl.where(g == group, best[:, None], standing)
        kept = tl.zeros((BLOCK_ROWS, BLOCK_E), dtype=tl.int32)
        for _turn in range(KEEP):
            chosen = tl.argmax(standing, axis=1)
            kept = tl.where(group_of[None, :] == chosen[:, None], 1, kept)
            standing = tl.where(g == chosen[:, None], float("-inf"), standing)
        choice = tl.where((kept == 0) & real, FILL, choice)
    k = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.int32)
    picked = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    for slot in range(TOP_K):
        at = tl.argmax(choice, axis=1)[:, None]
        hit = e[None, :] == at
        ids = tl.where(k == slot, at, ids)
        picked = tl.where(k == slot, tl.sum(tl.where(hit, score, 0.0), axis=1)[:, None], picked)
        choice = tl.where(hit, float("-inf"), choice)
    if NORMALISE:
        picked = picked / (tl.sum(picked, axis=1)[:, None] + 1e-20)
    ids = tl.where(k < TOP_K, ids, E - TOP_K + k)
    picked = tl.where(k < TOP_K, picked * scale, 1.0)
    at = row[:, None] * (TOP_K + SHARED) + k
    keep = live & (k < TOP_K + SHARED)
    tl.store(index + at, ids.to(tl.int64), mask=keep)
    tl.store(weights + at, picked, mask=keep)


@triton.jit
def sort_by_expert(
    index,
    offsets,
    order,
    place,
    total,
    EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stable counting sort of index i64[total] by expert; grid (expert tiles,).

    offsets i64[EXPERTS + 1]; order i64[total]: the entry at each sorted place; place i32[total]:
    its inverse, which `combine_rows` reads.
    """
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    begin = tl.zeros((BLOCK_EXPERTS,), dtype=tl.int32)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        e = tl.load(index + i, mask=i < total, other=EXPERTS).to(tl.int32)
        begin += tl.sum((e[None, :] < expert[:, None]).to(tl.int32), axis=1)
    tl.store(offsets + expert, begin.to(tl.int64), mask=expert <= EXPERTS)
    for start in range(0, total, BLOCK):
        i = start + tl.arange(0, BLOCK)
        e = tl.load(index + i, mask=i < total, other=EXPERTS).to(tl.int32)
        mine = (e[None, :] == expert[:, None]).to(tl.int32)
        at = begin[:, None] + tl.cumsum(mine, axis=1) - 1
        keep = (mine > 0) & (expert < EXPERTS)[:, None]
        entry = i[None, :] + tl.zeros_like(at)
        tl.store(order + at, entry.to(tl.int64), mask=keep)
        tl.store(place + entry, at, mask=keep)
        begin += tl.sum(mine, axis=1)


@triton.jit
def experts_hidden(
    a,
    index,
    b,
    c,
    N,
    K,
    a_m,
    TOP_K: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c[p] = act(gate_e a[t]) * (up_e a[t]) for pair p = t * TOP_K + slot, e = index[p].

    b is [experts, N, K], the N / 2 gate rows first. Each pair reads its expert's weights: with few
    pairs hardly two share one. Every other column of a tile is a gate's, the one behind it that of
    the same unit's up. Grid (pairs, tiles of columns).
    """
    BLOCK_M: tl.constexpr = 1
    pair = tl.program_id(0).to(tl.int64)
    tile_n = tl.program_id(1)
    unit = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N) // 2
    n = unit + tl.arange(0, BLOCK_N) % 2 * (N // 2)
    fits = unit < N // 2
    matrix = tl.load(index + pair)
    x_at = a + (pair // TOP_K) * a_m
    w_at = b + (matrix * N + n[None, :].to(tl.int64)) * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_at + k[None, :], mask=k[None, :] < K, other=0.0)
        w = tl.load(w_at + k[:, None], mask=fits[None, :] & (k[:, None] < K), other=0.0)  #: w
        part = tl.sum(tl.trans(x).to(tl.float32) * w.to(tl.float32), axis=0)[None, :]  #: part
        acc += part
    gate, up = tl.split(tl.reshape(acc, (BLOCK_N // 2, 2)))
    if ACT == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACT == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = gate + 0.044715 * gate * gate * gate
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * inner))
    else:
        gate = tl.maximum(gate, 0.0)
    u = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    tl.store(c + pair * (N // 2) + u, gate * up, mask=u < N // 2)


@triton.jit
def experts_output(
    a,
    index,
    weights,
    b,
    c,
    N,
    K,
    c_m,
    c_n,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """c[t] = sum over slots of weights[t, slot] * (down_e a[t, slot]), in fp32.

    a is the pairs' hidden units, dense; b is [experts, N, K]. Grid (tokens, tiles of columns).
    """
    token = tl.program_id(0).to(tl.int64)
    m = token + tl.zeros((1,), dtype=tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = m >= 0
    fits = n < N
    acc = tl.zeros((1, BLOCK_N), dtype=tl.float32)
    for slot in range(TOP_K):
        pair = token * TOP_K + slot
        share = tl.load(weights + pair)
        matrix = tl.load(index + pair)
        x_at = a + pair * K
        w_at = b + (matrix * N + n[None, :].to(tl.int64)) * K
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(x_at + k[None, :], mask=k[None, :] < K, other=0.0)
            w = tl.load(w_at + k[:, None], mask=fits[None, :] & (k[:, None] < K), other=0.0)  #: w
            part = tl.sum(tl.trans(x).to(tl.float32) * w.to(tl.float32), axis=0)[None, :]  #: part
            acc += share * part
    #: tile
    out = c + m[:, None] * c_m + n[None, :] * c_n
    tl.store(out, acc, mask=live[:, None] & fits[None, :])


@triton.jit
def invert_order(order, place, total, BLOCK: tl.constexpr):
    """place[order[p]] = p: where each (token, slot) went."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(order + p, mask=p < total, other=0)
    tl.store(place + entry, p, mask=p < total)


@triton.jit
def combine_rows(
    y,
    place,
    weights,
    c,
    M,
    N,
    c_m,
    c_n,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """c[t] = sum over slots of weights[t, slot] * y[place[t, slot]], accumulated in fp32.

    y is dense rows of N; grid (row tiles, tiles of columns).
    """
    m = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = m < M
    fits = n < N
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=tl.float32)
    for slot in range(TOP_K):
        at = tl.load(place + m * TOP_K + slot, mask=live, other=0).to(tl.int64)
        w = tl.load(weights + m * TOP_K + slot, mask=live, other=0.0)
        keep = live[:, None] & fits[None, :]
        v = tl.load(y + at[:, None] * N + n[None, :], mask=keep, other=0.0).to(tl.float32)
        acc += w[:, None] * v
    #: tile
    out = c + m[:, None].to(tl.int64) * c_m + n[None, :] * c_n
    tl.store(out, acc, mask=live[:, None] & fits[None, :])
