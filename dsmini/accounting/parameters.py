"""Parameters, and the floating-point operations of a token as the papers count them.

A FLOP is half a multiply-add. Figures quoted here are of DeepSeek-V3: its report (arXiv 2412.19437) and "Insights into
DeepSeek-V3" (arXiv 2505.09343).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dsmini.accounting.tensors import MTP, Part, main_parts, parts, sums
from dsmini.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """How many parameters a Transformer has, and how many of them a token meets in matrix products."""

    total: int
    """All parameters, those of the multi-token prediction blocks included."""
    mtp: int
    """Those of the multi-token prediction blocks. V3: 11.610B, printed as 11.5B (11.507B without "mtp projection")."""
    active: int
    """What a token is multiplied with in the main model: n_activated_experts of the routed experts, and the head, but
    not the embedding, of which it reads one row, nor norms. V3: 36.62B, printed as 37B; 37.55B with the embedding."""
    buffers: int
    """Routing biases, which are state but no parameters and in none of the other counts."""
    by_module: Mapping[str, int]
    """Parameters of each kind of module in the order of the model; they sum to total. In multi-token prediction
    blocks the names begin with "mtp "; the embedding and the head that these share are counted once, without it."""
    active_by_module: Mapping[str, int]
    """As `active`, for each kind of module, the multi-token prediction blocks and their use of the head included:
    V3's block is printed with 2.4B (2.44B with embedding and head and without "mtp projection")."""

    @property
    def main(self) -> int:
        """Parameters without multi-token prediction: V3 671,026,404,352."""
        return self.total - self.mtp


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add is two."""

    total: int
    by_module: Mapping[str, int]
    """For each kind of module, named as in Parameters.by_module; attention's products that grow with the
    context apart."""


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of Transformer(config), exactly. V3 without MTP: 671,026,404,352, and 14,848 routing biases.

    Source: the shapes of the released checkpoints; DeepSeek-V3 report, section 4.2 (671B, 37B activated).
    """
    by_module = sums(parts(config), lambda part: part.parameters)
    active = sums(parts(config), lambda part: part.per_token)
    return Parameters(
        total=sum(by_module.values()),
        mtp=sum(count for module, count in by_module.items() if module.startswith(MTP)),
        active=sum(count for module, count in active.items() if not module.startswith(MTP)),
        buffers=sum(part.buffers for part in parts(config)),
        by_module=by_module,
        active_by_module=active,
    )


def flops_per_token(
    config: ModelConfig, seq_len: int, causal: bool = True, training: bool = False, mtp: bool | None = None
) -> Flops:
    """FLOPs a token, the mean over a sequence of seq_len tokens: 2 N + L H (d_qk + d_v) seq_len, training 3 times that.

    N is `parameters(config).active`, L the layers, H the heads, d_qk and d_v the widths of a head's key and value: 192
    and 128 in V3, since MLA is counted in its expanded form, that of training and prefill. Training is three times the
    forward because backward makes two products of each one, for the gradients of its two factors.
    V3 at 4096 tokens in training, without MTP: 250.4 GFLOP, printed as 250; V2: 155.3, printed as 155.

    Left out: norms, softmax, activations, rotary embedding, residuals, choosing experts, weighing and summing their
    outputs, losses, the optimizer, recomputation. The embedding is a lookup.

    Args:
        causal: count half of the square of queries and keys, as the published figures do; the diagonal, 1 / seq_len
            of it, is ignored. False: the whole square, which is what an implementation with a mask computes.
        training: forward and backward.
        mtp: with the multi-token prediction blocks; left out: as training does, since plain decoding does not run
            them. The published figures are without. Simplified: depth k is counted at all positions, of which it has
            seq_len - k.

    Source: "Insights into DeepSeek-V3", table 2. Raises: ValueError for a seq_len below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} is not positive; use 1 or more")
    mtp = training if mtp is None else mtp
    passes = 3 if training else 1

    def flops(part: Part) -> int:
        return passes * (2 * part.per_token + (1 if causal else 2) * seq_len * part.per_pair)

    by_module = sums(parts(config) if mtp else main_parts(config), flops)
    return Flops(total=sum(by_module.values()), by_module=by_module)
