"""python -m dsmini.compare: is an idea better? Train pairs of runs, and say so with an interval.

Usage, then examples:

    python -m dsmini.compare [BASE] [IDEA ...] [FLAGS]

    python -m dsmini.compare --idea "model.n_mtp_layers=0" --small        # the toy without multi-token prediction
    python -m dsmini.compare toy toy-mha --seeds 20
    python -m dsmini.compare my_base.toml my_idea.py:make_model --seeds 10
    python -m dsmini.compare docs/claims/mtp.toml --seeds 20
    python -m dsmini.compare --report docs/claims
"""

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dsmini.config.fields import require
from dsmini.console.command import run, speaks
from dsmini.console.commandline import parse, refuse_twice
from dsmini.console.messages import say
from dsmini.console.progress import Progress
from dsmini.reading import find_config, read_toml
from dsmini.report.figures import plain
from dsmini.report.units import plural

if TYPE_CHECKING:
    from dsmini.comparison.arms import Comparison
    from dsmini.comparison.results import Results


@dataclass(frozen=True, kw_only=True)
class CompareCommand:
    """Find out if an idea is better: train pairs of runs with equal seeds, and say which differences are real.

    BASE and each IDEA are configs (a file or a name); an IDEA may also be a Python function that makes a model,
    my_idea.py:make_model, and --idea changes single settings of the base. Without BASE the toy is the base. A claim is
    a TOML file with [arms]: python -m dsmini.compare docs/claims/mtp.toml.
    Runs of one seed see the same data in the same order, and start from the same weights where shapes agree. Each core
    has a run of its own, on one thread. A run that is done has its line in --out, and is never done again: the same
    command continues a comparison that was stopped, more --seeds continue one that is done, and runs of equal arms are
    taken from other files of the folder. All are made by the same sources of dsmini on the same kind of machine: a file
    with others is refused, and what differs is named.
    """

    idea: tuple[str, ...] = ()
    """Settings that make an arm of the base, such as "model.n_mtp_layers=0" or "model.attention=mha train.lr=0.01"."""
    seeds: int = 20
    """Number of pairs for each idea. Choose it before the first run: who stops at the first verdict is wrong more
    often."""
    margin: float | None = None
    """Difference in nats a byte below which two arms count as equal; left out: 0.01."""
    small: bool = False
    """Runs of 200 steps, a minute or two on one core each. Paired differences vary by 0.01 to 0.04 nats so early;
    experts less dense by 0.006 with the base shakespeare and --set train.steps=1000, which takes as long."""
    set: tuple[str, ...] = ()
    """Settings of all arms, such as data.path=book.txt or train.steps=400."""
    jobs: int | None = None
    """Number of runs at a time; left out: one for each core."""
    out: Path | None = None
    """File of the results, NAME.jsonl; left out: in comparisons/. NAME.png is the picture."""
    report: Path | None = None
    """Folder of results to show again, without a run; draws one picture, forest.png. Comparisons of one question at
    several sizes have a trend for each arm; trends.png shows all sizes, forest.png the largest."""
    json: bool = False
    """Print the answer as a line of JSON, and all else to the standard error."""


