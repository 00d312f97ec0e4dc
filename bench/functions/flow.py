"""How functions are written and called: control flow, scalars, nests, gradients, sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.functions import Door, attempt, case, numbers

Pair = namedtuple("Pair", "left right")


@case("control flow")
def a_branch_on_a_size(door: Door) -> Iterator[Any]:
    """Another way for larger batches."""
    f = door(lambda x: x * 2 if x.shape[0] > 4 else x + 1)
    for rows in (3, 5, 4, 8, 1):
        yield attempt(f, numbers(rows, 2))


@case("control flow")
def a_branch_on_a_value(door: Door) -> Iterator[Any]:
    """Another way where the data says so."""

    def f(x: Tensor) -> Tensor:
        if x.max() > 0.5:
            return x * 2
        return x - 1

    g = door(f)
    for x in (torch.ones(3), torch.zeros(3), torch.ones(4)):
        yield attempt(g, x)


@case("control flow")
def a_loop_over_an_axis(door: Door) -> Iterator[Any]:
    """One step a row."""

    def f(x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[1])
        for row in x:
            state = torch.tanh(state + row)
        return state

    g = door(f)
    for rows in (3, 2, 4):
        yield attempt(g, numbers(rows, 2))


@case("control flow")
def a_loop_until_it_is_small(door: Door) -> Iterator[Any]:
    """`while` on a value."""

    def f(x: Tensor) -> Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x

    g = door(f)
    for by in (0.5, 3.0, 20.0):
        yield attempt(g, torch.full((3,), by))


@case("control flow")
def an_assertion(door: Door) -> Iterator[Any]:
    """An assertion about a size, and an exception raised by hand."""

    def f(x: Tensor) -> Tensor:
        assert x.shape[-1] == 4, "four features"
        if x.dim() > 2:
            raise ValueError("a matrix")
        return x * 2

    g = door(f)
    for shape in ((3, 4), (3, 5), (2, 3, 4)):
        yield attempt(g, numbers(*shape))


@case("control flow")
def try_and_except(door: Door) -> Iterator[Any]:
    """An exception that the function itself catches."""

    def f(d: dict[str, Tensor]) -> Tensor:
        try:
            return d["a"] * 2
        except KeyError:
            return d["b"] + 1

    g = door(f)
    yield attempt(g, {"a": numbers(3)})
    yield attempt(g, {"b": numbers(3)})


@case("control flow")
def a_wrong_shape(door: Door) -> Iterator[Any]:
    """Eager's error for matrices that do not fit, and work afterwards."""
    f = door(lambda a, b: a @ b)
    yield attempt(f, numbers(2, 3), numbers(4, 2))
    yield attempt(f, numbers(2, 4), numbers(4, 2))


@case("control flow")
def recursion(door: Door) -> Iterator[Any]:
    """A function that calls itself."""

    def f(x: Tensor, n: int) -> Tensor:
        return x if n == 0 else f(x * 2, n - 1) + 1

    g = door(f)
    for n in (0, 1, 3):
        yield attempt(g, numbers(3), n)


@case("control flow")
def printing(door: Door) -> Iterator[Any]:
    """A call that Python makes on the way."""
    seen: list[int] = []

    def f(x: Tensor) -> Tensor:
        y = x * 2
        seen.append(len(seen))
        return y + len(seen)

    g = door(f)
    for _ in range(3):
        yield attempt(g, numbers(3)), list(seen)


@case("scalars")
def item(door: Door) -> Iterator[Any]:
    """A Python number comes out."""
    f = door(lambda x: x.sum().item())
    for x in (torch.ones(3), torch.ones(4), torch.arange(4)):
        yield attempt(f, x)


@case("scalars")
def an_item_in_the_middle(door: Door) -> Iterator[Any]:
    """A number out of a tensor, and into the next."""
    f = door(lambda x: x * x.max().item() + x.shape[0])
    for x in (numbers(3), numbers(4), numbers(4) * 2):
        yield attempt(f, x)


@case("scalars")
def numbers_in_and_out(door: Door) -> Iterator[Any]:
    """Integers, floats, bools and None."""
    f = door(lambda x, n, s, flag: (x * n + s, n + 1, s * 2, flag, None, x.dim(), x.shape[0]))
    for n, s, flag in ((1, 0.5, True), (2, 0.5, True), (3, 1.5, False), (4, 2.5, False)):
        yield attempt(f, numbers(3), n, s, flag)


