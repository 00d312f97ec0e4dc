"""A configuration of any decoder, shrunk: few layers and small widths, all else as it is.

No table says what a model type looks like. The role of a number is read off its key, in the words
of the field (`heads`, `head_dim`, `experts`, `window`, …), and what numbers have to do with each
other is read off their values: equal ones stay equal, heads still divide heads, `hidden_size` is
still heads x head_dim where it was, and still is not where it was not. Layers are told apart by
all lists and counts that speak of layers, and at most two of each kind stay.

Kept are all texts, switches and fractions: activations, norms' epsilons, rope and its scaling,
which parts have biases, how a router scores. Windows become shorter than the sequences that are
tried, so that they mean something there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsc.frontends.facts import NAMES
from dsc.frontends.rope_scaling import SECTIONS, rope_sections

Values = dict[str, Any]
Place = tuple[str, ...]
"""Where a number stands: keys of mappings, from the outside."""

DEPTHS = ("num_layers_per_stack", *NAMES["num_hidden_layers"])
FEW = 4
"""So many layers or fewer are all kept."""
OF_A_KIND = 2
"""Layers of a kind that are kept of more."""

FIRST = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
"""Keys that count layers from the first on."""
LAST = ("num_kv_shared_layers",)
"""Keys that count layers from the last back."""
UPTO = ("moe_layer_end_index",)
"""Keys that name the last layer of a sort; -1 is the last of all."""
LISTED = (
    "mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers",
    "hybrid_layer_ids", "ple_layer_ids",
)  # fmt: skip
"""Keys that list layers by number."""
EVERY = (
    "decoder_sparse_step", "moe_layer_freq", "attn_layer_period", "expert_layer_period",
    "moe_layer_interval",
)  # fmt: skip
"""Keys after which layers repeat; others of that sort are spelled out in lists by their class."""

ASIDE = (*SECTIONS, "quantization_config", "id2label", "label2id")
"""Mappings that hold no width of the model."""

WINDOW = 6
VOCABULARY = 199
EXPERTS = 8
WIDEST = 256
"""A model none of whose widths is beyond this is as small as it needs to be."""
MOST_HEADS = 16
SMALL_VOCABULARY = 4096

ROLES: tuple[tuple[str, str], ...] = (
    ("id", r"token_ids?$"),
    ("vocabulary", r"vocab"),
    ("kept", r"pattern|_layers$|layers_per|period|offset|interval|_step$|max_window|_index$"),
    ("window", r"window|chunk_size$|chunk$|local_attention$|index_topk$|rel_extent|keep_window"),
    ("chosen", r"experts_per_tok|topk_experts|top_k_experts|moe_topk|moe_top_k|moe_k$"),
    ("groups", r"^n_group$|expert_groups?$|topk_group"),
    ("shared", r"shared_experts$"),
    ("width", r"expert.*(size|dim)"),
    ("experts", r"expert"),
    ("heads", r"heads|^n_head$|query_groups|query_group_num"),
    ("head_dim", r"head_dim|headdim|d_head|dim_head|head_size|kv_channels|rotary_dim"),
    ("width", r"size|dim|rank|width|inner|n_embd|d_model|dff|d_ff|d_state|d_ssm|d_rel|channels"),
)
"""The role of a number by its key, the first that is found; of others nothing is known."""


def shrunk(values: Mapping[str, Any]) -> Values:
    """The configuration with few layers, small widths and short windows.

    `values` has every key of its class, defaults included; lists a layer long are a value a layer.
    """
    cut = _cut(dict(values))
    numbers = dict(_numbers(cut))
    roles = {place: role_of(place[-1]) for place in numbers}
    change = {place: min(numbers[place], WINDOW) for place, r in roles.items() if r == "window"}
    if not _is_small(numbers, roles):
        change |= _narrow(numbers, roles, [*_fractions(cut)])
    vocabulary = [change.get(p, numbers[p]) for p, role in roles.items() if role == "vocabulary"]
    least = min(vocabulary, default=0)
    for place, role in roles.items():
        if role == "id" and least:
            change[place] = min(numbers[place], least - 1)
    return _written(cut, change)


def role_of(key: str) -> str:
    """The role of a number, by the words of its key; "" where they say none.

    >>> role_of("num_key_value_heads"), role_of("moe_intermediate_size"), role_of("rope_theta")
    ('heads', 'width', '')
    """
    return next((role for role, words in ROLES if re.search(words, key)), "")


def _is_small(numbers: Mapping[Place, int], roles: Mapping[Place, str]) -> bool:
    most = {
        "width": WIDEST, "head_dim": WIDEST, "heads": MOST_HEADS, "experts": MOST_HEADS,
        "vocabulary": SMALL_VOCABULARY,
    }  # fmt: skip
    return all(numbers[place] <= most.get(role, numbers[place]) for place, role in roles.items())


# Layers.


def _cut(values: Values) -> Values:
    """The same with the first two layers of each kind alone, in their order."""
    name = next((each for each in DEPTHS if isinstance(values.get(each), int)), None)
    depth = values[name] if name else 0
    if name is None or depth <= FEW:
        return values
    kinds = _kinds(values, depth)
    if any(_is_count(values.get(each)) and values[each] > 1 for each in EVERY):
        last = max(kinds.index(kind) for kind in set(kinds))
        kept = list(range(max(last + 1, OF_A_KIND)))
    else:
        kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < OF_A_KIND]
    return {key: _of_layers(key, value, depth, kept) for key, value in values.items()}


def _kinds(values: Values, depth: int) -> list[str]:
    """What tells the layers apart, one text a layer."""
    told = [found for key, value in values.items() if (found := _each(key, value, depth))]
    return [repr([each[i] for each in told]) for i in range(depth)]


def _each(key: str, value: Any, depth: int) -> list[Any]:
    """What a value says of each layer; nothing where it does not speak of layers."""
    layers = range(depth)
    if isinstance(value, (list, tuple)):
        if key in LISTED:
            return [i in value for i in layers]
        return list(value) if len(value) == depth else []
    if _is_by_layer(key, value):
        found = _by_number(value)
        return [found.get(i) for i in layers]
    if not _is_count(value):
        return []
    if key in FIRST:
        return [i < value for i in layers]
    if key in LAST:
        return [i >= depth - value for i in layers]
    if key in UPTO:
        return [value < 0 or i <= value for i in layers]
    return [i % value for i in layers] if key in EVERY and value > 1 else []


def _of_layers(key: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """A value that speaks of layers, for those that are kept; any other as it is."""
    if key in DEPTHS:
        return value * len(kept) // depth
    if key in LISTED and isinstance(value, (list, tuple)):
        return [new for new, old in enumerate(kept) if old in value]
    if isinstance(value, (list, tuple)):
        return [value[old] for old in kept] if len(value) == depth else value
    if _is_by_layer(key, value):
        found = _by_number(value)
        return {str(new): found[old] for new, old in enumerate(kept) if old in found}
    if not _is_count(value):
        return value
    if key in FIRST:
        return sum(old < value for old in kept)
    if key in LAST:
        return sum(old >= depth - value for old in kept)
    if key in UPTO and value >= 0:
        return sum(old <= value for old in kept) - 1
    return value


def _is_by_layer(key: str, value: Any) -> bool:
    """Whether a mapping says something of layers by their numbers."""
    numbered = isinstance(value, Mapping) and all(str(each).isdecimal() for each in value)
    return numbered and bool(value) and "layer" in key


def _by_number(value: Mapping[Any, Any]) -> dict[int, Any]:
    return {int(each): found for each, found in value.items()}


# Widths.


def _narrow(
    numbers: Mapping[Place, int], roles: Mapping[Place, str], parts: Sequence[float]
) -> dict[Place, int]:
    """Small numbers for large ones, by their roles and by what they have to do with each other.

    `parts` are the fractions of a head that are rotated: a whole even number of columns each.
    """
    of = {role: [p for p, r in roles.items() if r == role] for role in dict(ROLES)}
    change: dict[Place, int] = {p: min(numbers[p], VOCABULARY) for p in of["vocabulary"]}
    counts = _counts([numbers[p] for p in of["heads"]])
    change |= {p: counts[numbers[p]] for p in of["heads"]}
    change |= _experts(numbers, of)
    hidden, heads = _first(numbers, "hidden_size"), _first(numbers, "num_attention_heads")
    own = _first(numbers, "head_dim")
    implied = hidden // heads if heads and hidden % heads == 0 else 0
    dims = {numbers[p] for p in of["head_dim"] if numbers[p] > 0} or {implied or 16}
    by = _divisor(dims, [(own or implied) * part for part in parts])
    change |= {p: _divided(numbers[p], by) for p in of["head_dim"]}
    of_head = _divided(own or implied or 16 * by, by)
    across = counts.get(heads, 4) * of_head
    narrow = across if hidden == heads * (own or implied) or not heads else across * 3 // 2
    widths = _scaled({numbers[p] for p in of["width"]}, hidden, narrow)
    change |= {p: widths[numbers[p]] for p in of["width"]}
    return change | _across(numbers, of, change, hidden, narrow)


def _across(
    numbers: Mapping[Place, int],
    of: Mapping[str, list[Place]],
    change: Mapping[Place, int],
    hidden: int,
    narrow: int,
) -> dict[Place, int]:
    """Heads of state spaces, which together are some times as wide as the model.

    Such a count is all that is free: its head_dim and the factor are said elsewhere.
    """
    made = {}
    for heads in of["heads"]:
        word = heads[-1].replace("num_", "").replace("n_", "").partition("_")[0]
        for dim in of["head_dim"]:
            across = numbers[heads] * numbers[dim]
            mamba = word in ("mamba", "heads") and dim[-1].startswith((word, "head"))
            if mamba and heads[-1] != "n_heads" and hidden and across % hidden == 0:
                made[heads] = across // hidden * narrow // change[dim]
    return made


def _first(numbers: Mapping[Place, int], what: str) -> int:
    return next((numbers[(name,)] for name in NAMES.get(what, (what,)) if (name,) in numbers), 0)


def _counts(found: Sequence[int]) -> dict[int, int]:
    """Powers of two for counts of heads, in their order: one stays one, all divide the larger."""
    several = sorted({n for n in found if n > 1})
    start = 4 if len(several) == 1 else 2
    small = {n: start << rank for rank, n in enumerate(several)}
    return {n: small.get(n, n) for n in found}


def _divisor(dims: set[int], rotated: Sequence[float]) -> int:
    """By what dims of heads are divided, a power of two: then 24 at most, where all stay even."""
    by = 1
    while max(dims, default=0) // by > 24:
        turned = [int(columns / (2 * by)) for columns in rotated]
        if any(dim % (4 * by) for dim in dims) or any(n % 2 or not n for n in turned):
            break
        by *= 2
    return by


def _divided(dim: int, by: int) -> int:
    return dim if dim <= 0 else max(2, dim // by // 2 * 2)


def _scaled(found: set[int], hidden: int, narrow: int) -> dict[int, int]:
    """Widths in about the ratio of the hidden one's; unlike ones stay unlike."""
    made: dict[int, int] = {hidden: narrow} if hidden else {}
    for width in sorted(found):
        if width in made:
            continue
        if width <= 16:
            made[width] = width
            continue
        exact = width * narrow % (8 * hidden) == 0 if hidden else False
        small = max(16, round(width * narrow / (8 * hidden)) * 8) if hidden else min(width, 64)
        while small in made.values() and not exact:
            small += 8
        made[width] = small
    return made


