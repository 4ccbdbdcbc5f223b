"""QK-clip: after a step, heads whose attention logits have grown too large get smaller projections.

With S_h the largest scaled logit of head h over the batch, and S_h above a threshold tau, g = tau / S_h:
    W_QB (nope) *= sqrt(g)      W_KVB (keys) *= sqrt(g)      W_QB (rope) *= g
The rotary key belongs to all heads and stays. Then all logits of the head are g times what they were, and no other head
changes. Muon lets logits grow; V3's recipe has no such step, and V4 norms each query instead.

Source: Kimi K2 (arXiv 2507.20534), section 2.1; its threshold is 100.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn

from dsmini.nn.dsa import BLOCK
from dsmini.nn.mla import MLA


@contextmanager
def largest_logits(model: nn.Module, *, wanted: bool = True) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that gets the largest scaled logit of each head [h] in all forwards meanwhile, by its attention.

    Queries and keys are computed a second time, all keys that a query sees are looked at, and no gradient is made. The
    dict stays empty, and nothing is computed, unless it is wanted.
    """
    most: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(name: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        x, context = inputs
        cos_sin = context.cos_sin(layer.rope)
        q = layer.queries(layer.query_latent(x), cos_sin).float()
        k = layer.keys_and_values(*layer.latents(x, cos_sin))[0].float()
        for start in range(0, q.shape[1], BLOCK):
            stop = min(start + BLOCK, q.shape[1])
            logits = einsum(q[:, start:stop], k[:, :stop], "b s h d, b t h d -> b h s t") * layer.scale
            unseen = context.masked(layer.mask, stop, start, stop)
            here = logits.masked_fill(unseen[:, None], -torch.inf).amax((0, 2, 3))
            most[name] = torch.maximum(most[name], here) if name in most else here

    layers = [(name, module) for name, module in model.named_modules() if wanted and isinstance(module, MLA)]
    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers]
    try:
        yield most
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def clip_logits(model: nn.Module, most: dict[str, Tensor], threshold: float) -> None:
    """Scale the projections of each head whose largest logit is above the threshold, in place.

    Args:
        most: as largest_logits makes it.
    """
    for name, largest in most.items():
        layer: Any = model.get_submodule(name)
        g = (threshold / largest.clamp(min=threshold))[:, None, None]
        query = layer.wq_b if layer.wq is None else layer.wq
        of_query, of_keys = (linear.weight.unflatten(0, (layer.n_heads, -1)) for linear in (query, layer.wkv_b))
        n = layer.qk_nope_head_dim
        of_query[:, :n] *= g.sqrt()
        of_query[:, n:] *= g
        of_keys[:, :n] *= g.sqrt()
