"""The operators that a function under `@dsc.optimize` is written with.

    scores = dsc.matmul(q, k.transpose(-2, -1)) * 0.125
    out = dsc.softmax(scores) @ v

Each is a PyTorch operator: outside of a compiled function it computes at once, on ordinary tensors,
with gradients. What PyTorch has under the same meaning (`matmul`, `softmax`, `linear`, `embedding`,
`silu`) is PyTorch's own. What it lacks is registered here as `torch.ops.dsc.<name>`, straight from
the operator's declaration in `dsc.ir.ops`: schema, shape rule and reference are those of the IR, so
the tracer keeps the call whole and it arrives in the program as the operator it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from dsc.frontends.symbolic import SizeReader
from dsc.ir.dims import evaluate
from dsc.ir.op import OpDef, TypeMismatch, added, registry
from dsc.ir.ops import FAMILIES
from dsc.ir.types import DType, TensorType

_DEFAULTS: dict[str, dict[str, Any]] = {}
REGISTERED_FAMILIES = ("nn", "moe", "cache")

_SCHEMA_TYPES = {
    "int": "int",
    "extent": "int",
    "dim": "SymInt",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "dtype": "ScalarType",
    "ints": "int[]",
    "dims": "SymInt[]",
}


def schema(definition: OpDef) -> str:
    """The torch schema of an operator: operands by position, attributes by keyword.

    >>> schema(registry()["swiglu"])
    '(Tensor gate, Tensor up) -> Tensor'
    """
    operands = [
        f"Tensor[] {o.name}"
        if o.variadic
        else f"Tensor? {o.name}=None"
        if o.optional
        else f"Tensor {o.name}"
        for o in definition.operands
    ]
    attrs = [f"{_SCHEMA_TYPES[a.kind]} {a.name}" for a in definition.attrs]
    parameters = ", ".join([*operands, *(["*", *attrs] if attrs else [])])
    results = ", ".join(["Tensor"] * len(definition.results))
    return f"({parameters}) -> {results if len(definition.results) == 1 else f'({results})'}"


def registered() -> dict[str, OpDef]:
    """The operators that are registered with torch: those it lacks, without effects."""
    found = {d.name: d for f in REGISTERED_FAMILIES for d in vars(FAMILIES[f]).values()
             if isinstance(d, OpDef)}  # fmt: skip
    found["select_rows"] = registry()["select_rows"]
    found |= added()
    return {k: d for k, d in found.items() if not d.aliases and k != "embedding"}


def register(definition: OpDef) -> None:
    """Make an operator one of torch's, `torch.ops.dsc.<name>`, that runs its reference."""
    _DEFAULTS[definition.name] = {a.name: a.default for a in definition.attrs}

    def compute(*operands: Any, **attrs: Any) -> Any:
        result = definition.reference(*operands, **_reference_attrs(definition, attrs))
        return _fresh(result, operands)

    def shapes(*operands: Any, **attrs: Any) -> Any:
        return _fake_results(definition, operands, attrs)

    operator = torch.library.custom_op(
        f"dsc::{definition.name}", compute, mutates_args=(), schema=schema(definition)
    )
    operator.register_fake(shapes)
    operator.register_autograd(_backward(definition), setup_context=_save)


def _fresh(result: Any, operands: Sequence[Any]) -> Any:
    """The result without memory shared with an operand, which torch demands of an operator."""
    inputs = {x.untyped_storage().data_ptr() for x in tree_flatten(operands)[0]
              if isinstance(x, Tensor)}  # fmt: skip

    def own(x: Tensor) -> Tensor:
        return x.clone() if x.untyped_storage().data_ptr() in inputs else x

    return tuple(own(x) for x in result) if isinstance(result, (tuple, list)) else own(result)


def _reference_attrs(definition: OpDef, attrs: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {a.name: a.kind for a in definition.attrs}
    return {k: _attr(kinds[k], v) for k, v in attrs.items() if v is not None}


def _attr(kind: str, value: Any) -> Any:
    if kind == "dtype":
        return DType.of(value)
    return tuple(value) if kind in ("ints", "dims") else value


# Gradients: the reference once more, under autograd.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any, keyword_only_inputs: Any = None) -> None:
    """Keep the operands; `keyword_only_inputs` comes only where the schema has attributes."""
    tensors, ctx.layout = tree_flatten(inputs)
    ctx.save_for_backward(*(x for x in tensors if isinstance(x, Tensor)))
    ctx.where = [isinstance(x, Tensor) for x in tensors]
    ctx.attrs = keyword_only_inputs or {}


def _backward(definition: OpDef) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved).detach() if tensor else None for tensor in ctx.where]
        wanted = [x for x in leaves if x is not None and x.is_floating_point()]
        for x in wanted:
            x.requires_grad_(True)
        operands = tree_unflatten(leaves, ctx.layout)
        with torch.enable_grad():
            result = definition.reference(*operands, **_reference_attrs(definition, ctx.attrs))
        results = result if isinstance(result, (tuple, list)) else (result,)
        pairs = [(y, g) for y, g in zip(results, gradients, strict=True)
                 if y.requires_grad and g is not None]  # fmt: skip
        found = _gradients([y for y, _ in pairs], [g for _, g in pairs], wanted)
        by_leaf = dict(zip(map(id, wanted), found, strict=True))
        slots = [by_leaf.get(id(x)) for x in leaves]
        unflattened = tree_unflatten(slots, ctx.layout)
        return tuple(unflattened)

    return backward


