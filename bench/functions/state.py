"""What surrounds a function: whose memory results are in, mutation, captured values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.functions import Door, attempt, case, numbers, place_of

K = torch.ones(4)
SCALE = 2.0
SETTINGS: dict[str, Any] = {"shift": 1.0}


def _views(door: Door, function: Any, x: Tensor) -> Iterator[Any]:
    """Call, see whose memory the result is in, write to it, and look at the argument."""
    f = door(function)
    for _ in range(2):
        result = attempt(f, x)
        yield result
        leaves = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
        yield [place_of(r, x) for r in leaves]
        for each in leaves:
            each.fill_(7)
        yield x


@case("aliases")
def an_argument_itself(door: Door) -> Iterator[Any]:
    """The result is the argument, the same object."""
    f = door(lambda x: x)
    for rows in (3, 4, 5):
        x = numbers(rows, 2)
        yield f(x) is x
    yield from _views(door, lambda x: x, numbers(3, 2))


@case("aliases")
def a_view_of_an_argument(door: Door) -> Iterator[Any]:
    """A row."""
    yield from _views(door, lambda x: x[0], numbers(3, 2))


@case("aliases")
def views_and_values(door: Door) -> Iterator[Any]:
    """A view, a copy and something computed."""
    yield from _views(door, lambda x: (x[1:], x.clone(), x * 2, x.t()), numbers(3, 2))


@case("aliases")
def the_same_result_twice(door: Door) -> Iterator[Any]:
    """One computed tensor returned under two names stays one tensor."""

    def f(x: Tensor) -> Any:
        y = x * 2
        return y, y, y[0]

    g = door(f)
    for rows in (3, 4):
        a, b, c = g(numbers(rows, 2))
        yield a is b, place_of(c, a)
        a.add_(1)
        yield a, b, c


@case("aliases")
def results_do_not_share_between_calls(door: Door) -> Iterator[Any]:
    """A second call leaves the first call's result alone."""
    f = door(lambda x: (x * 2, torch.ones(3)))
    first = f(numbers(3))
    second = f(numbers(3) + 1)
    yield first, second
    first[1].zero_()
    yield second, f(numbers(3))


@case("aliases")
def two_arguments_that_overlap(door: Door) -> Iterator[Any]:
    """The same tensor twice, and two parts of one."""
    f = door(lambda x, y: (x + y, x * 2))
    x = numbers(6, 2)
    yield f(x, x)
    yield f(x[:4], x[2:])
    yield f(x[:3], x[:3])


@case("aliases")
def contiguous_is_itself(door: Door) -> Iterator[Any]:
    """`contiguous`, `to` and `reshape` copy or not, as eager does."""
    f = door(lambda x: (x.contiguous(), x.to(torch.float32), x.reshape(-1)))
    for x in (numbers(3, 2), numbers(3, 2).t(), numbers(4, 2)):
        found = f(x)
        yield found
        yield [place_of(r, x) for r in found]


@case("aliases")
def detached(door: Door) -> Iterator[Any]:
    """`detach` shares memory."""
    yield from _views(door, lambda x: x.detach(), numbers(3))


@case("aliases")
def a_constant_returned(door: Door) -> Iterator[Any]:
    """A captured tensor comes back as itself, and writing to it is seen next time."""
    table = torch.ones(3)
    f = door(lambda x: (x + table, table))
    _, same = f(numbers(3))
    yield same is table
    same.mul_(4)
    yield f(numbers(3))


@case("mutation")
def an_argument_in_place(door: Door) -> Iterator[Any]:
    """Added to, and returned."""
    f = door(lambda x: x.add_(1))
    for rows in (3, 4, 4):
        x = numbers(rows, 2)
        y = attempt(f, x)
        yield y, x, y is x


@case("mutation")
def part_of_an_argument(door: Door) -> Iterator[Any]:
    """One row is set, something else returned."""

    def f(x: Tensor) -> Tensor:
        x[0] = 5
        x[:, 1] *= 2
        return x.sum()

    g = door(f)
    for x in (numbers(3, 2), numbers(4, 2), numbers(2, 3).t()):
        yield attempt(g, x), x


@case("mutation")
def a_clone_in_place(door: Door) -> Iterator[Any]:
    """Writes to a copy leave the argument alone."""

    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[1:] += x[:-1]
        y.relu_()
        return y

    g = door(f)
    for rows in (3, 4):
        x = numbers(rows, 2)
        yield attempt(g, x), x


@case("mutation")
def a_view_in_place(door: Door) -> Iterator[Any]:
    """A view of an argument is written to, in a function that returns nothing."""

    def f(x: Tensor) -> None:
        x.view(-1)[::2].zero_()

    g = door(f)
    for rows in (3, 4):
        x = numbers(rows, 2)
        yield attempt(g, x), x


