"""Measured systems next to bounds and estimates: python -m tests.helpers.measured writes docs/measured.md."""

import functools
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsmini.planner.deployments import resolve, search
from dsmini.planner.figure import Figure
from dsmini.planner.hardware import load_hardware
from dsmini.planner.model import ModelFigures
from dsmini.planner.plan import make_plan
from dsmini.planner.request import Inputs, Model, PlanRequest, known_config
from dsmini.planner.serving import Deployment, Phase, Served, Service, serve
from tests.helpers.plans import every_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measured.md"
LOW, HIGH = 0.7, 1.4
"""Estimate over measured that needs no explanation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A measured system, as tests/planner/measured.toml says."""

    name: str
    what: str
    source: str
    model: str
    hardware: str
    phase: Any
    gpu: float | None = None
    user: float | None = None
    gpus: int | None = None
    tensor: int | None = None
    batch: int | None = None
    total: int | None = None
    """Sequences of all GPUs."""
    tokens: int = 4096
    prompt: int | None = None
    output: int | None = None
    weights: Any = None
    cache: Any = None
    micro_batches: int = 1
    drafts: int = 0
    length: float = 1.0
    precision: Any = None
    half: str = ""
    apart: str = ""
    stated: tuple[str, ...] = ()
    """Inputs that the source states."""
    assumed: tuple[str, ...] = ()
    """Inputs that it does not state."""

    @property
    def inputs(self) -> set[str]:
        """Names of what a bound or an estimate takes from the row."""
        if self.phase == "training":
            return {"gpus", "precision", "batch"}
        given = ("gpus", "tensor", "batch", "total", "prompt", "output", "micro_batches", "drafts", "length")
        drafting = {"drafts"} if self.phase != "prefill" and self.service.c.n_mtp_layers else set[str]()
        plain = {field.name: field.default for field in fields(self)}
        return {"tokens", "weights", "cache"} | drafting | {n for n in given if getattr(self, n) != plain[n]}

    @property
    def measured(self) -> float:
        return self.gpu or self.user or 0.0

    @functools.cached_property
    def service(self) -> Service:
        path = known_config(self.model)
        assert path is not None
        prompt = self.tokens if self.phase == "prefill" else self.prompt or self.tokens
        acceptance = accepted(self.length, self.drafts)
        how: dict[str, Any] = {"weight_dtype": self.weights, "cache_dtype": self.cache, "memory_share": 1.0}
        request = PlanRequest(context=self.tokens, prompt=prompt, acceptance=acceptance, **how)
        model, hardware = Model.from_file(path), load_hardware(self.hardware)
        inputs = resolve(Inputs(request=request, sources={}), model, hardware)
        m = ModelFigures(model.config, Figure("seq_len", 4096, "token", "", ""), self.model)
        return Service(m, inputs, hardware)

    def asked(self, phase: Phase, own: bool) -> PlanRequest:
        """Return the request of the row's own layout, or of any."""
        gpus, tensor = (self.gpus, self.tensor or 1) if own and self.gpus else (None, None)
        sizes: dict[str, Any] = {f"{phase}_gpus": gpus, f"{phase}_tensor": tensor}
        return PlanRequest(**sizes, drafts=self.drafts if self.service.c.n_mtp_layers else None)

    def served(self, phase: Phase) -> Served | None:
        """Return the deployment of the row's own layout; None where the source does not state it."""
        batch = self.total or (self.batch or 0) * (self.gpus or 0)
        if not (batch and self.gpus):
            return None
        spare = -self.service.c.n_routed_experts % self.gpus
        d = Deployment(phase=phase, gpus=self.gpus, tensor=self.tensor or 1, redundant=spare, batch=batch,
                       micro_batches=self.micro_batches, drafts=self.drafts)  # fmt: skip
        return serve(self.service, d)

    def ends(self, phase: Phase, own: bool) -> tuple[float, float]:
        """Return the least time, and the most tokens/s of a GPU, of the row's own layout or of any."""
        one = self.served(phase) if own else None
        if one is not None:
            return one.least_time, one.most_gpu_tokens_per_second
        found = search(self.service, self.asked(phase, own), phase)
        return found.least_time, found.most


