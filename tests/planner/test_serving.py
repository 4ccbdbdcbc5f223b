"""Serving: what binds a step, what a GPU sends and holds, drafts, and indexers."""

import pytest

from dsmini.planner.pages import lines_of
from dsmini.planner.serving import RESOURCES
from tests.helpers.plans import plan_of, values_of

SERVED = ["deepseek-v3", "deepseek-v3 context=32768 drafts=3", "deepseek-v2-lite decode_gpus=4", "toy-mha @laptop"]


@pytest.mark.parametrize("words", SERVED)
def test_a_step_takes_as_long_as_its_slowest_part(words: str) -> None:
    found, plan = values_of(words), plan_of(words)
    for stage in ("decode", "prefill", *(["verify"] if "verify_step_time" in found else [])):
        times = {word: found[key] for part, word in RESOURCES.items() if (key := f"{stage}_{part}") in found}
        assert found[f"{stage}_step_time"] == max(times.values())
        if stage in plan.waits:
            worked = [word for word, time in times.items() if time]
            assert plan.longest(stage) == sorted(worked, key=lambda word: -times[word])
    assert found["decode_time_per_token"] == found["decode_step_time"] == 1 / found["decode_tokens_per_second"]
    assert found["prefill_time_to_first_token"] == found["first_step_time"] <= found["prefill_step_time"]


def test_v3_decodes_as_worked_out_by_hand() -> None:
    found = values_of("deepseek-v3")
    assert (found["decode_gpu_experts"], found["prefill_gpu_experts"]) == (1, 9)
    assert found["decode_gpu_weights"] - found["decode_draft_weights"] == pytest.approx(8.65e9, rel=1e-3)
    assert found["decode_gpu_cache"] == 4 * 64 * 4096 * 62 * 1152, "with the layer of multi-token prediction"
    assert found["decode_sequences_that_fit"] == 65
    plain = values_of("deepseek-v3 drafts=0")
    assert plain["decode_gpu_cache"] == 4 * 64 * 4096 * 70_272 and plain["decode_sequences_that_fit"] == 67
    # 9 rows a token, of which one in forty stays in its node: 8/320
    assert found["decode_slow_bytes"] == pytest.approx(58 * 64 * 9 * 39 / 40 * (7392 + 14_336))
    inside = 58 * 64 * 9 * (1 / 40 - 1 / 320) * (7392 + 14_336)
    gathered = 61 * 64 * 3 * 2 * (1536 + 512 + 64 + 7168)  # latents in, sums out, for three others of the group
    assert found["decode_fast_bytes"] == pytest.approx(inside + gathered)


@pytest.mark.parametrize("figure", ["fast_row_bytes", "chunk_tensor", "decode_fast_bytes"])
def test_fp32_sends_twice_the_bytes_of_bf16(figure: str) -> None:
    fixed = "deepseek-v2-lite gpus=16 batch=96 expert=8 tensor=2 decode_gpus=8 decode_tensor=2"
    narrow, wide = (f"{fixed} precision={p} weight_dtype={d}" for p, d in (("bf16", "bfloat16"), ("fp32", "float32")))
    assert values_of(wide)[figure] == pytest.approx(2 * values_of(narrow)[figure])


def test_gain_of_drafts_is_that_of_plans_with_more_tokens() -> None:
    """A step that verifies d drafts is one of d + 1 times the tokens, which share the cache of the same sequences."""
    for words in ("deepseek-v3", "deepseek-v3 sequences=1 decode_gpus=1"):
        found, none = values_of(f"{words} drafts=2"), values_of(f"{words} drafts=0")
        assert found["tokens_per_step"] == pytest.approx(1 + 0.85 + 0.85**2)
        step = found["verify_step_time"] + 2 * found["draft_time"]
        assert found["speculation_gain"] == pytest.approx(found["tokens_per_step"] * none["decode_step_time"] / step)
        assert found["verify_cache_read"] == found["decode_cache_read"]
        assert found["verify_matrix_flops"] == 3 * found["decode_matrix_flops"]
        assert found["decode_weights_read"] <= found["verify_weights_read"]
        assert not {"speculation_gain", "drafts"} & none.keys(), "plain decoding"


