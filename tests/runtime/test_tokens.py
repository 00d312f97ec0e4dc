"""What a session is given as tokens: shapes, kinds, and the words for what is neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsc.errors import UsageError
from dsc.runtime.tokens import Form, read_ids, read_lengths


@pytest.mark.parametrize(
    ("given", "form", "found", "kind"),
    [
        ([1, 2], "batch", [[1, 2]], None),
        ([[1, 2], [3, 4]], "batch", [[1, 2], [3, 4]], None),
        ((1, 2), "prompt", [[1, 2]], None),
        ([1, 2], "column", [[1], [2]], None),
        ([[1], [2]], "column", [[1], [2]], None),
        (np.array([1, 2], np.int32), "column", [[1], [2]], "numpy"),
        (torch.tensor([[1, 2]], dtype=torch.int32), "batch", [[1, 2]], "torch"),
        ([torch.tensor(1), torch.tensor(2)], "prompt", [[1, 2]], None),
        ([], "prompt", [[]], None),
    ],
)
def test_ids_are_rows_or_a_column(given: Any, form: Form, found: Any, kind: str | None) -> None:
    ids, come = read_ids(given, form)
    assert (ids.tolist(), ids.dtype.str, come) == (found, "<i8", kind)


def test_ids_are_a_copy_in_order() -> None:
    given = np.arange(6).reshape(3, 2).T
    ids, _ = read_ids(given, "batch")
    assert ids.flags.c_contiguous
    ids[0, 0] = 9
    assert given[0, 0] == 0


PROMPT, BATCH, COLUMN = "ids must be int64 [S]", "ids must be int64 [B, S]", "ids must be int64 [B]"
WHOLE = "give whole numbers; pad shorter rows on the right, and give their lengths"
CONVERT = "give a list, an array or a tensor of whole numbers; convert with .astype or .to"
TEXT = "make ids of a text with its tokenizer"


@pytest.mark.parametrize(
    ("given", "form", "words", "hint"),
    [
        (
            [[1, 2]], "prompt", f"{PROMPT}; these have the shape [1, 2]",
            "add prompts one by one, each a row of its own",
        ),
        ([[[1]]], "batch", f"{BATCH}; these have the shape [1, 1, 1]", None),
        (np.array(3), "batch", f"{BATCH}; these have the shape []", None),
        ("abc", "batch", f"{BATCH}; this is 'abc' (str)", TEXT),
        (b"abc", "prompt", f"{PROMPT}; this is b'abc' (bytes)", TEXT),
        (None, "column", f"{COLUMN}; this is None (NoneType)", CONVERT),
        ("x" * 90, "batch", f"{BATCH}; this is '{'x' * 59} (str)", TEXT),
        ([[1], [2, 3]], "batch", f"{BATCH}; its rows differ in length, or hold other", WHOLE),
        ([0.5, 2], "batch", f"{BATCH}; this is a list of float", WHOLE),
        ((1, "a", None), "batch", f"{BATCH}; this is a tuple of NoneType, int, str", WHOLE),
        ([True, 2], "batch", f"{BATCH}; this is a list of bool, int", WHOLE),
        ([[1], [np.True_]], "batch", f"{BATCH}; this is a list of", WHOLE),
        ([2**64, 1], "batch", f"{BATCH}; this is a list of int, some too large for int64", WHOLE),
        (
            np.zeros((1, 2)), "batch",
            f"{BATCH}; this is an array of float64 (<f8) and shape (1, 2)", CONVERT,
        ),
        (
            torch.zeros(1, 2), "batch",
            f"{BATCH}; this is a tensor of torch.float32 and shape [1, 2] on cpu", CONVERT,
        ),
    ],
)  # fmt: skip
def test_what_is_no_ids_is_told_with_what_to_do(
    given: Any, form: Form, words: str, hint: str | None
) -> None:
    with pytest.raises(UsageError) as told:
        read_ids(given, form)
    assert words in str(told.value)
    assert told.value.hint == hint


def test_a_list_of_whole_numbers_has_no_large_ones() -> None:
    with pytest.raises(UsageError) as told:
        read_ids([0.5, 2.0], "batch")
    assert "too large" not in str(told.value)


@pytest.mark.parametrize("given", [[1, 4], (4, 1), np.array([1, 4]), torch.tensor([4, 4]), None])
def test_lengths_are_from_one_to_the_width(given: Any) -> None:
    found = read_lengths(given, 2, 4)
    assert found == ([4, 4] if given is None else list(map(int, given)))
    assert all(type(n) is int for n in found)


@pytest.mark.parametrize("given", [[0, 4], [1, 5], [5, 1], [1], [1, 2, 3], [[1, 2]], []])
def test_lengths_that_cannot_be_are_told_with_the_shape_of_ids(given: Any) -> None:
    with pytest.raises(UsageError) as told:
        read_lengths(given, 2, 4)
    assert f"lengths {given} for ids of shape [2, 4]" in str(told.value)
    assert told.value.hint == "one length a sequence, each from 1 to the width of ids"
