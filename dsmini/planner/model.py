"""Figures of a model alone: parameters, operations, cache, and the weights of a deployment.

All numbers are sums over the one list of dsmini.accounting, which counts them by kind of module.

Worked example, DeepSeek-V3 at 4096 tokens: 671,026,404,352 parameters, of which a token uses 36,624,596,992; training
takes 6 * 36.62e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 250.4 GFLOP a token, printed as 250.

Source: DeepSeek-V3 report, section 4.2; "Insights into DeepSeek-V3" (INS, arXiv 2505.09343), tables 1 and 2.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from dsmini.accounting import parameters
from dsmini.accounting.flops import LOSS, flops_per_token, is_repeated, work
from dsmini.accounting.memory import (
    CacheDtype,
    Recompute,
    Saved,
    fixed_cache_bytes,
    index_row_bytes,
    mha_kv_bytes_per_token,
    row_bytes,
)
from dsmini.accounting.tensors import (
    ENGRAM_TABLES,
    INDEXER,
    MTP,
    OVER,
    SCORES,
    SIZES,
    TensorUse,
    WeightDtype,
    blocks,
    engram_width,
    full_layers,
    main_tensors,
    tensors,
)
from dsmini.config import ModelConfig
from dsmini.config.model import CSA_RATIO
from dsmini.planner import request
from dsmini.planner.figure import COUNTED, Figure, counted, figure, figures_of, kept

EXPERTS = "routed experts"
ModelPart = Literal["embedding", "dense", "moe", "head", "mtp"]
PARTS_OF_A_MODEL: tuple[ModelPart, ...] = ("embedding", "dense", "moe", "head", "mtp")
TURNS = ("indexed", "compressed", "engram")
"""Places of tensors that some blocks of the main model have, and others of the same kind have not."""
Contents = Mapping[ModelPart, float]
"""Number of each part: blocks that are dense and with experts, embeddings, heads, and ends of an MTP depth."""
RATES = ("fp8", "routed", "plain")
OPERATIONS = tuple(itertools.product(("forward", "backward", "weights"), RATES))
Operations = dict[tuple[str, str], float]
"""FLOPs of a token by phase (forward, backward, weights) and rate (fp8, routed, plain)."""


def one_of_each(c: ModelConfig) -> list[TensorUse]:
    """Return the tensors of one block of each kind and of the ends, of the main model or else of MTP.

    V4's kinds of attention take turns, so each block has the mean of what makes and chooses entries. So it is with
    Engrams, and with indexers where layers share the choice of keys. The ends of an MTP depth have what its block has
    of these, less such a mean.
    """
    found: dict[tuple[str, str, str, int], TensorUse] = {}
    lacking: list[TensorUse] = []
    for use in tensors(c):
        mean: Any = use.times / c.n_layers
        if use.place not in TURNS:
            one = use._replace(times=1, mtp=use.mtp and use.place == "mtp")
        elif use.mtp:
            one = use._replace(times=1, place="mtp")
        else:
            one = use._replace(times=mean)
            lacking.append(use._replace(times=-mean, place="mtp"))
        found.setdefault((one.place, one.kind, one.name, one.ratio), one)
    return [*found.values(), *lacking]


def sizes_of(c: ModelConfig, source: str) -> dict[str, Figure]:
    """Return the sizes of a model as inputs of figures."""
    titles, sizes = request.titles_of(ModelConfig), {name: getattr(c, name) for name in request.SIZES}
    return {n: Figure(n, size, "", titles[n], source) for n, size in sizes.items() if size is not None}


class ModelFigures:
    """Parameters and operations of a model. DSA is counted in the sparse stage of its training."""

    def __init__(self, c: ModelConfig, seq_len: Figure, source: str) -> None:
        self.config: ModelConfig = c
        self.seq_len: Figure = seq_len
        self.uses: list[TensorUse] = one_of_each(c)
        self.parts: Mapping[ModelPart, list[TensorUse]] = {
            part: [use for use in self.uses if part in _parts(use)] for part in PARTS_OF_A_MODEL
        }
        self.sizes: dict[str, Figure] = sizes_of(c, source)
        of = parameters(c)
        self.main_modules: list[Figure] = _modules(of.by_module, "parameters")
        self.mtp_modules: list[Figure] = _modules(of.by_module, "parameters", mtp=True)
        self.active_modules: list[Figure] = _modules(of.active_by_module, "active")
        self.training: Mapping[str, int] = flops_per_token(c, int(seq_len), training=True, mtp=False).by_module

    @counted()
    def moe_layers(self) -> int:
        """MoE layers of the main model. Source: V3, section 4.2."""
        return blocks(self.config)[1]

    @counted()
    def expert_parameters(self) -> int:
        """One routed expert. Source: V3, section 4.2."""
        return self.numbers(EXPERTS)

    @figure(main=True)
    def parameters_main(self) -> float:
        """Parameters without MTP. Source: V3, section 4.2."""
        return sum(self.main_modules)

    @figure(main=True)
    def mtp_parameters(self) -> float:
        """MTP: parameters of its own. Source: V3, section 2.2."""
        return sum(self.mtp_modules)

    @figure()
    def parameters_total(self) -> float:
        """All parameters, with MTP. Source: V3, section 4.2."""
        return self.parameters_main + self.mtp_parameters

    @figure(main=True)
    def parameters_active(self) -> float:
        """Active parameters, without embedding. Source: V3, section 4.2."""
        return sum(self.active_modules)

    @counted()
    def parameters_narrow(self) -> float:
        """Active parameters of matrices that may be FP8. Source: V3, section 3.3."""
        return sum(use.per_token for use in main_tensors(self.config) if use.form == "fp8")

    @counted("FLOP/token")
    def attention_flops(self) -> float:
        """Operations of attention over the context, forward, causal. Source: INS, table 2."""
        return flops_per_token(self.config, int(self.seq_len)).by_module[OVER]

    @counted("FLOP/token")
    def indexer_flops(self) -> float:
        """Operations of indexers over the context in training, causal. Source: V3.2, section 2.1."""
        return self.training.get(SCORES, 0) + self.training.get(LOSS, 0)

    @figure("FLOP/token", main=True)
    def training_flops(self) -> float:
        """Operations of a token in training. Source: INS, table 2."""
        if not self.indexer_flops:
            return 6 * self.parameters_active + 3 * self.attention_flops
        return 6 * self.parameters_active - self.not_learned() + 3 * self.attention_flops + self.indexer_flops

    def not_learned(self) -> int:
        """Return the operations of gradients that indexers do not have: what they read has none."""
        of_blocks = (use for use in self.uses if use.kind == INDEXER and use.place != "mtp")
        return self.config.n_layers * sum(2 * use.per_token for use in of_blocks)

    def numbers(self, kind: str) -> int:
        """Return the numbers of one block's tensors of a kind, one of each stack."""
        return sum(use.numbers for use in self.uses if use.kind == kind)

    @kept
    def local(self, tensor: int) -> tuple[Contents, Contents]:
        """Return the numbers that a GPU has of each part: of matrices but routed experts, and of what is never FP8.

        The matrices of embedding and head are left out; a stage says how many it has.
        """

        def numbers(uses: list[TensorUse], fp8: bool) -> float:
            found = (u for u in uses if (u.form == "fp8") == fp8 and u.kind not in (EXPERTS, "embedding", "head"))
            return sum(use.times * use.numbers / (1 if use.split == "whole" else tensor) for use in found)

        matrices: Contents = {part: numbers(uses, True) for part, uses in self.parts.items()}
        others: Contents = {part: numbers(uses, False) for part, uses in self.parts.items()}
        return matrices, others

    @kept
    def operations(self, recompute: Recompute) -> Mapping[ModelPart, Operations]:
        """Return the operations of a token in each part: of forward, of backward with what is made again, and of the
        gradients of weights, which are a part of backward."""
        found: dict[ModelPart, Operations] = {part: dict.fromkeys(OPERATIONS, 0.0) for part in self.parts}
        for part, uses in self.parts.items():
            of = found[part]
            for use in uses:
                again = recompute == "full" and is_repeated(self.config, use, "sparse")
                up = use.kind == "attention" and use.name in ("wkv_b", "wq_b")  # in V4 the queries before their norm
                again = again or (recompute == "selective" and up)
                rate = "plain" if use.form != "fp8" else "routed" if use.kind == EXPERTS else "fp8"
                for each in work(self.config, use, int(self.seq_len), 1, True, "sparse"):
                    of["forward", rate] += each.forward
                    of["backward", rate] += each.backward + again * each.forward
                of["weights", rate] += 2 * use.per_token
        return found

    @kept
    def seconds(self, recompute: Recompute, fp8_rate: float, plain_rate: float, imbalance: float) -> tuple[float, ...]:
        """Return the computing time of a token in each part, forward and backward."""
        rates = {"fp8": fp8_rate, "routed": fp8_rate / imbalance, "plain": plain_rate}
        return tuple(
            sum(flops / rates[rate] for (phase, rate), flops in of.items() if phase != "weights")
            for of in self.operations(recompute).values()
        )

    @kept
    def saved(self, size: int, fp8: bool, recompute: Recompute) -> tuple[Mapping[ModelPart, float], float]:
        """Return the bytes of a token that are saved for backward, by part and of the block that is made again.

        Args:
            size: bytes of a number between products.
        """
        saved = Saved(c=self.config, size=size, fp8=fp8, recompute=recompute)
        again = saved.largest_block() if recompute == "full" else 0
        found: dict[ModelPart, float] = {part: saved.total(part) for part in PARTS_OF_A_MODEL}
        share = full_layers(self.config) / self.config.n_layers
        shares: dict[ModelPart, float] = {"dense": share, "moe": share, "mtp": 1 - share}  # as in one_of_each
        for part, number in shares.items():
            found[part] += number * saved.total("indexed")
        if hashed := self.config.n_hash_layers:  # a MoE layer has the mean of those with and without a table
            found["moe"] += hashed / self.moe_layers * (saved.total("hashed") - saved.total("moe"))
        return found, again