def test_own_efficiencies_and_imbalance_slow_a_step() -> None:
    words = "deepseek-v3 decode_gpus=144 decode_redundant=32 context=4989"
    bound = values_of(words)
    assert bound["decode_gpu_experts"] == 2, "of 256 and 32 copies"
    less = values_of(f"{words} memory_efficiency=0.5 serving_efficiency=0.5 link_efficiency=0.4 imbalance=1.5")
    for part, factor in (("memory_time", 2), ("slow_link_time", 3)):
        assert less[f"decode_{part}"] == pytest.approx(factor * bound[f"decode_{part}"])
    more = 2 * 64 * 0.5 * 58 * 8 * bound["expert_parameters"]  # of 64 tokens half as many again in the fullest GPU
    assert less["decode_matrix_flops"] == pytest.approx(bound["decode_matrix_flops"] + more)
    assert less["decode_compute_time"] == pytest.approx(2 * bound["decode_compute_time"] + 2 * more / 1978.9e12)
    trained = values_of("deepseek-v3 imbalance=1.5")
    assert trained["dispatch_seconds"] == pytest.approx(1.5 * bound["dispatch_seconds"])
    assert trained["chunk_forward"] > bound["chunk_forward"], "the fullest GPU computes more"


def test_a_dense_model_divides_its_feed_forwards() -> None:
    words = "deepseek-v2-lite n_dense_layers=27 sequences=1 decode_gpus=8"
    found, alone = values_of(words), values_of(f"{words} decode_tensor=1")
    assert (found["decode_tensor"], alone["decode_tensor"]) == (8, 1), "all GPUs, where nobody says another number"
    heads = 27 * 2 * (16 * 192 + 16 * 128) * 2048
    assert found["head_matrices_bytes"] == heads + 27 * 2 * 3 * 2048 * 10_944
    for amount in ("decode_gpu_weights", "decode_weights_read"):
        assert 7 < alone[amount] / found[amount] < 8, "all but latents and norms"
    # two tokens to seven others: hidden state, latent and sum of attention, and in and out of a feed-forward
    assert found["decode_fast_bytes"] == 2 * 27 * 7 * 2 * (2048 + 576 + 3 * 2048)


def test_first_token_is_that_of_one_prompt_of_each_group() -> None:
    """More GPUs that have prompts of their own give it no later; those that share heads read one prompt together."""
    one, two = (values_of(f"deepseek-v2-lite prefill_gpus={n}")["prefill_time_to_first_token"] for n in (1, 2))
    assert two == pytest.approx(one, rel=0.01)
    found = values_of("deepseek-v3")
    assert found["prefill_time_to_first_token"] == pytest.approx(found["prefill_step_time"] / (2 * 4), rel=0.01)
    assert "(8 prompts at a time)" in dict(lines_of(plan_of("deepseek-v3"))["inference"])["prefill"]
    assert "at a time" not in dict(lines_of(plan_of("deepseek-v2-lite"))["inference"])["prefill"]


def test_context_is_at_most_the_models() -> None:
    assert values_of("toy")["decode_longest_context"] == 256


def test_v4_with_the_window_alone_has_no_longest_context() -> None:
    found = values_of("toy-v4 compress_ratios=(0,0,0,0)")
    assert "decode_longest_context" not in found and found["decode_gpu_cache"] > 0


def test_gpus_that_fill_no_node_are_spread_evenly() -> None:
    """Twelve on nodes of eight are six in each of two."""
    found = values_of("deepseek-v3 decode_gpus=12")
    assert (found["decode_expert_nodes"], found["decode_expert_in_node"]) == (2, 6)
