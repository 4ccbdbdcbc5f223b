"""Deployments: how many GPUs serve one copy of a model, and how they share it.

DeepSeek-V3 serves with two deployments, since prefill computes and decode moves bytes:

    prefill    32 GPUs, 4 nodes      TP 4, DP 8     EP 32     256 + 32 experts, 9 a GPU
    decode     320 GPUs, 40 nodes    TP 4, DP 80    EP 320    256 + 64 experts, 1 a GPU

Tensor parallelism divides what belongs to attention's heads, and the vocabulary, within a group of GPUs that share
their sequences. Expert parallelism gives each GPU some routed experts. Copies of busy ones, the redundant experts, even
out the load. In decode the shared expert is sent to like a routed one, which makes 9 copies of a token. The rest,
dense feed-forwards too, is whole on every GPU.

Assumed, as the report does not say: embedding and head are divided like heads; the projections into latents are whole.

Source: DeepSeek-V3 report, section 3.4.
"""

from dataclasses import dataclass

from dsmini.accounting.kv_cache import CacheDtype
from dsmini.accounting.memory import WeightDtype
from dsmini.planner.hardware import Hardware
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import BYTES, COUNT, TOKENS, Bytes, Count, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingWorkload:
    """Sequences that a deployment serves; all numbers are inputs."""

    sequences: Count
    """Sequences of a GPU in a micro-batch of decode."""
    context: Tokens
    """Tokens that each of them holds, the new one with it."""
    prompts: Count
    """Prompts of a GPU in a micro-batch of prefill."""
    prompt: Tokens
    """Tokens of a prompt."""
    drafts: Count
    """Tokens that multi-token prediction drafts in a step."""
    acceptance: Count
    """Probability that a drafted token is accepted, if those before it were."""


