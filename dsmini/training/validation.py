"""The validations of a run: on the way on a part of the held-out split, at the end on all of it unless it is large."""

from collections.abc import Callable

from dsmini.config import TrainConfig
from dsmini.data.corpus import Windows
from dsmini.training.progress import TrainingProgress
from dsmini.training.stopping import StopAskedError, StopSignals
from dsmini.training.trainer import Trainer

LEAST_AT_THE_END = 131_072
"""Held-out tokens that the default of train.final_eval_tokens takes even after a short training."""


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
