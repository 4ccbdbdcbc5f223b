"""Completing a request: everything that a user leaves open is filled in, and where each choice comes from.

Sources of choices, the first that has one: the command line; the file's section [train]; DeepSeek-V3's published run
(presets.toml). Layouts that are left open are chosen by search.py. A deployment is the published one for
DeepSeek-V3's sizes, else the fewest GPUs whose memory holds weights and cache: with experts 1, 2, 4, 8 ... GPUs that
divide them, without experts GPUs of a node that divide its matrices.

A complete request is planned as it is. So another plan is a complete request with a change, completed again.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from dsmini.config.fields import require
from dsmini.planner.figure import Sheet
from dsmini.planner.hardware import USER, Hardware
from dsmini.planner.model import cache_figures, weight_figures
from dsmini.planner.request import DTYPES, ONE_PROCESS, Model, PlanRequest, Precision, Setup, check, is_v3, presets
from dsmini.planner.search import choose_layout
from dsmini.planner.serving import STAGES, Stage, deployment_figures, deployment_rules
from dsmini.planner.words import in_unit
from dsmini.report.units import plural

CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""
NODES = (1, 2, 4, 8, 16, 32, 64)


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
    price = {} if request.price is None else {"gpu_price": request.price / 3600}
    made = Setup(
        model=model,
        hardware=hardware.having(USER, **price),
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
    """Return a setup with some changes of the request, of the model's sizes or of the hardware, all else as it is.

    A longer context leaves room for fewer sequences, unless the user chose their number.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    of_request = {name: value for name, value in changes.items() if name in PlanRequest.__slots__}
    of_hardware = {name: value for name, value in changes.items() if name in hardware.numbers}
    of_model = {name: value for name, value in changes.items() if name not in of_request | of_hardware}
    sources, model = {**made.sources, **dict.fromkeys(of_request, source)}, made.model
    if of_model:
        model = replace(model, config=replace(model.config, **of_model))
        sources["model"] = f"{source} and {model.source}"
    again: dict[str, Any] = {"sequences": None} if "context" in changes and made.asked.sequences is None else {}
    request = made.asking(**{**again, **of_request}).request
    return setup(request, model, hardware.having(source, **of_hardware), replace(made, sources=sources))


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
    dtypes = {"weight_dtype": DTYPES[_precision(made)], "cache_dtype": "bfloat16"}  # however training multiplies
    made = _filled(made, "chosen", {"context": context, "prompt": context, **dtypes})
    for stage in STAGES:
        made, how = _choose(made, stage)
        made = replace(made, sources={stage: how, **made.sources})
    decode = made.deployment("decode")
    fit = float(memory_of(made.asking(sequences=1), "decode").sequences_that_fit) / decode.micro_batches
    made = _filled(made, "chosen", {"sequences": max(1, min(SEQUENCES, int(fit)))})
    misfit = {stage: sentence for stage in STAGES if (sentence := _misfit(made, stage))}
    return replace(made, misfit={**made.misfit, **misfit})


def memory_of(made: Setup, stage: Stage) -> Sheet:
    """Return the memory of a deployment. Raises: ValueError for one that the model or the hardware cannot have."""
    config, r, d, s = made.model.config, made.request, made.deployment(stage), Sheet(explained=False)
    check(deployment_rules(d, config, made.hardware))
    made.hardware.put(s)
    for name in ("context", "prompt", "sequences"):
        s.put(name, getattr(r, name) or 1, "")
    weight_figures(s, config, r.weight_dtype or "bfloat16")
    cache_figures(s, config, r.cache_dtype)
    return deployment_figures(s, config, d, "")


def _choose(made: Setup, stage: Stage) -> tuple[Setup, str]:
    """Return the setup with a deployment: the given numbers, and what is best for the others, and how it was chosen.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    gpus, tensor = (getattr(made.request, f"{stage}_{name}") for name in ("gpus", "tensor"))
    preset, tried = presets()["deepseek-v3"], list[tuple[int, int, str]]()
    if gpus is not None:
        tried = [(gpus, tensor or 1, "as chosen")]
    elif made.published and made.hardware.networked and tensor is None:
        tried = [(preset[stage]["gpus"], preset[stage]["tensor"], preset["sources"][stage])]
    if gpus is None:
        tried += [(*pair, "the fewest GPUs that hold weights and cache") for pair in _counts(made, tensor)]
    found, how = made, ""
    for count, shared, how in tried or [(tensor or 1, tensor or 1, "")]:
        found = made.asking(**{f"{stage}_gpus": count, f"{stage}_tensor": shared})
        if memory_of(found, stage).gpu_memory <= made.hardware.value("gpu_memory"):
            return found, how
    return found, how if gpus is not None else "the most GPUs that it divides"


def _counts(made: Setup, tensor: int | None) -> Iterator[tuple[int, int]]:
    """Yield numbers of GPUs to try, and how many of them share heads: one with experts, else all."""
    config, hardware, node = made.model.config, made.hardware, made.hardware.gpus_per_node
    moe, most = config.n_dense_layers < config.n_layers, made.hardware.node
    if moe and hardware.networked:
        most = max(node, config.n_routed_experts)
    few = [2**i for i in range(node.bit_length()) if 2**i < node]
    for count in (*few, *(node * nodes for nodes in NODES)):
        shared = tensor or (1 if moe else count)
        if count <= most and count % shared == 0 and shared <= node and config.n_heads % shared == 0:
            yield count, shared


def _misfit(made: Setup, stage: Stage) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    d, memory = made.deployment(stage), memory_of(made, stage)
    if memory.gpu_memory <= made.hardware.value("gpu_memory"):
        return ""
    fix = f"use more {stage}_gpus, or hardware with more memory"
    if stage == "decode" and (fit := int(float(memory.sequences_that_fit) / d.micro_batches)):
        fix = f"use sequences={fit}"
    elif memory.longest_context >= 1:
        fix = f"use {'context' if stage == 'decode' else 'prompt'}={float(memory.longest_context):.0f}"
    takes, of = (in_unit(float(value), "B") for value in (memory.gpu_memory, made.hardware.value("gpu_memory")))
    return f"{stage} on {plural(d.gpus, 'GPU')} does not fit: weights and cache take {takes} of {of}; {fix}"
