"""Modules and functions of torch.nn: layers, attention, losses, small models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.functions import Door, add, attempt, case, numbers, over

X, Y = numbers(6, 4), numbers(6, 4, seed=1)


def module(
    name: str, make: Callable[[], nn.Module], *shapes: Sequence[int], training: bool = False
) -> None:
    """Register a module in eval mode, called under no_grad with inputs of these shapes."""

    def script(door: Door) -> Iterator[Any]:
        torch.manual_seed(1)
        net = make().train(training)
        f = door(net)
        with torch.no_grad():
            for shape in shapes:
                yield attempt(f, numbers(*shape))
            for parameter in net.parameters():
                parameter.mul_(0.5)
            yield attempt(f, numbers(*shapes[0]))

    add(name, "modules", script)


module("linear", lambda: nn.Linear(4, 3), (6, 4), (5, 4), (2, 3, 4))
module("linear_without_bias", lambda: nn.Linear(4, 3, bias=False), (6, 4), (0, 4))
module("linear_double", lambda: nn.Linear(4, 3).double(), (6, 4))
module("linear_of_a_vector", lambda: nn.Linear(4, 3), (4,))
module("bilinear_mlp", lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), (6, 4))
module("nested_sequence", lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh()), (2, 4))
module("identity", nn.Identity, (6, 4), (5, 4))
module("layer_norm", lambda: nn.LayerNorm(4), (6, 4), (5, 4))
module("layer_norm_two_axes", lambda: nn.LayerNorm((3, 4)), (2, 3, 4))
module("rms_norm", lambda: nn.RMSNorm(4), (6, 4), (5, 4))
module("group_norm", lambda: nn.GroupNorm(2, 4), (2, 4, 5))
module("batch_norm_in_eval", lambda: nn.BatchNorm1d(4), (6, 4), (5, 4))
module("batch_norm_in_training", lambda: nn.BatchNorm1d(4), (6, 4), (5, 4), training=True)
module("instance_norm", lambda: nn.InstanceNorm1d(4), (2, 4, 5))
module("dropout_in_eval", lambda: nn.Dropout(0.5), (6, 4))
module("dropout_in_training", lambda: nn.Dropout(0.5), (6, 4), training=True)
module("prelu", lambda: nn.PReLU(4), (6, 4))
module("glu", lambda: nn.GLU(), (6, 4))
module("softmax_layer", lambda: nn.Softmax(-1), (6, 4), (6, 5))
module("conv1d", lambda: nn.Conv1d(4, 3, 3, padding=1), (2, 4, 5), (2, 4, 6))
module("conv2d", lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()), (1, 3, 5, 5))
module("conv_transpose", lambda: nn.ConvTranspose1d(4, 3, 2), (2, 4, 5))
module("max_pool", lambda: nn.MaxPool1d(2), (2, 4, 6))
module("average_pool", lambda: nn.AdaptiveAvgPool1d(1), (2, 4, 6))
module("upsample", lambda: nn.Upsample(scale_factor=2), (1, 2, 3))
module("lstm", lambda: nn.LSTM(4, 3, batch_first=True), (2, 5, 4))
module("gru_cell", lambda: nn.GRUCell(4, 3), (2, 4))
module("multihead_attention", lambda: _SelfAttention(), (2, 5, 8), (2, 6, 8))
module("encoder_layer", lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8))
module("cosine", lambda: _Two(nn.CosineSimilarity(-1)), (6, 4))
module("pixel_shuffle", lambda: nn.PixelShuffle(2), (1, 4, 2, 2))
module("flatten_layer", lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (2, 3, 4))
module("shared_weights", lambda: _Shared(), (6, 4), (5, 4))
module("buffers", lambda: _Counting(), (6, 4), (5, 4))


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to itself."""
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class _Two(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The inner module of x and its reverse."""
        return self.inner(x, x.flip(0))  # type: ignore[no-any-return]


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        """One weight under two names."""
        return self.b(self.a(x))  # type: ignore[no-any-return]


class _Counting(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Count calls in a buffer."""
        self.calls += 1
        return x * self.calls


over("losses", "mse_loss", lambda x, y: F.mse_loss(x, y), X, Y)
over("losses", "l1_loss", lambda x, y: F.l1_loss(x, y, reduction="none"), X, Y)
over("losses", "smooth_l1_loss", F.smooth_l1_loss, X, Y)
over("losses", "kl_div", lambda x, y: F.kl_div(x.log_softmax(-1), y.softmax(-1)), X, Y)
over(
    "losses",
    "cross_entropy",
    lambda x: F.cross_entropy(x, torch.arange(len(x)) % 4),
    X,
    variants=("f64", "strided"),
)
over(
    "losses",
    "binary_cross_entropy",
    lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()),
    X,
    Y,
)
over("losses", "cosine_similarity", lambda x, y: F.cosine_similarity(x, y, dim=-1), X, Y)
over("layers", "gelu_by_tanh", lambda x: F.gelu(x, approximate="tanh"), X)
over("layers", "swiglu", lambda x: F.silu(x[:, :2]) * x[:, 2:], X)
over("layers", "rms_norm_by_hand", lambda x: x * (x.pow(2).mean(-1, True) + 1e-6).rsqrt(), X)
over("layers", "gumbel_like", lambda x: -torch.log(-torch.log(x.sigmoid())), X)
over("random", "rand_like", lambda x: x + torch.rand_like(x), X, variants=())
over("random", "dropout_of_a_function", lambda x: F.dropout(x, 0.5, training=True), X, variants=())
over("random", "bernoulli", lambda x: torch.bernoulli(x.sigmoid()), X, variants=())
over("linear algebra", "svd", lambda x: torch.linalg.svdvals(x), X, variants=("f64",))
over(
    "linear algebra",
    "solve",
    lambda x: torch.linalg.solve(x[:4] + 9 * torch.eye(4), x.t()),
    X,
    variants=("f64",),
)
over("linear algebra", "det", lambda x: (x.t() @ x).det(), X, variants=("f64",))
over("linear algebra", "fft", lambda x: torch.fft.rfft(x).abs(), X, variants=("f64",))

