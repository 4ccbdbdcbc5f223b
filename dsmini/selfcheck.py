"""python -m dsmini.selfcheck: try dsmini on this machine, and print a report to paste into an issue.

Usage, then examples:

    python -m dsmini.selfcheck [FLAGS]

    python -m dsmini.selfcheck
    python -m dsmini.selfcheck --only kernels model
    python -m dsmini.selfcheck --device cpu
"""

import contextlib
import importlib
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from dsmini.config.fields import require
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import patience
from dsmini.reading import brief

ROOT = Path(__file__).parents[1]
LONGEST = {"gpu-tests": 3600.0, "kernels": 900.0}
"""Seconds after which a check has failed; others have 300."""
TINY = (
    "--model.dim 32 --model.inter-dim 48 --model.moe-inter-dim 16 --model.n-layers 2 --model.n-routed-experts 8 "
    "--model.max-seq-len 64 --train.batch-size 8 --train.steps 10 --train.eval-tokens 64 --train.final-eval-tokens 64 "
    "--train.sample-tokens 8"
)
"""A run of ten steps of a tiny model."""


@dataclass(frozen=True, kw_only=True)
class SelfcheckCommand:
    """Try dsmini on this machine, each part in a process of its own, and print a report for an issue.

    It takes about a minute on a CPU, longer the first time, when the C++ kernels are compiled, and downloads nothing.
    Exit status: 1 if a check failed.
    """

    only: tuple[str, ...] = ()
    """Checks to run, of versions, kernels, model, training, processes, speed and gpu-tests; default: all."""
    device: str = "auto"
    """Device to check: cpu, cuda or mps. auto: CUDA, then MPS, then the CPU."""
    here: bool = False
    """Run the checks in this process, where a crash ends them all."""
    json: bool = False
    """Print a line of JSON for each check instead of the report."""


class SkippedError(Exception):
    """A check that this machine cannot make; the message is the reason."""


@dataclass(frozen=True)
class Outcome:
    """The end of a check."""

    check: str
    state: str
    """ok, failed or skipped."""
    why: str
    """The figures of a check that is ok, else the reason in one sentence."""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.check}: {self.state}: {self.why} ({self.seconds:.1f} s)"


# --- the checks: each returns its figures, and raises SkippedError, or any other error if something is wrong


def versions(device: str) -> str:
    """Compare what is installed with what dsmini asks for."""
    from packaging.requirements import Requirement  # matplotlib needs it

    try:
        needs = [Requirement(line) for line in metadata.requires("dsmini") or () if "extra ==" not in line]
    except metadata.PackageNotFoundError:
        raise SkippedError("dsmini is not installed: it runs from its folder") from None
    have = {need.name: metadata.version(need.name) for need in needs}  # its error names what is missing
    wrong = [str(need) for need in needs if not need.specifier.contains(have[need.name], prereleases=True)]
    found = ", ".join(f"{name} {version}" for name, version in have.items())
    require(not wrong, f"dsmini wants {', '.join(wrong)}, here are {found}; install dsmini again")
    return found


def kernels(device: str) -> str:
    """Compile the kernels, try them, and compare those that round with plain PyTorch bit by bit."""
    import torch

    from dsmini import ops
    from dsmini.numerics import dequantize_tiles, quantize_tiles, round_tiles

    ops.prepare()
    served, missing = list[str](), list[str]()
    for where in dict.fromkeys(("cpu", device)):
        kind = where.partition(":")[0]
        backend = ops.FOR_DEVICE.get(kind, "")
        library: Any = importlib.import_module(f"dsmini_kernels.{backend}") if backend else None
        if library is None or library.why_not():
            missing.append(f"{kind}: {library.why_not() if library else 'there are none'}")
            continue
        x, results = torch.randn(130, 256, device=where) * torch.logspace(-6, 6, 256, device=where), []
        for name in (backend, "reference"):
            with ops.use(name):
                codes, scales = quantize_tiles(x, (1, 128), "ue8m0", "e4m3", 1e-4)
                rounded = round_tiles(x, (128, 128), "fp32", "e4m3", 1e-4, torch.bfloat16)
                results.append([codes, scales, rounded, dequantize_tiles(codes, scales, (1, 128))])
        same = [torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*results, strict=True)]
        require(all(same), f"{backend} kernels round other than plain PyTorch: equal are {same}")
        served.append(f"{backend} ({library.describe().partition(',')[0]}) rounds as plain PyTorch, bit by bit")
    if not served:
        raise SkippedError("; ".join(missing))
    return "; ".join([*served, *missing])