def _modules(counts: Mapping[str, int], what: str, mtp: bool = False) -> list[Figure]:
    """Return the parameters of kinds of modules in all layers as inputs, of the main model or of MTP."""
    of = {kind: n for kind, n in counts.items() if kind.startswith(MTP) == mtp}
    names = {kind: f"{kind.replace(' ', '_').replace('-', '_')}_{what}" for kind in of}
    return [Figure(names[kind], n, "", f"{what.capitalize()}: {kind}", COUNTED) for kind, n in of.items()]


def _parts(use: TensorUse) -> tuple[str, ...]:
    """Return the parts of a model that have a tensor."""
    if use.place == "ends":
        return ("embedding" if use.name.startswith("embed") else "head",)
    if use.place in ("block", *TURNS):
        return "dense", "moe"
    return ("moe" if use.place in ("scored", "hashed") else use.place,)  # MTP's own use of the head is in "mtp"


class CacheFigures:
    """Cache of a token. Raises: ValueError for "fp8" where attention is not MLA."""

    def __init__(self, c: ModelConfig, dtype: CacheDtype) -> None:
        self.config: ModelConfig = c
        self.dtype: CacheDtype = dtype
        self.size: int = SIZES[dtype]
        row_bytes(c, dtype)  # raises

    @counted("B")
    def index_row(self) -> int | None:
        """Indexer's key of a token, one layer. Source: V3.2, section 2.1; V4, section 2.3."""
        return index_row_bytes(self.config, self.dtype) or None

    @figure("B")
    def attention_row(self) -> int:
        """Row of attention's cache: of a token, and in V4 of an entry. Source: V2, table 1; V4, section 2.3."""
        c = self.config
        if c.is_mla and self.dtype != "fp8":
            return self.size * (c.kv_lora_rank + c.qk_rope_head_dim)
        return row_bytes(c, self.dtype)

    @figure("B")
    def cache_row(self) -> int:
        """Cache of a token in one layer. Source: V2, table 1; INS, table 1."""
        return self.attention_row + self.index_row if self.index_row else self.attention_row

    @counted()
    def csa_entries(self) -> float | None:
        """Entries of a token in the layers of CSA. Source: compress_ratios of the config."""
        return self.entries(lambda ratio: ratio == CSA_RATIO)

    @counted()
    def hca_entries(self) -> float | None:
        """Entries of a token in the layers of HCA. Source: compress_ratios of the config."""
        return self.entries(lambda ratio: ratio not in (0, CSA_RATIO))

    def entries(self, kind: Callable[[int], bool]) -> float | None:
        """Return the entries of a token in V4's layers of a kind."""
        ratios = self.config.compress_ratios
        return None if ratios is None else sum(1 / ratio for ratio in ratios if kind(ratio))

    @counted()
    def index_layers(self) -> int | None:
        """Layers with an indexer's keys. Source: indexer_types of the config."""
        return full_layers(self.config) if self.config.indexer_types else None

    @figure("B/token", main=True)
    def kv_cache(self) -> float:
        """Cache of a token, all layers; V4's without the window. Source: V2, table 1; INS, table 1; V4, section 2.3."""
        if self.csa_entries is not None and self.hca_entries is not None:
            return self.csa_entries * self.cache_row + self.hca_entries * self.attention_row
        if self.index_row and self.index_layers is not None:
            return self.config.n_layers * self.attention_row + self.index_layers * self.index_row
        return self.config.n_layers * self.cache_row

    @counted("B")
    def window_cache(self) -> float | None:
        """Cache of a sequence's window and of the rows that the next entry is made of, or of Engram, all layers."""
        return fixed_cache_bytes(self.config, self.dtype) or None

    @counted("B/token", main=True)
    def mha_kv_cache(self) -> float:
        """Cache of a token with MHA, all layers. Source: V2, table 1; INS, table 1."""
        return mha_kv_bytes_per_token(self.config, self.dtype)

    @figure(main=True)
    def cache_saving(self) -> float:
        """Share of MHA's cache that is saved. Source: V2, table 1; INS, table 1."""
        return 1 - self.kv_cache / self.mha_kv_cache