def _gradients(
    results: list[Tensor], gradients: list[Tensor], wanted: list[Tensor]
) -> Sequence[Tensor | None]:
    if not results:
        return [None] * len(wanted)
    return torch.autograd.grad(results, wanted, gradients, allow_unused=True)


# Shapes of results, from the operator's own inference.


def _fake_results(definition: OpDef, operands: Sequence[Any], attrs: Mapping[str, Any]) -> Any:
    """Empty results on fake tensors. Sizes that a signature calls equal are made so for good."""
    given = _reference_attrs(definition, attrs)
    if not definition.named_sizes:
        return tree_map(torch.empty_like, definition.reference(*operands, **given))
    _unify(definition, operands)
    sizes = SizeReader()
    results = _inferred(definition, operands, given, sizes)
    env = _sizes_by_name(operands, sizes)
    first = next(x for x in operands if x is not None)
    made = [first.new_empty([evaluate(d, env) for d in t.shape], dtype=t.dtype.torch)
            for t in results]  # fmt: skip
    return made[0] if len(made) == 1 else tuple(made)


def _inferred(
    definition: OpDef, operands: Sequence[Any], attrs: Mapping[str, Any], sizes: SizeReader
) -> tuple[TensorType, ...]:
    """Result types. A size that inference has to know becomes a constant of the trace."""
    named = [size for declared, x in zip(definition.operands, operands, strict=False)
             for name, size in _named_sizes(declared.pattern.dims, x)
             if not isinstance(size, int) and not name.startswith("*")]  # fmt: skip
    while True:
        types = [None if x is None else TensorType(DType.of(x.dtype), sizes.shape(x.shape))
                 for x in operands]  # fmt: skip
        try:
            return definition.infer(types, attrs)
        except TypeMismatch as problem:
            if not named:
                raise ValueError(f"dsc.{definition.name}: {problem}") from None
            int(named.pop())


def _unify(definition: OpDef, operands: Sequence[Any]) -> None:
    seen: dict[str, Any] = {}
    for declared, x in zip(definition.operands, operands, strict=False):
        for name, size in _named_sizes(declared.pattern.dims, x):
            other = seen.setdefault(name, size)
            message = f"dsc.{definition.name}: {declared.name} has {size} where {name} = {other}"
            torch._check(size == other, lambda text=message: text)


def _named_sizes(dims: tuple[str, ...], x: Any) -> list[tuple[str, Any]]:
    """Sizes of one operand by the names in its pattern; `*n` yields `*n0`, `*n1`, ..."""
    if x is None:
        return []
    star = next((i for i, d in enumerate(dims) if d.startswith("*")), len(dims))
    tail = len(dims) - star - 1
    middle = x.shape[star : len(x.shape) - tail] if star < len(dims) else ()
    found = list(zip(dims[:star], x.shape, strict=False))
    found += [(f"{dims[star]}{i}", size) for i, size in enumerate(middle)]
    if tail > 0:
        found += zip(dims[-tail:], x.shape[-tail:], strict=False)
    return [(name, size) for name, size in found if name.lstrip("*").isidentifier()]


def _sizes_by_name(operands: Sequence[Any], sizes: SizeReader) -> dict[str, Any]:
    """A symbolic size for each symbol that the operands' shapes contain."""
    from torch.fx.experimental.sym_node import SymNode

    env: dict[str, Any] = {}
    symbolic = [d for x in operands if x is not None for d in x.shape if not isinstance(d, int)]
    for size in symbolic:
        environment = size.node.shape_env
        for free in size.node.expr.free_symbols:
            env[sizes.names[str(free)]] = torch.SymInt(SymNode(free, environment, int, None))
    return env


for _definition in registered().values():
    register(_definition)


def call(name: str, *operands: Any, **attrs: Any) -> Any:
    """Call a registered operator with the defaults that its declaration states."""
    return getattr(torch.ops.dsc, name)(*operands, **{**_DEFAULTS[name], **attrs})


