"""What a session is given: tokens and lengths, of any kind, and limits; or an error in words.

NumPy is the form that all kinds share: it reads lists, and torch tensors that have values on some
device become its arrays. What either refuses is the user's mistake, told as such.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from dsc.errors import UsageError
from dsc.ir.arrays import Kind, array_of, extremes, is_tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsc.ir.program import Program

Form: TypeAlias = Literal["batch", "prompt", "column"]
TYPES = (np.dtype(np.int64), np.dtype(np.int32))


def read_ids(ids: Any, form: Form) -> tuple[NDArray[np.int64], Kind | None]:
    """Token ids as an int64 array [B, S], and the kind that came; `None`: lists, of neither.

    One axis is a sequence, [1, S], and all that a "prompt" may have; in a "column" it is one token
    of each, [B, 1]. The array is a copy: views of any order will do. Raises `UsageError`.
    """
    shape = {"batch": "[B, S]", "prompt": "[S]", "column": "[B]"}[form]
    found = _integers(ids, f"ids must be int64 {shape}")
    if not 1 <= found.ndim <= (1 if form == "prompt" else 2):
        raise UsageError(
            f"ids must be int64 {shape}; these have the shape {list(found.shape)}",
            hint="add prompts one by one, each a row of its own" if form == "prompt" else None,
        )
    if found.ndim == 1:
        found = found[:, None] if form == "column" else found[None]
    if isinstance(ids, list | tuple):
        return found, None
    return found, "torch" if is_tensor(ids) else "numpy"


def read_lengths(lengths: Any, batch: int, size: int) -> list[int]:
    """How many of `size` tokens each of `batch` sequences has, [B]; `None`: all of them.

    Raises `UsageError`.
    """
    if lengths is None:
        return [size] * batch
    found = _integers(lengths, "lengths must be int64 [B]")
    low, high = extremes(found) if found.shape == (batch,) else (0, 0)
    if low < 1 or high > size:
        raise UsageError(
            f"lengths {found.tolist()} for ids of shape [{batch}, {size}]",
            hint="one length a sequence, each from 1 to the width of ids",
        )
    return [int(n) for n in found]


def _integers(given: Any, wanted: str) -> NDArray[np.int64]:
    """A new int64 array of whole numbers. Raises `UsageError`, which begins with `wanted`."""
    listed = isinstance(given, list | tuple)
    try:
        with warnings.catch_warnings() if listed else nullcontext():
            if listed:  # how NumPy would have to be asked by a tensor in a list
                warnings.simplefilter("ignore")
            found = array_of(given.detach().cpu() if is_tensor(given) else given)
    except (TypeError, ValueError, RuntimeError, OverflowError, BufferError, LookupError):
        raise UsageError(f"{wanted}; {_kind(given)}", hint=_todo(given)) from None
    if listed and _holds_truth(given):  # NumPy takes it for 0 or 1 where it stands among numbers
        found = np.asarray(given, dtype=object)
    if found.size and found.dtype not in TYPES:
        raise UsageError(f"{wanted}; {_kind(given, found)}", hint=_todo(given))
    return np.array(found, dtype=np.int64, order="C", subok=False)


def _holds_truth(given: Any) -> bool:
    """Whether a list has a truth value in it."""
    if isinstance(given, list | tuple):
        return any(map(_holds_truth, given))
    return isinstance(given, bool) or str(getattr(given, "dtype", "")) in ("bool", "torch.bool")


def _kind(given: Any, found: NDArray[Any] | None = None) -> str:
    """What was given, as the second half of a sentence."""
    if is_tensor(given):
        return f"this is a tensor of {given.dtype} and shape {list(given.shape)} on {given.device}"
    if isinstance(given, np.ndarray):
        return f"this is an array of {given.dtype} ({given.dtype.str}) and shape {given.shape}"
    if not isinstance(given, list | tuple):
        return f"this is {given!r:.60} ({type(given).__name__})"
    if found is None:
        return "its rows differ in length, or hold other things than numbers"
    kinds = sorted({type(each).__name__ for each in found.astype(object).flat})
    large = "" if set(kinds) != {"int"} else ", some too large for int64"
    return f"this is a {type(given).__name__} of {', '.join(kinds)}{large}"


def _todo(given: Any) -> str:
    """What to do about it."""
    if isinstance(given, str | bytes):
        return "make ids of a text with its tokenizer"
    if isinstance(given, list | tuple):
        return "give whole numbers; pad shorter rows on the right, and give their lengths"
    return "give a list, an array or a tensor of whole numbers; convert with .astype or .to"


def check_limit(option: str, wanted: object, most: int) -> None:
    """Raise `UsageError` unless 1 <= `wanted` <= `most`, what a model was compiled for."""
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
        raise UsageError(f"{option} is {wanted!r}", hint=f"give a whole number, 1 to {most}")
    if not 1 <= wanted <= most:
        larger = f"; compile it with a larger {option}" if wanted > most else ""
        raise UsageError(
            f"{option} is {wanted}", hint=f"the model was compiled for 1 to {most}{larger}"
        )


def check_limits(program: Program, max_batch: int, max_context: int) -> None:
    """Raise `UsageError` beyond what a causal language model was compiled for."""
    if not program.is_causal_lm:
        raise UsageError(
            f"{program.name} is no causal language model",
            hint="run its entries with CompiledModel.run(inputs, entry)",
        )
    check_limit("max_batch", max_batch, program.limits.max_batch)
    check_limit("max_context", max_context, program.limits.max_context)
