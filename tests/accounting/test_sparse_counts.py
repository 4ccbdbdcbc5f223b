"""Counts of DSA: the published figures of V3.2, and what a small model computes and caches."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmini import Transformer, ops
from dsmini.accounting import (
    decode_bytes_per_token,
    decode_flops_per_token,
    flops_per_token,
    kv_bytes_per_token,
    parameters,
    step_flops,
    training_bytes,
)
from dsmini.training.optim import begin_stage
from tests.helpers.accounting import GROUPED, WHOLE, attention_by, explicit, sized
from tests.helpers.configs import DSA, V32, released

V3 = released("deepseek-v3")
SPARSE = released("deepseek-v3", **V32)
OVER, SCORES = "attention over the context", "scores of the indexer"


def test_an_indexer_of_v32_has_as_many_parameters_as_the_released_tensors() -> None:
    with_it, without = parameters(SPARSE), parameters(V3)
    one = 8192 * 1536 + 128 * 7168 + 64 * 7168 + 256
    assert one == 13_959_424
    assert with_it.main - without.main == 61 * one
    assert with_it.total - without.total == 62 * one
    assert with_it.by_module["indexer"] == 61 * (one - 256)  # its norm is with the others


def test_cache_of_v32() -> None:
    assert kv_bytes_per_token(SPARSE, dtype="fp8") == 48_068
    assert kv_bytes_per_token(SPARSE, dtype="bfloat16") == kv_bytes_per_token(SPARSE) == 61 * 1408


def test_a_decoded_token_reads_all_index_keys_and_k_rows() -> None:
    config = dataclasses.replace(SPARSE, max_seq_len=2**20)
    read = decode_bytes_per_token(config, context=128 * 1024, dtype="fp8", cache_dtype="fp8").by_part["cache read"]
    assert read == 61 * (132 * 128 * 1024 + 656 * 2048)
    expanded = decode_bytes_per_token(config, context=4096, dtype="fp8", cache_dtype="fp8", form="expanded")
    assert expanded.by_part["cache read"] == 61 * (132 + 656) * 4096


@pytest.mark.parametrize("context", [5, 8, 9, 100])
def test_operations_of_decoding_against_torch(context: int) -> None:
    """But for the weighted sum over the indexer's heads, which the papers leave out. Up to k keys it is not asked."""
    config = sized(**DSA, n_mtp_layers=0, n_dense_layers=3)
    model = Transformer(config).double()
    tokens = torch.randint(0, 51, (1, context))
    cache = model.new_cache(1, context, form="absorbed")
    with ops.use("eager"):
        model(tokens[:, :-1], cache)
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, -1:], cache)
    counted, heads = decode_flops_per_token(config, context=context, form="absorbed").total, DSA["index_n_heads"]
    sums = 2 * 3 * heads * context
    unused = 2 * 3 * heads * (32 * (context + 20) + 40)  # queries, their weights and scores where there is no choice
    assert counter.get_total_flops() == (counted + sums if context > 8 else counted - unused)


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize(
    ("q_lora_rank", "recompute"),
    [(20, True), (None, False), *(pytest.param(*rare, marks=pytest.mark.slow) for rare in ((20, False), (None, True)))],
)
def test_operations_of_a_training_step_against_torch(stage: Any, q_lora_rank: int | None, recompute: bool) -> None:
    """But for the weighted sums over the indexer's heads: picks, the loss, and two for its gradients."""
    config = sized(**DSA, n_mtp_layers=2, q_lora_rank=q_lora_rank, n_routed_experts=4)
    model, tokens, heads = Transformer(config), torch.randint(0, 51, (2, 60)), DSA["index_n_heads"]
    begin_stage(model, stage)
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED)
    with ops.use("eager"), counter, attention_by(explicit, WHOLE):
        model.losses(tokens, tokens, recompute=recompute).total.backward()
    how: dict[str, Any] = {"causal": False, "recompute": recompute, "dsa_stage": stage}
    counted = step_flops(config, batch_size=2, seq_len=60, **how)
    sums = 2 * 2 * heads * (3 * 60**2 + 59**2 + 58**2) * 4 * (1 + recompute)
    assert counter.get_total_flops() == counted.total + sums


def test_the_loss_of_an_indexer_compares_all_keys_or_the_picked_ones() -> None:
    """By hand: V3.2 at 4096 tokens, with the target's logits of all keys in both stages."""
    all_, picked = 4096 * 4096 / 2, 2048 * 2048 / 2 + 2048 * 2048
    for stage, compared in (("warmup", all_), ("sparse", picked)):
        counted = flops_per_token(SPARSE, 4096, training=True, mtp=False, dsa_stage=stage).by_module
        loss = 2 * (3 * 64 * 128 * compared + 128 * 192 * all_)
        assert counted["loss of the indexer"] == 61 * loss / 4096
        assert counted[SCORES] == 61 * 2 * 64 * 128 * 4096 / 2
        assert counted["indexer"] == 61 * 2 * 2 * (8192 * 1536 + 128 * 7168 + 64 * 7168)


def test_a_sequence_longer_than_k_attends_to_fewer_pairs() -> None:
    """T queries with at most k keys each: k^2 / 2 + k (T - k) pairs; all T^2 / 2 are scored."""
    counted = flops_per_token(SPARSE, 4096).by_module
    pairs = 2048 * 2048 / 2 + 2048 * (4096 - 2048)
    assert counted[OVER] == 61 * 2 * 128 * (192 + 128) * pairs / 4096
    assert counted[SCORES] == 61 * 2 * 64 * 128 * 4096 / 2
    short = flops_per_token(SPARSE, 2048).by_module
    assert short[OVER] == flops_per_token(V3, 2048).by_module[OVER]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_gradients_and_moments_are_those_of_a_step(stage: Any, optimizer: Any) -> None:
    config = sized(**DSA)
    model, tokens = Transformer(config), torch.randint(0, 51, (2, 30))
    begin_stage(model, stage)
    model.losses(tokens, tokens).total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sizes: dict[str, Any] = {"batch_size": 2, "seq_len": 30, "dsa_stage": stage}
    counted = training_bytes(config, **sizes, optimizer=optimizer).by_part
    assert counted["gradients"] == sum(grad.nbytes for grad in gradients)
    if optimizer == "adamw":
        assert counted["optimizer"] == sum(2 * grad.nbytes + 4 for grad in gradients)
    elif stage == "warmup":  # indexers are AdamW's
        assert counted["optimizer"] == training_bytes(config, **sizes).by_part["optimizer"]
    heads = 2 if stage == "sparse" else 0
    assert counted.get("the head's gradient", 0) == heads * 4 * 51 * 40


def test_copies_of_weights_of_an_indexer_are_saved_as_codes_alone() -> None:
    """Its inputs are detached, so that no product of backward reads its weights. There are four blocks with MTP's."""
    for precision, codes in (("native", 0), ("fp8", 4 * (3 * 32 * 20 + 32 * 40 + 4 * 2))):
        with_indexer, without = (
            training_bytes(sized(**more, precision=precision), batch_size=1, seq_len=20).by_part for more in (DSA, {})
        )
        name = "weights kept for backward"
        assert with_indexer[name] - without[name] == codes
