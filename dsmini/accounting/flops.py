"""Floating-point operations of decoding, and of whole steps as dsmini does them on a CPU in eager mode.

They differ from flops_per_token in what is really multiplied: experts' rows padded to multiples of 64, logits of a
block of 128 queries with all keys up to the block's end, positions that multi-token prediction has not.
"""

from collections.abc import Iterator
from typing import Literal

from dsmini.accounting.memory import check_dtype
from dsmini.accounting.parameters import Flops
from dsmini.accounting.tensors import Dtype, Part, collect, key_width, main_parts, mtp_parts
from dsmini.config import ModelConfig

Form = Literal["auto", "expanded", "absorbed"]
ROWS = 64
"""The cache is read in multiples of so many rows, and experts' rows are padded to them in BF16."""
QUERIES = 128
"""Logits are made for so many queries at a time."""
EXPLICIT = {"float32": 128, "bfloat16": 1024}
"""Up to so many tokens logits are explicit; beyond, attention is torch's flash attention."""


def decode_flops_per_token(config: ModelConfig, *, context: int, form: Form = "auto", as_run: bool = False) -> Flops:
    """FLOPs of decoding one token of a sequence that holds `context` with it: 2 N, and attention to what is cached.

    A twin's logits and sums take 2 h (d_qk + d_v) a cached token and layer. Expanded MLA makes keys and values of
    the whole context anew, 2 kv_lora_rank h (d_nope + d_v) a cached token, before the same; absorbed MLA takes 2 h (2
    kv_lora_rank + d_rope) a cached token, and its halves of wkv_b are as much work as wkv_b for one token.

    Args:
        form: how MLA attends; auto: as dsmini does, the form with fewer operations.
        as_run: with the rows that dsmini reads beyond the context, up to a multiple of 64. The padding of experts' rows
            in batches of more than 64 e / k sequences is not in it.

    Source: DeepSeek-V2 report, section 2.1.2 (absorption).
    Raises: ValueError for a context below 1 or beyond max_seq_len, and form="absorbed" of what has none.
    """
    keys = rows_read(config, context) if as_run else check_context(config, context)
    chosen = form_taken(config, context, form)

    def amounts() -> Iterator[tuple[str, int]]:
        for part in main_parts(config):
            if part.name == "wkv_b" and chosen == "expanded":
                yield "expanding the cache", 2 * keys * part.per_token
            else:
                yield part.module, 2 * part.per_token
            pair = part.per_pair if chosen == "expanded" or not part.per_pair else absorbed_pair(config)
            yield part.module, 2 * keys * pair

    by_module = collect(amounts())
    return Flops(total=sum(by_module.values()), by_module=by_module)


def step_flops(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    training: bool = True,
    dtype: Dtype = "bfloat16",
    recompute: bool = False,
    last_logits: bool = False,
) -> Flops:
    """FLOPs of the matrix products of one step over batch_size sequences of seq_len tokens, as dsmini runs it.

    Exact where attention's logits are explicit, up to 1024 tokens in BF16 and 128 in FP32. Beyond, torch's flash
    attention is counted as half the square, T (T + 1) / 2 pairs, of queries, keys and values padded to one width, with
    logits made again in backward; the blocks that it cuts the square in are not counted.
    Simulated FP8 makes the same products; its rounding is none. Left out as in flops_per_token: all but products.

    Args:
        training: forward and backward with multi-token prediction; else the forward of a model that is only asked for
            logits, as when a prompt is read.
        dtype: of the products.
        recompute: blocks run forward once more in backward, up to what their last product reads.
        last_logits: the head only for the last token of each sequence, as generation does (training=False only).

    Raises: ValueError for sizes below 1, and last_logits in training.
    """
    check_dtype(dtype, ("float32", "bfloat16"))
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    check_depths(config, seq_len, training)
    if training and last_logits:
        raise ValueError("last_logits=True in training, whose losses want all logits; use training=False")
    blocks = 3 + recompute if training else 1

    def amount(part: Part, s: int, passes: int) -> int:
        n = batch_size * s
        if part.per_pair:
            return batch_size * _attention(config, s, dtype, training, recompute)
        if part.module.endswith("routed experts"):
            rows = expert_rows(config, n, dtype)
            return 2 * passes * rows * part.per_token // part.visits
        if recompute and config.precision == "native" and part.name == "w2":
            passes -= 1  # recomputation stops behind the last number that is kept, which a block's last product reads
        rows = batch_size if part.name == "head" and last_logits else n
        return 2 * passes * rows * part.per_token

    def amounts() -> Iterator[tuple[str, int]]:
        for part in main_parts(config):
            inside = part.name not in ("embed", "head")
            yield part.module, amount(part, seq_len, blocks if inside else min(blocks, 3))
        for depth in range(config.n_mtp_layers if training else 0):
            for part in mtp_parts(config, depth):
                inside = part.name != "head"
                yield part.module, amount(part, seq_len - depth - 1, blocks if inside else 3)

    by_module = collect(amounts())
    return Flops(total=sum(by_module.values()), by_module=by_module)


