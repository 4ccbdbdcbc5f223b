"""Balance of the experts' load: the sequence-wise loss, and how uneven the load is. The bias update is the gate's."""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dsmini.nn.gate import stable_topk


def sequence_balance_loss(
    scores: Float[Tensor, "n e"],
    indices: Int[Tensor, "n k"],
    batch_size: int,
    counts: Literal["published", "routed"] = "published",
) -> Float[Tensor, ""]:
    """Return the sequence-wise balance loss of one MoE layer, mean over the sequences, without its weight alpha.

    For a sequence of T tokens: f_i = N_r / (K_r T) * (tokens that chose expert i), P_i = the mean over the sequence of
    scores normalised over all experts, loss = sum of f_i P_i; 1 when the load is even.

    Args:
        scores, indices: of a Routing over batch_size whole sequences, one after the other.
        counts: published: f counts the top-k of the plain scores, as equation 18 has it; routed: the experts that were
            really chosen, with bias and groups, as most code does.

    Source: DeepSeek-V3 report, section 2.1.2, equations 17 to 20.
    """
    if counts not in ("published", "routed"):
        raise ValueError(f"counts={counts!r} is unknown; use published or routed")
    e, k = scores.shape[1], indices.shape[1]
    chosen = indices if counts == "routed" else stable_topk(scores.detach(), k)
    per_sequence = rearrange(chosen, "(b t) k -> b (t k)", b=batch_size)
    tokens = torch.zeros(batch_size, e, device=scores.device, dtype=scores.dtype)
    tokens = tokens.scatter_add(1, per_sequence, torch.ones_like(per_sequence, dtype=scores.dtype))
    f = tokens * (e / per_sequence.shape[1])
    p = rearrange(scores / scores.sum(-1, keepdim=True), "(b t) e -> b t e", b=batch_size).mean(1)
    return (f * p).sum(-1).mean()


def max_violation(counts: Int[Tensor, "*layers e"]) -> Float[Tensor, "*layers"]:
    """Return MaxVio of each layer: (largest load - mean load) / mean load; 0 is perfect balance.

    Source: Wang et al. 2024, auxiliary-loss-free load balancing (arXiv 2408.15664), section 4.1.
    """
    load = counts.float()
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean.clamp(min=1e-20)
