"""Serving: what binds a step, what a GPU sends and holds, drafts, and indexers."""

import pytest

from tests.helpers.plans import plan_of, setup_of, values_of

SERVED = ["deepseek-v3", "deepseek-v3 context=32768 drafts=3", "deepseek-v2-lite decode_gpus=4", "toy-mha @laptop"]
RESOURCES = {
    "memory_time": "memory traffic",
    "compute_time": "compute",
    "slow_link_time": "links between nodes",
    "fast_link_time": "links within a node",
}


@pytest.mark.parametrize("words", SERVED)
def test_a_step_takes_as_long_as_its_slowest_part(words: str) -> None:
    found, binds = values_of(words), plan_of(words).binds
    for stage in ("decode", "prefill", *(["verify", "draft"] if "verify_step_time" in found else [])):
        times = {word: found[key] for part, word in RESOURCES.items() if (key := f"{stage}_{part}") in found}
        *_, second, first = sorted(times.values())
        assert found[f"{stage}_step_time"] == first
        assert found[f"{stage}_step_in_turn"] == pytest.approx(sum(times.values()))
        assert found[f"{stage}_binding_ratio"] == pytest.approx(first / second)
        assert stage not in binds or (times[binds[stage].first], times[binds[stage].second]) == (first, second)
    assert found["decode_time_per_token"] == found["decode_step_time"] == 1 / found["decode_tokens_per_second"]
    assert found["prefill_time_to_first_token"] == found["prefill_step_time"]


def test_v3_decodes_as_worked_out_by_hand() -> None:
    found = values_of("deepseek-v3")
    assert (found["decode_gpu_experts"], found["decode_data_parallel"], found["prefill_gpu_experts"]) == (1, 80, 9)
    assert found["decode_gpu_weights"] == pytest.approx(8.65e9, rel=1e-3)
    assert found["decode_gpu_cache"] == 4 * 60 * 4096 * 70_272 and found["decode_sequences_that_fit"] == 61
    # 9 rows a token, of which one in forty stays in its node: 8/320
    assert found["decode_slow_bytes"] == pytest.approx(58 * 60 * 9 * 39 / 40 * (7392 + 14_336))
    inside = 58 * 60 * 9 * (1 / 40 - 1 / 320) * (7392 + 14_336)
    gathered = 61 * 60 * 3 * 2 * (1536 + 512 + 64 + 7168)  # latents in, sums out, for three others of the group
    assert found["decode_fast_bytes"] == pytest.approx(inside + gathered)


def test_no_drafts_is_plain_decoding() -> None:
    none, one, three = (values_of(f"deepseek-v3 drafts={n}") for n in (0, 1, 3))
    assert "speculation_gain" not in none and none["decode_step_time"] == one["decode_step_time"]
    assert one["tokens_per_step"] == pytest.approx(1.85)
    assert three["tokens_per_step"] == pytest.approx(1 + 0.85 + 0.85**2 + 0.85**3)
    assert "drafts" not in setup_of("deepseek-v3 drafts=0").request.__slots__ or "drafts" not in none


def test_indexer_saves_as_v32_reports() -> None:
    """At 128K tokens, one layer: 2.15 GFLOP of scores and 0.57 of attention, dense 36.5."""
    found = values_of("deepseek-v3 context=131072 sequences=1")
    assert found["v32_index_flops"] == 2 * 64 * 128 * 131072
    assert found["v32_attention_flops"] == 2 * 128 * (1024 + 64) * 2048
    assert found["v32_flops_ratio"] == pytest.approx(13.43, rel=1e-3)
    assert (found["v32_kv_cache"], found["v32_crossover"]) == (48_068, pytest.approx(2176))
    assert found["v32_read_ratio"] == pytest.approx(656 * 131072 / (132 * 131072 + 656 * 2048))
    assert values_of("deepseek-v3.2")["kv_cache"] == 61 * 1408
