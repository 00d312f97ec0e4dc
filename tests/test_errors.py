"""Errors fill one template, travel as data and survive a process boundary."""

from __future__ import annotations

import pickle

import pytest

from dsc import errors
from dsc.errors import BackendUnavailable, DscError, NoNumbers

MISTAKES = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DscError)
]


def test_the_template_indents_what_has_several_lines() -> None:
    error = DscError("no", "model.layers.3", "do this\nor that", picture="%y = relu %x\n%z = add")
    assert str(error).splitlines() == [
        "no",
        "  where:  model.layers.3",
        "  | %y = relu %x",
        "  | %z = add",
        "  to do:  do this",
        "          or that",
    ]


def test_data_leaves_out_what_is_not_known() -> None:
    assert DscError("no").as_dict() == {"error": "DscError", "what": "no"}


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_every_mistake_exits_with_2_and_pickles(kind: type[DscError]) -> None:
    error = kind("what", "second")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (kind, str(error), 2)


def test_a_missing_backend_says_how_to_install_it() -> None:
    error = BackendUnavailable("triton is not installed", "pip install triton", where="dsc compile")
    again = pickle.loads(pickle.dumps(error))
    assert (again.hint, again.where) == ("pip install triton", "dsc compile")


def test_logits_without_numbers_keep_the_tokens_before_them() -> None:
    assert pickle.loads(pickle.dumps(NoNumbers("none", [[3, 4]]))).ids == [[3, 4]]
