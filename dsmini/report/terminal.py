"""What people see while it is measured: how far it is, how long it will take, and a table for each question."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from dsmini.report import units
from dsmini.report.comparison import Change
from dsmini.report.figures import Figure
from dsmini.report.page import case_words, shared, tone

STYLES = {"near": "green", "equal": "green", "off": "yellow", "far": "red", "unequal": "bold red", "better": "green"}
STYLES |= {"worse": "red", "new": "cyan", "gone": "cyan", "changed": "yellow"}


LONGEST = 30
"""Figures of a question that a terminal shows; the report has all."""


class Clock:
    """Seconds left, from the cases' estimates, corrected by what those before them really took."""

    def __init__(self, estimates: Sequence[float]) -> None:
        self.total = max(sum(estimates), 1e-9)
        self.expected = self.taken = 0.0
        """Of the cases that are done, as estimated and as measured."""
        self.current, self.started = 0.0, 0.0

    @property
    def factor(self) -> float:
        """Real seconds in an estimated one. The first case alone, if it is short, changes it little."""
        prior = 0.05 * self.total
        return (self.taken + prior) / (self.expected + prior)

    def begin(self, estimate: float) -> None:
        self.current, self.started = estimate, time.monotonic()

    def end(self, taken: float) -> None:
        self.expected += self.current
        self.taken += taken
        self.current = 0.0

    def left(self) -> float:
        later = (self.total - self.expected - self.current) * self.factor
        if not self.current:
            return later
        return later + max(0.0, self.current * self.factor - (time.monotonic() - self.started))


class _Left(ProgressColumn):
    def __init__(self, clock: Clock) -> None:
        self.max_refresh, self.clock = 1.0, clock
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(f"about {units.duration(self.clock.left())} left", style="cyan")


class Bar:
    """A bar in a terminal, which moves once a second so as not to disturb what is measured; else a line a case."""

    def __init__(self, console: Console, estimates: Sequence[float]) -> None:
        self.console, self.clock = console, Clock(estimates)
        self.estimates, self.nth = estimates, 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), _Left(self.clock))
        self.bar = Progress(*columns, console=console, refresh_per_second=1, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=self.clock.total)

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, question: str, key: str) -> None:
        """The next case."""
        self.clock.begin(self.estimates[self.nth])
        self.nth += 1
        where = f"{question} {key}"
        self.bar.update(self.task, description=f"{self.nth}/{len(self.estimates)}  {where[:36]}", refresh=True)
        if not self.console.is_terminal:
            say(
                self.console,
                f"{self.nth}/{len(self.estimates)}  {where}  about {units.duration(self.clock.left())} left",
            )

    def end(self, taken: float) -> None:
        self.clock.end(taken)
        self.bar.update(self.task, completed=self.clock.expected)


@contextmanager
def measuring_roofs(console: Console) -> Iterator[Callable[[float, str], None]]:
    """A line that says what of the machine is being measured; what it gives is to be told the share and the part."""
    with console.status("this machine's rates", refresh_per_second=1) as status:
        said = list[str]()

        def on_part(done: float, what: str) -> None:
            if not said and not console.is_terminal:
                say(console, "measuring this machine's rates, half a minute; they are kept")
            said.append(what)
            status.update(f"measuring this machine's rates, once: {done:.0%}, {what}")

        yield on_part


def say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)


def show_question(console: Console, title: str, finding: str, figures: Sequence[Figure]) -> None:
    """The figures of a question, as many as one likes to read, and the sentence they come to."""
    console.print()
    common = shared(figures)
    words = ", ".join(f"{units.words(key)} {units.shown(value)}" for key, value in common.items())
    title_text = Text(title, style="bold") + Text(f"  ({words})" if words else "", style="dim")
    table = Table(title=title_text, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("case", "metric"):
        table.add_column(name, header_style="dim", overflow="fold")
    for name in ("predicted", "measured", "ratio", "spread"):
        table.add_column(name, header_style="dim", justify="right", no_wrap=True)
    for figure in figures[:LONGEST]:
        table.add_row(
            Text(case_words(figure, without=common)),
            Text(units.words(figure.metric)),
            units.human(figure.predicted, figure.unit, figure.exact),
            units.human(figure.measured, figure.unit, figure.exact),
            Text(units.ratio(figure), style=STYLES.get(tone(figure), "")),
            units.spread(figure),
        )
    if figures:
        console.print(table)
    if len(figures) > LONGEST:
        say(console, f"... and {len(figures) - LONGEST} more, in the report", style="dim")
    say(console, finding, style="bold cyan")


def show_changes(console: Console, changes: Sequence[Change], old: str) -> None:
    """What changed, and in one line what did not."""
    console.print()
    table = Table(
        title=Text(f"Changes since {old}", style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in ("question", "case", "metric"):
        table.add_column(name, header_style="dim", overflow="fold")
    for name in ("before", "now", "factor", ""):
        table.add_column(name, header_style="dim", justify="right", no_wrap=True)
    changed = [change for change in changes if change.verdict != "unchanged"]
    for change in changed:
        figure = change.name
        table.add_row(
            figure.question,
            Text(case_words(figure)),
            Text(units.words(figure.metric)),
            units.human(change.old, figure.unit, figure.exact),
            units.human(change.new, figure.unit, figure.exact),
            "" if change.factor is None else f"{change.factor:.2f}",
            Text(change.verdict, style=STYLES.get(change.verdict, "")),
        )
    if changed:
        console.print(table)
    say(console, f"{len(changes) - len(changed)} of {len(changes)} figures are unchanged")
