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
from dsmini.planner.hardware import NUMBERS, USER, Hardware
from dsmini.planner.model import cache_figures, weight_figures
from dsmini.planner.request import DTYPES, Model, PlanRequest, Setup, check, is_v3, presets
from dsmini.planner.search import choose_layout, gpu_counts
from dsmini.planner.serving import STAGES, Stage, deployment_figures, deployment_rules
from dsmini.report.units import human, plural

CONTEXT, SEQUENCES = 4096, 32
"""Tokens of a decoding sequence, and the most sequences of a GPU in a micro-batch, where the user leaves them open."""


def setup(request: PlanRequest, model: Model, hardware: Hardware) -> Setup:
    """Return a request of the command line with everything that it leaves open.

    Raises: ValueError for choices that the model or the hardware cannot have.
    """
    said = dict.fromkeys(request.given(tuple(field.name for field in fields(request))), USER)
    how: dict[str, Any] = {"request": request, "asked": request, "sources": said, "published": is_v3(model.config)}
    return _completed(Setup(model=model, hardware=hardware, **how), must_serve=bool(request.serving))


def changed(made: Setup, changes: Mapping[str, Any], hardware: Hardware, source: str = "--vary") -> Setup:
    """Return a setup with some changes of the request, of the model's sizes or of the hardware, all else as it is.

    A longer context leaves room for fewer sequences, unless the user chose their number.

    Raises: ValueError for changes that the model or the hardware cannot have.
    """
    of_request = {name: value for name, value in changes.items() if name in PlanRequest.__slots__}
    known = {figure for figure, _ in NUMBERS.values()}
    of_hardware = {name: value for name, value in changes.items() if name in known}
    of_model = {name: value for name, value in changes.items() if name not in of_request | of_hardware}
    sources, model = {**made.sources, **dict.fromkeys(of_request, source)}, made.model
    if of_model:
        model = replace(model, config=replace(model.config, **of_model))
        sources["model"] = f"{source} and {model.source}"
    again: dict[str, Any] = {"sequences": None} if "context" in changes and made.asked.sequences is None else {}
    made = replace(made.asking(**{**again, **of_request}), model=model, sources=sources, unserved="")
    return _completed(replace(made, hardware=hardware.varied(source, of_hardware)), must_serve=False)


def _completed(made: Setup, must_serve: bool) -> Setup:
    """Return the setup with everything that its request leaves open."""
    model, price = made.model, made.request.price
    if model.config.attention == "dsa" and model.run is not None and model.run.train.dsa_stage == "warmup":
        raise ValueError(f"{model.source} has train.dsa_stage='warmup', which has no plan; use dsa_stage='sparse'")
    rent = {} if price is None else {"gpu_price": price / 3600}
    made = choose_layout(_worked(replace(made, hardware=made.hardware.having(USER, **rent))))
    try:
        return _served(made)
    except ValueError as error:
        if must_serve:
            raise
        return replace(made.asking(decode_gpus=None, prefill_gpus=None), unserved=str(error))


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
    dtypes = {"weight_dtype": DTYPES[made.usual_precision], "cache_dtype": "bfloat16"}  # however training multiplies
    made = _filled(made, "chosen", {"context": context, "prompt": context, **dtypes})
    for stage in STAGES:
        made = _deployed(made, stage)
    fit = float(memory_of(made.asking(sequences=1), "decode").sequences_that_fit)
    fit = int(fit / made.deployment("decode").micro_batches)
    made = _filled(made, "chosen", {"sequences": max(1, min(SEQUENCES, fit))})
    misfit = {stage: sentence for stage in STAGES if (sentence := _misfit(made, stage))}
    return replace(made, misfit={**made.misfit, **misfit})


def memory_of(made: Setup, stage: Stage) -> Sheet:
    """Return the memory of a deployment. Raises: ValueError for one that the model or the hardware cannot have."""
    r: Any = made.request
    config, d, s = made.model.config, made.deployment(stage), Sheet(explained=False)
    check(deployment_rules(d, config, made.hardware))
    made.hardware.put(s)
    for name in ("context", "prompt", "sequences"):
        s.put(name, getattr(r, name) or 1, "")
    weight_figures(s, config, r.weight_dtype)
    cache_figures(s, config, r.cache_dtype)
    return deployment_figures(s, config, d, "")


def _deployed(made: Setup, stage: Stage) -> Setup:
    """Return the setup with a deployment: the given numbers, and what is best for the others.

    Raises: ValueError for a deployment that does not divide the model or that the hardware has no links or units for.
    """
    gpus, tensor = (getattr(made.request, f"{stage}_{name}") for name in ("gpus", "tensor"))
    tried = [(gpus, tensor or 1, "as chosen")] if gpus is not None else [*_deployments(made, stage, tensor)]
    found, how = made, ""
    for count, shared, chosen in tried or [(tensor or 1, tensor or 1, "")]:
        found, how = made.asking(**{f"{stage}_gpus": count, f"{stage}_tensor": shared}), chosen
        if memory_of(found, stage).gpu_memory <= made.memory:
            break
    else:
        how = how if gpus is not None else "the most GPUs that can share it"
    return replace(found, sources={stage: how, **made.sources})


def _deployments(made: Setup, stage: Stage, tensor: int | None) -> Iterator[tuple[int, int, str]]:
    """Yield GPUs to try, how many of them share heads, and how they are chosen: with experts one, else all."""
    config, hardware, node, preset = (
        made.model.config,
        made.hardware,
        made.hardware.gpus_per_node,
        presets()["deepseek-v3"],
    )
    if made.published and hardware.networked and tensor is None:
        yield preset[stage]["gpus"], preset[stage]["tensor"], preset["sources"][stage]
    moe = config.n_dense_layers < config.n_layers
    most = max(node, config.n_routed_experts) if moe and hardware.networked else hardware.node
    for count in gpu_counts(node):
        shared = tensor or (1 if moe else count)
        if count <= most and count % shared == 0 and shared <= node and config.n_heads % shared == 0:
            yield count, shared, "the fewest GPUs that hold weights and cache"


def _misfit(made: Setup, stage: Stage) -> str:
    """Return one sentence for a deployment that does not hold weights and cache, with what would; "" if it does."""
    d, memory = made.deployment(stage), memory_of(made, stage)
    if memory.gpu_memory <= made.memory:
        return ""
    fix = f"use more {stage}_gpus, or hardware with more memory"
    if stage == "decode" and (fit := int(float(memory.sequences_that_fit) / d.micro_batches)):
        fix = f"use sequences={fit}"
    elif memory.longest_context >= 1:
        fix = f"use {'context' if stage == 'decode' else 'prompt'}={float(memory.longest_context):.0f}"
    takes, of = (human(float(value), "B") for value in (memory.gpu_memory, made.memory))
    return f"{stage} on {plural(d.gpus, 'GPU')} does not fit: weights and cache take {takes} of {of}; {fix}"
