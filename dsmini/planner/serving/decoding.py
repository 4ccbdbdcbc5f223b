"""Decoding: time of an output token on one accelerator or on many, and what binds it.

Every step gives each sequence one token. It reads the weights that its tokens meet, reads the cache of its sequences,
computes, and exchanges tokens between experts. serving_step says how these four become one time.

    time per output token    the step
    tokens/s of a sequence   1 / step
    tokens/s of a GPU        its sequences / step

Worked example, DeepSeek-V3 on 320 H800, two micro-batches of 32 sequences a GPU, context 4096, 50 GB/s between nodes:
a GPU sends 58 * 2 * 32 * 9 * 7168 * 3 * 312/320 = 0.70 GB, which takes 14.0 ms. It reads 16.9 GB of weights and 73.7 GB
of cache in 27.0 ms, since in its group of four every GPU reads the latents of all. Memory binds at this length, links
below 1670 tokens of context. The paper's limit, in which only links take time, is 15.11 ms (exchange.py).

MLA runs absorbed: wkv_b as two halves in BF16, and 2 kv_lora_rank + qk_rope_head_dim multiply-adds for each head and
cached token. In DSA a token meets index_topk cached tokens at most, after scores of all, which count as BF16.

Source: "Insights into DeepSeek-V3", section 2.3.2; DeepSeek-V3 report, section 3.4.2.
"""

from dataclasses import dataclass

from dsmini.planner.hardware import Hardware
from dsmini.planner.model.kv_cache import CachePlan, cache_plan
from dsmini.planner.model.sparse_context import is_sparse, keys_met, score_products
from dsmini.planner.model.weights import weights
from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import COUNT, TOKENS, Count, SecondsPerToken, TokensPerSecond, number_of, per
from dsmini.planner.serving.deployment import Deployment, ServingWorkload
from dsmini.planner.serving.memory import ServingMemory, cache_of, serving_memory
from dsmini.planner.serving.step import Setting, StepTimes, StepWork, main_blocks, step_times


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan(Figures):
    """Decoding of a model on a deployment."""

    cache: CachePlan
    memory: ServingMemory
    times: StepTimes
    time_per_token: SecondsPerToken
    """Time of an output token of a sequence."""
    tokens_per_second: TokensPerSecond
    """Output tokens of a sequence."""
    gpu_tokens_per_second: TokensPerSecond
    """Output tokens of a GPU: of all its sequences."""


def decode_plan(
    model: ModelInputs, hardware: Hardware, workload: ServingWorkload, deployment: Deployment
) -> DecodePlan:
    """Return how a deployment decodes.

    Raises: ValueError for a deployment that does not divide the model, hardware without a link or units that it needs,
        and MLA with qk_norm, which has no absorbed form.
    """
    setting = setting_of(model, hardware, deployment)
    cache = cache_plan(model, deployment.cache_dtype)
    mine = workload.sequences * deployment.micro_batches
    times = step_times(setting, main_blocks(setting), decode_work(setting, cache, workload, COUNT(1)), deployment.stage)
    stage, source = deployment.stage, "INS, section 2.3.2"
    rate = TOKENS(1) / times.step
    return DecodePlan(
        cache=cache,
        memory=serving_memory(setting, cache, mine, workload.context),
        times=times,
        time_per_token=per(times.step, TOKENS).named(f"{stage}_time_per_token", "Time of an output token", source),
        tokens_per_second=rate.named(f"{stage}_tokens_per_second", "Tokens/s of a sequence", source),
        gpu_tokens_per_second=(mine * rate).named(f"{stage}_gpu_tokens_per_second", "Tokens/s of a GPU", source),
    )


def setting_of(model: ModelInputs, hardware: Hardware, deployment: Deployment) -> Setting:
    """Return a model on hardware in a deployment that is checked to divide it. Raises: as decode_plan."""
    deployment.check(model, hardware)
    return Setting(
        model=model,
        hardware=hardware,
        deployment=deployment,
        weights=weights(model, deployment.weight_dtype),
    )


def decode_work(setting: Setting, cache: CachePlan, workload: ServingWorkload, positions: Count) -> StepWork:
    """Return the work of a GPU in a micro-batch whose sequences each bring this many tokens: 1, or drafts to verify.

    The tokens of a sequence share one read of its cache.
    """
    config = setting.model.config
    mla = config.is_mla
    if mla and config.qk_norm:
        raise ValueError("qk_norm=True has no absorbed form, which decoding is planned in; use qk_norm=False")
    rows, context = workload.sequences * positions, workload.context
    pairs = keys_met(setting.model, context) * context_products(setting.model)
    if is_sparse(setting.model):
        pairs = pairs + number_of(context) * score_products(setting.model)
    return StepWork(
        rows=rows,
        logits=rows,
        pairs=rows * pairs,
        cache=cache_of(setting, cache, workload.sequences, workload.context),
        up=setting.weights.absorbed if mla else setting.weights.latent_up,
    )


def context_products(model: ModelInputs) -> Count:
    """Return the multiply-adds of a token with one cached token in a layer, all heads; MLA absorbed."""
    if model.config.is_mla:
        width = 2 * model.kv_lora_rank + model.qk_rope_head_dim
    else:
        width = model.qk_nope_head_dim + model.v_head_dim
    return (model.n_heads * width).named(
        "context_products", "Multiply-adds of a token with a cached token, one layer", "V2, section 2.1.2"
    )
