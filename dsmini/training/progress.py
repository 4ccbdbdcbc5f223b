"""What a run shows on its way: the figures of its steps next to the bar or in lines, and its validations.

A validation on the way scores a part of the held-out split; that at the end all of it, unless it is large.
"""

from contextlib import nullcontext

from rich.console import Console

from dsmini.config import TrainConfig
from dsmini.console.progress import Progress
from dsmini.data.corpus import Windows
from dsmini.training.stopping import StopAskedError, StopSignals
from dsmini.training.trainer import StepResult, Trainer

LEAST_AT_THE_END = 131_072
"""Held-out tokens that the default of train.final_eval_tokens takes even after a short training."""


class TrainingProgress(Progress):
    """The progress bar of a training run."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(console, steps, f"step 0/{steps}", delay=0, line_every=max(1, steps // 20), stays=True)
        self.steps = steps

    def show(self, step: StepResult, tokens_per_s: float, sentence: str = "") -> None:
        """Show a training step, and a sentence about it."""
        figures = f"loss {step.loss:.3f}  {tokens_per_s:,.0f} tok/s  lr {step.lr:.1e}"
        figures += "" if step.max_vio is None else f"  MaxVio {step.max_vio:.2f}"
        figures += "" if step.spread is None else f"  spread {step.spread:.0%}"
        figures += f"  data wait {step.data_wait:.0%}" if step.data_wait > 0.05 else ""
        if step.indexers is not None:
            kl, recall = (sum(step.indexers[name]) / len(step.indexers[name]) for name in ("kl", "recall"))
            figures += f"  indexer KL {kl:.4f} recall {recall:.0%}"
        self.label = f"step {step.step}/{self.steps}"
        self.update(step.step, figures, left=(self.steps - step.step) * step.tokens / max(tokens_per_s, 1e-9))
        if step.skipped:
            self.say(f"step {step.step}: the gradient was not finite; the step was skipped, nothing changed")
        if sentence:
            self.say(sentence)


def final_eval_tokens(train: TrainConfig, trained: int) -> int:
    """Return the maximum number of held-out tokens in the validation at the end.

    The default is half the number of trained tokens. A forward without multi-token prediction costs about a quarter of
    a training step, so this takes about a tenth of the training time, and more of a short one, for which
    LEAST_AT_THE_END holds. A time limit would make the loss depend on the machine.
    """
    return max(trained // 2, LEAST_AT_THE_END) if train.final_eval_tokens is None else train.final_eval_tokens


def final_windows(trainer: Trainer, seq_len: int | None = None) -> Windows:
    """Return the held-out windows that the validation at the end scores."""
    config = trainer.config
    at_most = final_eval_tokens(config.train, trainer.sequences * config.seq_len)
    return trainer.corpus.windows(seq_len or config.seq_len, at_most)


def validate(trainer: Trainer, progress: TrainingProgress, asked: StopSignals) -> dict[str, float]:
    """Validate after the last step so far, if that is due; return the losses by their keys in metrics.jsonl.

    At the end there may be three: at the context of training, at eval_context, and with the average.

    Args:
        asked: the signals that ask the run to stop.

    Raises: StopAskedError as soon as one has come. Nothing is changed then.
    """
    train, step, seq_len = trainer.config.train, trainer.steps_done, trainer.config.seq_len

    def score(windows: Windows) -> float:
        def check(done: float) -> None:
            show(done)
            if done < 1 and asked.came():
                raise StopAskedError

        with progress.part("validation") as show:
            return trainer.validate(windows, on_part=check)

    if step < train.steps:
        if step % train.eval_every:
            return {}
        windows = trainer.corpus.windows(seq_len, train.eval_tokens)
        nats = score(windows)
        progress.say(f"step {step}: validation {nats:.3f} nats ({windows.tokens:,} held-out tokens, context {seq_len})")
        return {"val_loss": nats}
    windows, every = final_windows(trainer), trainer.corpus.windows(seq_len)
    line = "validating on the whole held-out split"
    if len(windows) < len(every):
        line = (
            f"validating on {windows.tokens:,} of {every.tokens:,} held-out tokens, spread evenly "
            f"(all of them: --train.final-eval-tokens {every.tokens})"
        )
    kinds = {"val_loss": (seq_len, "")}
    if train.eval_context is not None:
        kinds["val_loss_at_eval_context"] = (train.eval_context, f" at context {train.eval_context}")
    if trainer.average is not None:
        kinds["val_loss_ema"] = (seq_len, ", with the average of the parameters")
    scores = {}
    for key, (length, words) in kinds.items():
        progress.say(line + words)
        with trainer.averaged() if key == "val_loss_ema" else nullcontext():
            scores[key] = score(final_windows(trainer, length))
    return scores
