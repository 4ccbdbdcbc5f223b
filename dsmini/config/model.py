"""The config of a model, in the spelling of DeepSeek's released inference code."""

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsmini.config.fields import Bounds, build, check_types, refuse_unknown, require, require_multiple, setting
from dsmini.config.published import config_from_json
from dsmini.reading import brief, find_config, read_table, read_toml, refuse_folder

SECTIONS = ["model", "data", "train", "parallel", "out", "serving"]
"""Top-level keys of a TOML file."""
LARGEST_SIZE = 2**31 - 1
"""Maximum value of a whole number of a model."""
LARGEST_MATRIX = 2**50
"""Maximum number of parameters in one tensor; no machine holds a petabyte."""
SLACK = 32
"""Number of latest tokens that V4's cache can take back."""
CSA_RATIO = 4
"""Compression ratio that makes a layer of V4 compressed sparse attention. Source: DeepSeek-V4's inference code."""
V4 = ("compressed",)
INDEXED = ("dsa", *V4)
"""Kinds of attention with an indexer."""
EXAMPLES = {
    "gqa": "such as n_kv_heads=2",
    "dsa": "as in ModelConfig.from_file('toy-dsa')",
    "compressed": "as in ModelConfig.from_file('toy-v4')",
}
"""Values of the fields that a kind of attention needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and choices of a transformer in the style of DeepSeek-V2, V3, V3.2 or V4."""

    vocab_size: int = 256
    """Number of token ids; 256 for bytes."""
    dim: int = 192
    """Width of the residual stream."""
    inter_dim: int = 512
    """Hidden width of the dense feed-forward layers."""
    moe_inter_dim: int = 128
    """Hidden width of one routed expert; the shared experts are n_shared_experts times as wide."""
    n_layers: int = setting(4, least=1, most=10_000)
    """Number of blocks, without those of multi-token prediction."""
    n_dense_layers: int = setting(1, least=0, most=10_000)
    """Number of leading blocks with a dense feed-forward; n_layers + n_mtp_layers makes the whole model dense."""
    n_heads: int = 4
    """Number of attention heads."""

    attention: Literal["mla", "dsa", "compressed", "mha", "gqa", "mqa"] = "mla"
    """Kind of attention: MLA; DSA, V3.2's MLA that reads only the keys its indexer chooses; compressed, V4's window of
    tokens with compressed entries of those before; or a baseline with keys of qk_nope_head_dim and values of
    v_head_dim."""
    n_kv_heads: int | None = setting(None, only=("gqa",))
    """Number of key-value heads; only for attention "gqa"."""
    q_lora_rank: int | None = 96
    """Width of the compressed query; None projects the query directly, but not in V4."""
    kv_lora_rank: int = 64
    """Width of the compressed key-value latent c_kv, which is what MLA caches."""
    qk_nope_head_dim: int = 32
    """Width of a query or key head without position."""
    qk_rope_head_dim: int = 16
    """Width of the rotary part of a query head, and of the rotary key that all heads share."""
    v_head_dim: int = 32
    """Width of a value head."""
    index_n_heads: int | None = setting(None, only=INDEXED)
    """Number of the indexer's heads (V3.2, V4: 64); only for attention "dsa" and, with a ratio of 4, "compressed"."""
    index_head_dim: int | None = setting(None, only=INDEXED)
    """Width of an indexer's head and of its key (V3.2, V4: 128), a power of two."""
    index_topk: int | None = setting(None, only=INDEXED)
    """Number of keys that a query attends to (V3.2: 2048), in V4 of compressed entries (Flash: 512, Pro: 1024)."""
    indexer_rope_interleave: bool = setting(False, only=("dsa",))
    """Adjacent pairs in the indexer's RoPE, as in GLM; off: pairs of the two halves, as in V3.2."""
    indexer_types: tuple[Literal["full", "shared"], ...] = setting((), only=("dsa",))
    """Kind of each of n_layers layers (GLM-5.2): a "full" one chooses keys by its indexer; a "shared" one has none, and
    takes the choice of the last full layer before it. MTP blocks are full. Empty: all are, and a folder is V3.2's."""
    indexer_target: Literal["own", "served"] = setting("own", only=("dsa",))
    """Attention that an indexer learns to predict: of its own layer, or the mean of all layers that take its choice."""
    indexer_fp8: bool = setting(False, only=("dsa",))
    """Simulated FP8 in the indexer: queries and keys are rounded to E4M3 with a scale for each 128 numbers."""

    head_dim: int | None = setting(None, only=V4)
    """Width of a head of V4, of which the last qk_rope_head_dim numbers are rotated. One key, its value too, serves all
    heads (512)."""
    window_size: int | None = setting(None, only=V4)
    """Number of latest tokens, the query's own among them, that a query sees uncompressed (V4: 128)."""
    compress_ratios: tuple[int, ...] | None = setting(None, only=V4)
    """Number of tokens in a compressed entry, for each of n_layers blocks. 4: CSA, whose entries overlap and whose
    indexer chooses among them; 0: the window alone, as in MTP blocks; any other, such as 128: HCA."""
    compress_rope_theta: float = setting(160000.0, only=V4)
    """Base of the rotary frequencies in layers with compressed entries, which alone have YaRN."""
    o_groups: int | None = setting(None, only=V4)
    """Number of groups of heads whose outputs are projected apart (Flash: 8, Pro: 16)."""
    o_lora_rank: int | None = setting(None, only=V4)
    """Width of each group's projected output (V4: 1024)."""
    qat: bool = setting(False, only=V4)
    """Entries and the window's rows rounded to FP8, the indexer's queries and keys to FP4, in training as in V4's
    cache."""

    n_routed_experts: int = 16
    """Number of routed experts in a MoE layer."""
    n_shared_experts: int = setting(1, least=0, most=LARGEST_SIZE)
    """Number of shared experts, which every token uses; 0 for none."""
    n_activated_experts: int = 4
    """Number of routed experts that a token uses (top-k)."""
    n_expert_groups: int = 4
    """Number of groups of equal size that the routed experts are divided into."""
    n_limited_groups: int = 2
    """Maximum number of expert groups a token may use."""
    score_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = setting("sigmoid", function=True)
    """Function that turns the gate's logits into scores: softmax in V2, sigmoid in V3, sqrt(softplus) in V4. In Python
    also a function, from logits [n, e] to scores, which no file can hold."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """Method of selecting experts. noaux_tc (V3): with a bias, groups scored by their best two experts;
    group_limited_greedy (V2): no bias, groups scored by their best one; greedy (V2-Lite): no bias, no groups."""
    norm_topk_prob: bool = True
    """Normalization of a token's expert weights to a sum of 1."""
    route_scale: float = 2.5
    """Factor on the weights of the routed experts."""
    n_hash_layers: int = setting(0, least=0, most=10_000)
    """Number of leading blocks that choose experts by a table from token ids, not by scores (V4: 3)."""
    swiglu_limit: float | None = None
    """Largest value of SwiGLU's two inputs, and negative the smallest of `up` (V4: 10); None: any."""

    hc_mult: int = setting(1, least=1, most=64)
    """Number of residual streams, which manifold-constrained hyper-connections mix (V4: 4); 1: a plain residual."""
    hc_kind: Literal["sinkhorn", "identity"] = "sinkhorn"
    """Kind of hyper-connections. sinkhorn (V4): the streams are mixed by doubly stochastic matrices; identity (Hunyuan
    V4): they are not mixed. Only with hc_mult of more than 1."""
    hc_sinkhorn_iters: int = setting(20, least=1, most=1000)
    """Number of times that rows and columns of a mixing matrix are divided by their sums."""
    hc_eps: float = setting(1e-6, above=0, most=0.01)
    """Number that is added to weights and sums of hyper-connections."""

    engram_layer_ids: tuple[int, ...] | None = None
    """Numbers of the blocks, from 0, that look n-grams up in tables before their attention; none: no Engram."""
    engram_max_ngram_size: int = setting(3, least=2, most=64)
    """Largest order of an n-gram; all orders from 2 on are looked up (V4.1: 4)."""
    engram_n_heads: int = 4
    """Number of rows that are looked up for each order (V4.1: 8)."""
    engram_head_dim: int = 16
    """Width of a row of a table (V4.1: 256)."""
    engram_vocab_size: int = setting(4096, least=2, most=LARGEST_SIZE)
    """Least number of rows of each head: each takes the next prime that no other has (V4.1: 16 million)."""
    engram_conv_size: int | None = setting(4, least=1, most=64)
    """Number of tokens that the convolution after the tables reads; none (V4.1): no convolution."""
    engram_pad_token_id: int = setting(2, least=0, most=LARGEST_SIZE)
    """Token that stands for those before the start of a sequence."""
    engram_seed: int = setting(0, least=0, below=2**63)
    """Seed of the multipliers of the hash."""

    n_mtp_layers: int = setting(1, least=0, most=10_000)
    """Number of extra blocks for multi-token prediction, each of which predicts one token further."""
    mtp_input: Literal["post_norm", "pre_norm"] = "post_norm"
    """Hidden state given to the MTP blocks: the one after or before the final norm. The sources disagree. Several
    residual streams are given as they are."""

    max_seq_len: int = 256
    """Maximum sequence length in tokens; beyond original_seq_len the context counts as extended and YaRN is on."""
    original_seq_len: int | None = None
    """Context length in tokens of the training before an extension; None: never extended, no YaRN."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_factor: float = 40.0
    """Extension factor of YaRN."""
    beta_fast: float = 32.0
    """Number of turns within original_seq_len above which YaRN leaves a rotary frequency as it is."""
    beta_slow: float = 1.0
    """Number of turns within original_seq_len below which YaRN divides a rotary frequency by rope_factor."""
    mscale: float = setting(1.0, least=0, most=1e30)
    """Coefficient of YaRN's attention temperature for the rotary part of the logit."""
    mscale_all_dim: float = setting(1.0, least=0, most=1e30)
    """Coefficient of YaRN's attention temperature for the whole logit."""

    norm_eps: float = setting(1e-6, above=0, most=1.0)
    """Epsilon of RMSNorm; the two latent norms of MLA always use 1e-6, as in DeepSeek's code."""
    init_std: float = setting(0.02, above=0, most=10.0)
    """Standard deviation of the initial weights (V3: 0.006)."""
    zero_init: bool = False
    """Zeros as initial weights of the head and of every matrix that writes into the residual stream. Not DeepSeek's."""
    embed_norm: bool = False
    """RMSNorm of the embedding before the first block. Not DeepSeek's."""
    qk_norm: bool = False
    """RMSNorm of each head's whole query and key. DeepSeek norms the latents instead; excludes the absorbed form."""
    precision: Literal["native", "fp8"] = "native"
    """Precision of matrix products. native: the compute dtype; fp8: simulated FP8 in attention and feed-forwards."""

    def __post_init__(self) -> None:
        """Raise ValueError for every combination of sizes that cannot be built."""
        check_types(self, whole=Bounds(least=1, most=LARGEST_SIZE), real=Bounds(above=0, most=1e30))
        self._check_sizes()
        self._check_attention()
        self._check_experts()
        if self.engram_layer_ids is not None:
            self._check_engram(self.engram_layer_ids)

    def _check_sizes(self) -> None:
        """Refuse sizes that no machine holds, before torch meets them."""
        heads = self.n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)
        experts = self.moe_inter_dim * max(self.n_routed_experts, self.n_shared_experts)
        indexer = (self.index_n_heads or 0) * (self.index_head_dim or 0)
        heads = max(heads, self.n_heads * (self.head_dim or 0), (self.o_groups or 0) * (self.o_lora_rank or 0))
        latents = (self.q_lora_rank or 0, self.kv_lora_rank)
        largest = max(self.vocab_size, self.inter_dim, heads, experts, indexer, *latents) * max(self.dim, *latents)
        require(
            largest <= LARGEST_MATRIX,
            f"dim={self.dim}, inter_dim={self.inter_dim}, n_heads={self.n_heads} and the other sizes make a matrix of "
            f"{largest:,} numbers; use smaller ones, which make at most {LARGEST_MATRIX:,}",
        )
        require(
            self.hc_mult > 1 or self.hc_kind == "sinkhorn",
            f"hc_kind='{self.hc_kind}' has no meaning with one residual stream; leave it out, or use hc_mult=4",
        )
        deepest = self.n_layers + self.n_mtp_layers
        require(
            self.n_dense_layers <= deepest,
            f"n_dense_layers={self.n_dense_layers} is more than the {deepest} blocks there are "
            f"(n_layers + n_mtp_layers); use {deepest} or fewer",
        )

    def _check_attention(self) -> None:
        rotary = "qk_nope_head_dim" if self.is_baseline else "qk_rope_head_dim"
        width, kind = getattr(self, rotary), self.attention
        require(width % 2 == 0, f"{rotary}={width} is odd; RoPE turns pairs, use {width + 1}")
        chosen = [f for f in dataclasses.fields(self) if f.metadata.get("only")]
        needed = [f.name for f in chosen if kind in f.metadata["only"]]
        if kind in V4 and CSA_RATIO not in (self.compress_ratios or (CSA_RATIO,)):  # no layer has an indexer
            needed = [name for name in needed if not name.startswith("index_")]
        missing = [name for name in needed if getattr(self, name) is None]
        require(
            not missing,
            f"attention='{kind}' needs {', '.join(missing)}; set {'it' if len(missing) == 1 else 'them'}, "
            f"{EXAMPLES.get(kind)}, or take 'mla', 'mha' or 'mqa', which need no more",
        )
        for f in chosen:
            value, only = getattr(self, f.name), f.metadata["only"]
            require(
                kind in only or value == f.default,
                f"{f.name}={brief(value)} has no meaning with attention='{kind}'; leave it out, or use "
                f"attention={' or '.join(map(repr, only))}",
            )
        if self.n_kv_heads is not None:
            require_multiple("n_heads", self.n_heads, "n_kv_heads", self.n_kv_heads)
        if self.index_head_dim is not None:
            self._check_indexer(self.index_head_dim, self.qk_rope_head_dim)
        if types := self.indexer_types:
            n = self.n_layers
            require(
                len(types) == n,
                f"indexer_types has {len(types)} names, n_layers={n}; give one for each layer (MTP blocks are full)",
            )
            require(
                types[0] == "full",
                "indexer_types begins with 'shared', and no layer before it chooses keys; begin with 'full'",
            )
        if self.compress_ratios is not None:
            self._check_compressed(self.compress_ratios, self.head_dim or 0, self.o_groups or 1)
        for name in ("rope_theta", "compress_rope_theta"):
            theta = getattr(self, name)
            require(theta > 1, f"{name}={theta} makes no slower frequencies; use more than 1")
        if self.extended:
            require(self.rope_factor >= 1, f"rope_factor={self.rope_factor} shrinks the context; use 1 or more")
            swapped = f"beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; swap them"
            require(self.beta_fast >= self.beta_slow, swapped)

    def _check_indexer(self, d: int, r: int) -> None:
        require(
            not self.qk_norm,
            f"attention='{self.attention}' with qk_norm: it has no form for heads normed as a whole; leave one out",
        )
        require(
            d & (d - 1) == 0,
            f"index_head_dim={d} is not a power of two, as the Hadamard transform needs; use {1 << d.bit_length()}",
        )
        require(
            d >= r,
            f"index_head_dim={d} is smaller than qk_rope_head_dim={r}, which it holds; use {1 << (r - 1).bit_length()}",
        )

    def _check_compressed(self, ratios: tuple[int, ...], d: int, groups: int) -> None:
        n, r = self.n_layers, self.qk_rope_head_dim
        require(
            len(ratios) == n,
            f"compress_ratios has {len(ratios)} numbers, n_layers={n}; give one for each layer (MTP blocks have none)",
        )
        wrong = [ratio for ratio in ratios if ratio < 0 or ratio == 1 or ratio > LARGEST_SIZE]
        require(not wrong, f"compress_ratios has {brief(wrong)}; use 0 for the window alone, 4 for CSA, 128 for HCA")
        require(r <= d, f"qk_rope_head_dim={r} is more than head_dim={d}, which it is a part of; use {d} or less")
        require(self.q_lora_rank is not None, "attention='compressed' needs q_lora_rank, a compressed query; set it")
        require_multiple("n_heads", self.n_heads, "o_groups", groups)
        require(
            self.n_mtp_layers <= SLACK,
            f"n_mtp_layers={self.n_mtp_layers} guesses with attention='compressed', whose cache can take back {SLACK} "
            f"tokens; use {SLACK} or fewer",
        )

    def _check_experts(self) -> None:
        e, g, k = self.n_routed_experts, self.n_expert_groups, self.n_activated_experts
        limited, method = self.n_limited_groups, self.topk_method
        reachable, hashed = e // g * limited, self.n_hash_layers
        require(hashed <= self.n_layers, f"n_hash_layers={hashed} is more than n_layers={self.n_layers}; use fewer")
        require(
            not hashed or not self.n_dense_layers,
            f"n_hash_layers={hashed} with n_dense_layers={self.n_dense_layers}: both are the first layers; use "
            "n_dense_layers=0",
        )
        require_multiple("n_routed_experts", e, "n_expert_groups", g)
        require(limited <= g, f"n_limited_groups={limited} is more than n_expert_groups={g}; use {g} or fewer")
        require(k <= e, f"n_activated_experts={k} is more than n_routed_experts={e}; use {e} or fewer")
        require(
            k <= reachable,
            f"n_activated_experts={k} is more than the {reachable} experts in n_limited_groups={limited} groups of "
            f"{e // g}; use {reachable} or fewer, or allow more groups",
        )
        require(
            method != "greedy" or g == 1,
            f"topk_method='greedy' ignores groups, got n_expert_groups={g}; use 1, or another method",
        )
        require(
            method != "noaux_tc" or g == 1 or e // g >= 2,
            f"noaux_tc scores a group by its best two, got groups of {e // g}; use fewer groups",
        )

    def _check_engram(self, layers: tuple[int, ...]) -> None:
        n, last = self.engram_max_ngram_size, self.n_layers - 1
        require(
            len(layers) > 0 and list(layers) == sorted(set(layers)) and layers[0] >= 0 and layers[-1] <= last,
            f"engram_layer_ids={brief(list(layers))}; want rising numbers of blocks from 0 to {last}",
        )
        require(
            n <= self.max_seq_len,
            f"engram_max_ngram_size={n} is more than max_seq_len={self.max_seq_len}, which no n-gram can be; use fewer",
        )
        pad, most = self.engram_pad_token_id, self.vocab_size - 1
        require(
            most < 2**24, f"vocab_size={self.vocab_size} is more ids than Engram's hash takes; use {2**24} or fewer"
        )
        require(pad <= most, f"engram_pad_token_id={pad} is outside the vocabulary; want 0 to {most}")
        require(
            self.n_mtp_layers <= SLACK,
            f"n_mtp_layers={self.n_mtp_layers} guesses with an Engram, whose cache can take back {SLACK} tokens; use "
            f"{SLACK} or fewer",
        )
        heads = self.engram_n_heads * (n - 1)
        largest = heads * self.engram_head_dim * max(self.engram_vocab_size, self.hc_mult * self.dim)
        require(
            largest <= LARGEST_MATRIX,
            f"engram_vocab_size={self.engram_vocab_size} and the other sizes make a table of {largest:,} numbers; use "
            f"smaller ones, which make at most {LARGEST_MATRIX:,}",
        )

    def engram_primes(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Return the rows of each head of each order, from 2 on, of block `layer`.

        All heads of all layers have different primes: the first ones from engram_vocab_size on.
        """
        layers, heads, orders = self.engram_layer_ids or (), self.engram_n_heads, self.engram_max_ngram_size - 1
        primes = primes_from(self.engram_vocab_size, len(layers) * orders * heads)
        first = layers.index(layer) * orders
        return tuple(primes[i * heads : (i + 1) * heads] for i in range(first, first + orders))

    @property
    def engram_reach(self) -> int:
        """Return the number of tokens before a token that Engram's convolution reads."""
        return self.engram_max_ngram_size * ((self.engram_conv_size or 1) - 1)

    @property
    def extended(self) -> bool:
        """Return True if YaRN applies: the context is longer than the one trained at."""
        return self.original_seq_len is not None and self.max_seq_len > self.original_seq_len

    @property
    def is_mla(self) -> bool:
        """Return True for attention whose rows in a cache are MLA's: MLA itself, and DSA."""
        return self.attention in ("mla", "dsa")

    @property
    def is_baseline(self) -> bool:
        """Return True for MHA, GQA and MQA, which rotate whole heads of qk_nope_head_dim."""
        return self.attention in ("mha", "gqa", "mqa")

    @property
    def output_init_std(self) -> float:
        """Return the standard deviation of the initial weights of the head and of writes into the residual stream."""
        return 0.0 if self.zero_init else self.init_std

    @property
    def qk_head_dim(self) -> int:
        """Return the width of a whole query or key head of MLA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads of a baseline."""
        return {"mqa": 1, "gqa": self.n_kv_heads or self.n_heads}.get(self.attention, self.n_heads)

    def compress_ratio(self, layer: int) -> int:
        """Return the number of tokens in a compressed entry of block `layer`; 0 without any, as in MTP blocks."""
        return self.compress_ratios[layer] if self.compress_ratios and layer < self.n_layers else 0

    def index_source(self, layer: int) -> int:
        """Return the block whose indexer chooses the keys of block `layer`: itself, or the last full one before it."""
        while self.indexer_types and layer < self.n_layers and self.indexer_types[layer] == "shared":
            layer -= 1
        return layer

    @property
    def has_indexers(self) -> bool:
        """Return True if some layer chooses keys or compressed entries by an indexer."""
        return any(map(self.has_indexer, range(self.n_layers)))

    def has_indexer(self, layer: int) -> bool:
        """Return True if block `layer` has an indexer of its own."""
        if self.attention == "dsa":
            return self.index_source(layer) == layer
        return self.compress_ratio(layer) == CSA_RATIO

    @property
    def tokens_per_key(self) -> int:
        """Return the number of tokens that a key of an indexer stands for."""
        return CSA_RATIO if self.attention in V4 else 1

    def is_hashed(self, layer: int) -> bool:
        """Return True if block `layer` chooses experts by a table from token ids."""
        return layer < self.n_hash_layers

    def is_moe(self, layer: int) -> bool:
        """Return True if block `layer` has experts; MTP blocks follow the last layer."""
        return layer >= self.n_dense_layers

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a TOML file's [model], DeepSeek's inference JSON, or Hugging Face's config.json.

        Raises: ValueError naming the key that is unknown, cannot be honoured, or has a wrong value.
        """
        path = find_config(Path(path))
        refuse_folder(path)
        if path.suffix == ".json":
            raw = read_table(path)
            return build(cls, config_from_json(raw, str(path)), path.name, "")
        sections = read_toml(path)
        refuse_unknown(sections, SECTIONS, path.name, "")
        return build(cls, sections.get("model", {}), path.name, "model.")


@functools.cache
def primes_from(least: int, number: int) -> tuple[int, ...]:
    """Return this many primes, the first ones that are not less than `least`."""
    candidates = (n for n in itertools.count(max(least, 2)) if all(n % d for d in range(2, math.isqrt(n) + 1)))
    return tuple(itertools.islice(candidates, number))


def layer_config(config: ModelConfig | None, arguments: dict[str, Any]) -> ModelConfig:
    """Return the config of a single layer: `config` or the defaults, changed by plain arguments.

    Raises: ValueError for an unknown argument, with the nearest right one.
    """
    require(
        config is None or isinstance(config, ModelConfig),
        f"a layer is made from a ModelConfig or keyword arguments, got a {type(config).__name__}; use ModelConfig(...)",
    )
    require(
        "causal" not in arguments,
        "attention is causal; leave out causal, and hide keys in a call: layer(x, mask=...), True for hidden keys",
    )
    if not arguments:  # a model asks for every part of every layer
        return config or ModelConfig()
    refuse_unknown(arguments, [f.name for f in dataclasses.fields(ModelConfig)], "the arguments", "")
    return dataclasses.replace(config or ModelConfig(), **arguments)


NO_INDEXER = {
    f.name: f.default
    for f in dataclasses.fields(ModelConfig)
    if {"dsa", "compressed"} & set(f.metadata.get("only") or ())
}
"""Fields of a model whose attention has neither an indexer nor compressed entries."""
