"""The progress of a training run: its figures next to the bar, or in a line at regular steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console

from dsmini.console.progress import Progress
from dsmini.training.trainer import StepResult


class TrainingProgress:
    """The progress bar of a training run.

    Args:
        seq_len: length of a sequence in tokens, for the lines about validations.
    """

    def __init__(self, console: Console, steps: int, seq_len: int) -> None:
        self.steps, self.seq_len = steps, seq_len
        label = f"step 0/{steps}"
        self.bar = Progress(console, steps, label, delay=0, line_every=max(1, steps // 20), stays=True)
        self.say = self.bar.say

    def __enter__(self) -> "TrainingProgress":
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.__exit__(*error)

    def show(self, step: StepResult, tokens_per_s: float) -> None:
        """Show a training step."""
        vio = "" if step.max_vio is None else f"  MaxVio {step.max_vio:.2f}"
        wait = f"  data wait {step.data_wait:.0%}" if step.data_wait > 0.05 else ""
        spread = "" if step.spread is None else f"  spread {step.spread:.0%}"
        figures = f"loss {step.loss:.3f}  {tokens_per_s:,.0f} tok/s  lr {step.lr:.1e}{vio}{spread}{wait}"
        if step.indexers is not None:
            kl, recall = (sum(step.indexers[name]) / len(step.indexers[name]) for name in ("kl", "recall"))
            figures += f"  indexer KL {kl:.4f} recall {recall:.0%}"
        left = (self.steps - step.step) * step.tokens / max(tokens_per_s, 1e-9)
        self.bar.label = f"step {step.step}/{self.steps}"
        self.bar.update(step.step, figures, left=left)
        if step.skipped:
            self.say(f"step {step.step}: the gradient was not finite; the step was skipped, nothing changed")

    def validated(self, step: int, nats: float, tokens: int) -> None:
        """Print the result of a validation on the way."""
        self.say(f"step {step}: validation {nats:.3f} nats ({tokens:,} held-out tokens, context {self.seq_len})")

    def validating(self, line: str = "") -> AbstractContextManager[Callable[[float], None]]:
        """Show a bar for a validation, after a line about it; its function takes the share that is done."""
        if line:
            self.say(line)
        return self.bar.part("validation")
