"""Every rule of every pass: its examples fire once and keep the meaning, its near-misses do not."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

import dsc.passes
from dsc.rewrite.rule import Rule
from tests.rewrite.harness import check_rule


def rules() -> list[Rule]:
    """Find all rules, in the passes and in what passes share."""
    found: list[Rule] = []
    for path in sorted(Path(dsc.passes.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"dsc.passes.{path.stem}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, Rule):
                found.append(value())
    return found


RULES = rules()


def test_there_are_rules() -> None:
    assert len(RULES) > 15
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_holds_its_evidence(rule: Rule) -> None:
    check_rule(rule)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_is_named_by_its_equation(rule: Rule) -> None:
    assert "==>" in (type(rule).__doc__ or "")