@case("scalars")
def no_tensor_at_all(door: Door) -> Iterator[Any]:
    """Numbers alone, and a tensor made of nothing."""
    f = door(lambda a, b: a * b + 1)
    yield attempt(f, 2, 3)
    yield attempt(f, 2.5, 3)
    g = door(lambda: torch.arange(3) * 2)
    yield attempt(g)
    yield attempt(g)


@case("scalars")
def constants_alone(door: Door) -> Iterator[Any]:
    """A function that ignores what it is given."""
    f = door(lambda x: (3, "text", torch.zeros(2)))
    yield attempt(f, numbers(3))
    yield attempt(f, numbers(4))


@case("scalars")
def unused_arguments(door: Door) -> Iterator[Any]:
    """One of three is read."""
    f = door(lambda a, b, c: b * 2)
    for rows in (3, 4, 5):
        yield attempt(f, numbers(rows), numbers(2), numbers(rows, 7))


@case("scalars")
def sizes_in_the_result(door: Door) -> Iterator[Any]:
    """Sizes as numbers, in a list and in a tensor."""
    f = door(lambda x: (x.shape[0] * 2, list(x.shape), torch.tensor(x.shape[0]), x.numel() / 2))
    for rows in (3, 4, 5):
        yield attempt(f, numbers(rows, 2))


@case("scalars")
def tolist(door: Door) -> Iterator[Any]:
    """A list of numbers."""
    f = door(lambda x: (x * 2).tolist())
    for rows in (3, 2):
        yield attempt(f, torch.arange(rows))


@case("scalars")
def a_numpy_array(door: Door) -> Iterator[Any]:
    """Out to NumPy and back."""
    f = door(lambda x: torch.from_numpy((x * 2).numpy() + 1))
    for rows in (3, 2):
        yield attempt(f, numbers(rows))


@case("nests")
def nested_arguments(door: Door) -> Iterator[Any]:
    """Lists, tuples, dictionaries and named tuples in; the same out."""

    def f(x: list[Tensor], pair: Pair, *, more: dict[str, Any]) -> Any:
        total = x[0] + pair.left * more["by"]
        return {"total": total, "pair": Pair(total * 2, [x[1], {"k": pair.right}])}

    g = door(f)
    for rows in (3, 4):
        given = [numbers(rows), numbers(2)]
        yield attempt(g, given, Pair(numbers(rows, seed=1), None), more={"by": rows, "unused": "s"})


@case("nests")
def keyword_arguments(door: Door) -> Iterator[Any]:
    """By name, by position, by default."""

    def f(x: Tensor, y: Tensor | None = None, *args: Tensor, by: float = 2.0, **rest: Any) -> Any:
        return x * by + (y if y is not None else 0) + sum(args) + sum(rest.values())

    g = door(f)
    a, b = numbers(3), numbers(3, seed=1)
    yield attempt(g, a)
    yield attempt(g, a, b)
    yield attempt(g, y=b, x=a, by=3.0)
    yield attempt(g, a, b, a, by=1.0, more=b)
    yield attempt(g, a, nothing=None)


@case("nests")
def other_containers(door: Door) -> Iterator[Any]:
    """Dataclasses, ordered dictionaries and sets of numbers."""

    @dataclasses.dataclass
    class Both:
        a: Tensor
        b: float

    f = door(lambda both: OrderedDict(z=both.a * both.b, y=both.a))
    yield attempt(f, Both(numbers(3), 2.0))
    yield attempt(f, Both(numbers(3), 3.0))


@case("nests")
def generators_and_comprehensions(door: Door) -> Iterator[Any]:
    """Python on the way: zip, enumerate, comprehensions, f-strings."""

    def f(xs: list[Tensor]) -> Any:
        named = {f"x{i}": x * i for i, x in enumerate(xs)}
        return named, [a + b for a, b in itertools.pairwise(xs)], max(x.dim() for x in xs)

    g = door(f)
    yield attempt(g, [numbers(3), numbers(3, seed=1)])
    yield attempt(g, [numbers(3), numbers(3, seed=1), numbers(3, seed=2)])


@case("nests")
def functions_that_call_functions(door: Door) -> Iterator[Any]:
    """An optimised function inside another, and one that is passed in."""
    inner = door(lambda x: x * 2)
    f = door(lambda x, g: g(inner(x)) + 1)
    yield attempt(f, numbers(3), torch.tanh)
    yield attempt(f, numbers(3), torch.exp)