def main(args: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    words: list[str] = []
    rest = list(args)
    while rest and not rest[0].startswith("-"):
        words.append(rest.pop(0))
    command = parse(CompareCommand, "dsmini.compare", rest)
    console = Console(stderr=command.json, quiet=not speaks())
    _refuse(command, words, rest)
    if command.report is not None:
        return _report(command, command.report, console)

    from dsmini import __version__
    from dsmini.comparison.results import head_of, made_here, opened, reuse
    from dsmini.comparison.runs import read_corpora, run_missing
    from dsmini.machine import pick_device

    comparison, begun = _comparison(command, words), time.monotonic()
    path = command.out or Path("comparisons", f"{comparison.name}.jsonl")
    with Progress(console, label="the corpus", unit="bytes") as progress:
        corpora, ranges = read_corpora(comparison, path, progress.stage)
    made = made_here(pick_device(comparison.arms[0].config.train.device)) | {"scored": [*map(list, ranges)]}
    with opened(path, head_of(comparison, corpora, __version__), made) as results:
        base, *others = results.names
        say(console, f"compare {', '.join(others)} with {base}: {command.seeds} seeds, results in {path}")
        say(console, f"margin  {comparison.margin:g} nats a byte: a difference within it counts as none")
        tokens = {arm.name: arm.tokens for arm in comparison.arms}
        if len({*tokens.values()}) > 1:
            say(console, f"tokens  not equal: {', '.join(f'{name} {n:,}' for name, n in tokens.items())}")
        for other, n in reuse(results, command.seeds, made).items():
            say(console, f"reused  {plural(n, 'run')} of equal arms from {other}")
        with Progress(console, label="runs", delay=0, stays=True) as progress:
            try:
                done = run_missing(comparison, results, command.seeds, command.jobs, made, ranges, progress)
            except KeyboardInterrupt:
                say(console, f"stopped; {len(results.lines)} runs are kept in {path}; the same command continues")
                return 130
        time_taken = timedelta(seconds=round(time.monotonic() - begun))
        say(console, f"{plural(done, 'run')} in {time_taken}" if done else "all runs were done before")
    _answer(command, [results], path.with_suffix(".png"), console)
    return 0


def _refuse(command: CompareCommand, words: Sequence[str], rest: Sequence[str]) -> None:
    """Raise ValueError for flags that contradict each other, and for numbers of nothing."""
    few = f"--seeds {command.seeds} is too few for an interval; use 5 or more to decide, 20 for a difference of 0.02"
    require(command.seeds > 1, few)
    stated = command.margin is None or 0 < command.margin < math.inf
    require(stated, f"--margin {command.margin} is not positive and finite; use 0.01")
    require(command.jobs is None or command.jobs > 0, f"--jobs {command.jobs} runs nothing; use 1 or more")
    lines = command.out is None or (command.out.suffix == ".jsonl" and not command.out.is_dir())
    require(lines, f"--out {command.out} is to have lines of JSON; let it end in .jsonl")
    refuse_twice(rest, "--idea", "--set")
    others = {arg.partition("=")[0] for arg in rest if arg.startswith("--")} - {"--report", "--json"}
    alone = command.report is None or not (words or others)
    require(alone, f"--report shows results that are there, without arms and {', '.join(sorted(others)) or 'configs'}")


def _comparison(command: CompareCommand, words: Sequence[str]) -> "Comparison":
    """Return what is asked: a claim's comparison, or that of the command line."""
    from dsmini.comparison.arms import MARGIN, SMALL, Comparison, arms_of, read_claim

    settings = [*(SMALL if command.small else ()), *command.set]
    if words and words[0].endswith(".toml") and "arms" in read_toml(find_config(Path(words[0]))):
        require(len(words) == 1 and not command.idea, f"{words[0]} is a claim with its own arms; leave out the others")
        return read_claim(Path(words[0]), settings, command.margin)
    arms = arms_of(words, command.idea, settings)
    name = "-".join(re.sub(r"\W+", "-", arm.name).strip("-") for arm in arms)[:80]
    return Comparison(name=name, arms=arms, margin=command.margin or MARGIN)


def _report(command: CompareCommand, folder: Path, console: Console) -> int:
    """Show the results of a folder, and draw them in one picture."""
    from dsmini.comparison.results import read_results

    require(folder.is_dir(), f"there is no folder {folder}; name one with results of comparisons, such as docs/claims")
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            results = read_results(path)
        except ValueError as error:
            say(console, f"left out: {error}")
            continue
        found += [results] if results is not None and results.lines else []
    require(bool(found), f"{folder} has no results of comparisons (*.jsonl); run one, see --help")
    _answer(command, found, folder / "forest.png", console)
    return 0


def _answer(command: CompareCommand, found: "list[Results]", picture: Path, console: Console) -> None:
    """Show answers in the terminal, as a picture, and as JSON; those of a folder with their trends."""
    from dsmini.comparison.answer import answer_of, draw, show
    from dsmini.comparison.trend import answer_of_trends, ladders_of

    answers, ladders = [answer_of(results) for results in found], ladders_of(found) if command.report else []
    trends, smaller = [*map(answer_of_trends, ladders)], [step for each in ladders for step in [*each.values()][:-1]]
    for answer in (*answers, *trends):
        show(console, answer)
    largest = [answer for answer, results in zip(answers, found, strict=True) if results not in smaller]
    for path, of in ((picture, largest), (picture.with_name("trends.png"), trends)):
        if of:
            draw(path, of)
            say(console, f"picture {path}")
    if command.json:
        records = plain([answer.record for answer in (*answers, *trends)])
        print(json.dumps(records if command.report else records[0]))


if __name__ == "__main__":
    run(main)
