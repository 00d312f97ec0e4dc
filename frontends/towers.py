"""Where the language model lies in a checkpoint of a larger one.

Models that see or hear keep their language model under a prefix, which differs from release to
release (`language_model.model.`, `model.language_model.`), with `lm_head` under a part of it or
outside; towers and projectors lie beside it. The prefix is found by what it makes: the one under
which most of the declared parameters are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from dsc.errors import CheckpointError
from dsc.frontends.conversions import Conversions

DEEPEST = 6
"""Parts that a prefix has at most."""


@dataclass(frozen=True)
class Tower:
    """The prefix of a language model's tensors, and how names begin that are its own without it.

    `own` is empty where nothing may lie beside it.
    """

    head: str = ""
    own: frozenset[str] = frozenset()

    def plain(self, name: str) -> str:
        """The name that a tensor has where the language model is all there is."""
        return name.removeprefix(self.head)

    def is_beside(self, name: str) -> bool:
        """Whether a tensor is of another part of the larger model."""
        if not self.own:
            return False
        return not name.startswith(self.head) if self.head else _first(name) not in self.own


def language_model(
    names: Collection[str], declared: Collection[str], table: Conversions, where: str, wrapper: str
) -> Tower:
    """Where the tensors of the `declared` parameters lie among `names`.

    Raises:
        CheckpointError: under a prefix, and the configuration says of no larger model.
    """
    apart = [name for name in names if not any(_counts(part) for part in name.split("."))]
    tails = {tail for name in apart for _, tail in _heads(name)}
    found = table.renamed(tails, dict.fromkeys(declared))
    hits: dict[str, set[str]] = {"": set()}
    for name in apart:
        for head, tail in _heads(name):
            if found[tail].name in declared:
                hits.setdefault(head, set()).add(found[tail].name)
    best = max(hits, key=lambda head: (len(hits[head]), -len(head)))
    if wrapper:
        own = {_first(name) for name in declared}
        own |= {_first(name.removeprefix(f"{table.base}.")) for name in declared}
        return Tower(best, frozenset(own))
    if best:
        under = sum(name.startswith(best) for name in names)
        told = "all" if under == len(names) else f"{under} of {len(names)}"
        raise CheckpointError(
            f"{told} tensors lie under {best!r}, where the model has no part: it is named "
            "otherwise, or a part of a larger model", where, "save the language model on its own",
        )  # fmt: skip
    return Tower()


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts of a model that tensors are of: as far as names have no number.

    >>> parts_of(["vision.layers.0.k.weight", "vision.layers.1.k.weight", "projector.weight"])
    ['projector', 'vision.layers']
    """
    found = set()
    for name in names:
        parts = name.split(".")[:-1] or [name]
        end = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts))
        found.add(".".join(parts[: min(end, 2)] or parts[:1]))
    return sorted(found)


def _counts(part: str) -> bool:
    """Whether a part of a name is a number above 0: other layers and experts say nothing more."""
    return part.isdecimal() and part.strip("0") != ""


def _heads(name: str) -> Iterator[tuple[str, str]]:
    """The ways to part a name at one of its first dots, the whole name first."""
    yield "", name
    place = -1
    for _ in range(DEEPEST):
        place = name.find(".", place + 1)
        if place < 0:
            return
        yield name[: place + 1], name[place + 1 :]


def _first(name: str) -> str:
    return name.partition(".")[0]
