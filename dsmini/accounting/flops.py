"""Floating-point operations of matrix products, as the papers count them. A multiply-add is two.

    forward, a token      2 N + L H (d_qk + d_v) T
    training, a token     3 times that: backward makes two products of each one, for the gradients of its two factors
    decoding, a token     2 N + 2 L H (2 c + d_rope) t, absorbed

N is the active parameters, L the layers, H the heads, d_qk and d_v the widths of a head's key and value, c the latent's
width, T the tokens of a sequence, t those that a new token sees. T stands for half of the square of queries and keys,
which a causal mask leaves. In DSA a query attends to min(t, index_topk) keys, after scores of all of them, which take
2 index_n_heads index_head_dim t.

Only the weights of an indexer have gradients, not what it reads: two times a forward of its matrices. Its scores run
once for all keys, and in its loss three times, for those that the stage compares: all keys in the warm-up, the chosen
ones in the sparse stage. The target of the loss, the main model's logits of all keys, takes 2 H d_qk t more. In the
warm-up all else runs forward only, with attention to all keys.

Worked example, DeepSeek-V3.2 that decodes at 128K tokens, one layer: scores 2.15 GFLOP and attention 0.57, dense 36.5.

Worked example, DeepSeek-V3 in training at T = 4096, without multi-token prediction:
6 * 36.625e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 219.7e9 + 30.7e9 = 250.4 GFLOP a token, printed as 250.

Left out: norms, softmax, activations, rotary embedding, residuals, choosing experts, weighing and summing their
outputs, losses, the optimizer. The embedding is a lookup. An implementation may run more: padded rows, logits after
the mask. dsmini.measure.counting counts those that ran.

Source: "Insights into DeepSeek-V3" (arXiv 2505.09343), table 2; DeepSeek-V2 report, section 2.1.2 (absorption).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from dsmini.accounting.tensors import (
    INDEXER,
    OVER,
    SCORES,
    DsaStage,
    TensorUse,
    check_context,
    check_sizes,
    check_training,
    collect,
    full_layers,
    key_width,
    main_tensors,
    tensors,
)
from dsmini.config import ModelConfig
from dsmini.config.fields import require

Amounts = Iterator[tuple[str, int]]
LOSS = "loss of the indexer"
"""Name of the products of an indexer's loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add is two."""

    total: int
    by_module: Mapping[str, int]
    """FLOPs of each kind of module, named as in Parameters.by_module; attention's products that grow with the
    context apart."""


class Work(NamedTuple):
    """FLOPs of the products of one tensor."""

    module: str
    forward: int
    backward: int
    """Gradients of both factors, nothing made again. An indexer's loss is made in the forward, with its gradients."""


def flops_per_token(
    config: ModelConfig,
    seq_len: int,
    causal: bool = True,
    training: bool = False,
    mtp: bool | None = None,
    dsa_stage: DsaStage = "sparse",
) -> Flops:
    """Return the FLOPs of a token, the mean over a sequence of seq_len tokens: 2 N + L H (d_qk + d_v) seq_len.

    Training takes three times that. MLA is counted in its expanded form, that of training and prefill.
    V3 at 4096 tokens in training, without MTP: 250.4 GFLOP, printed as 250; V2: 155.3, printed as 155.

    Args:
        causal: count half of the square of queries and keys, as the published figures do; the diagonal, 1 / seq_len
            of it, is ignored. False: the whole square, which is what an implementation with a mask computes.
        training: forward and backward, nothing recomputed.
        mtp: with the multi-token prediction blocks; left out: as training does, since plain decoding does not run
            them. The published figures are without. Simplified: depth k is counted at all positions, of which it has
            seq_len - k.

    Source: "Insights into DeepSeek-V3", table 2. Raises: ValueError for a seq_len below 1.
    """
    check_sizes(seq_len=seq_len)
    stage = dsa_stage if training else None
    uses = tensors(config) if (training if mtp is None else mtp) else main_tensors(config)
    parts = (part for use in uses for part in work(config, use, seq_len, 1, causal, stage))
    return _flops((part.module, part.forward + part.backward) for part in parts)


def decode_flops_per_token(config: ModelConfig, *, context: int) -> Flops:
    """Return the FLOPs of decoding one token of a sequence that holds `context` tokens with it.

    A baseline's logits and sums take 2 h (d_qk + d_v) a cached token and layer. MLA attends absorbed, which takes
    2 h (2 kv_lora_rank + d_rope) a cached token, and its halves of wkv_b are as much work as wkv_b for one token; with
    qk_norm expanded: it makes keys and values of the whole context again, 2 kv_lora_rank h (d_nope + d_v) a cached
    token, before the same as a baseline.

    Source: DeepSeek-V2 report, section 2.1.2 (absorption).
    Raises: ValueError for a context below 1 or beyond max_seq_len.
    """
    check_context(config, context)
    absorbed = is_absorbed(config)

    def amounts() -> Amounts:
        for use in main_tensors(config):
            if use.name == "wkv_b" and not absorbed:
                yield "expanding the cache", 2 * context * use.per_token
            else:
                yield use.module, 2 * use.per_token
            yield use.module, 2 * use.times * context_products(config, use, context, absorbed)

    return _flops(amounts())


