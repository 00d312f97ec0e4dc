"""Texts of programs, damaged at random: each is still a program, or one error with its place."""

from __future__ import annotations

import random
from collections import Counter

from dsc import pipeline
from tests.cli.test_opt import DATA, SMALL_LM, document, mutated, outcome


def run(count: int, seed: int = 1) -> Counter[str]:
    """What came of `count` damaged texts: "read", "refused", or the words of anything else."""
    rng = random.Random(seed)
    blocks = [document(name, block) for name in pipeline.PASSES for block in ("Before", "After")]
    large = [path.read_text() for path in sorted((DATA / "traced").glob("*.dsc"))]
    small = [SMALL_LM.read_text(), *blocks]
    found = Counter[str]()
    for round_ in range(count):
        found[outcome(mutated(rng.choice(small if round_ % 10 else large), rng))] += 1
    return found
