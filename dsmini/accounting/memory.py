"""Bytes that are held from step to step: weights, gradients, the optimizer's state; and all that training holds.

Worked example, DeepSeek-V3 with multi-token prediction, 682.6B parameters, in training:

    FP32 parameters, routing biases               4 bytes a parameter    2.73 TB
    FP32 gradients                                4                      2.73 TB
    AdamW's two moments in BF16                   4                      2.73 TB

Its weights alone, without multi-token prediction, are 673.4 GB in FP8: 669.1e9 codes of one byte, 163 MB of scales,
1.85e9 numbers of embedding and head in BF16, 107e6 of gates and norms in FP32.

Source: the shapes and dtypes of the released checkpoints; DeepSeek-V3 report, section 3.3.3 (BF16 moments).
"""

from collections.abc import Iterator
from typing import Any, Literal

from dsmini.accounting.activations import activation_bytes
from dsmini.accounting.tensors import (
    INDEXER,
    SIZES,
    Bytes,
    Dtype,
    Stage,
    TensorUse,
    WeightDtype,
    check_dtype,
    number_bytes,
    tensors,
)
from dsmini.config import ModelConfig

Optimizer = Literal["adamw", "muon"]


def weight_bytes(config: ModelConfig, dtype: WeightDtype = "bfloat16", mtp: bool = True) -> Bytes:
    """Return the bytes of a model's parameters and routing biases as dsmini holds them. Exact.

    Norms, gates and routing biases are FP32 whatever dtype says. In FP8 the embedding, the head and MTP's projection
    are BF16, and the scales a part of their own; the released folders are smaller by the norms and gates, which they
    have in BF16. V3 without MTP in FP8: 673.4 GB.

    Args:
        mtp: with the multi-token prediction blocks.

    Source: the shapes and dtypes of the released checkpoints.
    """
    check_dtype(dtype, ("float32", "bfloat16", "fp8"))

    def amounts(use: TensorUse) -> Iterator[tuple[str, int]]:
        yield use.module, use.parameters * number_bytes(use, dtype)
        yield "routing biases", 4 * use.times * use.buffers
        if dtype == "fp8" and use.form == "fp8":
            yield "scales", 4 * use.times * use.stack * use.scales

    return Bytes.of(a for use in tensors(config) if mtp or not use.module.startswith("mtp ") for a in amounts(use))


def gradient_bytes(config: ModelConfig, dsa_stage: Stage = "sparse") -> Bytes:
    """Return the bytes of the gradients: FP32, as the parameters of training are; a stack of experts has one whole."""
    return Bytes.of((use.module, 4 * use.parameters) for use in tensors(config) if use.learns(dsa_stage))


def optimizer_bytes(
    config: ModelConfig,
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    dsa_stage: Stage = "sparse",
) -> Bytes:
    """Return the bytes that the optimizers store of FP32 parameters after a step. Exact.

    AdamW: two moments of every parameter, and a count of steps, 4 bytes, of every tensor. Muon: one FP32 momentum of
    the matrices inside the blocks, MTP's projection among them; embedding, head, gates, norms and indexers are AdamW's
    then too.
    V3's two moments in BF16 are 4 bytes a parameter for 8 (report, section 3.3.3).

    Args:
        moments: dtype of AdamW's moments.

    Temporary tensors of a step are not in it.
    """
    check_dtype(moments, ("float32", "bfloat16"))
    if optimizer not in ("adamw", "muon"):
        raise ValueError(f"optimizer={optimizer!r} is unknown; use adamw or muon")

    def amount(use: TensorUse) -> int:
        count = 0 if is_muons(use, optimizer) or not use.parameters else 4 * use.times
        return state_bytes(use, optimizer, moments) * use.parameters + count

    return Bytes.of((use.module, amount(use)) for use in tensors(config) if use.learns(dsa_stage))


def is_muons(use: TensorUse, optimizer: str) -> bool:
    """Return whether Muon updates a tensor: a matrix inside the blocks, or MTP's projection, but no indexer's."""
    return optimizer == "muon" and not use.module.endswith(INDEXER) and (use.form == "fp8" or use.name == "eh_proj")


def state_bytes(use: TensorUse, optimizer: str, moments: str) -> int:
    """Return the bytes of the optimizer's state for one number of a tensor."""
    return 4 if is_muons(use, optimizer) else 2 * SIZES[moments]


def training_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    optimizer: Optimizer = "adamw",
    moments: Dtype = "float32",
    recompute: bool = False,
    kernels: bool = False,
    dsa_stage: Stage = "sparse",
) -> Bytes:
    """Return the bytes that are held at the end of a forward in training: a lower bound, as activation_bytes is.

    They are FP32 parameters and gradients, the optimizer's state, and all that is saved for backward: activations,
    copies of weights, and the head's gradient, which the chunked cross-entropy makes in the forward.
    The peak of a step is higher by the operation at work, such as an optimizer's temporary tensors.

    Args:
        batch_size: sequences that go through the model at a time: with gradient accumulation a part of the step's.
        dtype, recompute, kernels, dsa_stage: as in activation_bytes.
        optimizer, moments: as in optimizer_bytes.
    """
    sizes = {"batch_size": batch_size, "seq_len": seq_len}
    how: dict[str, Any] = {"dtype": dtype, "kernels": kernels, "dsa_stage": dsa_stage}
    heads = 1 + config.n_mtp_layers if dsa_stage == "sparse" else 0
    return Bytes.of(
        [
            ("parameters", weight_bytes(config, "float32").total),
            ("gradients", gradient_bytes(config, dsa_stage).total),
            ("optimizer", optimizer_bytes(config, optimizer, moments, dsa_stage).total),
            ("activations", activation_bytes(config, **sizes, recompute=recompute, **how).total),
            ("weights kept for backward", saved_weight_bytes(config, **how).total),
            ("the head's gradient", 4 * heads * config.vocab_size * config.dim),
        ]
    )


def saved_weight_bytes(
    config: ModelConfig, dtype: Dtype = "bfloat16", kernels: bool = False, dsa_stage: Stage = "sparse"
) -> Bytes:
    """Return the bytes of the copies of weights that autograd saves, by kind of module; see activation_bytes."""
    uses = (use for use in tensors(config) if use.learns(dsa_stage))
    fp8 = config.precision == "fp8"
    return Bytes.of((use.module, saved_copy(use, dtype, fp8=fp8, kernels=kernels)) for use in uses)


def saved_copy(use: TensorUse, dtype: str, *, fp8: bool, kernels: bool = False) -> Any:
    """Return the bytes of the copies of a weight that autograd saves, besides the FP32 parameter itself.

    Matrices are saved in the dtype they were multiplied in; experts' w1 and w3 also in FP32, where they are joined.
    """
    if use.form == "fp8" and fp8:
        return use.parameters + 4 * use.times * use.stack * use.scales
    routed = use.module.endswith("routed experts")
    if use.module.endswith(INDEXER):  # whose inputs are detached
        return 0
    if (use.form != "fp8" and use.name != "eh_proj") or (kernels and routed):
        return 0
    joined = routed and use.name != "w2"
    return use.parameters * SIZES[dtype] if joined or dtype != "float32" else 0
