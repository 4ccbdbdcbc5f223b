"""Sizes, names and forms that no count accepts, each refused in one sentence that says what to use."""

from typing import Any

import pytest

from dsmini import ModelConfig
from dsmini.accounting import (
    activation_bytes,
    cache_bytes,
    decode_bytes_per_token,
    decode_flops_per_token,
    expected_experts,
    flops_per_token,
    kv_bytes_per_token,
    optimizer_bytes,
    step_flops,
    training_bytes_per_token,
    weight_bytes,
)
from tests.helpers.accounting import sized
from tests.helpers.configs import released

TOY, MHA, V3 = ModelConfig(), sized(attention="mha"), released("deepseek-v3")
REFUSED: list[tuple[Any, ModelConfig, dict[str, Any], str]] = [
    (activation_bytes, TOY, {"batch_size": 0, "seq_len": 4}, "batch_size=0 is not positive"),
    (activation_bytes, TOY, {"batch_size": 1, "seq_len": 1}, "too short for n_mtp_layers=1"),
    (flops_per_token, V3, {"seq_len": 0}, "seq_len=0 is not positive; use 1 or more"),
    (decode_flops_per_token, V3, {"context": 5, "form": "both"}, "use auto, expanded or absorbed"),
    (step_flops, V3, {"batch_size": 1, "seq_len": 9, "last_logits": True}, "use training=False"),
    (step_flops, V3, {"batch_size": 1, "seq_len": 1}, "too short for n_mtp_layers=1"),
    (kv_bytes_per_token, MHA, {"dtype": "fp8"}, "use bfloat16"),
    (cache_bytes, TOY, {"max_seq_len": 0}, "max_seq_len=0 is not positive; use 1 or more"),
    (expected_experts, TOY, {"tokens": -1}, "tokens=-1 is negative; use 0 or more"),
    (weight_bytes, TOY, {"dtype": "int8"}, "dtype='int8' is unknown; use float32, bfloat16, fp8 or fp4"),
    (optimizer_bytes, TOY, {"optimizer": "sgd"}, "use adamw or muon"),
    (decode_bytes_per_token, V3, {"context": 0}, "context=0 is not from 1 to max_seq_len=163840"),
    (decode_bytes_per_token, MHA, {"context": 5, "form": "absorbed"}, "use expanded"),
    (decode_bytes_per_token, V3, {"context": 5, "dtype": "int4"}, "use float32, bfloat16 or fp8"),
    (decode_bytes_per_token, sized(), {"context": 5, "batch": 3, "experts": 6.1}, "use 2 to 6, or leave it out"),
    (training_bytes_per_token, V3, {"seq_len": 1}, "too short for n_mtp_layers=1"),
]


@pytest.mark.parametrize(("count", "config", "given", "words"), REFUSED)
def test_refusals_say_what_to_use(count: Any, config: ModelConfig, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        count(config, **given)
