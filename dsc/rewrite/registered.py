"""Rules from outside, in the order in which they were registered."""

from __future__ import annotations

from dsc.ir.extensions import load_extensions
from dsc.rewrite.rule import Rule

_rules: list[Rule] = []


def register_rule(rule: Rule) -> None:
    """Add a rule (`dsc.rewrite.rule`) that `raise_registered` applies to every traced program."""
    _rules.append(rule)


def registered_rules() -> tuple[Rule, ...]:
    """The rules from outside, those of installed packages included."""
    load_extensions()
    return tuple(_rules)


def any_rules() -> bool:
    """Whether a rule was registered so far."""
    return bool(_rules)
