"""How much longer an operation takes inside a step than alone: factors of this machine, measured on other models.

A curve of calibration.py times one operation over and over. In a step its inputs were just written by others, its
memory may be new to the process, and its size may be none of those measured. Steps of a few small models say by how
much: for each kind of work and dtype, and each class of operations,

    factor = sum of measured seconds / sum of predicted seconds

What a step takes beyond its operations, in Python and in autograd, is divided by its calls. The models are not those
that anyone forecasts: forecast.py takes factors and cost of a call for other sizes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from dsmini.atomic import write_text
from dsmini.config import ModelConfig, TrainConfig
from dsmini.measure.calibration import load_or_measure, stored_roofs
from dsmini.measure.counting import CountedOperation, count
from dsmini.measure.cpu_time import CpuTimes
from dsmini.measure.dry import dry_count
from dsmini.measure.kernels import CURVES
from dsmini.measure.prediction import operation_seconds
from dsmini.measure.process import peak_of_process
from dsmini.measure.rates import Roofs, from_json
from dsmini.measure.turns import in_turns
from dsmini.measure.workloads import StepDtype, StepShape, Work

VERSION = 3
"""Version of this measurement; factors stored by another version are measured again."""
SECONDS = 0.7
"""Time to fill with steps of one shape, and again with counted ones."""
PASSES = 5
ATTEMPTS, DELAYED = 4, 0.1
"""A step is measured up to so many times, as long as its threads wait for a core more than this share of the time."""
LEAST_SHARE = 0.01
"""Share of a step's predicted time below which a class has the factor of all small classes together."""
OTHERS = "others"
SMALL = ModelConfig(
    vocab_size=320,
    dim=160,
    inter_dim=416,
    moe_inter_dim=112,
    n_layers=3,
    n_heads=4,
    q_lora_rank=80,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=12,
    n_activated_experts=3,
    max_seq_len=2048,
)
"""1.3M parameters, with multi-token prediction."""
WIDER = replace(
    SMALL,
    vocab_size=2048,
    dim=384,
    inter_dim=1024,
    moe_inter_dim=160,
    n_heads=6,
    q_lora_rank=128,
    n_routed_experts=24,
    n_activated_experts=4,
    n_mtp_layers=0,
)
SERVED = replace(
    WIDER,
    vocab_size=12000,
    dim=768,
    inter_dim=2048,
    moe_inter_dim=192,
    n_layers=5,
    n_heads=12,
    q_lora_rank=256,
    kv_lora_rank=192,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=48,
    n_expert_groups=8,
    n_limited_groups=4,
    max_seq_len=4096,
)
SHAPES: Mapping[Work, tuple[tuple[ModelConfig, int, int], ...]] = {
    "training": ((SMALL, 5, 192), (WIDER, 2, 320)),
    "prefill": ((WIDER, 2, 150), (SERVED, 1, 320)),
    "decode": ((WIDER, 1, 200), (SERVED, 1, 900), (SERVED, 6, 300)),
}
"""Config, batch and tokens of the steps that are measured."""


@dataclass(frozen=True, kw_only=True)
class StepRates:
    """Factors and cost of a call in steps of one kind of work and dtype."""

    factors: Mapping[str, float]
    """Measured over predicted seconds by class of operations; OTHERS for the small ones together."""
    call: float
    """Seconds of a call beyond the operations, views included."""

    def seconds(self, operations: Iterable[CountedOperation], views: int, roofs: Roofs) -> dict[str, float]:
        """Return the seconds of a step by class of operations, and those of "calls"."""
        found: dict[str, float] = {}
        calls = views
        for op in operations:
            name = class_of(op)
            factor = self.factors.get(name, self.factors[OTHERS])
            found[name] = found.get(name, 0.0) + factor * operation_seconds(op, roofs)
            calls += 1
        return found | {"calls": self.call * calls}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """All rates of a machine that forecasts need."""

    roofs: Roofs
    steps: Mapping[str, StepRates]
    """Rates by work and dtype, such as "training bfloat16"."""
    process: int = 0
    """Bytes that a process takes besides the tensors of its steps: Python, torch, buffers of products."""


def class_of(op: CountedOperation) -> str:
    """Return the class of an operation: the curve of a kernel, else the kind of torch's operation."""
    return CURVES.get(op.name, op.kind) if op.is_kernel else op.kind


