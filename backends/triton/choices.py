"""Tiles that `dsc tune` found fastest, kept for the card that they were measured on.

A tile is faster on a card, not on an architecture: an H200 and an H100 run the same code and differ
in memory. So what was found is kept (`dsc.kept`) by the card, by Triton's version, which makes the
code, and by our sources, which say what a key means. A compile for the architecture of the card at
hand takes it; where another card is at hand, or none, tiles are the rules'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dsc import kept
from dsc.backends.triton.blocks import AnyTile, tile_json, tile_of
from dsc.hardware import Gpu, gpus
from dsc.settings import switched
from dsc.targets import Target

KIND = "tiles"
OURS = ("backends/triton",)


@dataclass(frozen=True, slots=True)
class Known:
    """Tiles by their keys, and the card that they were measured on; none where nothing is known."""

    tiles: Mapping[str, AnyTile]
    card: str = ""

    def note(self, taken: int) -> str:
        """A line for the report of a compile that took so many of them."""
        return f"{taken} tiles are those that `dsc tune` measured on {self.card}; --no-tune: none"


def known(target: Target, asked: bool = True) -> Known:
    """What is known of the card at hand of a target, where it was `asked` for."""
    card = next((gpu for gpu in gpus() if gpu.target == str(target)), None)
    if card is None or not asked or not switched("DSC_TUNE", on="1", off="0"):
        return Known({})
    return Known(kept_tiles(card, triton_version()), card.name)


def kept_tiles(card: Gpu, triton: str) -> dict[str, AnyTile]:
    """The tiles that are kept for a card, by key, of code that this version of Triton made."""
    data = kept.get(KIND, _key(card, triton))
    if data is not None:
        with suppress(ValueError, LookupError, TypeError, AttributeError):
            return {key: tile_of(tile) for key, tile in json.loads(data).items()}
    return {}


def keep(card: Gpu, triton: str, found: Mapping[str, AnyTile]) -> None:
    """Keep what was found on a card, beside what was found on it before."""
    tiles = {**kept_tiles(card, triton), **found}
    data = {key: tile_json(tile) for key, tile in sorted(tiles.items())}
    kept.put(KIND, _key(card, triton), json.dumps(data).encode())


def _key(card: Gpu, triton: str) -> dict[str, Any]:
    """Everything that the fastest tiles depend on, beside their own keys.

    The driver is not among it: binaries are made ahead, it only starts them.
    """
    return {
        "card": card.name,
        "memory": round(card.memory / 1e9),
        "target": card.target,
        "triton": triton,
        "ours": kept.sources(*OURS),
    }


def triton_version() -> str:
    """The version of the installed Triton, or nothing."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