@case("nests")
def strings_choose(door: Door) -> Iterator[Any]:
    """A string argument and an element type."""
    f = door(lambda x, mode, dtype: getattr(x, mode)(-1).to(dtype))
    yield attempt(f, numbers(3, 4), "sum", torch.float64)
    yield attempt(f, numbers(3, 4), "amax", torch.float64)
    yield attempt(f, numbers(3, 4), "amax", torch.int32)


@case("gradients")
def a_gradient(door: Door) -> Iterator[Any]:
    """Backward through a function."""
    f = door(lambda x, w: (torch.tanh(x @ w) ** 2).sum())
    for rows in (3, 4):
        w = numbers(2, 2).requires_grad_()
        loss = attempt(f, numbers(rows, 2), w)
        yield loss, loss.requires_grad
        loss.backward()
        yield w.grad


@case("gradients")
def grad_mode_changes(door: Door) -> Iterator[Any]:
    """With gradients, without, with."""
    w = numbers(3).requires_grad_()
    f = door(lambda x: x * w)
    for enabled in (True, False, True):
        with torch.set_grad_enabled(enabled):
            y = attempt(f, numbers(3))
            yield y, y.requires_grad
    with torch.inference_mode():
        yield attempt(f, numbers(3))


@case("gradients")
def no_grad_inside(door: Door) -> Iterator[Any]:
    """A part without gradients."""

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().max()
        return (x / scale).sum() + x.detach().sum()

    g = door(f)
    x = numbers(3).requires_grad_()
    y = attempt(g, x)
    y.backward()
    yield y, x.grad


@case("gradients")
def training_steps(door: Door) -> Iterator[Any]:
    """Three steps of a small network, and an evaluation."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    f = door(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for i in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(f(numbers(5, 4, seed=i)), numbers(5, 2, seed=i))
        loss.backward()
        optimizer.step()
        yield loss
    net.eval()
    with torch.no_grad():
        yield f(numbers(5, 4))


@case("gradients")
def train_and_eval(door: Door) -> Iterator[Any]:
    """The training flag is looked at in every call."""
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.0))
    f = door(net)
    with torch.no_grad():
        for training in (False, True, False, True):
            net.train(training)
            yield attempt(f, numbers(6, 4))
            yield net[0].running_mean


@case("gradients")
def inference_mode(door: Door) -> Iterator[Any]:
    """Inference tensors in and out."""
    net = nn.Linear(4, 3)
    with torch.no_grad():
        net.weight.fill_(0.5)
        net.bias.fill_(0.1)
    f = door(net)
    with torch.inference_mode():
        y = attempt(f, numbers(3, 4))
        yield y, y.is_inference()


@case("gradients")
def requires_grad_of_results(door: Door) -> Iterator[Any]:
    """Parameters make a result that asks for gradients."""
    torch.manual_seed(1)
    f = door(nn.Linear(4, 3))
    y = attempt(f, numbers(3, 4))
    yield y, y.requires_grad, y.is_leaf


@case("sizes")
def many_batches(door: Door) -> Iterator[Any]:
    """A batch of every size up to nine, and a large one."""
    f = door(lambda x, w: F.linear(x, w).relu())
    for rows in (*range(1, 10), 100, 0):
        yield attempt(f, numbers(rows, 4), numbers(3, 4))


@case("sizes")
def two_sizes_that_may_agree(door: Door) -> Iterator[Any]:
    """Two axes equal at first, different later."""
    f = door(lambda x, y: (x[:, None] * y[None]).sum(-1))
    for a, b in ((4, 4), (3, 5), (6, 6), (2, 1)):
        yield attempt(f, numbers(a, 2), numbers(b, 2))


@case("sizes")
def element_types_in_turn(door: Door) -> Iterator[Any]:
    """One function for each element type."""
    f = door(lambda x: x * 2 + 1)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.float32):
        yield attempt(f, numbers(3, 4, dtype=dtype))


@case("sizes")
def layouts_in_turn(door: Door) -> Iterator[Any]:
    """Contiguous, transposed, strided, expanded, part of something larger."""
    f = door(lambda x: (x * 2, x.sum(0), x @ x.mT))
    x = numbers(4, 4)
    for given in (x, x.t(), numbers(8, 4)[::2], x[:1].expand(4, 4), numbers(6, 6)[1:5, 2:]):
        yield attempt(f, given)


@case("sizes")
def a_size_that_is_computed(door: Door) -> Iterator[Any]:
    """Reshapes by arithmetic on sizes."""
    f = door(lambda x: x.reshape(x.shape[0] // 2, 2, -1).sum(1).repeat(2, 1)[: x.shape[0] - 1])
    for rows in (4, 6, 8, 2):
        yield attempt(f, numbers(rows, 3))
