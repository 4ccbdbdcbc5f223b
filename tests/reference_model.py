"""DeepSeek-V3 and V3.2 in plain PyTorch, from the reports and YaRN's paper: what the tests compare dsmini with.

A function reads parameters of a module m by their names. c is a ModelConfig, x is [b, s, m], and `seen` [b, s, t] is
True for keys that a query may see. Epsilons, RoPE's pairs and the order of MTP's inputs are those of the released code.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.to(x.dtype).T


def rms_norm(x: Tensor, norm: Any, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def temperature(a: float, c: Any) -> float:
    return 0.1 * a * math.log(c.rope_factor) + 1 if c.extended else 1.0


def frequencies(c: Any) -> Tensor:
    """Return each pair's radians per position: theta^(-2j/d), slowed by YaRN's ramp over the numbers j of pairs."""
    d = c.qk_rope_head_dim if c.is_mla else c.qk_nope_head_dim
    j = torch.arange(d // 2, dtype=torch.float64)
    plain = c.rope_theta ** (-2 * j / d)
    if not c.extended:
        return plain
    lengths = [c.original_seq_len / (turns * 2 * math.pi) for turns in (c.beta_fast, c.beta_slow)]
    fast, slow = (d * math.log(length) / (2 * math.log(c.rope_theta)) for length in lengths)
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), d - 1)
    slowed = ((j - first) / (last - first or 0.001)).clamp(0, 1)
    return (1 - slowed) * plain + slowed * plain / c.rope_factor


def rotate(x: Tensor, c: Any, halves: bool = False) -> Tensor:
    """Turn x [b, s, h, d] by its positions. A pair, one complex number, is two neighbours or one of each half."""
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequencies(c))
    size = temperature(c.mscale, c) / temperature(c.mscale_all_dim, c)
    turns = size * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    pairs = x.unflatten(-1, (2, -1)).mT if halves else x.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return (turned.mT if halves else turned).flatten(-2)


def attention(m: Any, x: Tensor, c: Any, seen: Tensor | None = None, chosen: list[Tensor] | None = None) -> Tensor:
    """V3, equations 1 to 11, expanded. DSA sees the best keys of its indexer; MHA, GQA and MQA are MLA's baselines.

    A layer of DSA adds what it chose to `chosen`; one without an indexer sees what was added last.
    """
    chosen = [] if chosen is None else chosen
    h, nope = c.n_heads, c.qk_nope_head_dim
    seen = torch.ones(1, x.shape[1], x.shape[1]).tril().bool() if seen is None else seen
    if c.is_mla:
        latent = x if m.wq_a is None else rms_norm(linear(x, m.wq_a), m.q_norm)
        q = linear(latent, m.wq if m.wq_a is None else m.wq_b).unflatten(-1, (h, -1))
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], c)), -1)
        c_kv, k_rope = linear(x, m.wkv_a).split((c.kv_lora_rank, c.qk_rope_head_dim), -1)
        kv = linear(rms_norm(c_kv, m.kv_norm), m.wkv_b).unflatten(-1, (h, -1))
        k_rope = rotate(k_rope.unsqueeze(2), c).expand(-1, -1, h, -1)
        k, v = torch.cat((kv[..., :nope], k_rope), -1), kv[..., nope:]
        if c.attention == "dsa":
            if m.indexer is not None:
                scores = index_scores(m.indexer, x, latent, c).masked_fill(~seen, -torch.inf)
                best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : c.index_topk]
                chosen.append(torch.zeros_like(scores).scatter(-1, best, 1.0).bool())
            seen = seen & chosen[-1]
    else:
        groups = {"mha": h, "gqa": c.n_kv_heads, "mqa": 1}[c.attention]
        q, k, v = (linear(x, w).unflatten(-1, (n, -1)) for w, n in ((m.wq, h), (m.wk, groups), (m.wv, groups)))
        mine = [i * groups // h for i in range(h)]  # neighbours share a key-value head
        q, k, v = rotate(q, c), rotate(k, c)[:, :, mine], v[:, :, mine]
    if c.qk_norm:
        q, k = rms_norm(q, m.q_head_norm, c.norm_eps), rms_norm(k, m.k_head_norm, c.norm_eps)
    scale = q.shape[-1] ** -0.5 * temperature(c.mscale_all_dim, c) ** 2
    logits = scale * torch.einsum("bshd,bthd->bhst", q, k)
    weights = logits.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    return linear(torch.einsum("bhst,bthv->bshv", weights, v).flatten(2), m.wo)


def index_scores(m: Any, x: Tensor, latent: Tensor, c: Any) -> Tensor:
    """V3.2, equation 1, without the Hadamard transform, which changes no product."""
    rope = c.qk_rope_head_dim
    k = F.layer_norm(linear(x, m.wk), (c.index_head_dim,), m.k_norm.weight, m.k_norm.bias, eps=1e-6)
    heads = torch.cat((linear(latent, m.wq_b).unflatten(-1, (c.index_n_heads, -1)), k.unsqueeze(2)), 2)  # the key last
    heads = torch.cat((rotate(heads[..., :rope], c, not c.indexer_rope_interleave), heads[..., rope:]), -1)
    products = torch.einsum("bshd,btd->bhst", heads[:, :, :-1], heads[:, :, -1]).clamp(min=0)
    weights = linear(x, m.weights_proj) * (c.index_n_heads * c.index_head_dim) ** -0.5
    return torch.einsum("bsh,bhst->bst", weights, products)


def choose(values: Any, c: Any, of_group: int) -> list[int]:
    """Return a token's experts, best first, from the groups whose best `of_group` sum to most; of equals the lower."""
    size = len(values) // c.n_expert_groups
    groups = [sorted(values[i : i + size])[-of_group:] for i in range(0, len(values), size)]
    kept = sorted(range(len(groups)), key=lambda g: (-sum(groups[g]), g))[: c.n_limited_groups]
    best = sorted((i for i in range(len(values)) if i // size in kept), key=lambda i: (-values[i], i))
    return best[: c.n_activated_experts]


def route(logits: Tensor, bias: Tensor | None, c: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices, weights, scores (V3, equations 13 to 16). Without a bias (V2) its best one speaks for a group."""
    scores = logits.sigmoid() if c.score_func == "sigmoid" else logits.softmax(-1)
    values = scores if bias is None else scores + bias
    indices = torch.tensor([choose(row, c, 1 if bias is None else 2) for row in values.detach().numpy()])
    weights = scores.gather(1, indices)
    total = weights.sum(-1, keepdim=True) if c.norm_topk_prob else 1.0
    return indices, weights / total * c.route_scale, scores


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def experts(m: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return each token's weighted experts (V3, equation 12), token by token, of x [n, m]."""
    y = torch.zeros_like(x)
    for n, chosen in enumerate(indices.tolist()):
        for g, i in zip(weights[n], chosen, strict=True):
            y[n] = y[n] + g * swiglu(x[n], m.w1[i], m.w2[i], m.w3[i])
    return y


def feed_forward(m: Any, x: Tensor, c: Any, routing: list[Any]) -> Tensor:
    """Return the output of a dense layer, or of experts, whose routing is appended."""
    if not hasattr(m, "gate"):
        return swiglu(x, m.w1.weight, m.w2.weight, m.w3.weight)
    routing.append(route(linear(x.flatten(0, 1), m.gate), m.gate.bias, c))
    y = experts(m.experts, x.flatten(0, 1), *routing[-1][:2]).view(x.shape)
    return y if m.shared_experts is None else y + feed_forward(m.shared_experts, x, c, [])


def block(m: Any, x: Tensor, c: Any, seen: Tensor | None, routing: list[Any], chosen: list[Tensor]) -> Tensor:
    x = x + attention(m.attn, rms_norm(x, m.attn_norm, c.norm_eps), c, seen, chosen)
    return x + feed_forward(m.ffn, rms_norm(x, m.ffn_norm, c.norm_eps), c, routing)


def model(m: Any, tokens: Tensor, c: Any, seen: Tensor | None = None) -> tuple[list[Tensor], list[Any]]:
    """Return the logits of the next token and of each depth of MTP (V3, equations 21 to 23), and all routing."""
    embedding, routing, chosen = m.embed.weight[tokens], [], []
    x = embedding = rms_norm(embedding, m.embed_norm, c.norm_eps) if c.embed_norm else embedding
    for layer in m.layers:
        x = block(layer, x, c, seen, routing, chosen)
    logits = [linear(normed := rms_norm(x, m.norm, c.norm_eps), m.head)]
    for k, depth in enumerate(m.mtp, 1):
        n, hidden = tokens.shape[1] - k, x if c.mtp_input == "pre_norm" else normed
        pair = rms_norm(embedding[:, k:], depth.enorm, c.norm_eps), rms_norm(hidden[:, :n], depth.hnorm, c.norm_eps)
        within = seen if seen is None else seen[:, :n, :n]
        x = block(depth.block, linear(torch.cat(pair, -1), depth.eh_proj), c, within, routing, chosen)
        logits.append(linear(normed := rms_norm(x, depth.norm, c.norm_eps), m.head))
    return logits, routing
