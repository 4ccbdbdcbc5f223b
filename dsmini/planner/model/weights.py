"""Weights by part: bytes that each part of a block holds, and multiply-adds that a token takes with it.

A matrix [o, i] takes o * i multiply-adds of a token that meets it. Its bytes are 4 or 2 a number, or in FP8 one a
number and an FP32 scale for each block of 128x128. The parts are apart because a deployment treats them differently:
expert parallelism divides the routed experts, tensor parallelism divides what belongs to heads, and the rest every GPU
holds whole.

Worked example, one routed expert of DeepSeek-V3 in FP8: 3 * 7168 * 2048 = 44,040,192 bytes of codes and
3 * 56 * 16 * 4 = 10,752 of scales. 58 blocks hold 256 of them, 654 GB of the model's 673 GB.

Source: the shapes of the released checkpoints, as in dsmini.accounting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsmini.accounting.memory import WeightDtype
from dsmini.planner.model.matrices import Matrix, attention_matrices, block_norms, swiglu_matrices
from dsmini.planner.model.sparse_context import is_sparse
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, Bytes, Count, smallest, total
from dsmini.planner.quantities.sizes import BF16, FP32, SIZES, scaled_matrix

SOURCE = "shapes of the released checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part(Figures):
    """Weights of one part: of one block, or of the model where a block has none."""

    bytes: Bytes
    """Bytes that it holds."""
    products: Count
    """Multiply-adds of a token that meets it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights(Figures):
    """Weights of a model in one dtype."""

    dense_blocks: Count
    """Number of blocks with a dense feed-forward."""
    moe_blocks: Count
    """Number of blocks with experts."""
    head_matrices: Part
    """Matrices of attention that belong to heads, without `latent_up`."""
    latent_up: Part
    """MLA's wkv_b, which makes keys and values of the latent."""
    absorbed: Part
    """The two halves of wkv_b that decoding applies to queries and sums: as many numbers, in the compute dtype."""
    latent_down: Part
    """MLA's projections into latents, which no head owns."""
    dense: Part
    """Dense feed-forward."""
    expert: Part
    """One routed expert."""
    shared: Part
    """All shared experts of a block together."""
    gate: Part
    """Gate, with its routing biases. FP32."""
    norms: Part
    """Norms of a block, and DSA's weights of an indexer's heads. FP32."""
    vocabulary: Part
    """Embedding or head: one matrix of the vocabulary. The embedding's products are not made."""
    final_norms: Part
    """Norms outside the blocks. FP32."""
    projection: Part
    """Projection and norms of a multi-token prediction block."""
    total: Bytes
    """Bytes of the model without multi-token prediction."""
    active: Count
    """Multiply-adds of a token with all of its matrices, without multi-token prediction."""


def weights(model: ModelInputs, dtype: WeightDtype) -> Weights:
    """Return the weights of a model.

    Args:
        dtype: of the matrices. "fp8": of attention and feed-forwards; the others are BF16. Norms and gates are FP32.

    Raises: ValueError for an unknown dtype.
    """
    if dtype not in (*SIZES, "fp8"):
        raise ValueError(f"dtype={dtype!r} is unknown; use float32, bfloat16 or fp8")
    plain = SIZES.get(dtype, BF16)
    m, f = model.dim, model.moe_inter_dim
    shared = model.n_shared_experts * f
    attention = attention_matrices(model)
    dense = smallest(model.n_dense_layers, model.n_layers)
    parts = {
        "head_matrices": _part(attention.heads, dtype, "head_matrices", "matrices of heads in one block"),
        "latent_up": _part(attention.up, dtype, "latent_up", "projection out of the latent in one block"),
        "absorbed": _numbers(attention.up, plain, "absorbed", "projection out of the latent in two halves, one block"),
        "latent_down": _part(attention.whole, dtype, "latent_down", "projections into latents in one block"),
        "dense": _part(swiglu_matrices(model, model.inter_dim), dtype, "dense_ffn", "one dense feed-forward"),
        "expert": _part(swiglu_matrices(model, f), dtype, "expert", "one routed expert"),
        "shared": _part(swiglu_matrices(model, shared), dtype, "shared_experts", "the shared experts of a block"),
        "gate": _gate(model),
        "norms": _plain(model, attention.head_weights),
        "vocabulary": _numbers([(model.vocab_size, m)], plain, "vocabulary", "the embedding, or the head"),
        "final_norms": _norms(m * (2 if model.config.embed_norm else 1), "final_norms", "the norms outside blocks"),
        "projection": _projection(model, plain),
    }
    moe_blocks = (model.n_layers - dense).named("moe_blocks", "Blocks with experts", "V3, section 4.2")
    dense_blocks = dense.named("dense_blocks", "Blocks with a dense feed-forward", "V3, section 4.2")
    return Weights(
        dense_blocks=dense_blocks,
        moe_blocks=moe_blocks,
        **parts,
        total=_total(model, dense_blocks, moe_blocks, parts),
        active=_active(model, dense_blocks, moe_blocks, parts),
    )


