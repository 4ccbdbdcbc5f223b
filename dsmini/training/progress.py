"""What a run shows on its way: the figures of its steps next to the bar or in lines, and its validations.

A validation on the way scores a part of the held-out split; that at the end all of it, unless it is large.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console

from dsmini.config import TrainConfig
from dsmini.console.progress import Progress
from dsmini.data.corpus import Windows
from dsmini.training.stopping import StopAskedError, StopSignals
from dsmini.training.trainer import StepResult, Trainer

LEAST_AT_THE_END = 131_072
"""Held-out tokens that the default of train.final_eval_tokens takes even after a short training."""


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

    def show(self, step: StepResult, tokens_per_s: float, sentence: str = "") -> None:
        """Show a training step, and a sentence about it."""
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
        if sentence:
            self.say(sentence)

    def validated(self, step: int, nats: float, tokens: int) -> None:
        """Print the result of a validation on the way."""
        self.say(f"step {step}: validation {nats:.3f} nats ({tokens:,} held-out tokens, context {self.seq_len})")

    def validating(self, line: str = "") -> AbstractContextManager[Callable[[float], None]]:
        """Show a bar for a validation, after a line about it; its function takes the share that is done."""
        if line:
            self.say(line)
        return self.bar.part("validation")


def final_eval_tokens(train: TrainConfig, trained: int) -> int:
    """Return the maximum number of held-out tokens in the validation at the end.

    The default is half the number of trained tokens. A forward without multi-token prediction costs about a quarter of
    a training step, so this takes about a tenth of the training time, and more of a short one, for which
    LEAST_AT_THE_END holds. A time limit would make the loss depend on the machine.
    """
    if train.final_eval_tokens is not None:
        return train.final_eval_tokens
    return max(trained // 2, LEAST_AT_THE_END)


def final_windows(trainer: Trainer, seq_len: int | None = None) -> Windows:
    """Return the held-out windows that the validation at the end scores."""
    config = trainer.config
    at_most = final_eval_tokens(config.train, trainer.sequences * config.seq_len)
    return trainer.corpus.windows(seq_len or config.seq_len, at_most)


def validate(trainer: Trainer, progress: TrainingProgress, asked: StopSignals) -> dict[str, float]:
    """Validate after the last step so far, if that is due; return the losses by their keys in metrics.jsonl.

    Args:
        asked: the signals that ask the run to stop.

    Raises: StopAskedError as soon as one has come. Nothing is changed then.
    """
    config, step = trainer.config, trainer.steps_done
    if step == config.train.steps:
        return _last_scores(trainer, progress, asked)
    if step % config.train.eval_every:
        return {}
    windows = trainer.corpus.windows(config.seq_len, config.train.eval_tokens)
    with progress.validating() as on_part:
        nats = trainer.validate(windows, on_part=_until_asked(on_part, asked))
    progress.validated(step, nats, windows.tokens)
    return {"val_loss": nats}


def _last_scores(trainer: Trainer, progress: TrainingProgress, asked: StopSignals) -> dict[str, float]:
    """Compute the losses at the end: at the context of training, at eval_context, and with the average."""
    context = trainer.config.train.eval_context
    where, windows = _in_words(trainer), final_windows(trainer)
    with progress.validating(f"validating on {where}") as on_part:
        scores = {"val_loss": trainer.validate(windows, on_part=_until_asked(on_part, asked))}
    if context is not None:
        shorter = final_windows(trainer, context)
        with progress.validating(f"validating on {where} at context {context}") as on_part:
            scores["val_loss_at_eval_context"] = trainer.validate(shorter, on_part=_until_asked(on_part, asked))
    if trainer.average is not None:
        saying = f"validating on {where}, with the average of the parameters"
        with trainer.averaged(), progress.validating(saying) as on_part:
            scores["val_loss_ema"] = trainer.validate(windows, on_part=_until_asked(on_part, asked))
    return scores


def _in_words(trainer: Trainer) -> str:
    """Return in words what part of the held-out split is scored at the end."""
    every, some = trainer.corpus.windows(trainer.config.seq_len), final_windows(trainer)
    if len(some) == len(every):
        return "the whole held-out split"
    return (
        f"{some.tokens:,} of {every.tokens:,} held-out tokens, spread evenly "
        f"(all of them: --train.final-eval-tokens {every.tokens})"
    )


def _until_asked(on_part: Callable[[float], None], asked: StopSignals) -> Callable[[float], None]:
    def check(done: float) -> None:
        on_part(done)
        if done < 1 and asked.came():
            raise StopAskedError

    return check