Q = (2, 4, 5, 8)


def attention(name: str, *more: Any, kv: Sequence[int] = Q, **options: Any) -> None:
    """Register scaled_dot_product_attention with these arguments after q, k, v."""

    def script(door: Door) -> Iterator[Any]:
        f = door(lambda q, k, v, *given: F.scaled_dot_product_attention(q, k, v, *given, **options))
        q, k, v = numbers(*Q), numbers(*kv, seed=1), numbers(*kv, seed=2)
        yield attempt(f, q, k, v, *more)
        yield attempt(f, q * 2, k, v, *more)
        if not more:
            for new in (3, 0, 1):
                yield attempt(f, q[:, :, :new], k[:, :, :3], v[:, :, :3])
            yield attempt(f, q.double(), k.double(), v.double())

    add(name, "attention", script)


MASK = numbers(2, 1, 5, 5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool)
attention("attention")
attention("attention_causal", is_causal=True)
attention("attention_scaled", scale=0.3)
attention("attention_grouped", kv=(2, 2, 5, 8), enable_gqa=True)
attention("attention_causal_grouped", kv=(2, 2, 5, 8), enable_gqa=True, is_causal=True, scale=1.0)
attention("attention_bool_mask", MASK)
attention("attention_bool_mask_per_head", MASK.expand(2, 4, 5, 5))
attention("attention_one_mask_for_all", MASK[0, 0])
attention("attention_mask_of_keys", MASK[:, :, :1])
attention("attention_float_mask", numbers(2, 4, 5, 5))
attention("attention_float_mask_broadcast", numbers(5, 5))
attention("attention_mask_grouped", MASK, kv=(2, 2, 5, 8), enable_gqa=True)
attention("attention_mask_scaled", numbers(1, 4, 5, 5), scale=0.2)
attention("attention_rows_without_keys", torch.zeros(5, 5, dtype=torch.bool))
attention("attention_mask_and_causal", MASK, is_causal=True)


@case("attention")
def attention_by_hand(door: Door) -> Iterator[Any]:
    """Scores, softmax and values, at several sizes."""

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores: Tensor = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        return scores.softmax(-1) @ v

    g = door(f)
    for b, s, t in ((1, 4, 4), (2, 3, 7), (3, 5, 6), (2, 1, 5)):
        yield attempt(g, numbers(b, 2, s, 8), numbers(b, 2, t, 8), numbers(b, 2, t, 8, seed=1))


@case("attention")
def attention_of_three_axes(door: Door) -> Iterator[Any]:
    """Without an axis of heads."""
    f = door(F.scaled_dot_product_attention)
    for s in (5, 3, 4):
        yield attempt(f, numbers(2, s, 8), numbers(2, s, 8, seed=1), numbers(2, s, 8, seed=2))


@case("attention")
def attention_in_bf16(door: Door) -> Iterator[Any]:
    """In 16 bits, with a bool mask and without."""
    f = door(lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m))
    q = numbers(*Q, dtype=torch.bfloat16)
    yield attempt(f, q, MASK)
    yield attempt(f, q, numbers(5, 5, dtype=torch.bfloat16))
    yield attempt(f, q, None)


@case("modules")
def a_mask_made_inside(door: Door) -> Iterator[Any]:
    """A padding mask from lengths, as models build it."""

    def f(x: Tensor, lengths: Tensor) -> Tensor:
        visible = torch.arange(x.shape[1])[None] < lengths[:, None]
        scores = (x @ x.mT).masked_fill(~visible[:, None], float("-inf"))
        return scores.softmax(-1) @ x

    g = door(f)
    yield attempt(g, numbers(2, 5, 4), torch.tensor([3, 5]))
    yield attempt(g, numbers(3, 6, 4), torch.tensor([1, 2, 6]))


@case("modules")
def embedding_and_head(door: Door) -> Iterator[Any]:
    """A small language model with tied weights."""
    torch.manual_seed(1)
    table = nn.Embedding(11, 8)
    f = door(lambda ids: F.linear(F.layer_norm(table(ids), (8,)), table.weight).argmax(-1))
    with torch.no_grad():
        for shape in ((2, 5), (1, 7), (3, 4)):
            yield attempt(f, torch.arange(shape[0] * shape[1]).reshape(shape) % 11)