@case("mutation")
def two_names_for_one_argument(door: Door) -> Iterator[Any]:
    """What is written through one argument is read through the other."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return y + 1

    g = door(f)
    x = numbers(3)
    yield attempt(g, x, numbers(3, seed=5)), x
    yield attempt(g, x, x), x
    yield attempt(g, x[:2], x[1:]), x


@case("mutation")
def a_captured_tensor_in_place(door: Door) -> Iterator[Any]:
    """A counter outside of the function."""
    counter = torch.zeros(())

    def f(x: Tensor) -> Tensor:
        counter.add_(1)
        return x * counter

    g = door(f)
    for _ in range(3):
        yield attempt(g, numbers(3)), counter


@case("mutation")
def a_list_is_filled(door: Door) -> Iterator[Any]:
    """Tensors appended to a list of the caller."""
    kept: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        kept.append(x * 2)
        return x + 1

    g = door(f)
    for _ in range(3):
        yield attempt(g, numbers(3)), list(kept)


@case("mutation")
def a_dictionary_is_changed(door: Door) -> Iterator[Any]:
    """An argument that is a dictionary gets a new key."""

    def f(d: dict[str, Tensor]) -> Tensor:
        d["sum"] = d["a"] + d["b"]
        return d["sum"] * 2

    g = door(f)
    for _ in range(2):
        d = {"a": numbers(3), "b": numbers(3, seed=1)}
        yield attempt(g, d), d


@case("mutation")
def an_attribute_is_set(door: Door) -> Iterator[Any]:
    """A module that remembers its last input."""

    class Last(nn.Module):
        last: Any = None

        def forward(self, x: Tensor) -> Tensor:
            before = self.last
            self.last = x
            return x if before is None else x + before

    net = Last()
    f = door(net)
    for i in range(3):
        yield attempt(f, numbers(3, seed=i))
        yield net.last


@case("mutation")
def out_argument(door: Door) -> Iterator[Any]:
    """`out=` writes to a tensor of the caller."""
    f = door(lambda x, y: torch.add(x, 1, out=y))
    for _ in range(2):
        y = torch.empty(3)
        yield attempt(f, numbers(3), y), y


@case("mutation")
def an_expanded_argument(door: Door) -> Iterator[Any]:
    """Writing to a tensor whose elements share memory is eager's error."""
    f = door(lambda x: x.add_(1))
    yield attempt(f, torch.zeros(1, 2).expand(3, 2))


@case("mutation")
def resized_in_place(door: Door) -> Iterator[Any]:
    """The shape of an argument changes."""
    f = door(lambda x: x.unsqueeze_(0).mul_(2))
    for _ in range(2):
        x = numbers(3)
        yield attempt(f, x), x


@case("captured")
def a_captured_tensor(door: Door) -> Iterator[Any]:
    """Changed in place, bound anew, of another shape."""
    value = torch.ones(4)

    def f(x: Tensor) -> Tensor:
        return x * value

    g = door(f)
    yield attempt(g, numbers(3, 4))
    value.mul_(5)
    yield attempt(g, numbers(3, 4))
    value = torch.full((4,), 3.0)
    yield attempt(g, numbers(3, 4))
    value = torch.full((3, 1), 2.0, dtype=torch.float64)
    yield attempt(g, numbers(3, 4))


@case("captured")
def a_global_tensor(door: Door) -> Iterator[Any]:
    """A tensor of the module, bound anew."""
    global K
    K = torch.ones(4)
    f = door(lambda x: x * K)
    yield attempt(f, numbers(3, 4))
    K.mul_(5)
    yield attempt(f, numbers(3, 4))
    K = torch.full((4,), 7.0)
    yield attempt(f, numbers(3, 4))


@case("captured")
def a_global_number(door: Door) -> Iterator[Any]:
    """A number of the module, changed between calls."""
    global SCALE
    f = door(lambda x: x * SCALE)
    for value in (2.0, 3.0, 3.0, 4.5):
        SCALE = value
        yield attempt(f, numbers(3))


@case("captured")
def a_captured_number(door: Door) -> Iterator[Any]:
    """A counter in the enclosing function."""
    count = 0
    f = door(lambda x: x + count)
    for _ in range(4):
        count += 1
        yield attempt(f, numbers(3))


@case("captured")
def a_dictionary_of_settings(door: Door) -> Iterator[Any]:
    """A value in a dictionary, and a key that comes later."""
    f = door(lambda x: x * SETTINGS.get("gain", 1.0) + SETTINGS["shift"])
    SETTINGS.clear()
    SETTINGS["shift"] = 1.0
    yield attempt(f, numbers(3))
    SETTINGS["shift"] = 2.0
    yield attempt(f, numbers(3))
    SETTINGS["gain"] = -1.0
    yield attempt(f, numbers(3))


@case("captured")
def a_captured_list(door: Door) -> Iterator[Any]:
    """A list of tensors that grows."""
    parts = [torch.ones(3)]
    f = door(lambda x: sum((p * x for p in parts), x))
    for _ in range(3):
        yield attempt(f, numbers(3))
        parts.append(torch.full((3,), 2.0))


@case("captured")
def a_replaced_parameter(door: Door) -> Iterator[Any]:
    """Weights written in place, through `.data`, replaced, loaded."""
    torch.manual_seed(2)
    net = nn.Linear(3, 2)
    f = door(net)
    with torch.no_grad():
        yield attempt(f, numbers(4, 3))
        net.weight.add_(1)
        yield attempt(f, numbers(4, 3))
        net.weight.data.mul_(2)
        yield attempt(f, numbers(4, 3))
        net.weight = nn.Parameter(torch.ones(2, 3))
        yield attempt(f, numbers(4, 3))
        net.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
        yield attempt(f, numbers(4, 3))


@case("captured")
def a_flag_of_a_module(door: Door) -> Iterator[Any]:
    """A Python attribute that chooses the way."""

    class Gate(nn.Module):
        on = True

        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if self.on else x - 1

    net = Gate()
    f = door(net)
    for net.on in (True, False, True):
        yield attempt(f, numbers(3))


@case("captured")
def a_method(door: Door) -> Iterator[Any]:
    """A bound method of a plain object, whose state changes."""

    class Box:
        def __init__(self) -> None:
            self.by = torch.ones(3)

        def times(self, x: Tensor) -> Tensor:
            return x * self.by

    box = Box()
    f = door(box.times)
    yield attempt(f, numbers(3))
    box.by = torch.full((3,), 4.0)
    yield attempt(f, numbers(3))
