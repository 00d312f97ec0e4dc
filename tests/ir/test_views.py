"""Views: where their elements lie, against NumPy's own views of the same memory."""

from __future__ import annotations

import random
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest

from dsc.ir import views
from dsc.ir.dims import Dim, symbol
from dsc.ir.types import DType, TensorType
from dsc.ir.views import View

Positions = npt.NDArray[np.int64]
N = symbol("N")


def view_of(array: Positions) -> View:
    """The view whose elements lie where an array of positions says, by the array's strides."""
    strides = tuple(s // array.itemsize for s in array.strides)
    return View(7, TensorType(DType.f32, array.shape), strides, int(array.flat[0]))


def positions(view: View) -> Positions:
    """Where each element lies in its buffer."""
    shape = [int(str(d)) for d in view.shape]
    found = np.full(shape, int(str(view.offset)))
    for axis, stride in enumerate(view.strides):
        along = [-1 if a == axis else 1 for a in range(len(shape))]
        found += np.arange(shape[axis]).reshape(along) * int(str(stride))
    return found


def random_array(rng: random.Random) -> Positions:
    """A part of a dense buffer, its axes in any order, some of them broadcast."""
    shape = [rng.choice((1, 2, 3, 4)) for _ in range(rng.randint(1, 4))]
    array = np.arange(np.prod(shape)).reshape(shape)
    for axis, extent in enumerate(shape):
        start = rng.choice((0, 0, 0, extent - 1))
        array = array[(slice(None),) * axis + (slice(start, None, rng.choice((1, 1, 2))),)]
    array = array.transpose(rng.choice(list(permutations(range(array.ndim)))))
    if rng.random() < 0.2:
        array = np.broadcast_to(array, (2, *array.shape))
    return array


RNG = random.Random(0)
ARRAYS = [random_array(RNG) for _ in range(250)]


def test_views_move_elements_as_numpy_does() -> None:
    for array in ARRAYS:
        view, rank = view_of(array), array.ndim
        assert np.array_equal(positions(view), array)
        order = RNG.sample(range(rank), rank)
        turned = views.permute(view, order)
        assert np.array_equal(positions(turned), array.transpose(order))
        wide = (3, *(4 if d == 1 else d for d in array.shape))
        assert np.array_equal(positions(views.expand(view, wide)), np.broadcast_to(array, wide))
        axis = RNG.randrange(-rank, rank)
        start, step = RNG.randrange(array.shape[axis]), RNG.choice((1, 2))
        part = np.moveaxis(np.moveaxis(array, axis, 0)[start::step], 0, axis)
        narrow = views.narrow(turned.strided(view.shape, view.strides), axis, start,
                              part.shape[axis], step)  # fmt: skip
        assert np.array_equal(positions(narrow), part)
        assert narrow.buffer == 7


def test_a_reshape_is_a_view_where_numpy_needs_no_copy() -> None:
    needed = []
    for array in ARRAYS:
        sizes = [d for d in (1, 2, 3, 4, 6, 8, 12) if array.size % d == 0]
        first = RNG.choice(sizes)
        second = RNG.choice([d for d in sizes if array.size % (first * d) == 0])
        for shape in ((first, second, array.size // first // second), (array.size,)):
            made = views.reshape(view_of(array), shape)
            same = array.view()
            try:
                same.shape = shape
            except AttributeError:
                needed.append(shape)
                assert made is None
                continue
            assert made is not None
            assert np.array_equal(positions(made), same)
    assert 50 < len(needed) < 400


def test_what_is_said_of_a_view_is_so() -> None:
    for array in ARRAYS:
        view, flat = view_of(array), array.ravel()
        assert views.extent(view) == flat.max() - flat.min() + 1
        assert view.is_dense == np.array_equal(flat, flat[0] + np.arange(flat.size))
        row = array.reshape(-1, array.shape[-1])[0]
        assert views.has_unit_rows(view) == np.array_equal(row, row[0] + np.arange(row.size))
        for axes in range(array.ndim + 1):
            lead = array.reshape(*array.shape[:axes], -1)[..., 0].ravel()
            gaps = set(np.diff(lead).tolist())
            folded = views.fold(view, axes)
            assert (folded is None) == (len(gaps) > 1)
            assert folded is None or folded == (lead.size, *(gaps or (folded[1],)))


def test_axes_of_symbolic_extent_merge_and_are_cut_by_their_factors() -> None:
    dense = View(0, TensorType(DType.f32, (N, 6, 4)), (24, 4, 1))
    for shape, strides in (
        ((N * 6, 4), (4, 1)),
        ((N, 24), (24, 1)),
        ((N, 2, 1, 12), (24, 12, 0, 1)),
        ((N * 24,), (1,)),
        ((N, 3, 8), (24, 8, 1)),
    ):
        made = views.reshape(dense, shape)
        assert made is not None
        assert (made.shape, made.strides) == (shape, strides)
    apart = View(0, TensorType(DType.f32, (N, 6, 4)), (30, 5, 1))
    assert views.reshape(apart, (N, 24)) is None
    assert views.reshape(dense, (N, 6)) is None
    assert views.reshape(dense, (N, 6, 4, 2)) is None


@pytest.mark.parametrize(
    ("axes", "joined"),
    [
        ([], []),
        ([(1, 9), (1, 1)], []),
        ([(2, 12), (3, 4), (4, 1)], [(24, 1)]),
        ([(2, 13), (3, 4), (4, 1)], [(2, 13), (12, 1)]),
        ([(2, 12), (1, 7), (3, 4), (4, 2)], [(6, 4), (4, 2)]),
        ([(N, 12), (12, 1)], [(N * 12, 1)]),
    ],
)
def test_neighbouring_axes_are_joined_where_evenly_spaced(
    axes: list[tuple[Dim, Dim]], joined: list[tuple[Dim, Dim]]
) -> None:
    assert views.joined(axes) == joined
