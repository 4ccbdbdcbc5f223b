"""Figures of plans as they are printed, or derived by hand: one table, each with its tolerance and its source."""

import math

import pytest

from tests.helpers.plans import values_of

DAY = 86400
# 1. parts of DeepSeek-V3: parameters, and bytes in FP8 with an FP32 scale for each block of 128x128
ATTENTION = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
ABSORBED = ATTENTION - 512 * 32768
SWIGLU, DENSE = 3 * 7168 * 2048, 3 * 7168 * 18432
EXPERT_BYTES = SWIGLU + 3 * 4 * 56 * 16
HEAD_BYTES = 24576 * 1536 + 4 * 192 * 12 + 7168 * 16384 + 4 * 56 * 128 + 32768 * 512 + 4 * 256 * 4
LATENT_BYTES = 1536 * 7168 + 4 * 12 * 56 + 576 * 7168 + 4 * 5 * 56
GATE_BYTES, NORM_BYTES = 4 * (256 * 7168 + 256), 4 * (2 * 7168 + 1536 + 512)
BLOCK_BYTES = HEAD_BYTES / 4 + LATENT_BYTES + NORM_BYTES
OTHER_BYTES = 61 * BLOCK_BYTES + 3 * (DENSE + 3 * 4 * 56 * 144) + 4 * 129280 * 7168 / 4 + 4 * 7168
# 2. activations of a token in FP8, where attention's matrices and SwiGLU's product are computed again
SAVED = 2 * 7168 * 2 + (1536 + 512 + 64) * 2 + 16384 * 12 // 8 + 128 * 4 + 128 * 4
GATE_SAVED = 256 * 4 + 4 + 256 * 8 + 8 * 8 + 4
ROWS_SAVED = 8 * (7168 + 56 * 4 + 16 + 2 * (2048 + 16 * 4))
MOE_SAVED = SAVED + GATE_SAVED + ROWS_SAVED + 2 * (2048 + 16 * 4)
# 3. a GPU in the middle of V3's pipeline: two stages of 4 MoE layers, 4 experts of each
MIDDLE_EXPERTS = 8 * 4 * SWIGLU
MIDDLE_MATRICES = 8 * (ATTENTION + SWIGLU)
MIDDLE_PLAIN = 8 * (256 * 7168 + 2 * 7168 + 1536 + 512)
# 4. rows of experts: FP8 with scales there, BF16 back
ROW = 7392 + 14336
MILLION = 2**20
PREFILL = "prefill_gpus=32 prefill_tensor=4 prefill_redundant=32 weight_dtype=fp8 prompt=1000"
SENT = 58 * 2 * 1000 * 7168 * 3
"""Bytes that 2,000 tokens of a GPU send and get back, in FP8 and BF16, for each copy."""
NO_MTP = "n_layers=64 n_dense_layers=0 n_mtp_layers=0 gpus=2048 pipeline=16 expert=64 tensor=1 zero=1 precision=fp8"
NO_MTP += " recompute=selective moments=bfloat16"
"""V3's layout of a model whose stages are equal."""
V3 = "gpus=2048 pipeline=16 expert=64 tensor=1 zero=1 recompute=selective precision=fp8 moments=bfloat16"
GQA = "deepseek-v3 attention=gqa n_kv_heads=4 gpus=2048 decode_gpus=8 weight_dtype=bfloat16 sequences=5 context=100"
GQA_BYTES = 2 * 5 * 100 * 4 * (128 + 128) * 61 * 2
GRADIENTS = "((parameters_last - expert_parameters_last) * (1 - 1 / data)"
GRADIENTS += " + expert_parameters_last * (1 - 1 / expert_data)) * 4 / slow_link_effective"
"""Time to reduce the gradients of the last GPU once, which has most."""
ONE = "deepseek-v3 decode_gpus=1 sequences=1 context=100"