class WeightFigures:
    """Bytes and multiply-adds of the parts that a deployment divides differently.

    Tensor parallelism divides heads' matrices, the vocabulary and feed-forwards, expert parallelism routed experts;
    all else is whole on each GPU. A matrix [o, i] takes o * i multiply-adds of a token. Its bytes are 4 or 2 a number,
    or in FP8 one and an FP32 scale for each block of 128x128. `absorbed` are the two halves of wkv_b that decoding
    applies to queries and sums: the same number, in the compute dtype.
    """

    def __init__(self, m: "ModelFigures", dtype: WeightDtype, uses: Iterable[TensorUse]) -> None:
        self.m: ModelFigures = m
        self.dtype: WeightDtype = dtype
        self.size: int = SIZES[dtype]
        self.uses: list[TensorUse] = [use for use in uses if use.kind not in ("embedding", "head")]

    def held(self, *splits: str) -> int:
        """Return the bytes of tensors that are split so, in all their blocks, without routed experts and tables."""
        found = [use for use in self.uses if use.split in splits and use.kind not in (EXPERTS, ENGRAM_TABLES)]
        return sum(use.times * use.bytes(self.dtype) for use in found)

    @counted("B")
    def divided_bytes(self) -> int:
        """Bytes of the matrices of heads and of feed-forwards but routed experts. Source: the released shapes."""
        return self.held("heads", "up", "width")

    @counted("B")
    def width_bytes(self) -> int:
        """Bytes of feed-forwards but routed experts. Source: shapes of the released checkpoints."""
        return self.held("width")

    @counted("B")
    def absorbed_bytes(self) -> int:
        """Bytes that the projections out of the latent add in two halves. Source: V2, section 2.1.2."""
        return self.size * sum(use.per_token for use in self.uses if use.split == "up") - self.held("up")

    @counted("B")
    def whole_bytes(self) -> int:
        """Bytes that every GPU holds whole: latents, gates, norms. Source: the released shapes."""
        return self.held("whole")

    @counted("B")
    def table_bytes(self) -> int:
        """Bytes of the tables of hash layers, of which a token reads a row. Source: the released shapes."""
        return sum(use.times * use.bytes(self.dtype) for use in self.uses if use.name == "tid2eid")

    @counted("B")
    def engram_bytes(self) -> int | None:
        """Bytes of Engram's tables, in serving in the host's memory. Source: Engram (arXiv 2601.07372)."""
        return sum(use.parameters * self.size for use in self.uses if use.kind == ENGRAM_TABLES) or None

    @counted("B/token", main=True)
    def engram_read(self) -> int | None:
        """Bytes of Engram's tables that a token reads, all layers. Source: Engram (arXiv 2601.07372)."""
        c = self.m.config
        return len(c.engram_layer_ids or ()) * engram_width(c) * self.size or None

    @counted("B")
    def expert_bytes(self) -> int:
        """Bytes of one routed expert. Source: shapes of the released checkpoints."""
        return sum(use.bytes(self.dtype) for use in self.uses if use.kind == EXPERTS)

    @figure("B")
    def vocabulary_bytes(self) -> int:
        """Bytes of the embedding, or the head. Source: shapes of the released checkpoints."""
        return self.m.config.vocab_size * self.m.config.dim * self.size

    @figure("B", main=True)
    def model_bytes(self) -> float:
        """Weights of the model without MTP. Source: shapes of the released checkpoints."""
        experts = self.m.moe_layers * self.m.config.n_routed_experts * self.expert_bytes
        on_gpus = self.divided_bytes + self.whole_bytes + experts + 2 * self.vocabulary_bytes
        return on_gpus + self.engram_bytes if self.engram_bytes else on_gpus

    @counted()
    def matrix_products(self) -> int:
        """Multiply-adds of a token with matrices that may be FP8, without routed experts. Source: every matrix once."""
        return sum(use.per_token for use in self.uses if use.form == "fp8" and use.kind != EXPERTS)

    @counted()
    def expert_products(self) -> int:
        """Multiply-adds of a token with routed experts. Source: every matrix once."""
        return sum(use.per_token for use in self.uses if use.kind == EXPERTS)

    @counted()
    def other_products(self) -> int:
        """Multiply-adds of a token with gates and other plain matrices. Source: every matrix once."""
        return sum(use.per_token for use in self.uses if use.form != "fp8")


def model_figures(m: ModelFigures, weight_dtype: WeightDtype, cache_dtype: CacheDtype) -> dict[str, Figure]:
    """Return all figures of a model alone, with weights and a cache in these dtypes."""
    parts = (m, CacheFigures(m.config, cache_dtype), WeightFigures(m, weight_dtype, main_tensors(m.config)))
    return {name: found for part in parts for name, found in figures_of(part, m.sizes).items()}
