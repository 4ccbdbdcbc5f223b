"""Bytes of activations that a layer saves for backward, by token: a lower bound, in closed form.

    none         all that autograd saves of the layer as it is written, attention fused: dsmini.accounting.activations
    selective    what DeepSeek-V3 saves: norms, MLA's up-projections and SwiGLU's product are made again, attention's
                 result is saved once, and the results of experts are not saved, because the gradient of an expert's
                 weight is also the product of SwiGLU's result with its gradient [assumed]
    full         the layer's input alone

Numbers are 2 bytes, or 4 in FP32. With FP8 the inputs of matrix products are FP8 rows, that of the one after attention
E5M6. A routed expert's rows are counted at perfect balance: k rows for each token.

Worked example, a MoE layer of DeepSeek-V3 in FP8, selective: inputs of the norms 2 * 14,336; latents
3072 + 1024 + 128; attention's result 24,576 + 512, and a number a head, 512; scores 1028, their order 2048, weights 68;
8 rows of 7392 + 16 + 2 * 2112; the shared expert's 4224: 158,920 bytes a token, 0.65 GB for 4096 tokens.

Source: DeepSeek-V3 report, sections 3.2.3 and 3.3.3.
"""

from dataclasses import dataclass

from dsmini.planner.model.matrices import key_width, kv_heads
from dsmini.planner.model.sparse_context import is_sparse
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS, Bytes, BytesPerToken, Count, per, total
from dsmini.planner.quantities.sizes import BF16, FP32, INDEX, e5m6_row, fp8_row
from dsmini.planner.training.layout import Precision, Recompute


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationFigures(Figures):
    """Bytes of activations of a token by part of the model."""

    dense_layer: BytesPerToken
    moe_layer: BytesPerToken
    embedding: BytesPerToken
    head: BytesPerToken
    mtp: BytesPerToken
    """One depth of multi-token prediction without its block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of activations of a token by part of the model, for one precision and kind of recomputation."""

    m: ModelInputs
    precision: Precision
    recompute: Recompute

    def figures(self) -> ActivationFigures:
        """Return all parts as named figures."""
        source = "V3, section 3.2.3"
        return ActivationFigures(
            dense_layer=self.dense_layer().named("activations_dense", "Activations of a token, dense layer", source),
            moe_layer=self.moe_layer().named("activations_moe", "Activations of a token, MoE layer", source),
            embedding=self.embedding().named("activations_embedding", "Activations of a token, embedding", source),
            head=self.head().named("activations_head", "Activations of a token, head", source),
            mtp=self.mtp_inputs().named("activations_mtp", "Activations of a token, MTP without its block", source),
        )

    def dense_layer(self) -> BytesPerToken:
        """Return the bytes of a dense layer."""
        if self.recompute == "full":
            return _by_token(self.row(self.m.dim))
        return _by_token(self._attention() + self._norm_and(self._swiglu(self.m.inter_dim)))

    def moe_layer(self) -> BytesPerToken:
        """Return the bytes of a MoE layer."""
        if self.recompute == "full":
            return _by_token(self.row(self.m.dim) + self._scores())
        return _by_token(self._attention() + self._moe())

    def embedding(self) -> BytesPerToken:
        """Return the bytes before the first layer: a token's index, and the input of a norm if there is one."""
        parts = [total([INDEX])]
        if self.m.config.embed_norm:
            parts.append(self.normed(self.m.dim))
        return _by_token(total(parts))

    def head(self) -> BytesPerToken:
        """Return the bytes of the final norm and the loss, whose logits are made in parts and not saved."""
        return _by_token(self.normed(self.m.dim) + self.row(self.m.dim))

    def mtp_inputs(self) -> BytesPerToken:
        """Return the bytes of one depth of multi-token prediction outside its block: norms, projection and loss."""
        m = self.m
        parts = [self.normed(m.dim), self.row(m.dim)]
        if m.config.embed_norm:
            parts.append(self.normed(m.dim))
        if self.recompute == "none":
            parts += [self.normed(m.dim), 2 * self.row(m.dim) + FP32]
        if self.recompute == "selective":
            parts.append(3 * self.row(m.dim))
        return _by_token(total(parts))

    # Rows of numbers, as they are saved.

    def row(self, width: Count) -> Bytes:
        """Return the bytes of a row between products."""
        return width * (FP32 if self.precision == "fp32" else BF16)

    def read(self, width: Count) -> Bytes:
        """Return the bytes that are saved of a row that a product reads."""
        return fp8_row(width) if self.precision == "fp8" else self.row(width)

    def normed(self, width: Count) -> Bytes:
        """Return the bytes of a norm's input, and of the inverse of its root mean square unless it is made again."""
        return self.row(width) if self.recompute == "selective" else self.row(width) + FP32

    def norm_result(self, width: Count) -> Bytes:
        """Return the bytes of a norm's result, which a product reads; none if it is made again."""
        return self.read(width) if self.recompute == "none" else 0 * self.read(width)

    def _attention(self) -> Bytes:
        """Return the bytes of a layer's first half: norm, projections and fused attention."""
        m, d, v = self.m, key_width(self.m), self.m.v_head_dim
        latent, again = m.config.is_mla, self.recompute == "selective"
        parts = [self.normed(m.dim), self.norm_result(m.dim)]
        if latent:
            parts += [self.normed(m.kv_lora_rank), self.row(m.qk_rope_head_dim), self.norm_result(m.kv_lora_rank)]
            if m.config.q_lora_rank is not None:
                parts += [self.normed(m.q_lora_rank), self.norm_result(m.q_lora_rank)]
        if m.config.qk_norm and not (again and latent):
            parts.append((m.n_heads + kv_heads(m)) * self.normed(d))
        if not (again and latent and m.config.q_lora_rank is not None):
            parts.append(m.n_heads * self.row(d))
        if not (again and latent):
            parts.append(kv_heads(m) * self.row(d + v))
        result = m.n_heads * v
        if self.precision == "fp8":
            parts.append(e5m6_row(result))
        if self.precision != "fp8" or not again:
            parts.append(self.row(result))
        parts.append(m.n_heads * FP32)  # of the softmax
        if is_sparse(m):
            parts += self._indexer()
        return total(parts)

    def _indexer(self) -> list[Bytes]:
        """Return the bytes of an indexer and of its loss's gradients, whatever is made again outside of it."""
        m, fp8 = self.m, self.precision == "fp8"
        width = m.dim if m.config.q_lora_rank is None else m.q_lora_rank
        parts = [m.index_head_dim * FP32 + 2 * FP32, (m.index_n_heads + COUNT(1)) * self.row(m.index_head_dim)]
        parts.append(m.index_n_heads * FP32)
        if fp8:
            parts += [fp8_row(m.dim), fp8_row(width)]
        return parts if self.precision == "fp32" else [*parts, m.dim * FP32]

    def _norm_and(self, rest: Bytes) -> Bytes:
        """Return the bytes of the second norm, its result once, and of what reads it."""
        return self.normed(self.m.dim) + self.norm_result(self.m.dim) + rest

    def _swiglu(self, hidden: Count) -> Bytes:
        """Return the bytes between SwiGLU's products: its two inputs; in BF16 without recomputation four rows."""
        if self.precision == "fp8":
            return 2 * fp8_row(hidden)
        return (4 if self.recompute == "none" else 2) * self.row(hidden)

    def _scores(self) -> Bytes:
        """Return the bytes of the gate's scores and of their sum, which the balance loss divides by."""
        return (self.m.n_routed_experts * FP32) + FP32

    def _gate(self) -> Bytes:
        """Return the bytes of scores, of their order, and of the weights, twice where they are normalized."""
        k, weights = self.m.n_activated_experts, FP32 * self.m.n_activated_experts
        if self.m.config.norm_topk_prob:
            weights = 2 * k * FP32 + FP32
        return self._scores() + self.m.n_routed_experts * INDEX + weights

    def _moe(self) -> Bytes:
        m, none = self.m, self.recompute == "none"
        visit = [self.read(m.dim), 2 * INDEX, self._swiglu(m.moe_inter_dim)]  # with its token and its place
        if none:
            visit.append(self.row(m.dim))
        parts = [self.normed(m.dim), self._gate(), m.n_activated_experts * total(visit)]
        if none and self.precision != "fp32":
            parts.append(m.dim * FP32)  # the gate's copy
        if none and (m.config.n_shared_experts or self.precision == "fp32"):
            parts.append(self.read(m.dim))
        if m.config.n_shared_experts:
            parts.append(self._swiglu(m.n_shared_experts * m.moe_inter_dim))
        return total(parts)


def _by_token(amount: Bytes) -> BytesPerToken:
    return per(amount, TOKENS)