def hit(experts: int, chosen: int, places: int) -> float:
    """Return the places that different experts are on: one is missed if all chosen experts are among the others."""
    return places * (1 - math.comb(experts - experts // places, chosen) / math.comb(experts, chosen))


Row = tuple[str, float, float, str]
TABLE: dict[str, list[Row]] = {
    # what it is: a figure or a formula of some, its value, the relative tolerance, where the value comes from
    "deepseek-v3": [
        ("parameters_main", 671_026_404_352, 0, "V3, section 4.2: 671B"),
        ("parameters_total", 682_636_472_320, 0, "the released tensors"),
        ("routing_biases", 59 * 256, 0, "one for each expert, the MTP block's too"),
        ("attention_parameters", ATTENTION, 0, "by hand"),
        ("mtp_parameters", 11.610e9, 5e-5, "V3's README: 14B with embedding and head"),
        ("kv_cache", 70_272, 0, "INS, table 1: 70.272 KB"),
        ("equal_gqa_groups", 2.25, 0, "V2, table 1"),
        ("cache_saving", 0.9824, 5e-5, "70,272 of 61 * 2 * 128 * 256 bytes"),
        ("v32_indexer_parameters", 8192 * 1536 + 128 * 7168 + 64 * 7168 + 256, 0, "the released tensors"),
        ("v41_kv_cache", 890, 0, "V4.1 report: 890 bytes"),
        # 1. the recipe: 12,426 steps of 9216 sequences on average, and 227,785 of 15360
        ("tokens", (12_426 * 9216 + 227_785 * 15_360) * 4096, 1e-6, "V3, section 4.2: 14.8T"),
        ("batch * seq_len", 15360 * 4096, 0, "V3, section 4.2"),
        # 2. the layout
        ("data", 128, 0, "V3, section 3.2: PP16 on 2048 GPUs"),
        ("experts_per_gpu", 4, 0, "V3, section 3.2: EP64"),
        ("expert_data", 2, 0, "128 / 64"),
        ("micro_batches", 120, 0, "15360 / 128"),
        ("layers_first", 4, 0, "61 layers in 16 stages"),
        ("layers_last", 3, 0, "61 layers in 16 stages"),
        # 3. memory
        ("state_parameter", 13 + 4 / 128**2, 1e-12, "FP8 1, FP32 4 + 4, BF16 moments 4, a scale a block"),
        ("activations_moe", 158_920, 0, "V3, section 3.3.3, by hand"),
        ("activations_moe", MOE_SAVED, 0, "V3, section 3.3.3, by hand"),
        ("activations_dense", SAVED + 2 * (18432 + 144 * 4), 0, "V3, section 3.3.3, by hand"),
        ("expert_parameters_middle", MIDDLE_EXPERTS, 0, "V3, section 3.2, by hand"),
        ("parameters_middle", MIDDLE_MATRICES + MIDDLE_PLAIN + MIDDLE_EXPERTS, 0, "V3, section 3.2, by hand"),
        (
            "memory_weights_middle",
            (MIDDLE_MATRICES + MIDDLE_EXPERTS) * (1 + 4 / 128**2) + 2 * MIDDLE_PLAIN,
            0,
            "V3, section 3.3, by hand",
        ),
        ("memory_gradients_middle / parameters_middle", 4, 0, "FP32"),
        (
            "memory_master_middle",
            4 * ((MIDDLE_MATRICES + MIDDLE_PLAIN) / 256 + MIDDLE_EXPERTS / 4),
            0,
            "ZeRO 1 over 128 * 2 copies, of experts 2 * 2",
        ),
        ("memory_moments_middle / memory_master_middle", 1, 0, "twice BF16"),
        ("memory_activations_middle", 17 * 4 * 158_920 * 4096, 0, "V3, table 2: PP + 1 micro-batches"),
        ("memory_middle", 63.5e9, 1e-3, "the sum"),
        ("memory_needed", 65.0e9, 1e-3, "the first GPU: embedding and head too"),
        # 4. rows of experts
        ("dispatch_row", 7168 + 4 * 56, 0, "V3, section 3.3.3"),
        ("combine_row", 2 * 7168, 0, "V3, section 3.3.3"),
        ("expert_nodes", 8, 0, "V3, section 3.2: EP64 over 8 nodes"),
        ("node_limit", 4, 0, "V3, section 2.1.2: at most 4 nodes"),
        ("nodes_reached", 3.97, 0.011, "a gate with random scores"),
        ("nodes_drawn", 5.29, 1e-3, "a gate with random scores"),
        ("slow_copies", 3.5, 0, "one of 4 nodes in 8 is the token's own"),
        ("slow_copies_unlimited", 7, 0, "the eighth expert is on the token's own node"),
        ("slow_bytes", 3.5 * ROW, 0, "by hand"),
        ("dispatch_seconds", 3.5 * ROW / 40e9, 1e-12, "InfiniBand as reached"),
        ("slow_link_rate_unlimited", 30.8e9 * 7 / 8, 0.02, "V3's tokens a second, by hand"),
        ("slow_link_share_unlimited", 0.68, 0.015, "of InfiniBand, by hand"),
        ("slow_link_share_unlimited / slow_link_share", 2, 1e-12, "7 rows to 3.5 nodes"),
        ("slow_link_share_unlimited * step_seconds / computing_seconds", 0.78, 0.013, "V3, section 3.2: about 1:1"),
        # 5. time
        ("1 - computing_share", 20 / 132, 1e-12, "V3, section 3.2.2: 20 of 132 multiprocessors"),
        ("chunk_forward + chunk_backward", 13.95 / 97, 0.01, "INS, table 4: 97 pairs in 13.95 s"),
        ("roof_step_seconds", 19.926, 0.01, "INS, table 4"),
        ("assumed_step_seconds", 19.926, 0.005, "INS, table 4, at its MFU"),
        ("step_seconds - roof_step_seconds", 0, 1e-12, "the slower of the two"),
        ("bubble_seconds", 1.09, 0.05, "DualPipe's formula with the times of INS, table 4"),
        ("roof_utilization", 0.3894, 0.01, "INS, table 4"),
        ("training_tokens_per_day", 272.80e9, 0.01, "INS, table 4"),
        ("training_gpu_hours", 2664e3, 0.01, "V3, table 1"),
        ("training_days", 14.8 * 3.7, 0.01, "V3, section 1: 3.7 days a trillion"),
        ("training_cost", 2664e3 * 2, 0.01, "V3, table 1: $2 an hour"),
        ("dispatching_seconds / chunk_dispatch", 16 * 2, 1e-12, "DualPipe hides those of 104 micro-batches"),
        # 6. failures
        ("mean_time_to_failure", DAY / (256 * 6.5e-3), 1e-12, "Meta: 6.50 in 1000 node-days"),
        ("checkpoint_interval", math.sqrt(2 * 10 * DAY / (256 * 6.5e-3)), 1e-12, "Young: sqrt(2 w M)"),
        ("checkpoint_bytes", 8 * 682_636_472_320, 0, "FP32 weights, twice BF16 moments"),
        ("checkpoint_write_time", 8 * 682_636_472_320 / (256 * 10 * 2**30), 1e-12, "Fire-Flyer: 10 GiB/s a node"),
        ("effective_share", 0.975, 1e-3, "(1 - (300 + 510) / 51923) / (1 + 10 / 1019)"),
        ("failures * mean_time_to_failure / elapsed_time", 1, 1e-12, "a constant rate"),
        ("elapsed_cost * effective_share_at_any_rate / training_cost", 1, 1e-9, "rent goes on"),
        ("training_energy", 2048 * 1275 * 54.54 * DAY / 0.97485, 1e-3, "GPUs * W * time"),
        # 7. serving
        ("decode_sequences_that_fit", 61, 0, "(80 - 8.65) GB of 4 * 288 MB"),
        ("decode_longest_context", 4230, 0, "60 sequences in 71.35 GB"),
        ("sequences", 30, 0, "61 sequences fit, in two micro-batches"),
        ("decode_data_parallel", 80, 0, "V3, section 3.4.2: DP80"),
        ("decode_gpu_experts", 1, 0, "V3, section 3.4.2: one a GPU"),
        ("prefill_data_parallel", 8, 0, "V3, section 3.4.1: DP8"),
        ("prefill_gpu_experts", 9, 0, "V3, section 3.4.1: 8 and a redundant one"),
        ("decode_gpu_weights", OTHER_BYTES + 58 * (EXPERT_BYTES + GATE_BYTES), 0, "the shared one is a routed one"),
        ("prefill_gpu_weights", OTHER_BYTES + 58 * (10 * EXPERT_BYTES + GATE_BYTES), 0, "9, and the shared one"),
        ("tokens_per_step", 1.85, 1e-12, "V3, section 5.4.3: 85 % accepted"),
        ("decode_cost * decode_gpu_tokens_per_second", 2 / 3600, 1e-12, "rent over rate"),
        ("prefill_cost * prefill_gpu_tokens_per_second", 2 / 3600, 1e-12, "rent over rate"),
        ("decode_gpu_tokens_per_second / decode_tokens_per_second", 60, 1e-12, "a GPU's sequences"),
        ("prefill_gpu_tokens_per_second * prefill_step_time", 2 * 4096, 1e-12, "two prompts"),
    ],
    # --- training in other layouts
    "deepseek-v3 precision=bf16 moments=float32": [("state_parameter", 18, 0, "2 + 4 + 4 + 8")],
    "deepseek-v3 precision=bf16": [
        ("state_parameter", 14, 0, "2 + 4 + 4 + 4"),
        ("dispatch_row", 14336, 0, "BF16"),
    ],
    "deepseek-v3 precision=fp32 moments=float32 gpus=2048 expert=1": [
        ("state_parameter", 16, 0, "its own master: 4 + 4 + 8"),
        ("computing_share", 1, 0, "no multiprocessor carries rows"),
    ],
    f"deepseek-v3 {V3} schedule=1f1b": [("dispatching_seconds / chunk_dispatch", 240, 1e-9, "nothing is hidden")],
    f"deepseek-v3 {V3} schedule=zb1p": [("dispatching_seconds / chunk_dispatch", 240, 1e-9, "nothing is hidden")],
    f"deepseek-v3 {V3} schedule=dualpipe slow_link*0.05": [
        (
            "(computing_seconds + dispatching_seconds) / (computing_seconds * 16 / 120 + 240 * chunk_dispatch)",
            1,
            1e-12,
            "pairs take as long as their rows",
        ),
    ],
    f"deepseek-v3 {V3.replace('zero=1', 'zero=0')} schedule=1f1b": [
        (f"exchange_seconds / ({GRADIENTS})", 2, 1e-9, "an all-reduce"),
    ],
    f"deepseek-v3 {V3} schedule=1f1b ": [
        (f"exchange_seconds / ({GRADIENTS})", 1.25 + 1 / 128**2, 1e-9, "FP32 gradients, FP8 weights"),
    ],
    f"deepseek-v3 {V3.replace('zero=1', 'zero=2')} schedule=1f1b": [
        (f"(exchange_seconds + computing_seconds) / ({GRADIENTS})", 120.25, 1e-4, "gradients of each micro-batch"),
    ],
    f"deepseek-v3 {V3.replace('zero=1', 'zero=3')} schedule=1f1b": [
        (f"(exchange_seconds + computing_seconds) / ({GRADIENTS})", 120 * 1.5, 1e-4, "weights of both passes too"),
    ],
    f"deepseek-v3 {NO_MTP} schedule=1f1b": [
        ("memory_activations_first", 16 * 4096 * (4 * MOE_SAVED + 8), 0, "V3, table 2: PP micro-batches"),
        ("memory_activations_middle", 15 * 4096 * 4 * MOE_SAVED, 0, "one fewer"),
    ],
    f"deepseek-v3 {NO_MTP} schedule=zb1p": [
        ("memory_activations_first", 16 * 4096 * (4 * MOE_SAVED + 8), 0, "V3, table 2: PP micro-batches"),
        ("memory_activations_last", 16 * 4096 * (4 * MOE_SAVED + 4 * 7168), 0, "with the head's"),
    ],
    f"deepseek-v3 {NO_MTP} schedule=dualpipe": [
        (
            "memory_activations_first",
            4096 * (17 * 4 * MOE_SAVED + 16 * 8 + 4 * 7168),
            0,
            "V3, table 2: PP + 1 micro-batches, and the head's",
        ),
    ],
    "deepseek-v3 gpus=2560 pipeline=40 schedule=1f1b expert=64 tensor=1 zero=1": [
        ("stage_share * forward_seconds / dense_layer_seconds", 2, 1e-12, "61 layers in 40 stages: some have 2"),
    ],
    f"deepseek-v3 {V3.replace('tensor=1', 'tensor=4')} schedule=dualpipe": [
        ("chunk_tensor", 62 / 16 * 4 * 3 / 4 * 4096 * 14336 / 160e9, 1e-12, "2 all-reduces a layer, each way"),
        ("reducing_seconds / chunk_tensor", 2 * 15360 / (2048 / 16 / 4), 1e-12, "two passes"),
    ],
    "deepseek-v3 gpus=2048 expert=8 zero=3": [
        ("expert_nodes", 1, 0, "one node"),
        ("slow_copies", 0, 0, "nothing leaves it"),
        ("fast_copies", hit(256, 8, 8) * 7 / 8, 1e-3, "GPUs of a token, its own among them"),
        ("dispatch_seconds / fast_copies", ROW / 160e9, 1e-12, "NVLink as reached"),
    ],
    "deepseek-v3 gpus=2048 expert=256 zero=3": [("node_limit", 16, 0, "a group is on 4 nodes")],
    "deepseek-v3 gpus=2048 expert=16 zero=3": [
        ("node_limit", 4, 0, "a node has 4 groups"),
        ("nodes_reached", hit(256, 8, 2), 1e-3, "both nodes"),
    ],
    "deepseek-v3 n_limited_groups=8 gpus=2048 expert=64": [("nodes_reached", 5.29, 0.011, "random scores")],
    "deepseek-v3 n_limited_groups=2 gpus=2048 expert=64": [("nodes_reached", 2, 0.011, "random scores")],
    "deepseek-v3 n_expert_groups=1 n_limited_groups=1 gpus=2048 expert=64": [
        ("node_limit", 8, 0, "all nodes"),
        ("gpus_reached", hit(256, 8, 64), 1e-3, "by combinations"),
    ],
    "deepseek-v3 n_routed_experts=64 n_activated_experts=6 gpus=2048 expert=8 zero=3": [
        ("gpus_reached", hit(64, 6, 8), 1e-3, "by combinations"),
    ],
    "deepseek-v3 n_routed_experts=8 n_expert_groups=1 n_limited_groups=1 gpus=2048 expert=8 zero=3": [
        ("gpus_reached", 8, 1e-3, "each GPU has an expert of the token"),
    ],
    # --- workloads, prices and assumptions
    "deepseek-v3 batch=7680 tokens=1e12 utilization=0.2 price=3 failures_per_node_day=0.01": [
        ("batch * seq_len * tokens", 7680 * 4096 * 1e12, 0, "as asked for"),
        ("utilization", 0.2, 0, "as asked for"),
        ("gpu_price", 3 / 3600, 1e-12, "as asked for"),
        ("mean_time_to_failure", DAY / 2.56, 1e-12, "as asked for"),
        ("step_seconds / assumed_step_seconds", 1, 0, "a utilization that was measured holds"),
    ],
    "deepseek-v3 restart_time=60 checkpoint_halt=1": [
        ("restart_time + checkpoint_halt", 61, 0, "as asked for"),
        ("checkpoint_interval", math.sqrt(2 * DAY / (256 * 6.5e-3)), 1e-12, "Young"),
    ],
    "deepseek-v2-lite": [("batch * seq_len * tokens", 15360 * 4096 * 14.8e12, 0, "V3's, for want of a recipe")],
    "toy": [
        ("batch * seq_len", 4 * 256, 0, "[train] of the file"),
        ("tokens", 1600 * 4 * 256, 0, "[train] of the file"),
        ("exchange_seconds + bubble_seconds + dispatching_seconds + reducing_seconds", 0, 0, "one process"),
        ("checkpoint_bytes / parameters_total", 8, 0, "FP32 and Muon's momentum"),
    ],
    "toy precision=fp32": [("checkpoint_bytes / parameters_total", 8, 0, "the weight is its own master")],
    "toy-dense": [("checkpoint_bytes / parameters_total", 12, 0, "FP32 and AdamW's moments")],
    "toy utilization=0.2": [("step_seconds * peak_bfloat16 * utilization / step_flops", 1, 1e-12, "one process")],
    "deepseek-v3 gpus=1 precision=bf16 moments=float32": [
        ("process_parameters + process_gradients + process_optimizer", 16 * 682.6e9, 1e-4, "4 + 4 + 8"),
    ],
    # 12,000 GPUs, and the 16,384 of LLaMA 3, as so many failures of one
    "toy failures_per_node_day=78": [("effective_share", 0.92, 0.02, "Kokolis et al.: above 0.9 at 12,000 GPUs")],
    "toy failures_per_node_day=78 checkpoint_halt=300": [("effective_share", 0.74, 0.02, "Kokolis et al.")],
    "toy failures_per_node_day=62.074": [("mean_time_to_failure", 3.09 * 3600, 2e-3, "LL3: 419 in 54 days")],
    # --- decoding
    "deepseek-v3 memory*2 sequences=32": [
        ("decode_slow_bytes", 58 * 2 * 32 * 9 * 7168 * 3 * 312 / 320, 1e-12, "INS, 2.3.2, but for its own node"),
        ("decode_fast_bytes", 61 * 2 * 32 * 7168 * 2 * 2 * 3, 1e-12, "a group of 4 gathers and scatters BF16"),
        ("decode_cache_read", 4 * 64 * 4096 * 70_272, 0, "each GPU reads its group's latents"),
    ],
    "deepseek-v3 sequences=32 context=1000": [("decode_gpu_cache", 4 * 2 * 32 * 1000 * 70_272, 0, "by hand")],
    "deepseek-v3 sequences=32 context=2322": [("decode_step_time - decode_slow_link_time", 0, 0, "17.5 ms")],
    "deepseek-v3 sequences=32 context=2323": [
        ("decode_step_time - decode_memory_time", 0, 0, "5.04 ms + 5.37 us each")
    ],
    "deepseek-v3 sequences=32 decode_gpus=320 decode_tensor=1 decode_redundant=64": [
        ("decode_gpu_cache", 64 * 4096 * 70_272, 0, "its own latents alone"),
    ],
    "deepseek-v3 sequences=32 decode_gpus=8": [
        ("decode_fast_link_time", 58 * 64 * 8 * 7168 * 3 * 7 / 8 / 160e9, 1e-12, "experts of one node"),
    ],
    "deepseek-v3 cache_dtype=fp8": [("cache_row", 512 + 4 * 4 + 2 * 64, 0, "latent with scales, BF16 rotary key")],
    "deepseek-v3 context=32768": [("sequences", 3, 0, "7 fit")],
    "deepseek-v3 context=256": [("sequences", 32, 0, "no more than that")],
    f"{GQA} decode_tensor=1": [("decode_gpu_cache", GQA_BYTES, 0, "four key-value heads")],
    f"{GQA} decode_tensor=4": [("decode_gpu_cache", GQA_BYTES, 0, "one head of four sequences")],
    f"{GQA} decode_tensor=8": [("decode_gpu_cache", 2 * GQA_BYTES, 0, "two GPUs hold each head")],
    ONE: [
        ("decode_experts_read", 8, 1e-12, "those of one token"),
        ("verify_experts_read", 16 - 8 * 8 / 256, 1e-12, "two draws of 8 of 256"),
        ("draft_matrix_flops", 2 * (ABSORBED + 9 * SWIGLU), 1e-12, "one block"),
        (
            "draft_other_flops",
            2 * (512 * 32768 + 256 * 7168 + 2 * 7168 * 7168 + 129280 * 7168 + 100 * 128 * (2 * 512 + 64)),
            1e-12,
            "wkv_b absorbed, gate, projection, head and 100 keys",
        ),
        ("draft_cache_read", 100 * 1152, 0, "of one layer"),
    ],
    f"{ONE} n_dense_layers=62 decode_gpus=1": [("draft_matrix_flops", 2 * (ABSORBED + DENSE), 1e-12, "a dense block")],
    "deepseek-v3 acceptance=0.9": [("tokens_per_step", 1.9, 1e-12, "V3, section 5.4.3")],
    "deepseek-v3 acceptance=0.5 drafts=5": [
        ("tokens_per_step", sum(0.5**n * 0.5 * (n + 1) for n in range(5)) + 0.5**5 * 6, 1e-12, "by cases"),
    ],
    "deepseek-v3 acceptance=0.8 drafts=2": [
        ("speculative_step - verify_step_time - 2 * draft_step_time", 0, 1e-12, "two drafts, then the model"),
        ("speculation_gain * speculative_step / decode_step_time", 1 + 0.8 + 0.64, 1e-12, "by cases"),
    ],
    # --- reading prompts
    f"deepseek-v3 {PREFILL} n_limited_groups=1": [("prefill_slow_bytes", SENT * 3 / 4, 1e-3, "one node of four")],
    f"deepseek-v3 {PREFILL} n_limited_groups=3": [("prefill_slow_bytes", SENT * 3 * 3 / 4, 1e-3, "three of four")],
    f"deepseek-v3 {PREFILL} n_limited_groups=8": [
        ("prefill_slow_bytes", SENT * hit(256, 8, 4) * 3 / 4, 1e-3, "those of 8 experts"),
        (
            "prefill_fast_bytes",
            SENT * hit(256, 8, 32) * 7 / 8 + 61 * 2000 * 7168 * 2 * 2 * 3,
            1e-3,
            "GPUs of 8 experts, and a group of 4 that gathers and scatters",
        ),
    ],
    f"deepseek-v3 {PREFILL} n_expert_groups=2 n_limited_groups=1": [
        ("prefill_slow_bytes", SENT * 2 * 3 / 4, 1e-9, "a group is on two nodes"),
    ],
    # --- sparse and compressed attention
    "deepseek-v3 context=2000": [
        ("v32_attention_flops", 2 * 128 * (2 * 512 + 64) * 2000, 0, "all keys"),
        ("v32_dense_flops - v32_attention_flops", 0, 0, "all keys"),
        ("v32_read", 2000 * (656 + 132), 0, "all keys, and the indexer's"),
    ],
    "deepseek-v3 context=2176": [("v32_flops_ratio", 1, 1e-12, "where both lines meet")],
    "deepseek-v3 context=131072 sequences=1": [
        ("v32_flops_ratio", 13.4, 4e-3, "V3.2, by hand"),
        ("v32_read_ratio", 4.6, 0.011, "V3.2, by hand"),
        ("v32_dense_flops", 36.5e9, 1e-3, "V3.2, by hand"),
        ("v32_index_flops", 2.15e9, 2e-3, "V3.2, by hand"),
        ("v32_attention_flops", 0.57e9, 2e-3, "V3.2, by hand"),
        ("v32_kv_cache", 48_068, 0, "61 * (656 + 132)"),
    ],
    f"deepseek-v3 max_seq_len={MILLION} context={MILLION} sequences=1": [
        ("v32_cache", 50.4e9, 1e-3, "48,068 bytes a token"),
        (
            "v32_token_flops",
            2 * (36_624_596_992 + 61 * 13_959_424)
            + 61 * (2 * 64 * 128 * MILLION + 2 * 2 * 128 * (2 * 512 + 64) * 2048),
            1e-12,
            "matrices, scores, and attention to 2048 keys in BF16",
        ),
        ("pro_parameters", 1_572_997_201_763, 0, "the released tensors"),
        ("flash_parameters", 284_332_240_471, 0, "the released tensors"),
        ("pro_active_products", 48.85e9, 1e-3, "the released tensors"),
        ("flash_active_products", 13.27e9, 1e-3, "the released tensors"),
        ("pro_entry", 448 + 2 * 64 + 7 + 1, 0, "codes, rotary numbers, scales, padding"),
        ("pro_index_entry", 64 + 4, 0, "FP4 and scales"),
        ("pro_kv_cache", 30 * (584 + 68) / 4 + 31 * 584 / 128, 1e-12, "V4, section 2.3, by hand"),
        ("flash_kv_cache", 21 * (584 + 68) / 4 + 20 * 584 / 128, 1e-12, "V4, section 2.3, by hand"),
        ("pro_cache - pro_window_cache", 5.28e9, 2e-3, "by hand"),
        ("flash_cache - flash_window_cache", 3.68e9, 2e-3, "by hand"),
        ("pro_window_cache", 61 * 128 * 584, 0, "held once"),
        ("pro_baseline_share", 0.0201, 3e-3, "V4, section 2.3: about 2 %"),
        ("flash_baseline_share", 0.0200, 3e-3, "V4, section 2.3: about 2 %"),
        ("pro_flops_ratio", 3.78, 2e-3, "by hand"),
        ("flash_flops_ratio", 10.03, 1e-3, "by hand"),
        (
            "pro_attention_flops",
            128 * 2048 * 2 * (30 * (1024 + 128) + 31 * (MILLION / 128 + 128)),
            0,
            "V4, section 2.3, by hand",
        ),
        ("pro_index_flops", 30 * MILLION / 4 * 64 * 128 * 2 * 0.5, 0, "V4, section 2.3, by hand"),
    ],
    "deepseek-v3 context=1000": [("pro_cache", 1000 * 5031.4375 + 61 * 128 * 584, 1e-12, "windows are held once")],
    "deepseek-v3 context=64": [
        ("flash_attention_flops", 64 * 2048 * 2 * (43 * 64 + 21 * 64 / 4 + 20 * 64 / 128), 1e-12, "few entries"),
    ],
    "moonlight": [("v32_indexer_parameters", 8192 * 2048 + 128 * 2048 + 64 * 2048 + 256, 0, "reads the hidden state")],
}
ROWS = [pytest.param(words, *row, id=f"{words}: {row[0]}") for words, rows in TABLE.items() for row in rows]


@pytest.mark.parametrize(("words", "figure", "value", "within", "source"), ROWS)
def test_figure_is_as_printed(words: str, figure: str, value: float, within: float, source: str) -> None:
    found = eval(figure, {"__builtins__": {}}, values_of(words))
    assert found == (pytest.approx(value, rel=within, abs=within if value == 0 else 0) if within else value), source