# What a user calls.


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product of the last two axes; leading axes broadcast."""
    return torch.matmul(a, b)


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x - max) / sum along `dim`, in fp32 inside."""
    return torch.softmax(x, dim)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [*,k] @ weight [m,k]^T + bias [m] -> [*,m]."""
    return torch.nn.functional.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [v,d] at ids i64[*] -> [*,d]."""
    return torch.nn.functional.embedding(ids, weight)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return torch.nn.functional.silu(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return call("swiglu", gate, up)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; statistics in fp32."""
    return call("rms_norm", x, weight, eps=eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last axis, all in fp32."""
    return call("layer_norm", x, weight, bias, eps=eps)  # type: ignore[no-any-return]


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    layout: str = "interleaved",
    scale: float = 1.0,
    dims: int = 0,
) -> Tensor:
    """Rotary embedding of x [b,s,r] or [b,s,h,r] at positions i64[b,s], by inv_freq f32[r/2].

    `layout` is "interleaved" (pairs 2i, 2i+1), "deinterleave" (such pairs in, halves out) or
    "half" (pairs i, i + r/2). cos and sin are multiplied by `scale`. With `dims` the first `dims`
    = r columns of a wider row turn, and the others stay as they are.
    """
    operands = (x, positions, inv_freq)
    return call("rope", *operands, layout=layout, scale=scale, dims=dims)  # type: ignore[no-any-return]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v for q [b,s,h,d], k [b,t,g,d], v [b,t,g,e] -> [b,s,h,e].

    With `lengths` i64[b], query i of row b sees keys j <= lengths[b] + i. Without, `causal` means
    j <= i + t - s. Of these it sees the last `window`, and those of its own `chunk`, if not 0.
    Scores are capped to softcap * tanh(x / softcap); `sinks` [h] are one more logit a head, which
    takes its share and adds nothing. `scale` is d^-0.5 by default; h is a multiple of g.
    """
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    sight = {"window": window, "chunk": chunk, "softcap": softcap}
    return call("attention", q, k, v, lengths, sinks, scale=scale, causal=causal, **sight)  # type: ignore[no-any-return]


def mla_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    kv_b: Tensor,
    lengths: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Multi-head latent attention, expanded (DeepSeek-V2, eq. 9-19).

    q_nope [b,s,h,n], q_rope [b,s,h,r], latent [b,t,c], rope [b,t,r], kv_b [h*(n+v),c] holding
    [k_nope | v] a head, lengths i64[b] -> [b,s,h,v].
    """
    operands = (q_nope, q_rope, latent, rope, kv_b, lengths)
    return call("mla_attention", *operands, scale=scale)  # type: ignore[no-any-return]


def latent_attention(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor, *, scale: float
) -> Tensor:
    """Multi-head latent attention, absorbed: all heads attend over the latent rows themselves.

    q_latent [b,s,h,c], q_rope [b,s,h,r], latent [b,t,c], rope [b,t,r] -> [b,s,h,c].
    """
    operands = (q_latent, q_rope, latent, rope, lengths)
    return call("latent_attention", *operands, scale=scale)  # type: ignore[no-any-return]


def append(past: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """past [b,p,d] grown to [b,p+s,d], with new [b,s,d] at rows lengths[b] .. lengths[b]+s-1."""
    return call("append", past, new, lengths)  # type: ignore[no-any-return]


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    score: str = "sigmoid",
    groups: int = 1,
    keep: int = 1,
    group_score: str = "top2",
    fill: float = float("-inf"),
    normalise: bool = True,
    scale: float = 1.0,
    shared: int = 0,
    logit_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts a token (DeepSeek-V3, eq. 12-16): indices i64 and weights f32 [*,k].

    x [*,d], weight [e,d]. `bias` f32[e] steers the choice and never enters the weights. `shared`
    experts, from number e on, follow those chosen, with weight 1. `logit_bias` f32[e] is added to
    the logits, before the score (gpt-oss).
    """
    return call(  # type: ignore[no-any-return]
        "route", x, weight, bias, logit_bias, top_k=top_k, score=score, groups=groups, keep=keep,
        group_score=group_score, fill=fill, normalise=normalise, scale=scale, shared=shared,
    )  # fmt: skip


def experts(
    x: Tensor,
    idx: Tensor,
    w: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: str = "silu",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = float("inf"),
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """sum_k w_k * down_k(act(gate_k x) * up_k x) over each token's experts.

    x [*,d], idx i64[*,k], w f32[*,k], gate_up [e,2i,d] (gate rows, then up rows), down [e,d,i];
    `act` is silu, gelu, gelu_tanh or relu. Products may have biases [e,2i] and [e,d]. The gate is
    at most `limit` and up within it on both sides; then it is act(alpha * gate) / alpha and up +
    `shift` that are multiplied (gpt-oss).
    """
    return call(  # type: ignore[no-any-return]
        "experts", x, idx, w, gate_up, down, gate_up_bias, down_bias, act=act, limit=limit,
        alpha=alpha, shift=shift,
    )  # fmt: skip