def model(device: str) -> str:
    """Compare logits, gradients and decoded tokens with plain PyTorch in FP64 on the CPU."""
    import torch

    import dsmini
    from dsmini import ops

    torch.manual_seed(0)
    net, tokens = dsmini.Transformer(dsmini.ModelConfig()), torch.randint(0, 256, (2, 65))
    for p in net.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    results: list[list[torch.Tensor]] = []
    for where, dtype, backend in ((device, torch.float32, None), ("cpu", torch.float64, "reference")):
        net, ids = net.to(where).to(dtype), tokens.to(where)
        with ops.use(backend):
            total = net.losses(ids[:, :-1], ids[:, 1:]).total
            found = [*torch.autograd.grad(total, list(net.parameters()))]
            with torch.no_grad():
                found += [net(ids), dsmini.generate(net, ids[:, :8], 8).tokens]
        results.append([t.detach().cpu().double() for t in found])  # Apple's GPUs have no FP64
    names = [*(f"the gradient of {name}" for name, _ in net.named_parameters()), "the logits", "the decoded tokens"]
    errors = [((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(*results, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    # sums of at most 512 terms, some 100 of them chained, each rounded to FP32; four times that for softmax and norms
    allowed = 4 * 2.0**-24 * math.sqrt(512 * 100)
    require(errors[worst] <= allowed, f"{names[worst]}: {errors[worst]:.1e} off FP64's, at most {allowed:.1e} is right")
    return f"logits and {len(errors) - 2} gradients within {max(errors):.0e} of FP64's, 16 equal decoded tokens"


def training(device: str) -> str:
    """Train ten steps in BF16."""
    rows = _trained([sys.executable], device, "--train.dtype bfloat16")
    seconds = statistics.median(512 / row["tokens_per_s"] for row in rows[2:])
    return f"loss {rows[0]['loss']:.3f} to {rows[-1]['loss']:.3f}, {1000 * seconds:.1f} ms a step"


def processes(device: str) -> str:
    """Train on two processes, over NCCL where there are two GPUs, and compare the losses with those of one."""
    import torch

    nccl = device.startswith("cuda") and torch.cuda.device_count() > 1
    where, over = ("cuda", "NCCL") if nccl else ("cpu", "Gloo on the CPU, as NCCL wants two GPUs")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = _trained([sys.executable], where, "--train.dtype float32")
    two = _trained(launch, where, "--train.dtype float32 --parallel.ep 2")
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True))
    require(apart < 1e-3, f"losses over {over} are up to {apart:.1e} from those of one process")
    return f"experts divided over two ranks by {over}: losses within {apart:.0e} of one process's"


def speed(device: str) -> str:
    """Time the toy model until the device is done, and products of matrices."""
    import torch

    import dsmini
    from dsmini.machine import product_rates
    from dsmini.measure.turns import in_turns

    net, tokens = dsmini.Transformer(dsmini.ModelConfig()).to(device), torch.randint(0, 256, (4, 257), device=device)
    runs: dict[str, Callable[[], object]] = {
        "forward and backward of 1,024 tokens": lambda: net.losses(tokens[:, :-1], tokens[:, 1:]).total.backward(),
        "decoding 32 tokens": lambda: dsmini.generate(net, tokens[:1, :8], 32),
    }
    turns = in_turns(runs, torch.device(device), seconds=10.0, count=15)
    fp32, bf16 = (f"{rate / 1e9:,.0f} GFLOP/s" for rate in product_rates(torch.device(device)))
    return "; ".join([*(f"{name} {1000 * turns.median(name):.1f} ms" for name in runs), f"FP32 {fp32}", f"BF16 {bf16}"])


def gpu_tests(device: str) -> str:
    """Run the tests that want a GPU."""
    if not device.startswith("cuda"):
        raise SkippedError(f"no CUDA GPU; this is {device}")
    if not (ROOT / "tests" / "gpu").exists():
        raise SkippedError("the tests are in a checkout: git clone, then pip install -e '.[test]'")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    last = done.stdout.strip().rpartition("\n")[2].strip("= ")
    require(done.returncode == 0, last or f"pytest ended with status {done.returncode}")
    return last


CHECKS: dict[str, Callable[[str], str]] = {
    check.__name__.replace("_", "-"): check
    for check in (versions, kernels, model, training, processes, speed, gpu_tests)
}


def _trained(launch: list[str], device: str, flags: str) -> list[dict[str, Any]]:
    """Train ten steps in processes of their own, and return the rows of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "text.txt"), Path(folder, "run")
        text.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
        paths = ["--data.path", str(text), "--out", str(out), "--train.device", device]
        command = [*launch, "-m", "dsmini.train", *paths, *TINY.split(), *flags.split()]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=140)
        require(done.returncode == 0, f"dsmini.train ended with status {done.returncode}; its error is above")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    require(len(rows) == 10 and not any(row["skipped"] for row in rows), "a step was skipped or is missing")
    require(rows[-1]["loss"] < rows[0]["loss"], f"the loss went from {rows[0]['loss']} to {rows[-1]['loss']}")
    return rows


# --- the command


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(SelfcheckCommand, "dsmini.selfcheck", args)
    for name in command.only:
        if name not in CHECKS:
            raise ValueError(f"unknown check {brief(name)}; there are {', '.join(CHECKS)}")
    from dsmini.machine import pick_device

    device, console = str(pick_device(command.device)), Console(stderr=True, quiet=command.json)
    names, outcomes = command.only or tuple(CHECKS), list[Outcome]()
    try:
        for name in names:
            with patience(console, name):
                outcomes.append(_here(name, device) if command.here else _apart(name, device))
            say(console, str(outcomes[-1]))
    finally:  # a signal ends the checks, not the report
        outcomes += [Outcome(name, "skipped", "stopped before it ended") for name in names[len(outcomes) :]]
        print("\n".join(json.dumps(asdict(o)) for o in outcomes) if command.json else _report(outcomes, device))
    return int(any(outcome.state == "failed" for outcome in outcomes))


def _here(name: str, device: str) -> Outcome:
    """Run a check in this process; its output goes to the standard error."""
    begin, state = time.perf_counter(), "ok"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            why = CHECKS[name](device)
    except SkippedError as reason:
        state, why = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        state, why = "failed", f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return Outcome(name, state, why, time.perf_counter() - begin)


def _apart(name: str, device: str) -> Outcome:
    """Run a check in a process of its own, so that a driver that fails fails in one check alone."""
    longest = LONGEST.get(name, 300.0)
    command = [sys.executable, "-m", "dsmini.selfcheck", "--only", name, "--device", device, "--here", "--json"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=longest, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(name, "failed", f"no end within {longest:g} s", longest)
    if not done.stdout:
        return Outcome(name, "failed", f"its process ended with status {done.returncode}; its last words are above")
    try:
        return Outcome(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError):  # a library, such as NCCL, printed after it, or it was cut off
        last = brief(done.stdout.splitlines()[-1])
        return Outcome(name, "failed", f"its process ended with status {done.returncode} and the words {last}")


def _report(outcomes: Sequence[Outcome], device: str) -> str:
    """Return the report, in Markdown: versions, the machine, a line for each check, and the counts."""
    import torch

    import dsmini
    from dsmini.machine import card

    try:
        here, gpus = card(torch.device(device)), torch.cuda.device_count()
        cuda = f"{gpus} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}" if gpus else "none"
    except RuntimeError as error:  # a driver that fails must not take the report with it
        here, cuda = card(torch.device("cpu")), f"CUDA {torch.version.cuda}, which fails: {str(error).splitlines()[0]}"
    counts = (f"{sum(o.state == state for o in outcomes)} {state}" for state in ("ok", "failed", "skipped"))
    isa = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"dsmini {dsmini.__version__}, Python {here['python']}, torch {here['torch']}, {platform.platform()}",
        f"CPU: {here['processor']}, {here['cores']} cores, {isa}; GPU: {cuda}; checked: {device}",
        *map(str, outcomes),
        f"{', '.join(counts)} in {sum(o.seconds for o in outcomes):.0f} s",
    ]
    return "\n".join(["### dsmini.selfcheck", *(f"- {line}" for line in lines)])


if __name__ == "__main__":
    run(main)