def load_or_measure_rates(
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Rates:
    """Return this machine's roofs and its rates of steps, stored or measured now (a minute and a half).

    Args: as of calibration.load_or_measure.
    """
    roofs = load_or_measure(device, keep, lambda done, what: on_part(done / 2, what), fresh)
    return rates_beyond(roofs, device, keep, lambda done, what: on_part(0.5 + done / 2, what), fresh)


def stored_rates(device: torch.device, keep: Path | None = None) -> Rates | None:
    """Return this machine's rates if they are stored, else None. Measures nothing."""
    _, key, stored = stored_roofs(device, keep)
    with suppress(KeyError, TypeError, AttributeError, ValueError):  # none is stored, or it is damaged
        return _from_json(stored[_steps_key(key)], from_json(stored[key]))
    return None


def rates_beyond(
    roofs: Roofs,
    device: torch.device,
    keep: Path | None = None,
    on_part: Callable[[float, str], None] = lambda done, what: None,
    fresh: bool = False,
) -> Rates:
    """Return these roofs with this machine's rates of steps, stored or measured now. Args: as of load_or_measure."""
    keep, key, stored = stored_roofs(device, keep)
    key = _steps_key(key)
    if not fresh:
        with suppress(KeyError, TypeError, AttributeError, ValueError):  # none is stored, or it is damaged
            return _from_json(stored[key], roofs)
    rates = Rates(roofs=roofs, steps=measure_steps(roofs, device, on_part), process=measure_process())
    stored[key] = {"steps": {name: asdict(each) for name, each in rates.steps.items()}, "process": rates.process}
    with suppress(OSError):  # measured again next time
        keep.parent.mkdir(parents=True, exist_ok=True)
        write_text(keep, json.dumps(stored))
    return rates


def _steps_key(key: str) -> str:
    return json.dumps(["steps", VERSION, key])


def _from_json(raw: Mapping[str, Any], roofs: Roofs) -> Rates:
    steps = {name: StepRates(**of_step) for name, of_step in raw["steps"].items()}
    return Rates(roofs=roofs, steps=steps, process=raw["process"])


def measure_process() -> int:
    """Return the bytes of a training process of a small model besides its tensors."""
    (config, batch, tokens), *_ = SHAPES["training"]
    shape = StepShape(work="training", config=config, dtype="bfloat16", batch=batch, tokens=tokens)
    return peak_of_process(shape) - dry_count(lambda: shape.make(torch.device("cpu"))).peak


def measure_steps(
    roofs: Roofs, device: torch.device, on_part: Callable[[float, str], None] = lambda done, what: None
) -> dict[str, StepRates]:
    """Measure the steps of SHAPES in each dtype that has a rate here."""
    dtypes: list[StepDtype] = [d for d in get_args(StepDtype) if d in roofs.peak or d == "fp8"]
    works: tuple[Work, ...] = get_args(Work)
    found: dict[str, StepRates] = {}
    jobs: list[tuple[Work, StepDtype]] = [(work, dtype) for work in works for dtype in dtypes]
    for i, (work, dtype) in enumerate(jobs):
        on_part(i / len(jobs), f"{work} {dtype}")
        shapes = [
            StepShape(work=work, config=c, dtype=dtype, batch=b, tokens=n, train=TrainConfig())
            for c, b, n in SHAPES[work]
        ]
        found[f"{work} {dtype}"] = rates_of([_measured(shape, roofs, device) for shape in shapes], roofs)
    return found


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step as measured: operations of some passes, and seconds of the whole."""

    passes: list[list[CountedOperation]]
    views: int
    seconds: float


def _measured(shape: StepShape, roofs: Roofs, device: torch.device) -> MeasuredStep:
    """Measure a step; again if other programs kept the cores meanwhile, and take the time when they did so least."""
    step = shape.make(device)
    found: list[tuple[float, MeasuredStep]] = []
    while len(found) < ATTEMPTS and (not found or found[-1][0] > DELAYED):
        before = CpuTimes.now()
        taken = sorted(in_turns({"step": step}, device, seconds=SECONDS, least=3).seconds["step"])
        passes = [count(step, roofs.cache_bytes) for _ in range(1 + PASSES)][1:]
        delayed = CpuTimes.now().rates_since(before).delayed
        operations = [each.operations for each in passes]
        measured = MeasuredStep(passes=operations, views=passes[0].views, seconds=taken[len(taken) // 4])
        found.append((delayed, measured))
    return min(found, key=lambda attempt: attempt[0])[1]


def rates_of(steps: Iterable[MeasuredStep], roofs: Roofs) -> StepRates:
    """Return the factors of classes, over all steps together, and the cost of a call."""
    steps = list(steps)
    measured: dict[str, float] = {}
    predicted: dict[str, float] = {}
    whole = within = 0.0
    calls = 0
    for step in steps:
        ops = [min(same, key=lambda op: op.seconds) for same in zip(*step.passes, strict=False)]
        for op in ops:
            name = class_of(op)
            measured[name] = measured.get(name, 0.0) + op.seconds
            predicted[name] = predicted.get(name, 0.0) + operation_seconds(op, roofs)
        whole += step.seconds
        within += sum(op.seconds for op in ops)
        calls += len(ops) + step.views
    small = {name for name, seconds in predicted.items() if seconds < LEAST_SHARE * sum(predicted.values())}
    # where the parts are longer than the whole, counting itself made them so
    shrink = min(1.0, whole / within)
    factors = {name: shrink * measured[name] / predicted[name] for name in predicted if name not in small}
    rest = small or set(predicted)
    factors[OTHERS] = shrink * sum(measured[name] for name in rest) / sum(predicted[name] for name in rest)
    return StepRates(factors=factors, call=max(0.0, whole - within) / calls)
