"""python -m dsmini.plan: predict memory, time, traffic, cost and failures of a model, and explain each figure.

Usage, then examples:

    python -m dsmini.plan CONFIG [FLAGS]

    python -m dsmini.plan deepseek-v3 --hardware h800
    python -m dsmini.plan configs/deepseek-v3.toml --gpus 1024 --search
    python -m dsmini.plan configs/deepseek-v3.toml --vary kv_lora_rank=128,256,512 hardware=h100,h800 --out plan
    python -m dsmini.plan configs/toy.toml --hardware this --explain list
    python -m dsmini.plan --compare deepseek-v3 deepseek-v3.2 kimi-k2 --gpus 2048
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

from dsmini.atomic import check_folder
from dsmini.console.command import run
from dsmini.console.commandline import parse
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.planner.request import PlanRequest
from dsmini.reading import find_config, refuse_folder

if TYPE_CHECKING:
    from dsmini.planner.pages import Answer


@dataclass(frozen=True, kw_only=True)
class PlanCommand(PlanRequest):
    """Predict memory, time, traffic, cost and failures of a model on hardware, from its config alone.

    CONFIG is a TOML file, Hugging Face's config.json, DeepSeek's inference JSON, or a name such as deepseek-v3. Nothing
    is built or measured. Deployments of serving are searched: the cheapest in time, the cheapest and the fastest are
    told, each with a bound and an estimate. Misfits of the memory come first, with a fix, and the
    exit status is 2.
    """

    config: Annotated[Path | None, tyro.conf.Positional] = None
    """The config of the model: .toml or .json, or a name."""
    all: bool = False
    """Show the tables of all main figures, and not only a line or two for each question."""
    search: bool = False
    """Search all layouts for the GPUs of --gpus: those that fit, fastest first, each with what binds it."""
    vary: tuple[str, ...] = ()
    """Values of one thing or of two to compare, such as kv_lora_rank=128,256,512 or hardware=h100,h800."""
    of: tuple[str, ...] = ()
    """Names of the figures that --vary compares; left out: the main ones that differ."""
    explain: str | None = None
    """Name of a figure to explain: formula, numbers and sources, down to the inputs. list: all names."""
    depth: int | None = None
    """Number of formulas that --explain goes down; left out: to the inputs."""
    compare: tuple[str, ...] = ()
    """Configs to plan side by side on equally many GPUs, with CONFIG if there is one; --gpus left out: 2048."""
    out: Path | None = None
    """Folder for plan.html, a page to read offline with all figures, and plan.json."""
    fresh: bool = False
    """Measure this machine again, with --hardware this, and not take what was stored."""
    json: bool = False
    """Print the figures as a line of JSON, and everything else on the standard error."""


MAIN = (
    *("hardware", "gpus", "days", "pipeline", "expert", "tensor", "zero", "recompute", "precision"),
    *("batch", "seq_len", "tokens", "context", "tpot", "ttft", "weight_dtype", "cache_dtype", "decode_gpus"),
    *("all", "search", "vary", "explain", "depth", "compare", "fresh", "out", "json"),
)
"""Fields that --help lists."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    command = parse(PlanCommand, "dsmini.plan", args, main=MAIN)
    if sys.flags.optimize > 1:
        raise ValueError("a plan explains figures by docstrings, which python -OO leaves out; run it without -OO")
    if command.config is not None:
        command = dataclasses.replace(command, config=find_config(command.config))
    _refuse(command, args)
    console = Console(stderr=command.json)
    answer = _answer(command, args, console)
    answer.show(console)
    if command.out is not None:
        for path in answer.write(command.out):
            say(console, f"written  {path}")
    if command.json:
        print(json.dumps(answer.record))
    return answer.status


def _refuse(command: PlanCommand, args: Sequence[str]) -> None:
    """Raise ValueError for questions that contradict each other."""
    if sum(arg.partition("=")[0] == "--vary" for arg in args) > 1:
        raise ValueError("--vary is given twice; write both after one: --vary kv_lora_rank=256,512 hardware=h100,h800")
    alone = [n for n in ("explain", "search", "vary", "compare", "all") if getattr(command, n)]
    if len(alone) > 1:
        raise ValueError(f"{' and '.join(f'--{name}' for name in alone)} are different questions; ask them one by one")
    if command.config is None and not command.compare:
        raise ValueError("a plan needs a config; name a .toml or .json, such as configs/deepseek-v3.toml")
    if command.config is not None:
        refuse_folder(command.config)
        if command.config.suffix not in (".toml", ".json"):
            raise ValueError(
                f"{command.config} is not a .toml or .json; name a config, such as configs/deepseek-v3.toml"
            )
    if command.of and not command.vary:
        raise ValueError("--of names the figures that --vary compares; add --vary, or --explain one figure")
    if command.depth is not None and command.explain is None:
        raise ValueError("--depth says how far --explain goes; add --explain NAME, or leave it out")
    if command.fresh and command.hardware != "this":
        raise ValueError(f"--fresh measures this machine, got --hardware {command.hardware}; add --hardware this")
    if command.search and (chosen := {"pipeline", "expert", "tensor"} & command.given().keys()):
        raise ValueError(f"--search chooses {', '.join(sorted(chosen))}; leave that out, or leave out --search")
    if command.out is not None and command.explain is not None:
        raise ValueError("--explain prints one figure, and --out writes a page of all; leave one of them out")


def _answer(command: PlanCommand, args: Sequence[str], console: Console) -> "Answer":
    # what loads numpy and jinja2 is imported after --help
    from dsmini.planner import pages
    from dsmini.planner.hardware import load_hardware
    from dsmini.planner.plan import make_plan, model_alone
    from dsmini.planner.request import Model

    def progress(label: str) -> Progress:
        return Progress(console, 1.0, label, delay=2.0)

    if command.out is not None:
        check_folder(command.out, pages.FILES)
    line = shlex.join(["python", "-m", "dsmini.plan", *args])
    if command.compare:
        configs = [*filter(None, [command.config]), *(find_config(_named(name)) for name in command.compare)]
        with progress("planning models") as bar:
            return pages.compare(command, [Model.from_file(path) for path in configs], line, bar.update)
    assert command.config is not None, "a plan without a config is refused"
    model = Model.from_file(command.config)
    if command.explain is not None and command.explain != "list":  # a model's own figures need no plan
        alone = model_alone(command, model, command.explain)
        if command.explain in alone:
            return pages.explained(alone, command.explain, console.width, command.depth)
    with progress("measuring this machine") as bar:
        hardware = load_hardware(command.hardware, bar.update, command.fresh)
    with progress("choosing a layout"):
        plan = make_plan(command, model, hardware)
    if command.explain is not None:
        return pages.explained(plan, command.explain, console.width, command.depth)
    if command.search:
        with progress("searching layouts") as bar:
            return pages.searched(plan, line, bar.update)
    if command.vary:
        with progress("varying the plan") as bar:
            return pages.varied(plan, command.vary, command.of, line, bar.update)
    return pages.planned(plan, line, whole=command.all)


def _named(name: str) -> Path:
    """Return the path of a config, or its name, which may leave out deepseek-."""
    from dsmini.planner.request import known_config

    return known_config(f"deepseek-{name}") or Path(name)


if __name__ == "__main__":
    run(main)