def expert_rows(c: ModelConfig, n: int, dtype: str) -> int:
    """Rows that a layer's experts multiply for n tokens: a visit each and, in BF16 with enough of them, padding."""
    visits, e = n * c.n_activated_experts, c.n_routed_experts
    if dtype != "bfloat16" or visits < ROWS * e:
        return visits
    return -(-(visits + e * (ROWS - 1)) // ROWS) * ROWS


def explicit_pairs(s: int) -> int:
    """Logits a head makes of s queries, 128 at a time, with all keys up to the block's end."""
    return sum((min(s, start + QUERIES) - start) * min(s, start + QUERIES) for start in range(0, s, QUERIES))


def _attention(c: ModelConfig, s: int, dtype: Dtype, training: bool, recompute: bool) -> int:
    d, v, h = key_width(c), c.v_head_dim, c.n_heads
    forward = 1 + recompute if training else 1
    if s <= EXPLICIT[dtype]:
        return 2 * h * explicit_pairs(s) * (d + v) * (forward + 2 * training)
    products = 2 * forward + 5 * training
    return 2 * h * (s * (s + 1) // 2) * max(d, v) * products


def absorbed_pair(c: ModelConfig) -> int:
    """Multiply-adds of a query with a cached row in the absorbed form, all heads."""
    return c.n_heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim)


def form_taken(c: ModelConfig, context: int, form: Form) -> Literal["expanded", "absorbed"]:
    """How a layer attends from one new token; a twin is expanded, having nothing to absorb."""
    if form not in ("auto", "expanded", "absorbed"):
        raise ValueError(f"form={form!r} is unknown; use auto, expanded or absorbed")
    able = c.attention == "mla" and not c.qk_norm
    if form == "absorbed" and not able:
        raise ValueError("form='absorbed' is MLA's without qk_norm; use expanded")
    if form != "auto" or not able:
        return "expanded" if form == "auto" else form
    keys = rows_read(c, context)
    wkv_b = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    expanded = keys * wkv_b + keys * c.n_heads * (c.qk_head_dim + c.v_head_dim)
    return "absorbed" if wkv_b + keys * absorbed_pair(c) < expanded else "expanded"


def rows_read(c: ModelConfig, context: int) -> int:
    """Of a cache that has room for max_seq_len tokens: those of the context, up to a multiple of 64."""
    return min(c.max_seq_len, -(-check_context(c, context) // ROWS) * ROWS)


def check_context(c: ModelConfig, context: int) -> int:
    """The context, if a model can have it."""
    if not 1 <= context <= c.max_seq_len:
        raise ValueError(f"context={context} is not from 1 to max_seq_len={c.max_seq_len}; use such a number")
    return context


def check_sizes(**sizes: int) -> None:
    """Refuse what is below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive; use 1 or more")


def check_depths(c: ModelConfig, seq_len: int, training: bool) -> None:
    """Refuse sequences that leave a depth of multi-token prediction no position."""
    if training and seq_len <= c.n_mtp_layers:
        raise ValueError(f"seq_len={seq_len} is too short for n_mtp_layers={c.n_mtp_layers}; use more tokens")