def step_flops(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    causal: bool = True,
    training: bool = True,
    recompute: bool = False,
    last_logits: bool = False,
    dsa_stage: DsaStage = "sparse",
) -> Flops:
    """Return the FLOPs of one step over batch_size sequences of seq_len tokens, at the positions that there are.

    As batch_size * seq_len tokens of flops_per_token, but depth k of multi-token prediction has seq_len - k positions.

    Args:
        causal: as in flops_per_token.
        training: forward and backward with multi-token prediction; else the forward of a model that is only asked for
            logits, as when a prompt is read.
        recompute: blocks run forward once more in backward, up to what their last product reads.
        last_logits: the head only for the last token of each sequence, as generation does (training=False only).
        dsa_stage: as in flops_per_token.

    Raises: ValueError for sizes below 1, and last_logits in training.
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    if training:
        check_training(config, batch_size, seq_len)
        require(not last_logits, "last_logits=True in training, whose losses want all logits; use training=False")
    stage = dsa_stage if training else None

    def amounts() -> Amounts:
        for use in tensors(config) if training else main_tensors(config):
            again = training and recompute and is_repeated(config, use, dsa_stage)
            for each, s in by_depth(use, seq_len):
                tokens = 1 if use.name == "head" and last_logits else s
                for part in work(config, each, s, tokens, causal, stage):
                    yield part.module, batch_size * ((1 + again) * part.forward + part.backward)

    return _flops(amounts())


def work(c: ModelConfig, use: TensorUse, s: int, n: int, causal: bool, stage: DsaStage | None) -> Iterator[Work]:
    """Yield the FLOPs of a tensor for n tokens of a sequence of s, and of an indexer's loss next to its scores.

    Args:
        stage: of a training step; None: a forward.
    """
    keys, all_ = (twice_the_keys(most, s, causal, stage, use.ratio) for most in (use.most_keys, None))
    gradients = 2  # of both factors
    if stage is None or use.kind == SCORES or (stage == "warmup" and use.kind != INDEXER):
        gradients = 0
    elif use.kind == INDEXER:  # whose inputs have no gradient
        gradients = 1
    forward = 2 * n * use.per_token + use.times * int(n * keys * use.per_pair)
    yield Work(use.module, forward, gradients * forward)
    if stage and use.kind == SCORES:  # scores with their backward, and the target's logits of all keys
        compared = twice_the_keys(c.index_topk, s, causal, stage, use.ratio)
        loss = 3 * compared * use.per_pair + all_ * (c.n_heads * key_width(c))
        learnt = use.times
        if c.indexer_target == "served" and not use.mtp:  # all layers; of a planner's mean block one
            learnt = round(use.times * c.n_layers / full_layers(c))
        yield Work(use.module.replace(SCORES, LOSS), learnt * int(n * loss), 0)


def is_repeated(c: ModelConfig, use: TensorUse, stage: DsaStage) -> bool:
    """Return whether a block that is made again in backward runs a product again.

    Backward needs no result of the last one. Two it needs: the routed experts', whose weights learn from them, and in
    FP8 SwiGLU's with the product after it, one function. MTP's blocks end with a norm, and begin with its projection.
    Several residual streams read the last result. The ends of the main model are outside of blocks. In the warm-up the
    last result that it needs is the indexer's.
    """
    if stage == "warmup" and c.attention == "dsa":
        read = (INDEXER, SCORES, "attention", "projection")
        return use.kind in read and use.name not in ("wo", "head")
    ends_alone = c.precision == "native" and c.hc_mult == 1 and not use.mtp
    last = ends_alone and use.name == "w2" and use.kind != "routed experts"
    return use.place != "ends" and use.name != "head" and not last


def by_depth(use: TensorUse, seq_len: int) -> Iterator[tuple[TensorUse, int]]:
    """Yield a tensor with the positions of a sequence that pass it: in depth k of multi-token prediction k fewer."""
    if not use.mtp:
        yield use, seq_len
        return
    for depth in range(use.first, use.first + use.times):
        yield use._replace(times=1), seq_len - depth - 1


def twice_the_keys(
    most_keys: int | None, s: int, causal: bool = True, stage: DsaStage | None = None, ratio: int = 1
) -> Fraction:
    """Return two times the keys that a query sees, at most most_keys, the mean over s queries.

    A mask hides keys and saves nothing: without `causal` all keys count, those that were not chosen too. In the warm-up
    every query sees all keys.

    Args:
        ratio: tokens of a key.
    """
    keys = Fraction(s, ratio)
    if not causal:
        return 2 * keys
    if most_keys is None or stage == "warmup":
        return keys
    k = min(keys, most_keys)
    return k * (2 * keys - k) / keys


def is_absorbed(c: ModelConfig) -> bool:
    """Return whether a new token attends to MLA's cache in the absorbed form: where the heads are not normed.

    So a cached token costs fewer operations whatever the sizes: 2 c + d_rope is less than c (d_nope + d_v) + d_qk + d_v
    for each head.
    """
    return c.is_mla and not c.qk_norm


def context_products(c: ModelConfig, use: TensorUse, context: int, absorbed: bool) -> int:
    """Return the multiply-adds of a new token with the cache in one block, all heads; 0 for a parameter.

    Where a query chooses rows the form is absorbed, which reads those alone.
    """
    keys = context // use.ratio
    met = min(keys, use.most_keys or keys)
    if use.kind == OVER and absorbed:
        return met * (c.n_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim))
    return met * use.per_pair


def _flops(amounts: Amounts) -> Flops:
    by_module = collect(amounts)
    return Flops(total=sum(by_module.values()), by_module=by_module)
