"""Thirty of the small functions of torch that `make bars` runs all of, one or two of each kind.

Kernels are not the point here, so the reference backend runs what is compiled.
"""

from __future__ import annotations

import pytest

from bench.functions import CASES
from bench.torch_functions import check, door_of

THROUGH_OPTIMIZE = (
    "integer_trunc_divide bool_not numbers_and_tensors compare_nan rms_norm_by_hand"
    " linear identity index_from_the_end nothing_to_reduce smallest a_view_of_an_argument"
    " an_argument_in_place a_captured_tensor a_branch_on_a_size item numbers_in_and_out"
    " keyword_arguments no_axes"
).split()
THROUGH_COMPILE = (
    "linear_double attention_bool_mask attention_rows_without_keys conv1d products_of_nothing"
    " the_same_result_twice two_names_for_one_argument a_global_number a_branch_on_a_value"
    " nested_arguments no_tensor_at_all a_gradient"
).split()


REFUSED = {"integer_trunc_divide", "nothing_to_reduce"}
EAGER = {"linear_double", "conv1d", "a_gradient"}


@pytest.mark.parametrize("name", THROUGH_OPTIMIZE)
def test_optimize_is_equal_to_eager_or_says_why_not(name: str) -> None:
    outcome = check(CASES[name], door_of("optimize", "reference"))
    assert outcome.result == ("refused" if name in REFUSED else "equal"), outcome


@pytest.mark.parametrize("name", THROUGH_COMPILE)
def test_torch_compile_is_equal_to_eager(name: str) -> None:
    outcome = check(CASES[name], door_of("compile", "reference"))
    assert outcome.result == ("eager" if name in EAGER else "equal"), outcome


def test_a_difference_is_found() -> None:
    """A door that forgets what was captured, copies views and rounds is caught."""
    import torch

    def wrong(function: object, **_: object) -> object:
        optimised = door_of("optimize", "reference")(function)
        return lambda *args, **kwargs: torch.utils._pytree.tree_map(
            lambda x: x + 1e-3 if isinstance(x, torch.Tensor) else x, optimised(*args, **kwargs)
        )

    for name in ("gelu", "a_view_of_an_argument", "linear"):
        assert check(CASES[name], wrong).result == "different"  # type: ignore[arg-type]
