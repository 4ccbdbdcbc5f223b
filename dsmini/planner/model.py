"""Figures of a model alone: parameters, operations, cache, and the weights of a deployment.

All numbers are sums over the one list of dsmini.accounting. The formula of a part is the shapes of its matrices; all
else is computed from named parts:

    parameters_main = 2 * vocabulary_parameters + n_layers * (attention_parameters + norm_parameters) + ...

A part that a model lacks is 0.

Worked example, DeepSeek-V3 at 4096 tokens: 671,026,404,352 parameters, of which a token uses 36,624,596,992; training
takes 6 * 36.62e9 + 3 * 61 * 128 * (192 + 128) * 4096 = 250.4 GFLOP a token, printed as 250.

Source: DeepSeek-V3 report, section 4.2; "Insights into DeepSeek-V3" (INS, arXiv 2505.09343), tables 1 and 2.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from dsmini.accounting import kv_bytes_per_token, mha_kv_bytes_per_token, parameters, weight_bytes
from dsmini.accounting.flops import LOSS, flops_per_token, is_repeated, work
from dsmini.accounting.memory import Recompute, Saved, index_row_bytes, row_bytes
from dsmini.accounting.tensors import INDEXER, MTP, OVER, SCORES, SIZES, TensorUse, blocks, tensors
from dsmini.config import ModelConfig
from dsmini.planner import request
from dsmini.planner.figure import Figure, given

EXPERTS = "routed experts"
Part = Literal["embedding", "dense", "moe", "head", "mtp"]
PARTS_OF_A_MODEL: tuple[Part, ...] = ("embedding", "dense", "moe", "head", "mtp")
Contents = Mapping[Part, float]
"""Number of each part: blocks that are dense and with experts, embeddings, heads, and ends of an MTP depth."""
Operations = dict[tuple[str, str], float]
"""FLOPs of a token by phase (forward, backward, weights) and rate (fp8, routed, plain)."""


def shapes(uses: Iterable[TensorUse]) -> str:
    """Return the sum of the sizes of some tensors as a formula: 1536 * 7168 + 1536."""
    found = [" * ".join(f"{n}" for n in use.shape) for use in uses if use.shape]
    return " + ".join(found) or "0"


def one_of_each(c: ModelConfig) -> list[TensorUse]:
    """Return the tensors of one block of each kind and of the ends, of the main model or else of MTP."""
    found: dict[tuple[str, str, str], TensorUse] = {}
    for use in tensors(c):
        found.setdefault((use.place, use.kind, use.name), use._replace(times=1, mtp=use.mtp and use.place == "mtp"))
    return list(found.values())


class ModelFigures:
    """Parameters and operations of a model. DSA is counted in the sparse stage of its training.

    Attributes:
        dense_layers: Dense layers of the main model. Source: V3, section 4.2.
        moe_layers: MoE layers of the main model. Source: V3, section 4.2.
        mtp_dense_layers: Dense layers of multi-token prediction.
        mtp_moe_layers: MoE layers of multi-token prediction.
        parameters_main: Parameters without MTP. Source: V3, section 4.2.
        mtp_parameters: MTP: parameters of its own. Source: V3, section 2.2.
        parameters_total: All parameters, with MTP. Source: V3, section 4.2.
        parameters_active: Active parameters, without embedding. Source: V3, section 4.2.
        mtp_active: MTP: active parameters. Source: V3, section 2.2.
        attention_parameters: Matrices of attention, a layer. Source: V2, section 2.1.
        indexer_parameters: Matrices of an indexer, a layer. Source: V3.2, section 2.1.
        dense_parameters: Dense feed-forward, a layer. Source: V3, section 4.2.
        expert_parameters: One routed expert. Source: V3, section 4.2.
        shared_parameters: Shared experts, a layer. Source: V3, section 4.2.
        gate_parameters: Gate of a MoE layer. Source: V3, section 4.2.
        norm_parameters: Norms of a block. Source: V3, section 4.2.
        vocabulary_parameters: Embedding, and as many again: head.
        final_norm_parameters: Norms outside the blocks.
        mtp_projection_layer: MTP: projection of a depth. Source: V3, section 2.2.
        mtp_norm_layer: MTP: norms of a depth outside its block. Source: V3, section 2.2.
        attention_flops: Operations of attention over the context, forward, causal. Source: INS, table 2.
        indexer_flops: Operations of indexers over the context in training, causal. Source: V3.2, section 2.1.
        training_flops: Operations of a token in training. Source: INS, table 2.
    """

    def __init__(self, c: ModelConfig, seq_len: Figure, source: str) -> None:
        self.config, self.seq_len = c, seq_len
        self.uses = one_of_each(c)
        self._counted: dict[Recompute, dict[Part, Operations]] = {}
        self._saved: dict[tuple[int, bool, Recompute], SavedFigures] = {}
        self.sizes = {
            n: given(v, "", request.titles_of(ModelConfig)[n], source)
            for n in request.SIZES
            if (v := getattr(c, n)) is not None
        }
        dense, moe, mtp_dense, mtp_moe = blocks(c)
        self.dense_layers = Figure(dense, "", "min(n_dense_layers, n_layers)")
        self.moe_layers = Figure(moe, "", "n_layers - dense_layers")
        self.mtp_dense_layers = Figure(mtp_dense, "", "n_dense_layers - dense_layers")
        self.mtp_moe_layers = Figure(mtp_moe, "", "n_mtp_layers - mtp_dense_layers")
        self.attention_parameters = self._part("attention")
        self.indexer_parameters = self._part(INDEXER)
        self.dense_parameters = self._part("dense feed-forward")
        self.expert_parameters = self._part(EXPERTS)
        self.shared_parameters = self._part("shared experts")
        self.gate_parameters = self._part("gates")
        self.norm_parameters = self._part("norms", "block")
        self.vocabulary_parameters = self._part("embedding")
        self.final_norm_parameters = self._part("norms", "ends")
        self.mtp_projection_layer = self._part("projection")
        self.mtp_norm_layer = self._part("norms", "mtp")
        counted = parameters(c)
        layer = "attention_parameters + indexer_parameters + norm_parameters"
        chosen = "gate_parameters + shared_parameters + n_activated_experts * expert_parameters"
        every = chosen.replace("n_activated", "n_routed")
        self.parameters_main = Figure(
            counted.main,
            "",
            f"2 * vocabulary_parameters + final_norm_parameters + n_layers * ({layer}) "
            f"+ dense_layers * dense_parameters + moe_layers * ({every})",
        )
        mtp = f"+ {layer}) + mtp_dense_layers * dense_parameters + mtp_moe_layers * "
        of_mtp = f"n_mtp_layers * (mtp_projection_layer + mtp_norm_layer {mtp}({every})"
        self.mtp_parameters = Figure(counted.mtp, "", of_mtp)
        self.parameters_total = Figure(counted.total, "", "parameters_main + mtp_parameters")
        products = layer.removesuffix(" + norm_parameters")
        self.parameters_active = Figure(
            counted.active,
            "",
            f"vocabulary_parameters + n_layers * ({products}) + dense_layers * dense_parameters "
            f"+ moe_layers * ({chosen})",
        )
        active = sum(n for module, n in counted.active_by_module.items() if module.startswith(MTP))
        of_mtp = f"n_mtp_layers * (mtp_projection_layer + vocabulary_parameters {mtp}({chosen})"
        self.mtp_active = Figure(active, "", of_mtp.replace(" + norm_parameters", ""))
        self._operations(int(seq_len))

    def _of(self, kind: str, place: str = "") -> list[TensorUse]:
        return [use for use in self.uses if use.kind == kind and use.shape and (not place or use.place == place)]

    def _part(self, kind: str, place: str = "") -> Figure:
        uses = self._of(kind, place)
        return Figure(sum(use.numbers for use in uses), "", shapes(uses))

    def _operations(self, seq_len: int) -> None:
        """Set the operations of a token over the context and in training."""
        c, training = self.config, flops_per_token(self.config, seq_len, training=True, mtp=False)
        pairs = {use.kind: use.per_pair for use in self.uses if use.per_pair}
        keys = "seq_len"  # twice the mean number of keys that a causal mask leaves
        if c.index_topk is not None:
            keys = "min(seq_len, index_topk) * (2 * seq_len - min(seq_len, index_topk)) / seq_len"
        self.attention_flops = Figure(
            flops_per_token(c, seq_len).by_module[OVER], "FLOP/token", f"n_layers * {pairs[OVER]} * {keys}"
        )
        indexer = training.by_module.get(SCORES, 0) + training.by_module.get(LOSS, 0)
        once, scored = 0, "0"
        if SCORES in pairs:
            target = c.n_heads * (c.qk_head_dim)
            scored = f"{pairs[SCORES] + target} * seq_len + {3 * pairs[SCORES]} * {keys}"
            once = sum(2 * use.per_token for use in self._of(INDEXER)) * c.n_layers
        self.indexer_flops = Figure(indexer, "FLOP/token", f"n_layers * ({scored})")
        less = f" - {once}" if once else ""  # what an indexer reads has no gradient
        self.training_flops = Figure(
            training.total, "FLOP/token", f"6 * parameters_active{less} + 3 * attention_flops + indexer_flops"
        )

    def operations(self, recompute: Recompute) -> Mapping[Part, Operations]:
        """Return the operations of a token in each part: of forward, of backward with what is made again, and of the
        gradients of weights, which are a part of backward."""
        if recompute not in self._counted:
            self._counted[recompute] = self._count(recompute)
        return self._counted[recompute]

    def _count(self, recompute: Recompute) -> dict[Part, Operations]:
        keys = tuple(itertools.product(("forward", "backward", "weights"), ("fp8", "routed", "plain")))
        found: dict[Part, Operations] = {part: dict.fromkeys(keys, 0.0) for part in PARTS_OF_A_MODEL}
        for use in self.uses:
            again = recompute == "full" and is_repeated(self.config, use, "sparse") and use.place not in ("ends", "mtp")
            up = self.config.is_mla and use.kind == "attention" and use.name in ("wkv_b", "wq_b")
            again = again or (recompute == "selective" and up)
            rate = "plain" if use.form != "fp8" else "routed" if use.kind == EXPERTS else "fp8"
            for part in _parts(use):
                for each in work(self.config, use, int(self.seq_len), 1, True, "sparse"):
                    found[part]["forward", rate] += each.forward
                    found[part]["backward", rate] += each.backward + again * each.forward
                found[part]["weights", rate] += 2 * use.per_token
        return found

    def saved(self, size: int, fp8: bool, recompute: Recompute) -> "SavedFigures":
        """Return the activations of a token that are saved for backward, in numbers of so many bytes."""
        key = size, fp8, recompute
        if key not in self._saved:
            self._saved[key] = SavedFigures(Saved(c=self.config, size=size, fp8=fp8, recompute=recompute))
        return self._saved[key]


def _parts(use: TensorUse) -> list[Part]:
    """Return the parts of a model that have a tensor."""
    if use.place == "block":
        return ["dense", "moe"]
    if use.place != "ends":
        return [use.place]  # MTP's own use of the head is in "mtp"
    return ["embedding" if use.kind == "embedding" or use.name == "embed_norm" else "head"]


class SavedFigures:
    """Bytes of a token that are saved for backward, by part.

    Attributes:
        activations_embedding: Activations of a token, embedding. Source: V3, section 3.2.3.
        activations_dense: Activations of a token, dense layer. Source: V3, section 3.2.3.
        activations_moe: Activations of a token, MoE layer. Source: V3, section 3.2.3.
        activations_head: Activations of a token, head. Source: V3, section 3.2.3.
        activations_mtp: Activations of a token, MTP without its block. Source: V3, section 3.2.3.
        activations_again: Activations of a token of the block that is made again.
    """

    def __init__(self, saved: Saved) -> None:
        def part(name: Part) -> Figure:
            found = [amount for _, amount in saved.part(name) if amount]
            formula = " + ".join(f"{n}" for n in found) or "0"
            return Figure(sum(found), "B/token", formula)

        self.activations_embedding = part("embedding")
        self.activations_dense = part("dense")
        self.activations_moe = part("moe")
        self.activations_head = part("head")
        self.activations_mtp = part("mtp")
        again = saved.largest_block() if saved.recompute == "full" else 0
        self.activations_again = Figure(again, "B/token", f"{again}")

    def each(self, part: Part) -> Figure:
        """Return the activations of a part."""
        return getattr(self, f"activations_{part}")


class CacheFigures:
    """Cache of a token. Raises: ValueError for "fp8" where attention is not MLA.

    Attributes:
        index_row: Indexer's key of a token, one layer. Source: V2, table 1; INS, table 1.
        cache_row: Cache of a token in one layer. Source: V2, table 1; INS, table 1.
        kv_cache: Cache of a token, all layers. Source: V2, table 1; INS, table 1.
        mha_kv_cache: Cache of a token with MHA, all layers. Source: V2, table 1; INS, table 1.
        cache_saving: Share of MHA's cache that is saved. Source: V2, table 1; INS, table 1.
    """

    def __init__(self, m: ModelFigures, dtype: Any) -> None:
        c, size = m.config, SIZES[dtype]
        row, index = row_bytes(c, dtype), index_row_bytes(c, dtype)
        width = "kv_lora_rank + qk_rope_head_dim" if c.is_mla else f"{c.kv_heads} * (qk_nope_head_dim + v_head_dim)"
        formula = f"{size} * ({width})"
        if dtype == "fp8":
            formula = "kv_lora_rank + 4 * ceil(kv_lora_rank / 128) + 2 * qk_rope_head_dim"
        self.index_row = Figure(index, "B", f"{index}")
        self.cache_row = Figure(row + index, "B", f"{formula} + index_row")
        self.kv_cache = Figure(kv_bytes_per_token(c, dtype=dtype), "B/token", "n_layers * cache_row")
        self.mha_kv_cache = Figure(
            mha_kv_bytes_per_token(c, size), "B/token", f"n_layers * n_heads * (qk_nope_head_dim + v_head_dim) * {size}"
        )
        saving, formula = 1 - self.kv_cache / self.mha_kv_cache, "1 - kv_cache / mha_kv_cache"
        self.cache_saving = Figure(saving, "", formula)


class WeightFigures:
    """Bytes and multiply-adds of the parts that a deployment divides differently.

    Heads' matrices and the vocabulary are divided by tensor parallelism, routed experts by expert parallelism; all else
    is whole on each GPU. A matrix [o, i] takes o * i multiply-adds of a token. Its bytes are 4 or 2 a number, or in FP8
    one and an FP32 scale for each block of 128x128. `absorbed` are the two halves of wkv_b that decoding applies to
    queries and sums: as many numbers, in the compute dtype.

    Attributes:
        head_matrices_bytes: Bytes of the matrices of heads. Source: shapes of the released checkpoints.
        latent_up_bytes: Bytes of the projections out of the latent. Source: shapes of the released checkpoints.
        latent_up_products: Multiply-adds of a token with the projections out of the latent. Source: every matrix once.
        whole_bytes: Bytes that every GPU holds whole: latents, dense layers, gates, norms. Source: shapes of released
            checkpoints.
        shared_experts_bytes: Bytes of the shared experts. Source: shapes of the released checkpoints.
        matrix_products: Multiply-adds of a token with matrices that may be FP8, but those of the latent. Source: every
            matrix once.
        other_products: Multiply-adds of a token with gates and other plain matrices. Source: every matrix once.
        absorbed_bytes: Bytes of the projections out of the latent in two halves. Source: V2, section 2.1.2.
        expert_bytes: Bytes of one routed expert. Source: shapes of the released checkpoints.
        vocabulary_bytes: Bytes of the embedding, or the head. Source: shapes of the released checkpoints.
        model_bytes: Weights of the model without MTP. Source: shapes of the released checkpoints.
    """

    def __init__(self, m: ModelFigures, dtype: Any) -> None:
        c, size = m.config, SIZES[dtype]
        uses = [use for use in tensors(c) if not use.mtp]
        apart = ("embedding", "head", EXPERTS, "shared experts")

        def held(wanted: Callable[[TensorUse], bool]) -> Figure:
            """Return the bytes of some tensors in all their blocks: of each kind of block the number and the bytes."""
            places: Counter[float] = Counter()
            for use in filter(wanted, uses):
                places[use.times] += use.bytes(dtype)
            formula = " + ".join(f"{n} * {amount}" for n, amount in places.items()) or "0"
            return Figure(sum(n * amount for n, amount in places.items()), "B", formula)

        def products(wanted: Callable[[TensorUse], bool]) -> Figure:
            found = [use.per_token for use in filter(wanted, uses)]
            return Figure(sum(found), "", f"{sum(found)}")

        self.head_matrices_bytes = held(lambda u: u.split == "heads" and u.kind not in apart)
        self.latent_up_bytes = held(lambda u: u.split == "up")
        self.latent_up_products = products(lambda u: u.split == "up")
        self.absorbed_bytes = Figure(self.latent_up_products * size, "B", f"{size} * latent_up_products")
        self.whole_bytes = held(
            lambda u: u.split in ("whole", "width") and u.kind not in apart,
        )
        self.shared_experts_bytes = held(lambda u: u.kind == "shared experts")
        expert = [use.bytes(dtype) for use in uses if use.kind == EXPERTS]
        formula = " + ".join(f"{n}" for n in expert) or "0"
        self.expert_bytes = Figure(sum(expert), "B", formula)
        self.vocabulary_bytes = Figure(c.vocab_size * c.dim * size, "B", f"vocab_size * dim * {size}")
        self.model_bytes = Figure(
            weight_bytes(c, dtype, mtp=False).total,
            "B",
            "head_matrices_bytes + latent_up_bytes + whole_bytes + shared_experts_bytes + 2 * vocabulary_bytes "
            "+ moe_layers * n_routed_experts * expert_bytes",
        )
        inside = [use for use in uses if use.visits and use.kind != "head" and use.split != "up"]
        self.matrix_products = products(
            lambda u: u in inside and u.form == "fp8",
        )
        self.other_products = products(lambda u: u in inside and u.form != "fp8")