def _experts(numbers: Mapping[Place, int], of: Mapping[str, list[Place]]) -> dict[Place, int]:
    """Eight experts or fewer; a group of them stays one, or they are two, one of which is taken."""
    change = {p: min(numbers[p], EXPERTS) for p in of["experts"]}
    change |= {p: min(numbers[p], 2) for p in of["shared"]}
    all_of_them = {numbers[p] for p in of["experts"]}
    for place in of["chosen"]:
        chosen = numbers[place]
        change[place] = min(chosen, EXPERTS if chosen in all_of_them else 2)
    groups = max((numbers[p] for p in of["groups"] if "topk" not in p[-1]), default=1)
    for place in of["groups"]:
        kept = numbers[place]
        change[place] = min(kept, 2 if "topk" not in place[-1] or kept == groups else 1)
    return change


# Numbers within a configuration.


def _numbers(values: Mapping[str, Any], at: Place = ()) -> Iterator[tuple[Place, int]]:
    """Whole numbers and where they stand, those in lists of numbers at "key", index."""
    for key, value in values.items():
        if _is_count(value):
            yield (*at, key), value
        elif isinstance(value, Mapping) and key not in ASIDE:
            yield from _numbers(value, (*at, key))
        elif isinstance(value, (list, tuple)) and value and all(map(_is_count, value)):
            yield from (((*at, str(index), key), each) for index, each in enumerate(value))


def _fractions(values: Mapping[str, Any]) -> Iterator[float]:
    """The fractions of a head that are rotated, wherever they are said."""
    for section in (values, *(section for _, section in rope_sections(values))):
        for key, value in section.items():
            if isinstance(value, float) and re.search(r"partial_rotary|rotary_pct|rope_pct", key):
                yield value


def _written(values: Mapping[str, Any], change: Mapping[Place, int], at: Place = ()) -> Values:
    """The configuration with other numbers."""
    made: Values = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in ASIDE:
            made[key] = _written(value, change, (*at, key))
        elif isinstance(value, (list, tuple)) and (*at, "0", key) in change:
            made[key] = [change[(*at, str(index), key)] for index in range(len(value))]
        else:
            made[key] = change.get((*at, key), value)
    return made


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
