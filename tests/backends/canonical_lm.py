"""A causal language model of the family in canonical operators, built by hand at any sizes.

Backends are tested on it without a frontend in between: embedding, layers of multi-head latent
attention with a dense or an expert feed-forward part, norm, head. Weights are seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsc.ir.dims import Range, symbol
from dsc.ir.graph import GraphBuilder, Value, Weight
from dsc.ir.program import Program
from dsc.ir.stages import Stage
from dsc.ir.types import DType, TensorType
from dsc.ir.weights import MetaSource, Source, random_source

B, S, P, L = (symbol(name) for name in "BSPL")


@dataclass(frozen=True)
class Sizes:
    """The widths of a model; the defaults are small and odd."""

    vocab: int = 50
    hidden: int = 40
    layers: int = 2
    dense: int = 1
    heads: int = 3
    q_lora: int = 24
    kv_lora: int = 20
    nope: int = 12
    rope: int = 8
    value: int = 10
    inner: int = 52
    experts: int = 6
    expert_inner: int = 14
    top_k: int = 2
    groups: int = 3
    keep: int = 2
    dtype: DType = DType.f32
    tied: bool = False


class _Model:
    """Appends layers to a graph and collects the weights they name."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.b = GraphBuilder("step")
        self.types: dict[str, TensorType] = {}

    def weight(self, name: str, *shape: int, dtype: DType | None = None) -> Weight:
        self.types[name] = TensorType(dtype or self.sizes.dtype, shape)
        return Weight(name, self.types[name])

    def norm(self, x: Value, name: str) -> Value:
        gain = self.weight(f"{name}.weight", int(x.type.shape[-1]))  # type: ignore[arg-type]
        out: Value = self.b.rms_norm(x, gain, eps=1e-6)
        return out

    def linear(self, x: Value, name: str, width: int) -> Value:
        matrix = self.weight(f"{name}.weight", width, int(x.type.shape[-1]))  # type: ignore[arg-type]
        out: Value = self.b.linear(x, matrix)
        return out

    def gated(self, x: Value, name: str, width: int) -> Value:
        gate = self.linear(x, f"{name}.gate_proj", width)
        up = self.linear(x, f"{name}.up_proj", width)
        return self.linear(self.b.swiglu(gate, up), f"{name}.down_proj", int(x.type.shape[-1]))  # type: ignore[arg-type]

    def attention(
        self, x: Value, name: str, positions: Value, lengths: Value, past: tuple[Value, Value]
    ) -> tuple[Value, Value, Value]:
        c, b = self.sizes, self.b
        width = c.nope + c.rope
        freq = self.weight("inv_freq", c.rope // 2, dtype=DType.f32)
        q = self.norm(self.linear(x, f"{name}.q_a_proj", c.q_lora), f"{name}.q_a_layernorm")
        q = b.reshape(self.linear(q, f"{name}.q_b_proj", c.heads * width),
                      shape=(B, S, c.heads, width))  # fmt: skip
        q_nope, q_rope = b.split(q, sizes=(c.nope, c.rope))
        kv = self.linear(x, f"{name}.kv_a_proj_with_mqa", c.kv_lora + c.rope)
        latent, k_rope = b.split(kv, sizes=(c.kv_lora, c.rope))
        latent = self.norm(latent, f"{name}.kv_a_layernorm")
        q_rope = b.rope(q_rope, positions, freq, layout="deinterleave", scale=1.1)
        k_rope = b.rope(k_rope, positions, freq, layout="deinterleave", scale=1.1)
        latent = b.append(past[0], latent, lengths)
        k_rope = b.append(past[1], k_rope, lengths)
        kv_b = self.weight(f"{name}.kv_b_proj.weight", c.heads * (c.nope + c.value), c.kv_lora)
        o = b.mla_attention(q_nope, q_rope, latent, k_rope, kv_b, lengths, scale=width**-0.5)
        o = b.reshape(o, shape=(B, S, c.heads * c.value))
        return self.linear(o, f"{name}.o_proj", c.hidden), latent, k_rope

    def sparse(self, x: Value, name: str) -> Value:
        c, b = self.sizes, self.b
        gate = self.weight(f"{name}.gate.weight", c.experts, c.hidden)
        bias = self.weight(f"{name}.gate.e_score_correction_bias", c.experts, dtype=DType.f32)
        index, weights = b.route(
            x, gate, bias, score="sigmoid", groups=c.groups, keep=c.keep, top_k=c.top_k,
            normalise=True, scale=2.5,
        )  # fmt: skip
        up = self.weight(f"{name}.experts.gate_up_proj", c.experts, 2 * c.expert_inner, c.hidden)
        down = self.weight(f"{name}.experts.down_proj", c.experts, c.hidden, c.expert_inner)
        routed = b.experts(x, index, weights, up, down)
        out: Value = b.add(routed, self.gated(x, f"{name}.shared_experts", c.expert_inner))
        return out


def canonical_lm(
    sizes: Sizes, max_batch: int = 4, max_context: int = 64, *, values: bool = True, chunk: int = 32
) -> Program:
    """The program, with one entry `step` at stage CANONICAL; its weights may have no values."""
    m = _Model(sizes)
    b, i64 = m.b, DType.i64
    ids = b.input("input_ids", TensorType(i64, (B, S)))
    positions = b.input("positions", TensorType(i64, (B, S)))
    lengths = b.input("lengths", TensorType(i64, (B,)))
    wanted = b.input("logits_at", TensorType(i64, (B, L)))
    pasts = [
        (b.input(f"past.{i}.latent", TensorType(sizes.dtype, (B, P, sizes.kv_lora))),
         b.input(f"past.{i}.rope", TensorType(sizes.dtype, (B, P, sizes.rope))))
        for i in range(sizes.layers)
    ]  # fmt: skip
    table = m.weight("model.embed_tokens.weight", sizes.vocab, sizes.hidden)
    x = b.embedding(ids, table)
    present: list[Value] = []
    for i, past in enumerate(pasts):
        name = f"model.layers.{i}"
        b.loc = name
        o, *caches = m.attention(
            m.norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", positions, lengths, past
        )
        present += caches
        x = b.add(x, o)
        h = m.norm(x, f"{name}.post_attention_layernorm")
        mlp = f"{name}.mlp"
        x = b.add(x, m.gated(h, mlp, sizes.inner) if i < sizes.dense else m.sparse(h, mlp))
    b.loc = "lm_head"
    x = m.norm(b.select_rows(x, wanted), "model.norm")
    logits = b.linear(x, table) if sizes.tied else m.linear(x, "lm_head", sizes.vocab)
    parts = [f"present.{i}.{kind}" for i in range(sizes.layers) for kind in ("latent", "rope")]
    aliases = tuple((1 + at, 4 + at) for at in range(len(present)))
    graph = b.finish([logits, *present], ("logits", *parts), aliases)
    ranges = {"B": Range(1, max_batch), "S": Range(1, chunk), "P": Range(0, max_context)}
    return Program(
        "canonical-lm", {"step": graph}, {k: Source(k, t) for k, t in m.types.items()},
        {**ranges, "L": Range(1, chunk)}, random_source(m.types) if values else MetaSource(m.types),
        stage=Stage.CANONICAL,
    )  # fmt: skip
