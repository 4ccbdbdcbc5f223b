"""DeepSeek-V4 in plain PyTorch, rounded where its released code stores a number: what dsmini's BF16 is compared with.

Written from the equations of the report and the dtypes of the released code. Numbers of the compute dtype are rounded
to it; those in between are FP32. In FP64 nothing is rounded, and the model is the exact one. One document [s], without
MTP; a query sees every entry whose block has ended, so index_topk must not be smaller than their number.
"""

import functools
from typing import Any

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return x in the dtype of what lies between two rounded numbers."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.to(x.dtype).T


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = wide(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def turn(x: Tensor, positions: Tensor, theta: float, width: int) -> Tensor:
    """Rotate adjacent pairs of the last numbers of [s, ..., d] by their positions."""
    angles = positions[:, None].float() * theta ** (-torch.arange(0, width, 2).float() / width)
    angles = angles.view(len(x), *[1] * (x.dim() - 2), width // 2)
    pairs = torch.view_as_complex(wide(x[..., -width:]).unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat((x[..., :-width], turned.to(x.dtype)), -1)


def as_fp8(x: Tensor) -> Tensor:
    """Round blocks of 64 numbers to E4M3 with a power of two each."""
    out = []
    for block in wide(x).split(64, -1):
        amax = block.abs().amax(-1, keepdim=True).clamp(min=1e-4)
        scale = torch.exp2((amax / 448).log2().ceil())
        out.append((block / scale).to(torch.float8_e4m3fn).to(scale.dtype) * scale)
    return torch.cat(out, -1).to(x.dtype)


def as_cached(rows: Tensor, c: Any) -> Tensor:
    """Return rows as attention reads them: in quantization-aware training their numbers without position as FP8."""
    r = c.qk_rope_head_dim
    return torch.cat((as_fp8(rows[:, :-r]), rows[:, -r:]), -1) if c.qat else rows


def entries(of: Any, x: Tensor, m: int, c: Any) -> Tensor:
    """Compress each whole block of m tokens to a row; with m = 4 the block before takes part, with its own series."""
    d, overlap = len(of.norm.weight), m == 4
    contents, weights = (project(wide(x), part.weight) for part in (of.wkv, of.wgate))
    rows = []
    for start in range(0, len(x) - m + 1, m):
        own = slice(start, start + m)
        values, logits = [contents[own, -d:]], [(weights[own] + of.ape)[:, -d:]]
        if overlap and start:
            before = slice(start - m, start)
            values.append(contents[before, :d])
            logits.append((weights[before] + of.ape)[:, :d])
        rows.append((torch.cat(logits).softmax(0) * torch.cat(values)).sum(0))
    if not rows:
        return x.new_zeros(0, d)
    made = norm(torch.stack(rows).to(x.dtype), of.norm.weight, c.norm_eps)
    return as_cached(turn(made, m * torch.arange(len(made)), c.compress_rope_theta, c.qk_rope_head_dim), c)


def attention(a: Any, x: Tensor, m: int, c: Any) -> Tensor:
    t, r = torch.arange(len(x)), c.qk_rope_head_dim
    theta = c.compress_rope_theta if m else c.rope_theta
    q = project(norm(project(x, a.wq_a.weight), a.q_norm.weight, c.norm_eps), a.wq_b.weight).unflatten(
        -1, (c.n_heads, -1)
    )
    q = turn(q * torch.rsqrt(q.square().mean(-1, keepdim=True) + c.norm_eps), t, theta, r)
    kv = as_cached(turn(norm(project(x, a.wkv.weight), a.kv_norm.weight, c.norm_eps), t, theta, r), c)
    seen = (t <= t[:, None]) & (t > t[:, None] - c.window_size)
    if m:
        made = entries(a.compressor, x, m, c)
        assert m != 4 or len(made) <= c.index_topk
        kv, seen = torch.cat((kv, made)), torch.cat((seen, m * torch.arange(len(made)) + m - 1 <= t[:, None]), 1)
    logits = torch.einsum("shd,td->sht", wide(q), wide(kv)) * c.head_dim**-0.5
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    p = (logits - largest).exp()
    total = p.sum(-1, keepdim=True) + (a.attn_sink.to(p.dtype)[:, None] - largest).exp()
    o = (torch.einsum("sht,td->shd", wide(p.to(x.dtype)), wide(kv)) / total).to(x.dtype)
    o = turn(o, -t, theta, r).flatten(1).unflatten(-1, (c.o_groups, -1))
    of_groups = a.wo_a.weight.to(x.dtype).unflatten(0, (c.o_groups, -1))
    return project(torch.einsum("sgw,grw->sgr", o, of_groups).flatten(1), a.wo_b.weight)


def expert(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, limit: float, share: Tensor | None = None) -> Tensor:
    """Clamp, activate and weigh in FP32; round once, before w2."""
    gate, up = wide(project(x, w1)).clamp(max=limit), wide(project(x, w3)).clamp(-limit, limit)
    hidden = gate * torch.sigmoid(gate) * up
    return project((hidden if share is None else share * hidden).to(x.dtype), w2)


def moe(f: Any, x: Tensor, tokens: Tensor, c: Any) -> Tensor:
    """Sum the experts, the shared one last, in FP32."""
    scores = torch.nn.functional.softplus(project(wide(x), f.gate.weight)).sqrt()
    table = getattr(f.gate, "tid2eid", None)
    best = (scores + f.gate.bias).topk(c.n_activated_experts).indices if table is None else table[tokens].long()
    shares = scores.gather(1, best)
    shares = shares / shares.sum(-1, keepdim=True) * c.route_scale
    y = torch.zeros_like(wide(x))
    for i in range(c.n_routed_experts):
        token, choice = (best == i).nonzero(as_tuple=True)
        e, limit = f.experts, c.swiglu_limit
        y[token] += expert(x[token], e.w1[i], e.w2[i], e.w3[i], limit, shares[token, choice, None])
    e = f.shared_experts
    return (y + expert(x, e.w1.weight, e.w2.weight, e.w3.weight, c.swiglu_limit)).to(x.dtype)


def mixes(streams: Tensor, of: Any, eps: float) -> Tensor:
    flat = wide(streams).flatten(1)
    return project(flat, of.fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def read(streams: Tensor, weights: Tensor) -> Tensor:
    return (weights[..., None] * wide(streams)).sum(1).to(streams.dtype)


def sublayer(streams: Tensor, of: Any, before: Any, run: Any, c: Any) -> Tensor:
    """Read one sum of the streams, and write to all, which are mixed; all in FP32 but what is stored."""
    n, eps = c.hc_mult, c.hc_eps
    pre, post, comb = mixes(streams, of, c.norm_eps).split((n, n, n * n), 1)
    bias = of.base.split((n, n, n * n))
    comb = (of.scale[2] * comb + bias[2]).unflatten(1, (n, n)).softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    x = read(streams, torch.sigmoid(of.scale[0] * pre + bias[0]) + eps)
    y = run(norm(x, before.weight, c.norm_eps))
    new = 2 * torch.sigmoid(of.scale[1] * post + bias[1])[..., None] * wide(y)[:, None]
    return (new + torch.einsum("sjk,sjm->skm", comb, wide(streams))).to(y.dtype)


def logits(model: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits [s, v] of tokens [s], FP32 or, for FP64, in that."""
    c = model.config
    x = model.embed.weight.to(dtype)[tokens][:, None].expand(-1, c.hc_mult, -1)
    for block, m in zip(model.layers, c.compress_ratios, strict=True):
        attend = functools.partial(attention, block.attn, m=m, c=c)
        x = sublayer(x, block.hc_attn, block.attn_norm, attend, c)
        x = sublayer(x, block.hc_ffn, block.ffn_norm, functools.partial(moe, block.ffn, tokens=tokens, c=c), c)
    head = model.hc_head
    x = read(x, torch.sigmoid(mixes(x, head, c.norm_eps) * head.scale + head.base) + c.hc_eps)
    return project(wide(norm(x, model.norm.weight, c.norm_eps)), model.head.weight)