def serving_workload(
    *,
    sequences: int = 32,
    context: int = 4096,
    prompts: int = 1,
    prompt: int = 4096,
    drafts: int = 1,
    acceptance: float = 0.85,
    source: str = "chosen",
) -> ServingWorkload:
    """Return a workload of these numbers.

    Raises: ValueError for a number below 1, and an acceptance outside 0 to 1.
    """
    counts = {"sequences": sequences, "context": context, "prompts": prompts, "prompt": prompt, "drafts": drafts}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive; use 1 or more")
    if not 0 <= acceptance < 1:
        raise ValueError(f"acceptance={acceptance} is not a probability below 1; use 0.85 to 0.9 as V3 measured")
    return ServingWorkload(
        sequences=COUNT(sequences, "sequences", "Sequences of a GPU in a micro-batch of decode", source),
        context=TOKENS(context, "context", "Tokens that a decoding sequence holds", source),
        prompts=COUNT(prompts, "prompts", "Prompts of a GPU in a micro-batch of prefill", source),
        prompt=TOKENS(prompt, "prompt", "Tokens of a prompt", source),
        drafts=COUNT(drafts, "drafts", "Tokens drafted in a step", source),
        acceptance=COUNT(acceptance, "acceptance", "Probability that a drafted token is accepted", source),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """GPUs that serve one copy of a model; all numbers are inputs."""

    stage: str
    """Prefix of the names of its inputs and figures, such as "decode"."""
    tensor_parallel: Count
    """GPUs that divide attention's heads and share their sequences."""
    expert_parallel: Count
    """GPUs that divide the routed experts: all of the deployment."""
    redundant_experts: Count
    """Copies of experts beyond one of each; in decode also places of shared experts."""
    micro_batches: Count
    """Parts of a step's batch, of which one communicates while another computes."""
    imbalance: Count
    """Tokens of the busiest GPU's experts over the mean; 1 is perfect."""
    dispatch_number: Bytes
    """Bytes of a number that is sent to an expert."""
    combine_number: Bytes
    """Bytes of a number that comes back."""
    shared_remote: bool
    """Shared experts are reached like routed ones, instead of being on every GPU."""
    two_hop: bool
    """A token is sent to each chosen node once, and within it to each chosen GPU once; else once for each expert."""
    weight_dtype: WeightDtype
    cache_dtype: CacheDtype

    def gpu_experts(self, model: ModelInputs) -> Count:
        """Return the number of experts in each MoE block that a GPU holds."""
        slots = model.n_routed_experts + self.redundant_experts
        return (slots / self.expert_parallel).named(
            f"{self.stage}_gpu_experts", "Experts in each block that a GPU holds", "V3, section 3.4"
        )

    def data_parallel(self) -> Count:
        """Return the number of groups that have sequences of their own."""
        return (self.expert_parallel / self.tensor_parallel).named(
            f"{self.stage}_data_parallel", "Groups of GPUs with sequences of their own", "V3, section 3.4"
        )

    def copies(self, model: ModelInputs) -> Count:
        """Return how many experts a token is sent to in a block."""
        k = model.n_activated_experts
        return k + model.n_shared_experts if self.shared_remote else k

    def spans_nodes(self, hardware: Hardware) -> bool:
        """Return whether experts are on more than one node."""
        return self.expert_parallel > hardware.gpus_per_node

    def check(self, model: ModelInputs, hardware: Hardware) -> None:
        """Refuse a model that cannot be divided so. Raises: ValueError with the number to change."""
        tp, ep = self.tensor_parallel.value, self.expert_parallel.value
        slots = model.n_routed_experts.value + self.redundant_experts.value
        if ep % tp:
            raise ValueError(f"{ep:g} GPUs are no multiple of tensor_parallel={tp:g}; use a divisor of {ep:g}")
        if tp > hardware.gpus_per_node.value:
            raise ValueError(f"tensor_parallel={tp:g} is more than a node has; use {hardware.gpus_per_node.value:g}")
        if slots % ep:
            more = -slots % ep
            raise ValueError(
                f"{slots:g} experts, redundant ones included, do not divide by {ep:g} GPUs; add {more:g} redundant ones"
            )


def deployment(
    stage: str,
    *,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    redundant_experts: int = 0,
    micro_batches: int = 1,
    imbalance: float = 1.0,
    shared_remote: bool = False,
    two_hop: bool = False,
    weight_dtype: WeightDtype = "fp8",
    cache_dtype: CacheDtype = "bfloat16",
    source: str = "chosen",
) -> Deployment:
    """Return a deployment of these numbers; left out, one GPU that holds everything.

    Tokens go to experts in the dtype of the weights, FP8 or BF16, and come back in BF16.

    Args:
        stage: prefix of names: "decode" or "prefill".

    Raises: ValueError for a number below 1, or below 0 redundant experts.
    """
    counts = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel, "micro_batches": micro_batches}
    for name, value in {**counts, "imbalance": imbalance, "redundant_experts": redundant_experts + 1}.items():
        if value < 1:
            raise ValueError(f"{name}={value} is too small; use 1 or more, or 0 redundant_experts")

    def count(value: float, name: str, title: str) -> Count:
        return COUNT(value, f"{stage}_{name}", title, source)

    sent = {"fp8": 1, "bfloat16": 2, "float32": 4}[weight_dtype]
    return Deployment(
        stage=stage,
        tensor_parallel=count(tensor_parallel, "tensor_parallel", "GPUs that divide attention's heads"),
        expert_parallel=count(expert_parallel, "expert_parallel", "GPUs that divide the experts"),
        redundant_experts=count(redundant_experts, "redundant_experts", "Copies of experts beyond one of each"),
        micro_batches=count(micro_batches, "micro_batches", "Micro-batches of a step"),
        imbalance=count(imbalance, "imbalance", "Tokens of the busiest GPU's experts over the mean"),
        dispatch_number=BYTES(sent, f"{stage}_dispatch_number", "Number that is sent to an expert", "INS, 2.3.2"),
        combine_number=BYTES(2, f"{stage}_combine_number", "Number that an expert sends back, BF16", "INS, 2.3.2"),
        shared_remote=shared_remote,
        two_hop=two_hop,
        weight_dtype=weight_dtype,
        cache_dtype=cache_dtype,
    )


def v3_prefill() -> Deployment:
    """Return DeepSeek-V3's deployment for prefill. Source: DeepSeek-V3 report, section 3.4.1."""
    return deployment(
        "prefill",
        tensor_parallel=4,
        expert_parallel=32,
        redundant_experts=32,
        micro_batches=2,
        two_hop=True,
        source="V3, section 3.4.1",
    )


def v3_decode() -> Deployment:
    """Return DeepSeek-V3's deployment for decoding. Source: DeepSeek-V3 report, section 3.4.2."""
    return deployment(
        "decode",
        tensor_parallel=4,
        expert_parallel=320,
        redundant_experts=64,
        micro_batches=2,
        shared_remote=True,
        source="V3, section 3.4.2",
    )
