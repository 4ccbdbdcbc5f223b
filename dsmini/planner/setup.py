"""Completing a request: everything that a user leaves open is filled in, and where each choice comes from.

Sources of choices, the first that has one: the command line; the file's section [train]; DeepSeek-V3's published run
(presets.toml). Layouts that are left open are chosen by search.py. A deployment is the published one for
DeepSeek-V3's sizes, else the fewest GPUs whose memory holds weights and cache: with experts 1, 2, 4, 8 ... GPUs that
divide them, and if none hold it, GPUs that also share attention; without experts GPUs of a node that divide its
matrices.

A complete request is planned as it is. So another plan is a complete request with a change, completed again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from dsmini.config.fields import require
from dsmini.planner.display import in_unit, shown
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import USER, Hardware
from dsmini.planner.model import cache_figures, placed_tensors, weight_figures
from dsmini.planner.request import DTYPES, ONE_PROCESS, Model, PlanRequest, Precision, Setup, check, is_v3, presets
from dsmini.planner.search import choose_layout
from dsmini.planner.serving import SIZES, STAGES, Deployment, Stage, deployment_figures, deployment_rules
from dsmini.report.units import plural

CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""
NODES = (1, 2, 4, 8, 16, 32, 64)
FOLLOW = {"context": "sequences", "decode_gpus": "decode_redundant", "prefill_gpus": "prefill_redundant"}
"""Fields that another one follows where the user left it open."""


def setup(request: PlanRequest, model: Model, hardware: Hardware, base: Setup | None = None) -> Setup:
    """Return a request with everything that it leaves open.

    Args:
        base: setup that this one is varied from, with the sources of the fields that are given; left out: these are of
            the command line.

    Raises: ValueError for choices that the model or the hardware cannot have.
    """
    if model.config.attention == "dsa" and model.run is not None and model.run.train.dsa_stage == "warmup":
        raise ValueError(f"{model.source} has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
    said = dict.fromkeys(request.given(tuple(field.name for field in fields(request))), USER)
    made = Setup(
        model=model,
        hardware=hardware.at_price(request.price),
        request=request,
        asked=base.asked if base else request,
        sources={**said, **(base.sources if base else {})},
        published=base.published if base else is_v3(model.config),
    )
    made = _trained(_worked(made))
    try:
        return _served(made)
    except ValueError as error:
        if request.serving and base is None:
            raise
        return replace(made.asking(decode_gpus=None, prefill_gpus=None), unserved=str(error))


def changed(made: Setup, changes: Mapping[str, Any], hardware: Hardware, source: str = "--vary") -> Setup:
    """Return a setup with some changes of the request or of the model's sizes, all else as it is.

    A longer context leaves room for fewer sequences, unless the user chose their number; redundant experts follow the
    number of GPUs.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    of_request = {name: value for name, value in changes.items() if name in PlanRequest.__slots__}
    sources, model = {**made.sources, **dict.fromkeys(of_request, source)}, made.model
    if of_model := {name: value for name, value in changes.items() if name not in of_request}:
        model = replace(model, config=replace(model.config, **of_model))
        sources["model"] = f"{source} and {model.source}"
    again = {other: None for name, other in FOLLOW.items() if name in changes and getattr(made.asked, other) is None}
    return setup(made.asking(**{**again, **of_request}).request, model, hardware, replace(made, sources=sources))


def _filled(made: Setup, source: str, values: Mapping[str, Any]) -> Setup:
    """Return the setup with values for the fields that are open, and where these come from."""
    open_ = {name: value for name, value in values.items() if getattr(made.request, name) is None}
    return replace(made.asking(**open_), sources={**dict.fromkeys(values, source), **made.sources})


