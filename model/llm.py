"""Architecture of a decoder-only language model, and what follows from it by counting.

Symbols as in docs/nomenclature: L layers, h hidden, n_h heads, n_kv KV heads, d_h head size, ff MLP width,
V vocabulary. Counts follow the published layer shapes: attention h d_h (n_h + 2 n_kv) + n_h d_h h, gated MLP 3 h ff,
two norms of h per layer, one final norm; multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) by
its ranks; mixture of experts by router h E, E routed and the shared experts. Gated DeltaNet layers (Qwen3-Next family)
by their projections.
"""

from __future__ import annotations

from dataclasses import dataclass

from servecast.model.formats import BYTES_PER_ELEMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Llm:
    """One decoder-only transformer. Counts are of layers, heads, elements; widths are in elements."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    intermediate: int = 0
    """Width of a dense MLP; 0 where every layer is a mixture of experts."""
    gated_mlp: bool = True
    tied_embeddings: bool = False
    position_embeddings: int = 0
    """Rows of a learned position table (OPT, GPT-2); 0 for rotary positions."""
    attention_bias: bool = False
    mlp_bias: bool = False
    # mixture of experts
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Total width of the experts that every token visits."""
    moe_layers: int = 0
    # multi-head latent attention
    kv_rank: int = 0
    q_rank: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    value_dim: int = 0
    index_heads: int = 0
    """Heads of a sparse-attention indexer (DeepSeek-V3.2, GLM-5); 0 where there is none."""
    index_dim: int = 0
    index_topk: int = 0
    """Tokens of context that sparse attention reads at most; 0 reads all."""
    # attention that does not see the whole context
    window: int = 0
    """Sliding window of the windowed layers. [tokens]"""
    windowed_layers: int = 0
    linear_layers: int = 0
    """Layers with a constant-size recurrent state instead of a KV cache."""
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_head_dim: int = 0
    query_gate: bool = False
    """The query projection is twice as wide and gates the attention output (Qwen3-Next family)."""
    max_context: int = 0
    """Positions the model was trained for; 0 is unknown. [tokens]"""
    native_format: str = "bf16"
    """Weight format of the published checkpoint."""
    expert_format: str | None = None
    """Format of the routed experts where it differs from `native_format` (gpt-oss: mxfp4 experts, bf16 rest)."""

    # ---- parameter counts [parameters] -------------------------------------------------------------

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def is_mla(self) -> bool:
        return self.kv_rank > 0

    @property
    def attention_layers(self) -> int:
        """Layers with a KV cache."""
        return self.layers - self.linear_layers

    @property
    def full_attention_layers(self) -> int:
        """Layers that see the whole context."""
        return self.attention_layers - self.windowed_layers

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated_mlp else 2

    @property
    def attention_params(self) -> int:
        """Projections of one attention layer, biases and the indexer included."""
        h, n, d = self.hidden, self.heads, self.head_dim
        if not self.is_mla:
            qkv = n * (2 if self.query_gate else 1) + 2 * self.kv_heads
            return h * d * qkv + n * d * h + (d * qkv if self.attention_bias else 0)
        query_dim = n * (self.nope_dim + self.rope_dim)
        query = h * self.q_rank + self.q_rank * query_dim if self.q_rank else h * query_dim
        key_value = h * (self.kv_rank + self.rope_dim) + self.kv_rank * n * (self.nope_dim + self.value_dim)
        indexer = self.index_heads * (self.q_rank * self.index_dim + h) + h * self.index_dim
        return query + key_value + n * self.value_dim * h + indexer

    @property
    def linear_attention_params(self) -> int:
        """Projections of one Gated DeltaNet layer: q, k, v, gate, output and the two scalar gates."""
        d = self.linear_head_dim
        keys, values = self.linear_key_heads * d, self.linear_value_heads * d
        return self.hidden * (2 * keys + 2 * values + 2 * self.linear_value_heads) + values * self.hidden

    @property
    def dense_mlp_params(self) -> int:
        bias = self.intermediate * (self.mlp_matrices - 1) + self.hidden if self.mlp_bias else 0
        return self.mlp_matrices * self.hidden * self.intermediate + bias

    @property
    def expert_params(self) -> int:
        """One routed expert."""
        bias = self.expert_intermediate * (self.mlp_matrices - 1) + self.hidden if self.mlp_bias else 0
        return self.mlp_matrices * self.hidden * self.expert_intermediate + bias

    @property
    def shared_expert_params(self) -> int:
        """Shared experts and router of one mixture-of-experts layer."""
        return self.mlp_matrices * self.hidden * self.shared_intermediate + self.hidden * self.experts

    @property
    def embedding_params(self) -> int:
        """One embedding table."""
        return self.vocabulary * self.hidden

    @property
    def routed_params(self) -> int:
        """All routed experts of the model."""
        return self.moe_layers * self.experts * self.expert_params

    @property
    def trunk_params(self) -> int:
        """Everything that every token passes but the embedding tables: attention, dense MLP, shared experts, norms."""
        attention = self.attention_layers * self.attention_params + self.linear_layers * self.linear_attention_params
        mlp = self.dense_layers * self.dense_mlp_params + self.moe_layers * self.shared_expert_params
        return attention + mlp + (2 * self.layers + 1) * self.hidden

    @property
    def params_total(self) -> int:
        tables = self.embedding_params * (1 if self.tied_embeddings else 2) + self.position_embeddings * self.hidden
        return tables + self.trunk_params + self.routed_params

    @property
    def params_active(self) -> int:
        """Parameters that one token uses, both embedding tables counted."""
        idle = self.moe_layers * (self.experts - self.experts_per_token) * self.expert_params
        return self.params_total - idle

    # ---- bytes [B] -----------------------------------------------------------------------------------

    def weight_bytes(self, trunk_format: str, expert_format: str | None = None) -> float:
        """Bytes of all weights; embedding tables and lm_head stay in 16 bit, as every engine keeps them. [B]"""
        expert = BYTES_PER_ELEMENT[expert_format or trunk_format]
        tables = self.params_total - self.trunk_params - self.routed_params
        return 2.0 * tables + BYTES_PER_ELEMENT[trunk_format] * self.trunk_params + expert * self.routed_params

    @property
    def kv_elements_per_token_layer(self) -> int:
        """Cached elements of one token in one attention layer: 2 n_kv d_h, or kv_rank + rope_dim with MLA."""
        if self.is_mla:
            return self.kv_rank + self.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def kv_bytes_per_token(self, kv_format: str = "bf16") -> float:
        """Cache growth per token of context, windowed layers included (they stop growing at `window`). [B]"""
        index = self.attention_layers * self.index_dim * 1.0
        return self.attention_layers * self.kv_elements_per_token_layer * BYTES_PER_ELEMENT[kv_format] + index

    # ---- arithmetic [FLOP] ---------------------------------------------------------------------------

    @property
    def gemm_flops_per_token(self) -> float:
        """Multiply-adds of one token through all layers, lm_head excluded, as 2 per parameter used. [FLOP]"""
        routed = self.moe_layers * self.experts_per_token * self.expert_params
        return 2.0 * (self.trunk_params + routed)

    @property
    def head_flops(self) -> float:
        """Language-model head for one sampled token. [FLOP]"""
        return 2.0 * self.embedding_params

    def attention_flops(self, context: float) -> float:
        """Scores and values of one query token over `context` cached tokens, all layers: 4 n_h d_h per token. [FLOP]"""
        width = self.heads * ((2 * self.kv_rank + self.rope_dim) if self.is_mla else 2 * self.head_dim)
        seen = self.full_attention_layers * min(context, self.index_topk or context)
        return 2.0 * width * (seen + self.windowed_layers * min(context, self.window))

    def prefill_flops_per_token(self, prompt: float) -> float:
        """Mean arithmetic per prompt token; causal, so a token sees half of the prompt on average. [FLOP]"""
        return self.gemm_flops_per_token + self.attention_flops(prompt / 2.0)

    def decode_flops_per_token(self, context: float) -> float:
        """Arithmetic of one generated token over `context` cached tokens, head included. [FLOP]"""
        return self.gemm_flops_per_token + self.head_flops + self.attention_flops(context)
