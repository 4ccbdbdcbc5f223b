"""Published figures next to what the planner gives, each with its residual: ours over printed, less one.

    reproduced       within the error to hold: what a figure says, or half a unit of its last printed digit
    follows          the same, but by one sum, ratio or formula of other printed figures
    fitted           the same, by a constant that was chosen so that it agrees
    missed           not, and nobody knows why or a formula of sizes cannot: the residual is shown
    misprint         not, since the source contradicts itself

Worked example: 250 GFLOP a token are printed to a whole GFLOP, so up to 0.5 may be rounding. Ours are 250.45, which is
reproduced.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dsmini.accounting import decode_flops_per_token, kv_bytes_per_token, parameters
from dsmini.accounting.flops import flops_per_token
from dsmini.accounting.tensors import MTP, OVER, SCORES
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import CacheFigures, ModelFigures, cache_figures
from dsmini.planner.plan import Plan, make_plan
from dsmini.planner.request import Inputs, Model, PlanRequest, reference
from dsmini.planner.run import Failures
from dsmini.reading import read_toml

Status = Literal["reproduced", "follows", "fitted", "missed", "misprint"]
V2_BITS = 6
"""Bits of a number of V2's cache (V2, section 3.2.2)."""
EXTENSION = ((32768, 1920), (131072, 480))
"""Tokens and sequences of the steps in V3's two phases of context extension, 1000 each (V3, section 4.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A printed figure, and ours."""

    name: str
    what: str
    printed: str
    """Number in base units as printed; its last digit says how exact it is."""
    unit: str = ""
    ours: float
    source: str
    hold: float | None = None
    """Relative error to hold, in place of half a unit of the last printed digit."""
    note: str = ""
    """Reason of any but "reproduced" and "follows", and of an error to hold above 5 %."""
    expected: Status = "reproduced"

    @property
    def within(self) -> float:
        """Relative error to hold."""
        return rounding(self.printed) if self.hold is None else self.hold

    @property
    def residual(self) -> float:
        """Ours over printed, less one."""
        return self.ours / float(self.printed) - 1

    @property
    def status(self) -> Status:
        """Status by the residual; a contradiction of the source keeps its name."""
        slack = 1e-9 * (self.within > 0)  # of printed decimals, which no float holds
        if abs(self.residual) <= self.within + slack:
            return self.expected if self.expected in ("follows", "fitted") else "reproduced"
        return "misprint" if self.expected == "misprint" else "missed"

    @property
    def record(self) -> dict[str, Any]:
        """Figure as JSON."""
        computed = {"printed": float(self.printed), "within": self.within, "residual": self.residual}
        return {**asdict(self), **computed, "status": self.status}


def rounding(printed: str) -> float:
    """Return the largest relative error that rounding to the printed digits makes: of "250e9" it is 0.5 / 250."""
    digits = printed.partition("e")[0]
    decimals = len(digits.partition(".")[2])
    return 0.5 * 10.0**-decimals / float(digits)


# --- ours


@functools.cache
def counts(name: str) -> ModelFigures:
    """Return the counts of a model at 4096 tokens."""
    return ModelFigures(reference(name), Figure("seq_len", 4096, "token", "", ""), name)


@functools.cache
def cache(name: str) -> CacheFigures:
    """Return the cache of a model in BF16."""
    return cache_figures(reference(name), "bfloat16")


@functools.cache
def v3(hardware: str = "h800", gpus_per_node: int = 8, **choices: Any) -> Plan:
    """Return a plan of DeepSeek-V3."""
    model = Model(config=reference("deepseek-v3"), source="deepseek-v3")
    machine = load_hardware(hardware).having("a reckoning", {"gpus_per_node": gpus_per_node})
    return make_plan(PlanRequest(hardware=hardware, **choices), model, machine)


def failures(gpus: int) -> Failures:
    """Return the failures of GPUs."""
    return Failures(Inputs(request=PlanRequest(), sources={}), gpus)


def v3_mtp(active: bool = False) -> float:
    """Return the parameters of V3's multi-token prediction as printed: without the projection; active with the ends."""
    counted = parameters(reference("deepseek-v3"))
    of = counted.active_by_module if active else counted.by_module
    own = sum(n for module, n in of.items() if module.startswith(MTP)) - of["mtp projection"]
    return own + counted.by_module["embedding"] if active else own


def extension_hours() -> float:
    """Return the GPU-hours of V3's context extension, at the utilization of its pre-training."""
    plan, extended = v3(), replace(reference("deepseek-v3"), max_seq_len=163840)
    work = sum(flops_per_token(extended, n, training=True, mtp=False).total * 1000 * rows * n for n, rows in EXTENSION)
    return work / (plan.m.training_flops * plan.inputs.of("tokens")) * plan.run.training_gpu_hours