def _worked(made: Setup) -> Setup:
    """Return the setup with the training's sequences, steps and tokens."""
    r, run, longest = made.request, made.model.run, made.model.config.max_seq_len
    if r.seq_len is not None and r.seq_len > longest:
        raise ValueError(f"seq_len={r.seq_len} is longer than max_seq_len={longest} of {made.model.source}; shorten it")
    if run is not None:
        train = run.train
        fewer = (train.batch_size - (train.batch_start or train.batch_size)) / 2 * train.batch_ramp  # in equal steps
        tokens = train.steps * (train.batch_size - fewer) * run.seq_len
        work = {"seq_len": run.seq_len, "batch": train.batch_size, "tokens": tokens}
        return _filled(made, f"{made.model.source}: [train]", work)
    preset = presets()["deepseek-v3"]
    work = preset["workload"] | {"seq_len": min(preset["workload"]["seq_len"], longest)}
    return _filled(made, preset["sources"]["workload"], work)


def _precision(made: Setup) -> Precision:
    """Return the precision of products where the user leaves it open: FP8 for V3 and for configs that say so."""
    config, peaks = made.model.config, made.hardware.peaks
    if "fp8" in peaks and (config.precision == "fp8" or is_v3(config, indexer=True)):
        return "fp8"
    return "bf16" if "bfloat16" in peaks else "fp32"


def _trained(made: Setup) -> Setup:
    """Return the setup with its layout: fields that are given, and what is best for the others."""
    state: dict[str, Any] = {"precision": _precision(made), "optimizer": "adamw", "moments": "float32"}
    if made.model.run is not None:
        train = made.model.run.train
        state |= {"optimizer": train.optimizer, "moments": train.moments}
        state |= {"precision": "fp32"} if train.dtype == "float32" else {}
    preset = presets()["deepseek-v3"] if is_v3(made.model.config) else {"training": {}, "sources": {"training": ""}}
    found, how, misfit = choose_layout(made, state, preset["training"], preset["sources"]["training"])
    sources = {**dict.fromkeys([*ONE_PROCESS, "layout"], how), **made.sources}
    return replace(found, sources=sources, misfit={"training": misfit} if misfit else {})


# --- serving


def _served(made: Setup) -> Setup:
    """Return the setup with both deployments, and as many sequences as fit where the user leaves them open.

    Raises: ValueError for what the model or the hardware cannot have.
    """
    r, longest = made.request, made.model.config.max_seq_len
    for name in ("context", "prompt"):
        tokens = getattr(r, name) or 1
        require(tokens <= longest, f"{name}={tokens} is longer than the model's max_seq_len={longest}; shorten it")
    context = r.context or min(CONTEXT, longest)
    weights = DTYPES[_precision(made)]  # however training multiplies
    made = _filled(made, "chosen", {"context": context, "prompt": context})
    made = _filled(made, "chosen", {"weight_dtype": weights, "cache_dtype": "bfloat16"})
    one = made.asking(sequences=r.sequences or 1)
    chosen = {stage: _choose(one, stage) for stage in STAGES}
    for stage, (d, how) in chosen.items():
        sizes = {f"{stage}_{name}": getattr(d, name) for name in SIZES}
        made = replace(made.asking(**sizes), sources={stage: how, **made.sources})
    decode, _ = chosen["decode"]
    fit = float(memory_of(made.asking(sequences=1), decode).sequences_that_fit) / decode.micro_batches
    made = _filled(made, "chosen", {"sequences": max(1, min(SEQUENCES, int(fit)))})
    misfit = {stage: sentence for stage in STAGES if (sentence := _misfit(made, stage))}
    return replace(made, misfit={**made.misfit, **misfit})


def memory_of(made: Setup, d: Deployment) -> Sheet:
    """Return the memory of a deployment. Raises: ValueError for one that the model or the hardware cannot have."""
    config, s = made.model.config, Sheet()
    check(deployment_rules(d, config, made.hardware))
    made.hardware.put(s)
    placed_tensors(s, config)
    for name in ("context", "prompt", "sequences"):
        s.put(name, getattr(made.request, name), "")
    weight_figures(s, config, d.weight_dtype)
    cache_figures(s, config, d.cache_dtype)
    return deployment_figures(s, config, d, "")


