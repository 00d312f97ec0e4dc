"""DeepSeek-V3 in plain PyTorch, written to be read and to be exported.

The model of arXiv:2412.19437: multi-head latent attention (MLA), a mixture of experts (MoE) whose
router balances load by a bias, rotary positions stretched by YaRN. Parameters carry the names of
the official checkpoints, with the experts of a layer stacked in two tensors as transformers holds
them, so any checkpoint of the family loads without translation.

One step serves prefill, chunked prefill and decode. Its caches are inputs and outputs, never
hidden state, and sequences of different lengths share a batch:

    forward(input_ids[B,S], positions[B,S], lengths[B], logits_at[B,L],
            past.0.latent[B,P,c], past.0.rope[B,P,r], past.1.latent, ...)
        -> (logits[B,L,vocab], present.0.latent[B,P+S,c], present.0.rope[B,P+S,r], ...)

`lengths[b]` counts the tokens of sequence b that its cache already holds; new token i of row b is
written at cache row `lengths[b] + i` and sees rows up to and including its own. Rows are padded on
the right: what padding writes lies beyond the end, is never seen, and is overwritten later.

Axes: B batch, S new tokens, P past rows, T = P + S, L wanted logits, N = B*S tokens, E experts,
h heads, n / r / v the widths of a head's position-free, rotated and value parts, c kv_lora_rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsc.errors import UnsupportedArchitecture
from dsc.frontends.family import ModelConfig, RopeParameters

LATENT_NORM_EPS = 1e-6
"""The norms on the two latents ignore `rms_norm_eps`, in the official code as in transformers."""


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def inverse_frequencies(rope: RopeParameters, width: int) -> Tensor:
    """Radians a position turns each of the `width / 2` pairs by, fp32 on the CPU.

    Plain rope: theta^(-2i/width). YaRN (arXiv:2309.00071, section 3.2) leaves alone the pairs that
    turn more than `beta_fast` times within the original context, slows down by `factor` those
    that turn less than `beta_slow` times, and blends linearly between. The device is fixed so
    that a model built on `meta` still has real frequencies.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    period = rope.rope_theta ** (steps / width)  # positions a radian
    if rope.rope_type == "default":
        return 1.0 / period
    context = rope.original_max_position_embeddings
    assert context is not None, "the config schema demands it of yarn"

    def pair_that_turns(times: float) -> float:
        log_base = 2 * math.log(rope.rope_theta)
        return width * math.log(context / (times * 2 * math.pi)) / log_base

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(width // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    return 1.0 / (rope.factor * period) * (1 - kept) + 1.0 / period * kept


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, one value a pair of channels."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies = inverse_frequencies(config.rope_parameters, config.qk_rope_head_dim)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.scale = config.rope_parameters.cos_sin_scale

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [B,S] to cos and sin [B,S,1,r/2], computed in fp32."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq.to(positions.device)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of `x` [B,S,*,r]; the result holds all first halves, then all second ones.

    Official weights keep a pair in neighbouring channels (2i, 2i+1). Leaving the result
    de-interleaved changes queries and keys alike, so no score changes, and the cached keys are
    those that transformers caches.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def append(past: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Write new[b,i] at row lengths[b] + i: past [B,P,d], new [B,S,d] -> [B,P+S,d]."""
    batch, added, width = new.shape
    rows = lengths.unsqueeze(-1) + torch.arange(added, device=new.device)
    grown = torch.cat([past, torch.zeros_like(new)], dim=1)
    return grown.scatter(1, rows.unsqueeze(-1).expand(batch, added, width), new)


def visible(past: Tensor, new: Tensor, lengths: Tensor) -> Tensor:
    """Which cache rows each new token sees, bool [B,1,S,T]: row j for token i if j <= lengths+i."""
    added = new.shape[1]
    own_row = lengths.unsqueeze(-1) + torch.arange(added, device=new.device)
    rows = torch.arange(past.shape[1] + added, device=new.device)
    return (rows <= own_row.unsqueeze(-1)).unsqueeze(1)


class MultiHeadLatentAttention(nn.Module):
    """Attention whose cache is one latent of width c and one rotated key of width r a token.

    Section 2.1.1 of the paper. All heads share both; `kv_b_proj` expands a latent to each head's
    position-free key and its value, in that order. This is the expanded form: it rebuilds all
    keys and values at every step. Absorbing `kv_b_proj` into queries and outputs is the
    compiler's work, not the model's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_split = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.kv_a_split = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.kv_b_split = [config.qk_nope_head_dim, config.v_head_dim]
        self.interleaved = config.rope_interleave
        self.scale = config.softmax_scale
        hidden, bias = config.hidden_size, config.attention_bias
        q_width, kv_width = self.heads * sum(self.q_split), self.heads * sum(self.kv_b_split)
        self.q_lora_rank = config.q_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, sum(self.kv_a_split), bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(self.heads * config.v_head_dim, hidden, bias=bias)

    def queries(self, x: Tensor) -> Tensor:
        """Project x [B,S,hidden] to [B,S,h*(n+r)], through a bottleneck if there is one."""
        if self.q_lora_rank is None:
            direct: Tensor = self.q_proj(x)
            return direct
        projected: Tensor = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return projected

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: Tensor,
        lengths: Tensor,
        past_latent: Tensor,
        past_rope: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend: x [B,S,hidden], both caches [B,P,*] -> output [B,S,hidden], caches [B,T,*]."""
        batch, added, _ = x.shape
        query = self.queries(x).view(batch, added, self.heads, sum(self.q_split))
        q_nope, q_rope = torch.split(query, self.q_split, dim=-1)
        latent, k_rope = torch.split(self.kv_a_proj_with_mqa(x), self.kv_a_split, dim=-1)
        q_rope = rotate(q_rope, cos, sin, self.interleaved)
        k_rope = rotate(k_rope.unsqueeze(2), cos, sin, self.interleaved).squeeze(2)

        latent = append(past_latent, self.kv_a_layernorm(latent), lengths)
        k_rope = append(past_rope, k_rope, lengths)

        total = latent.shape[1]
        expanded = self.kv_b_proj(latent).view(batch, total, self.heads, sum(self.kv_b_split))
        k_nope, value = torch.split(expanded, self.kv_b_split, dim=-1)
        shared = k_rope.unsqueeze(2).expand(batch, total, self.heads, self.q_split[1])
        out = F.scaled_dot_product_attention(
            torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2),
            torch.cat([k_nope, shared], dim=-1).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=seen,
            scale=self.scale,
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, added, -1)), latent, k_rope


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [*,hidden] to [*,hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Choose k experts a token: "noaux_tc", section 2.1.2 of the paper.

    A learned bias steers the *choice* towards idle experts and never enters the *weights*. Experts
    form groups; a group counts as its two best biased scores, and only the best groups compete.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        self.groups, self.kept = config.n_group, config.topk_group
        self.top_k = config.num_experts_per_tok
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route x [N,hidden]: chosen experts i64 [N,k] and their weights f32 [N,k]."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = scores + self.e_score_correction_bias
        grouped = biased.view(x.shape[0], self.groups, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.kept, dim=-1, sorted=False).indices
        open_groups = torch.zeros_like(group_scores).scatter(1, best, 1.0).bool()
        biased = grouped.masked_fill(~open_groups.unsqueeze(-1), -math.inf).view_as(biased)
        chosen = biased.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class Experts(nn.Module):
    """All routed experts of a layer, stacked: y = sum over chosen k of w_k * expert_k(x).

    Written as its definition: every expert runs on every token, and weights of zero discard what
    was not chosen. That needs E/k times the arithmetic, and no control flow that depends on data,
    which is what an exporter wants to see. The compiler recognises it and computes only the
    chosen experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts = config.n_routed_experts
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.zeros(self.experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.zeros(self.experts, hidden, inner))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Mix x [N,hidden], chosen [N,k], weights f32 [N,k] -> [N,hidden], summed in fp32."""
        share = weights.new_zeros(x.shape[0], self.experts).scatter(1, chosen, weights)
        tokens = x.expand(self.experts, *x.shape)
        gate, up = torch.bmm(tokens, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(F.silu(gate) * up, self.down_proj.transpose(1, 2))
        return (out * share.t().unsqueeze(-1)).sum(0).to(x.dtype)


class MoE(nn.Module):
    """Routed experts plus `n_shared_experts` that every token visits, fused into one MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, shared)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B,S,hidden] to [B,S,hidden]."""
        tokens = x.flatten(0, 1)
        routed: Tensor = self.experts(tokens, *self.gate(tokens)).view_as(x)
        shared: Tensor = self.shared_experts(x)
        return routed + shared


class DecoderLayer(nn.Module):
    """Attention and a (dense or sparse) MLP, each on a normed input and added to the stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadLatentAttention(config)
        self.mlp: nn.Module = (
            MoE(config)
            if config.is_moe(index)
            else MLP(config.hidden_size, config.intermediate_size)
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *attention_inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x [B,S,hidden] to the same, and give the layer's two caches [B,T,*]."""
        attended, latent, rope = self.self_attn(self.input_layernorm(x), *attention_inputs)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), latent, rope


class DeepseekV3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self, input_ids: Tensor, positions: Tensor, lengths: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states [B,S,hidden] after the final norm, and all caches, two a layer."""
        x = self.embed_tokens(input_ids)
        cos, sin = self.rotary_emb(positions, x.dtype)
        seen = visible(past[0], x, lengths)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            x, *caches = layer(x, cos, sin, seen, lengths, past[2 * index], past[2 * index + 1])
            present += caches
        return self.norm(x), present


class DeepseekV3ForCausalLM(nn.Module):
    """The language model: one step over new tokens, caches in and out (see the module's head)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DeepseekV3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        lengths: Tensor,
        logits_at: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step; shapes in the module's head. Logits only of the rows in `logits_at`."""
        hidden, present = self.model(input_ids, positions, lengths, past)
        rows = logits_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.lm_head(hidden.gather(1, rows)), *present


def build(config: ModelConfig) -> nn.Module:
    """The model of `config` with untrained weights, on torch's current default device.

    Raises `UnsupportedArchitecture` for a V2, whose router is another one.
    """
    if config.model_type != "deepseek_v3":
        raise UnsupportedArchitecture(f"{config.model_type} has another router than V3")
    return DeepseekV3ForCausalLM(config).eval()