def v2_cache_saving() -> float:
    """Return the share of DeepSeek 67B's cache that V2 saves."""
    v2 = kv_bytes_per_token(reference("deepseek-v2"), bytes_per_number=1) * V2_BITS / 8
    return 1 - v2 / cache("deepseek-67b").kv_cache


def million(name: str, work: bool) -> float:
    """Return the work of a token after a million, in FLOPs at the rate of FP8, or the FP8 cache of a token."""
    c, n = replace(reference(name), max_seq_len=2**20), 2**20
    if not work:
        return kv_bytes_per_token(c, dtype="fp8")
    slower = {OVER: 2, SCORES: 0.5 if c.compress_ratios else 1}
    return sum(
        flops * slower.get(module, 1) for module, flops in decode_flops_per_token(c, context=n).by_module.items()
    )


def next_to_v3_2(name: str, work: bool) -> Callable[[], float]:
    """Return a model's work or cache over V3.2's, when it is called."""
    return lambda: million(name, work) / million("deepseek-v3.2", work)


def link_seconds() -> float:
    """Return the time of an output token that InfiniBand's peak allows, with two micro-batches of 32 a GPU."""
    served = v3("h100", sequences=32, link_efficiency=1.0).served
    assert served is not None
    return served.decode_step.slow_link_time


def nvlink_seconds() -> float:
    """Return the same where NVLink connects all GPUs: only the rows of experts, without attention's."""
    plan = v3("gb200-nvl72", 320, sequences=32, link_efficiency=1.0)
    rows = plan.figures["decode_fast_row_bytes"] * plan.m.moe_layers * 2 * 32
    return rows / plan.hardware.fast_link


def run(name: str) -> Callable[[], float]:
    """Return a figure of V3's plan, when it is called."""
    return lambda: v3().figures[name]


OURS: Mapping[str, Callable[[], float]] = {
    "v3_parameters": lambda: counts("deepseek-v3").parameters_main,
    "v3_active": lambda: counts("deepseek-v3").parameters_active,
    "v3_active_with_embedding": lambda: (
        counts("deepseek-v3").parameters_active + counts("deepseek-v3").numbers("embedding")
    ),
    "v3_mtp": v3_mtp,
    "v3_mtp_active": lambda: v3_mtp(active=True),
    "v3_flops": lambda: counts("deepseek-v3").training_flops,
    "v4_flash_parameters": lambda: counts("deepseek-v4-flash").parameters_main,
    "v4_flash_active": lambda: counts("deepseek-v4-flash").parameters_active,
    "v4_pro_parameters": lambda: counts("deepseek-v4-pro").parameters_main,
    "v4_pro_active": lambda: counts("deepseek-v4-pro").parameters_active,
    "v4_flash_cache": next_to_v3_2("deepseek-v4-flash", work=False),
    "v4_pro_cache": next_to_v3_2("deepseek-v4-pro", work=False),
    "v4_flash_work": next_to_v3_2("deepseek-v4-flash", work=True),
    "v4_pro_work": next_to_v3_2("deepseek-v4-pro", work=True),
    "v2_flops": lambda: counts("deepseek-v2").training_flops,
    "llama_flops": lambda: counts("llama-3.1-405b").training_flops,
    "qwen_flops": lambda: counts("qwen-2.5-72b").training_flops,
    "v3_step": run("step_seconds"),
    "v3_mfu": run("mfu"),
    "v3_pretraining_hours": run("training_gpu_hours"),
    "v3_cost": run("training_cost"),
    "v3_extension_hours": extension_hours,
    "v3_cache": lambda: cache("deepseek-v3").kv_cache,
    "qwen_cache": lambda: cache("qwen-2.5-72b").kv_cache,
    "llama_cache": lambda: cache("llama-3.1-405b").kv_cache,
    "v2_cache_saving": v2_cache_saving,
    "v3_bubble": run("bubble_seconds"),
    "v3_link_time": link_seconds,
    "v3_link_rate": lambda: 1 / link_seconds(),
    "v3_nvlink_time": nvlink_seconds,
    "v3_nvlink_rate": lambda: 1 / nvlink_seconds(),
    "v3_speculation": run("tokens_per_step"),
    "failure_16k": lambda: failures(16384).mean_time_to_failure,
    "failure_131k": lambda: failures(131072).mean_time_to_failure,
    "failure_1k": lambda: failures(1024).mean_time_to_failure,
    "effective_share_12k": lambda: failures(12000).effective_share,
}
"""Our value of each figure of published.toml."""


def published_figures() -> list[Published]:
    """Return all figures of published.toml, in its order."""
    raw = read_toml(Path(__file__).with_name("published.toml"))
    return [Published(name=name, ours=float(OURS[name]()), **table) for name, table in raw.items()]