def _choose(made: Setup, stage: Stage) -> tuple[Deployment, str]:
    """Return the deployment with the given numbers and what is best for the others, and how it was chosen.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    experts, preset = made.model.config.n_routed_experts, presets()["deepseek-v3"]
    gpus, tensor, redundant = (getattr(made.request, f"{stage}_{name}") for name in SIZES)
    if made.published and made.hardware.networked and gpus is None and tensor is None and redundant is None:
        published = made.deployment(stage, **{name: preset[stage][name] for name in SIZES})
        if memory_of(made, published).memory_share <= 1:
            return published, preset["sources"][stage]

    if gpus is not None:
        return _of(made, stage, gpus, tensor or 1, redundant), "as chosen"
    slots = experts + (redundant or 0)
    tried = [_of(made, stage, *pair, redundant) for pair in _counts(made, tensor)]
    tried = [d for d in tried if redundant is None or slots % d.gpus == 0]
    if not tried:
        alone = _of(made, stage, tensor or 1, tensor or 1, redundant)
        check(deployment_rules(alone, made.model.config, made.hardware))
    memory: list[Sheet] = []
    for deployment in tried:
        memory.append(memory_of(made, deployment))
        if memory[-1].memory_share <= 1:
            return deployment, "the fewest GPUs that hold weights and cache"
    if redundant is not None:
        whole = f"{stage}_redundant={redundant} makes {slots} experts of a layer"
        fix = f"leave it out, or name {stage}_gpus too"
        raise ValueError(f"{whole}, which no number of GPUs that holds the model divides; {fix}")
    best = max(range(len(tried)), key=lambda i: (float(memory[i].sequences_that_fit), -float(memory[i].memory_share)))
    return tried[best], "what has memory for most sequences, since none fits"


def _of(made: Setup, stage: Stage, count: int, shared: int, redundant: int | None = None) -> Deployment:
    """Return the deployment on a number of GPUs, with as many redundant experts as make the experts divide."""
    spare = -made.model.config.n_routed_experts % count if redundant is None else redundant
    return made.deployment(stage, gpus=count, tensor=shared, redundant=spare)


def _counts(made: Setup, tensor: int | None) -> Iterator[tuple[int, int]]:
    """Yield numbers of GPUs to try, and how many of them share heads."""
    config, hardware, node = made.model.config, made.hardware, made.hardware.gpus_per_node
    moe, most = config.n_dense_layers < config.n_layers, made.hardware.node
    if moe and hardware.networked:
        most = max(node, config.n_routed_experts)
    few = [2**i for i in range(node.bit_length()) if 2**i < node] + [node]
    for width in [tensor] if tensor else few if moe else [None]:
        for count in (*few[:-1], *(node * nodes for nodes in NODES)):
            shared = width or count
            if count <= most and count % shared == 0 and shared <= node and config.n_heads % shared == 0:
                yield count, shared


def _misfit(made: Setup, stage: Stage) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    d, fixes = made.deployment(stage), list[str]()
    memory = memory_of(made, d)
    if memory.memory_share <= 1:
        return ""
    if stage == "decode" and (fit := int(float(memory.sequences_that_fit) / d.micro_batches)):
        fixes.append(f"use sequences={fit}")
    elif memory.longest_context >= 1:
        fixes.append(f"use {'context' if stage == 'decode' else 'prompt'}={float(memory.longest_context):.0f}")
    for count, shared in _counts(made, None if d.tensor == 1 else d.tensor):
        if count > d.gpus and memory_of(made, _of(made, stage, count, shared)).memory_share <= 1:
            fixes.append(f"use {stage}_gpus={count}" + (f" and {stage}_tensor={shared}" if shared != d.tensor else ""))
            break
    return (
        f"{stage} on {plural(d.gpus, 'GPU')} does not fit: weights and cache take {shown(memory.gpu_memory)} of "
        f"{in_unit(made.hardware.value('gpu_memory'), 'B')}; {' or '.join(fixes) or 'use hardware with more memory'}"
    )
