"""Why this architecture: how the machine shapes the algorithm, and both shape the data, in the numbers of a plan.

    Machine to Algorithm    memory asks for MLA, links for node-limited routing, arithmetic for experts and FP8
    Machine to Data         the pipeline asks for large batches, and the cluster's speed limits the tokens
    Algorithm to Data       few active parameters leave operations for tokens, a small cache leaves room for context

Each paragraph compares the plan with the same one without a choice: without MLA, without a limit of nodes, with all
experts active, in the other precision. It is left out where model or hardware have nothing to compare.

Source: "Insights into DeepSeek-V3" (arXiv 2505.09343), sections 2 to 4.
"""

import dataclasses
from collections.abc import Iterator

from dsmini.accounting.kv_cache import mha_twin
from dsmini.planner.pages.sections import percent
from dsmini.planner.quantities.explanation import shown
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import Count
from dsmini.planner.serving.decoding import decode_plan
from dsmini.planner.serving.deployment_choice import in_dtypes
from dsmini.planner.serving.memory import ServingMemory
from dsmini.planner.training.layout import Layout, Precision
from dsmini.planner.training.training_plan import TrainingPlan, training_plan
from dsmini.planner.whole import Plan


def why(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the paragraphs of the chain, each with its heading."""
    parts = {
        "Machine to Algorithm: memory": _attention(plan),
        "Machine to Algorithm: links": _routing(plan),
        "Machine to Algorithm: arithmetic": _precision(plan),
        "Machine to Data: batch": _batch(plan),
        "Machine to Data: tokens": _tokens(plan),
        "Algorithm to Data: tokens": _sparsity(plan),
        "Algorithm to Data: context": _context(plan),
    }
    for heading, sentences in parts.items():
        if paragraph := " ".join(sentences):
            yield heading, paragraph


def _attention(plan: Plan) -> Iterator[str]:
    """Compare how many sequences fit with the same model and multi-head attention, on the same GPUs."""
    served, m, hardware = plan.setup.serving, plan.setup.m, plan.setup.hardware
    if plan.serving is None or served is None:
        return
    memory, context = plan.serving.decode.memory, served.workload.context
    weights, mine, full = memory.weights, context * plan.cache.per_token, context * plan.cache.baseline
    if weights < hardware.memory:
        left = hardware.memory - weights
        yield f"{hardware.title} has {shown(1 * hardware.memory)}, of which the weights leave {shown(left)}."
    else:
        yield f"The weights of a GPU, {shown(weights)}, leave nothing of {shown(1 * hardware.memory)} for a cache."
    yield f"The cache of {shown(context)} takes {shown(full)} with multi-head attention."
    if m.config.is_mla:
        index = f", and a key of {shown(m.index_head_dim)} for the indexer" if m.config.attention == "dsa" else ""
        yield (
            f"MLA stores one latent of {shown(m.kv_lora_rank)} numbers and one rotary key of "
            f"{shown(m.qk_rope_head_dim)} for all {shown(m.n_heads)} heads{index}: {shown(mine)}."
        )
        group = served.decode.deployment.tensor_parallel
        if group.value > 1:
            yield f"Of heads each of {shown(group)} GPUs would hold a part. The latents are for all heads, so each GPU"
            yield f"holds those of all {shown(group)}: {shown(group * mine)} for a sequence of its own."
    else:
        yield f"With this model's {m.config.attention.upper()} it takes {shown(mine)}."
    if weights < hardware.memory:
        mha = _mha(plan)
        other = "" if mha is None else f", and with multi-head attention {shown(mha.sequences)}"
        yield f"Of such sequences {shown(memory.sequences)} fit on a GPU{other}."
    if m.config.attention == "mla":
        yield "A step reads the cache of all its sequences, so what is saved in memory is saved in time too."


def _mha(plan: Plan) -> ServingMemory | None:
    """Return the memory of decoding with multi-head attention and its weights, all else equal; None if it is there."""
    s, config = plan.setup, plan.setup.m.config
    if s.serving is None or config.attention == "mha" or config.qk_nope_head_dim % 2:  # RoPE turns pairs
        return None
    made = s.serving.decode.deployment
    cache = "bfloat16" if made.cache_dtype == "fp8" else made.cache_dtype  # that format is for latents
    m = ModelInputs.of(mha_twin(config), s.model.source)
    return decode_plan(m, s.hardware, s.serving.workload, in_dtypes(made, made.weight_dtype, cache)).memory


def _routing(plan: Plan) -> Iterator[str]:
    """Compare a token's rows over the slow link with and without a limit on nodes."""
    found, hardware, m = plan.training.dispatch, plan.setup.hardware, plan.setup.m
    if found is None or hardware.fast_link is None or hardware.slow_link is None or found.expert_nodes.value <= 1:
        return
    yield (
        f"A GPU sends {shown(hardware.fast_link)} within its node and {shown(hardware.slow_link)} to other nodes: "
        f"{shown(hardware.fast_link / hardware.slow_link)} times less."
    )
    yield (
        f"The {shown(m.n_activated_experts)} experts of a token, chosen freely, are on {shown(found.nodes_drawn)} of "
        f"{shown(found.expert_nodes)} nodes."
    )
    if found.node_limit < found.nodes_drawn:
        yield f"Routing allows {shown(found.node_limit)}."
    yield (
        f"A row crosses the slow link once for each remote node, and the fast link hands it on to the token's GPUs: "
        f"{shown(found.slow_copies)} rows, where one for each remote expert would be "
        f"{shown(found.slow_copies_unlimited)}."
    )
    if plan.training.link is not None:
        mine, free = plan.training.link.share, plan.training.link.share_unlimited
        yield f"That takes {percent(mine)} of the slow link, and those would take {percent(free)}."


def _precision(plan: Plan) -> Iterator[str]:
    """Compare the plan with the one in the other of FP8 and BF16."""
    s, layout, peaks = plan.setup, plan.training.layout, plan.setup.hardware.peaks
    if not {"fp8", "bfloat16"} <= peaks.keys() or layout.precision == "fp32":
        return

    def planned(precision: Precision) -> TrainingPlan:
        other = dataclasses.replace(layout, precision=precision)
        return training_plan(s.m, s.hardware, other, s.workload, s.assumptions)

    quick, slow = planned("fp8"), planned("bf16")
    yield f"FP8 products have a peak of {shown(peaks['fp8'])}, those in BF16 of {shown(peaks['bfloat16'])}."
    yield "Their operands take half the bytes in memory and on links."
    for name, made in (("FP8", quick), ("BF16", slow)):
        fits = "" if made.fits else ", which does not fit"
        yield (
            f"In {name} this layout takes {shown(made.step.roof_step)} a step and {shown(made.memory_needed)} on the "
            f"fullest GPU{fits}."
        )
    yield f"FP8 is {shown(slow.step.roof_step / quick.step.roof_step)} times as fast."


def _batch(plan: Plan) -> Iterator[str]:
    """Tell how many sequences a step must have for the pipeline to be full."""
    t, layout = plan.training, plan.training.layout
    if layout.pipeline == 1 and layout.data == 1:
        return
    micro_batches = layout.pipeline * (2 if layout.schedule == "dualpipe" else 1)
    least = layout.data * layout.micro_batch * micro_batches
    yield (
        f"{layout.gpus:,} GPUs in {_stages(layout)} work on {layout.data:,} parts of the batch at the same time. Each "
        f"needs {micro_batches} micro-batches or more, so a step has at least {least:,} sequences, "
        f"{shown(t.workload.seq_len * least)}."
    )
    yield f"This one has {shown(t.workload.batch)}."
    if layout.pipeline > 1:
        yield f"Its GPUs wait in the pipeline for {percent(t.step.bubble / t.step.roof_step)} of a step."
    yield "A larger cluster asks for larger batches, whatever the model would learn best from."


def _tokens(plan: Plan) -> Iterator[str]:
    t = plan.training
    tokens = 1 * t.workload.tokens  # computed, so shown in three digits
    machines = "one GPU reads" if t.layout.gpus == 1 else f"{t.layout.gpus:,} GPUs read"
    yield (
        f"At {shown(t.time.step_seconds)} a step {machines} {shown(t.time.tokens_per_day)} a day. So "
        f"{shown(tokens)} take {shown(plan.reliability.running)}."
    )
    if t.time.cost is not None:
        yield f"They cost {shown(t.time.cost / t.workload.tokens)}."
    yield "The machine, and the time that it is rented for, set how much text the model can read."


def _sparsity(plan: Plan) -> Iterator[str]:
    """Compare the tokens of the same operations with all parameters active."""
    p, ops, m = plan.training.model.parameters, plan.training.model.operations, plan.setup.m
    if plan.training.model.layer.moe_layers.value == 0:
        yield "All blocks are dense: every token pays for every parameter."
    else:
        whole: Count = (p.parameters_main - p.vocabulary_parameters) / p.parameters_active
        context = 3 * ops.attention_flops
        if ops.indexer_flops is not None:
            context = context + ops.indexer_flops
        dense = (ops.training_flops - context) * whole + context
        fewer = dense / ops.training_flops
        tokens = 1 * plan.training.workload.tokens
        yield (
            f"A token meets {shown(m.n_activated_experts)} of {shown(m.n_routed_experts)} routed experts: "
            f"{shown(ops.training_flops)} instead of {shown(dense)} with all of them."
        )
        yield (
            f"The same time would train a dense model of this size on {shown(tokens / fewer)} instead of "
            f"{shown(tokens)}, {shown(fewer)} times fewer."
        )
    if m.n_mtp_layers.value > 0:
        more = (ops.training_flops_mtp - ops.training_flops) / ops.training_flops
        yield f"Multi-token prediction lets a position learn from further tokens, for {percent(more)} more operations."


def _context(plan: Plan) -> Iterator[str]:
    if plan.serving is None:
        return
    longest = plan.serving.decode.memory.context
    yield (
        f"Beside the weights there is room for {shown(longest)} in each of a GPU's sequences; the model takes up to "
        f"{plan.setup.m.config.max_seq_len:,}."
    )
    mha = _mha(plan)
    if mha is not None and mha.context < longest:
        times = f", {shown(longest / mha.context)} times fewer" if mha.context.value else ""
        yield f"With multi-head attention it would be for {shown(mha.context)}{times}."


def _stages(layout: Layout) -> str:
    return "one stage" if layout.pipeline == 1 else f"{layout.pipeline} stages"
