"""Files of a checkpoint, mutated as somebody would who means harm, or whose disk is failing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

BAIT = "hostile_bait"
"""Part of every name that a mutation has somebody import, open, download or run."""
EXECUTABLE: dict[str, Any] = {
    "auto_map": {"AutoConfig": f"{BAIT}.Config", "AutoModelForCausalLM": f"{BAIT}.Model"},
    "Auto_Map": {"AutoConfig": f"{BAIT}--x.Config"},
    "autoMap": {"AutoModel": f"{BAIT}.Model"},
    "\uff41uto_map": {"AutoConfig": f"{BAIT}.Config"},
    "_attn_implementation": f"{BAIT}/kernel",
    "attn_implementation": {"": f"{BAIT}/kernel"},
    "_attn_implementation_internal": f"{BAIT}/kernel",
    "experts_implementation": "deepgemm",
    "_experts_implementation_internal": "sonicmoe",
    "custom_generate": f"{BAIT}/generate",
    "custom_pipelines": {BAIT: {"impl": f"{BAIT}.Pipe", "type": "text"}},
    "kernel_config": {"RMSNorm": f"{BAIT}/kernel:RMSNorm"},
    "use_kernels": True,
    "quantizer": BAIT,
    "chat_template_url": f"http://localhost:9/{BAIT}",
    "_name_or_path": f"/{BAIT}/model",
    "trust_remote_code": True,
    "base_model_name_or_path": f"{BAIT}/model",
    "peft_config": {"base_model_name_or_path": f"{BAIT}/model"},
    "use_timm_backbone": True,
    "backbone": f"{BAIT}/timm",
    "__class__": BAIT,
    "__init__": BAIT,
    "torchscript": True,
    "loss_type": BAIT,
    "pretrained_model_name_or_path": f"../{BAIT}",
}
"""Keys that make some loader import, download or run something; in a model they mean nothing."""
TEXTS = (
    "", "32", f"{BAIT}.py", f"../../{BAIT}", f"/etc/{BAIT}", f"http://localhost:9/{BAIT}",
    "{0.__class__.__mro__}", "%s%n%(x)s", "{{ 7 * 7 }}", "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe", "\ud800", "\0", "a" * 5000, "a" * 30 + "!", "(a+)+$", "antigravity",
    "this", "turtle", "wave", "smtplib",
    "os.system", "silu", "dynamic", "yarn", "llama3", "sliding_attention", "__import__('os')",
    "line\nto do:  pay",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 1 << 15, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64,
    -(1 << 63), 10**30, 0.0, -0.0, 0.5, 1.5, 32.0, 1e-320, 1e308, -1e308, float("nan"),
    float("inf"), float("-inf"),
)  # fmt: skip
LONG = 1 << 14
"""Entries of a long list; what is read has at most so many."""
ALIKE = str.maketrans("aceiopsxy", "асеіорѕху")  # noqa: RUF001 - Cyrillic letters, meant


def mutated(tree: Any, rng: random.Random) -> tuple[bytes, str]:
    """A mutation of a JSON object as text; and its kind, "executable" where the meaning stays."""
    copied = deepcopy(tree)
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 6)):
            _executable(copied, rng)
        return json.dumps(copied).encode(), "executable"
    if rng.random() < 0.15:
        return damaged(json.dumps(tree).encode(), rng), "bytes"
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(CHANGES)(copied, rng)
    text = json.dumps(copied)
    if rng.random() < 0.03:  # numbers that Python's own writer has not
        text = text.replace(": 1,", f": {rng.choice(('1e999', '-1e999', '9' * 5000))},")
    if rng.random() < 0.03:
        text = text.replace("{", '{"model_type": "llama", ', 1)
    return text.encode("utf-8", "replace"), "values"


def damaged(text: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled or put in."""
    found = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(found) + 1)
        way = rng.randrange(4)
        if way == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            del found[place:]
        elif way == 2:
            end = min(len(found), place + rng.randrange(1, 200))
            found[end:end] = found[place:end]
        else:
            put = (b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b"-", b"9" * 6000)
            found[place:place] = rng.choice(put)
    return bytes(found)


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a tree, the tree itself first."""
    if isinstance(tree, dict):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(each, (dict, list)):
            yield from _dicts(each)


def _place(tree: Any, rng: random.Random) -> tuple[dict[str, Any], str] | None:
    """An object of a tree and one of its keys; often at the top."""
    held = [each for each in _dicts(tree) if each]
    if not held:
        return None
    chosen = held[0] if rng.random() < 0.6 else rng.choice(held)
    return chosen, rng.choice(list(chosen))


def _executable(tree: Any, rng: random.Random) -> None:
    held = list(_dicts(tree))
    key = rng.choice(list(EXECUTABLE))
    (held[0] if rng.random() < 0.5 else rng.choice(held)).setdefault(key, deepcopy(EXECUTABLE[key]))


def _renamed(tree: Any, rng: random.Random) -> None:
    if place := _place(tree, rng):
        held, key = place
        ways = (key.translate(ALIKE), key.upper(), key + "_", key.replace("_", ""), key + "\u200b",
                key.replace("_", "-"), "_" + key, rng.choice(TEXTS))  # fmt: skip
        held[rng.choice(ways)] = held.pop(key)


def _dropped(tree: Any, rng: random.Random) -> None:
    if place := _place(tree, rng):
        del place[0][place[1]]


def _deeper(tree: Any, rng: random.Random) -> None:
    if place := _place(tree, rng):
        held, key = place
        for _ in range(rng.choice((1, 2, 7, 100))):
            held[key] = rng.choice(([held[key]], {"a": held[key]}, {key: held[key]}))


def _odd(tree: Any, rng: random.Random) -> None:
    if place := _place(tree, rng):
        others: tuple[Any, ...] = (
            True,
            False,
            None,
            [],
            {},
            [1],
            {"a": 1},
            [None],
            [[]],
            {"0": {}},
        )
        place[0][place[1]] = rng.choice(rng.choice((others, TEXTS, NUMBERS)))


def _number(tree: Any, rng: random.Random) -> None:
    """Another number in the place of one."""
    places = [(d, k) for d in _dicts(tree) for k, v in d.items() if isinstance(v, (int, float))]
    if places:
        held, key = rng.choice(places)
        v = held[key]
        near = (v * 2, -v, v + 1, v - 1, v * 1000, v * 10**6, float(v), v / 3, bool(v), str(v))
        held[key] = rng.choice((rng.choice(near), rng.choice(NUMBERS)))


def _longer(tree: Any, rng: random.Random) -> None:
    places = [(d, k) for d in _dicts(tree) for k, v in d.items() if isinstance(v, list)]
    if places:
        held, key = rng.choice(places)
        was = held[key][:32]
        ways: tuple[list[Any], ...] = (
                was[:-1], was + was, (was * LONG)[: rng.choice((LONG, 20000))], [*was, None],
                [*was, -1], [], was[::-1],
                [*was, rng.choice(TEXTS)], [rng.choice(NUMBERS), *was[1:]])  # fmt: skip
        held[key] = rng.choice(ways)


def _swapped(tree: Any, rng: random.Random) -> None:
    one, other = _place(tree, rng), _place(tree, rng)
    if one and other:
        (a, i), (b, k) = one, other
        a[i], b[k] = deepcopy(b[k]), deepcopy(a[i])


def _added(tree: Any, rng: random.Random) -> None:
    held = rng.choice(list(_dicts(tree)))
    held[rng.choice(TEXTS)] = rng.choice((*TEXTS, *NUMBERS))


CHANGES: tuple[Callable[[Any, random.Random], None], ...] = (
    _renamed, _dropped, _deeper, _odd, _number, _number, _longer, _swapped, _added, _executable,
)  # fmt: skip