def accepted(length: float, drafts: int) -> float:
    """Return the probability with which this many drafts give this length, by halving."""
    low, high, p = 1e-6, 1 - 1e-6, 0.5
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**i for i in range(drafts + 1)) < length else (low, p)
    return p if drafts else 0.85


def together(row: Row, decode: float, prefill: float) -> float:
    """Return the tokens/s of a GPU that reads prompts and decodes; of a decode row those of answers alone."""
    if row.prompt is None or row.output is None:
        return decode
    counted = row.output if row.phase == "decode" else row.prompt + row.output
    return counted / (row.prompt / prefill + row.output / decode)


def bound(row: Row, own: bool) -> float:
    """Return the most that a row's own layout gives, or any."""
    if row.phase == "training":
        return trained(row)["bound"]
    if row.user is not None:
        return 1 / row.ends("decode", own)[0]
    if row.phase == "prefill":
        return row.ends("prefill", own)[1]
    return together(row, row.ends("decode", own)[1], row.ends("prefill", own)[1] if row.prompt else 1.0)


def estimate(row: Row) -> float | None:
    """Return the estimate of the row's own layout; None where it states none."""
    if not row.half:
        return None
    if row.phase == "training":
        return trained(row)["estimate"]
    one = row.served(row.phase)
    assert one is not None, "a row with a half states its deployment"
    if row.user is not None:
        return one.tokens_per_second
    prefill = 1.0
    if row.prompt is not None and row.gpus:
        spare, groups = -row.service.c.n_routed_experts % row.gpus, row.gpus // (row.tensor or 1)
        d = Deployment(phase="prefill", gpus=row.gpus, tensor=row.tensor or 1, redundant=spare, batch=2 * groups)
        prefill = serve(row.service, d).gpu_tokens_per_second
    return together(row, one.gpu_tokens_per_second, prefill)


def trained(row: Row) -> dict[str, float]:
    """Return tokens/s of a GPU in training, by bound and by estimate."""
    path = known_config(row.model)
    assert path is not None
    request = PlanRequest(hardware=row.hardware, gpus=row.gpus, precision=row.precision, batch=15360)
    found = every_of(make_plan(request, Model.from_file(path), load_hardware(row.hardware)))
    tokens = found["step_tokens"] / (row.gpus or 1)
    return {"bound": tokens / found["least_step_seconds"], "estimate": tokens / found["step_seconds"]}


def rows() -> list[Row]:
    """Return all measured systems."""
    found = tomllib.loads((ROOT / "tests" / "planner" / "measured.toml").read_text())
    return [Row(name=name, **row) for name, row in found.items()]


def page() -> str:
    """Return docs/measured.md: each system next to the bounds of its own layout and of any, and the estimate."""
    lines = Path(__file__).with_suffix(".md").read_text().splitlines()
    ratios: dict[str, list[float]] = {"fitted": [], "kept": []}
    sources = list(dict.fromkeys(row.source for row in rows()))
    for row in rows():
        guess = estimate(row)
        own, best = bound(row, own=True), bound(row, own=False)
        ours = "", ""
        if guess is not None:
            ours = f"{guess:,.0f}", f"{guess / row.measured:.2f}"
            ratios[row.half].append(guess / row.measured)
        unit = " a user" if row.user else ""
        numbers = f"{row.measured:,.0f}{unit}", f"{own:,.0f}", f"{best:,.0f}", *ours
        what = f"{row.what} [{sources.index(row.source) + 1}]"
        cells = (what, row.model, row.hardware, row.phase, *numbers, row.half, ", ".join(row.assumed))
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for half, found in ratios.items():
        good, middle = sum(LOW <= ratio <= HIGH for ratio in found), sorted(found)[len(found) // 2]
        lines.append(
            f"{half.capitalize()} rows: {good} of {len(found)} between {LOW} and {HIGH}, the median {middle:.2f}."
        )
    lines += ["Why others may be apart, by what their sources say of them or by our reading:", ""]
    lines += [f"- {row.what} ({row.model}, {row.hardware}): {row.apart}." for row in rows() if row.apart]
    lines += ["", *(f"{number}. {source}" for number, source in enumerate(sources, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
