"""Thirty of the small functions of torch that `make bars` runs all of, one or two of each kind.

Kernels are not the point here, so the reference backend runs what is compiled.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dsc
from bench.functions import CASES
from bench.torch_functions import check, door_of

THROUGH_OPTIMIZE = (
    "integer_trunc_divide bool_not numbers_and_tensors compare_nan rms_norm_by_hand"
    " linear identity index_from_the_end nothing_to_reduce smallest a_view_of_an_argument"
    " an_argument_in_place a_captured_tensor a_branch_on_a_size item numbers_in_and_out"
    " keyword_arguments no_axes masks_in_place_of_indices"
).split()
THROUGH_COMPILE = (
    "linear_double attention_bool_mask attention_rows_without_keys conv1d products_of_nothing"
    " the_same_result_twice two_names_for_one_argument a_global_number a_branch_on_a_value"
    " nested_arguments no_tensor_at_all a_gradient"
).split()


REFUSED = {"integer_trunc_divide", "nothing_to_reduce", "masks_in_place_of_indices"}
EAGER = {"conv1d", "a_gradient"}


@pytest.mark.parametrize("name", THROUGH_OPTIMIZE)
def test_optimize_is_equal_to_eager_or_says_why_not(name: str) -> None:
    outcome = check(CASES[name], door_of("optimize", "reference"))
    assert outcome.result == ("refused" if name in REFUSED else "equal"), outcome


@pytest.mark.parametrize("name", THROUGH_COMPILE)
def test_torch_compile_is_equal_to_eager(name: str) -> None:
    outcome = check(CASES[name], door_of("compile", "reference"))
    assert outcome.result == ("eager" if name in EAGER else "equal"), outcome


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_have_the_types_of_eager_in_every_precision(dtype: torch.dtype) -> None:
    def norms(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        image = x.view(2, 4, 4)
        return (
            F.layer_norm(x, (16,)),
            F.layer_norm(x, (16,), w.float(), w.float()),
            *torch.native_layer_norm(x, [16], w, w, 1e-5),
            F.group_norm(image, 2, w[:4], w[:4]),
            *torch.native_group_norm(image, w[:4], None, 2, 4, 4, 2, 1e-5),
            F.batch_norm(image, w[:4], w[4:8].abs() + 1),
            F.instance_norm(image),
            F.rms_norm(x, (16,), w),
            F.softmax(x, -1),
            F.log_softmax(x, -1),
            F.log_softmax(x, -1, dtype=torch.float32),
            *torch.var_mean(x, -1),
        )

    x, w = torch.randn(2, 16).to(dtype), torch.randn(16).to(dtype)
    found = dsc.optimize(backend="reference")(norms)(x, w)
    rounding = 4 * torch.finfo(dtype).eps
    for y, expected in zip(found, norms(x, w), strict=True):
        torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding)


def test_a_difference_is_found() -> None:
    """A door that forgets what was captured, copies views and rounds is caught."""

    def wrong(function: object, **_: object) -> object:
        optimised = door_of("optimize", "reference")(function)
        return lambda *args, **kwargs: torch.utils._pytree.tree_map(
            lambda x: x + 1e-3 if isinstance(x, torch.Tensor) else x, optimised(*args, **kwargs)
        )

    for name in ("gelu", "a_view_of_an_argument", "linear"):
        assert check(CASES[name], wrong).result == "different"  # type: ignore[arg-type]