def _total(model: ModelInputs, dense_blocks: Count, moe_blocks: Count, parts: dict[str, Part]) -> Bytes:
    size = {name: part.bytes for name, part in parts.items()}
    block = size["head_matrices"] + size["latent_up"] + size["latent_down"] + size["norms"]
    experts = model.n_routed_experts * size["expert"] + size["shared"] + size["gate"]
    blocks = model.n_layers * block + dense_blocks * size["dense"] + moe_blocks * experts
    return (blocks + 2 * size["vocabulary"] + size["final_norms"]).named(
        "model_bytes", "Weights of the model without MTP", SOURCE
    )


def _active(model: ModelInputs, dense_blocks: Count, moe_blocks: Count, parts: dict[str, Part]) -> Count:
    met = {name: part.products for name, part in parts.items()}
    block = met["head_matrices"] + met["latent_up"] + met["latent_down"]
    if is_sparse(model):
        block = block + met["norms"]
    experts = model.n_activated_experts * met["expert"] + met["shared"] + met["gate"]
    blocks = model.n_layers * block + dense_blocks * met["dense"] + moe_blocks * experts
    return (blocks + met["vocabulary"]).named("active_products", "Multiply-adds of a token with all matrices", SOURCE)


def _part(shapes: Sequence[Matrix], dtype: WeightDtype, name: str, title: str) -> Part:
    """Return matrices that are FP8 in FP8 models."""
    if dtype != "fp8" or not shapes:
        return _numbers(shapes, SIZES.get(dtype, BF16), name, title)
    return _named(total(scaled_matrix(o, i) for o, i in shapes), _products(shapes), name, title)


def _numbers(shapes: Sequence[Matrix], number: Bytes, name: str, title: str) -> Part:
    return _named(_products(shapes) * number, _products(shapes), name, title)


def _norms(width: Count, name: str, title: str) -> Part:
    return _named(width * FP32, COUNT(0), name, title)


def _plain(model: ModelInputs, head_weights: Sequence[Matrix]) -> Part:
    norms = _norms(block_norms(model), "block_norms", "the norms of a block")
    if not head_weights:
        return norms
    title = "the norms of a block and the weights of an indexer's heads"
    numbers = _products(head_weights)
    return _named((block_norms(model) + numbers) * FP32, numbers, "block_norms", title)


def _gate(model: ModelInputs) -> Part:
    logits = model.n_routed_experts * model.dim
    biases = model.config.topk_method == "noaux_tc"
    numbers = logits + model.n_routed_experts if biases else logits
    return _named(numbers * FP32, logits, "gate", "the gate of a block, with its routing biases")


def _projection(model: ModelInputs, plain: Bytes) -> Part:
    products = model.dim * (2 * model.dim)
    held = products * plain + 3 * model.dim * FP32
    return _named(held, products, "mtp_projection", "the projection and norms of a multi-token prediction block")


def _products(shapes: Sequence[Matrix]) -> Count:
    counts = [o * i for o, i in shapes]
    return total(counts) if counts else COUNT(0)


def _named(held: Bytes, products: Count, name: str, title: str) -> Part:
    return Part(
        bytes=held.named(f"{name}_bytes", f"Bytes of {title}", SOURCE),
        products=products.named(f"{name}_products", f"Multiply-adds of a token with {title}", SOURCE),
    )
