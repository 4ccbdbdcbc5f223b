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
    for stage in ("decode", "prefill", *(["verify"] if "verify_step_time" in found else [])):
        times = {word: found[key] for part, word in RESOURCES.items() if (key := f"{stage}_{part}") in found}
        assert found[f"{stage}_step_time"] == max(times.values())
        if stage in binds:
            second, first = sorted(times, key=lambda word: times[word])[-2:]
            assert binds[stage].first == first and binds[stage].words.endswith(f"; next: {second}")
    assert found["decode_time_per_token"] == found["decode_step_time"] == 1 / found["decode_tokens_per_second"]
    assert found["prefill_time_to_first_token"] == found["prefill_step_time"]


def test_v3_decodes_as_worked_out_by_hand() -> None:
    found = values_of("deepseek-v3")
    assert (found["decode_gpu_experts"], found["prefill_gpu_experts"]) == (1, 9)
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


def test_gain_of_drafts_is_that_of_plans_with_more_tokens() -> None:
    """A step that verifies d drafts is one of d + 1 times as many tokens that share the cache of as many sequences."""
    for words in ("deepseek-v3", "deepseek-v3 sequences=1 decode_gpus=1"):
        found = values_of(f"{words} drafts=2")
        step = found["verify_step_time"] + 2 * found["draft_time"]
        assert found["speculation_gain"] == pytest.approx((1 + 0.85 + 0.85**2) * found["decode_step_time"] / step)
        assert found["verify_cache_read"] == found["decode_cache_read"]
        assert found["verify_matrix_flops"] == 3 * found["decode_matrix_flops"]
        assert found["decode_weights_read"] <= found["verify_weights_read"]


def test_indexer_reads_few_rows_of_a_long_context() -> None:
    """At 128K tokens V3.2 reads the indexer's keys whole and of attention's rows the 2048 that it picked."""
    found = values_of("deepseek-v3.2 context=131072 sequences=1 cache_dtype=fp8 decode_gpus=64 decode_tensor=1")
    assert found["kv_cache"] == 48_068
    assert found["decode_cache_read"] == pytest.approx(2 * 61 * (132 * 131072 + 656 * 2048))
