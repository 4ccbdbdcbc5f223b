"""One run of an arm with a seed: paired weights, training, and what it came to. A process of its own runs it.

python -m dsmini.comparison.trial < REQUEST     prints a JSON line for each step, and one with the result
"""

import json
import math
import os
import statistics
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsmini import accounting
from dsmini.comparison.arms import Arm, make_model_of
from dsmini.comparison.results import made_here
from dsmini.comparison.scoring import Ranges, held_out, windows_of
from dsmini.config import RunConfig
from dsmini.config.fields import build
from dsmini.data.corpus import Windows, load_corpus
from dsmini.machine import DTYPES, keep_freed_memory, pick_device
from dsmini.nn import Transformer
from dsmini.sources import own_sources
from dsmini.text.tokenizer import load_tokenizer
from dsmini.training.lookups import make_lookups
from dsmini.training.trainer import StepResult, Trainer

LAST = 0.1
"""Share of the steps, at the end, over which loads are averaged."""
ACCEPTED_TOKENS = 16384
"""Held-out tokens on which drafts are compared with the next token."""


def run_trial(
    arm: Arm, seed: int, ranges: Ranges, cache: Path, on_part: Callable[[float], None] = lambda done: None
) -> dict[str, Any]:
    """Train an arm with a seed, and return its figures.

    Args:
        ranges: bytes of the held-out text that are scored.
        cache: folder of tokenized corpora.
        on_part: told the share of the steps that is done.

    Returns: loss in nats a byte (None if the run diverged), the ranges and their bytes a token, train_seconds and
        cpu_seconds of all steps, steps, tokens, parameters, active (None of a function's model), cache_bytes a token,
        max_vio at the end, acceptance of drafts, and what made it, as in results.made_here.
    """
    trainer = prepared(arm, seed, cache)
    config, steps = trainer.config, trainer.config.train.steps
    done: list[StepResult] = []
    skipped, cpu = 0, time.process_time()
    while trainer.steps_done < steps and skipped < config.train.max_skipped:
        done.append(trainer.step())
        skipped = skipped + 1 if done[-1].skipped else 0
        on_part(len(done) / steps)
    cpu = time.process_time() - cpu
    windows = windows_of(held_out(config.data, cache), ranges, load_tokenizer(config.data.tokenizer), config.seq_len)
    bytes_per_token = sum(end - first for first, end in ranges) / windows.tokens
    loss = trainer.validate(windows) / bytes_per_token if trainer.steps_done == steps else math.nan
    loads = [step.max_vio for step in done if step.max_vio is not None]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "scored": ranges,
        "bytes_per_token": bytes_per_token,
        "train_seconds": round(sum(step.seconds for step in done), 3),
        "cpu_seconds": round(cpu, 3),
        "steps": len(done),
        "tokens": sum(step.tokens for step in done),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "active": None if arm.function else accounting.parameters(config.model).active,
        "cache_bytes": _cache_bytes(trainer),
        "max_vio": statistics.fmean(loads[-max(1, round(LAST * steps)) :]) if loads else None,
        "acceptance": acceptance(trainer, windows) if len(trainer.model.mtp) else None,
        **made_here(trainer.device),
    }


def prepared(arm: Arm, seed: int, cache: Path) -> Trainer:
    """Return a trainer of an arm's model with the weights of a seed.

    Models of one seed have the same first values where names and shapes agree (nn/first_values.py).

    Raises: ValueError for a function that returns no model, and for what load_corpus refuses.
    """
    config = replace(arm.config, train=replace(arm.config.train, seed=seed))
    device = pick_device(config.train.device)
    corpus = load_corpus(config.data, config.seq_len, config.model.vocab_size, cache, 0)
    make = make_model_of(arm.function) if arm.function else Transformer
    torch.manual_seed(seed)
    model = make(config.model)
    if not isinstance(model, Transformer):
        raise ValueError(f"{arm.function} returned a {type(model).__name__}; want a dsmini.Transformer")
    make_lookups(model, config, corpus)
    model.compute_dtype = DTYPES[config.train.dtype]
    torch.manual_seed(seed)
    return Trainer(model.to(device), corpus, config, device)


@torch.no_grad()
def acceptance(trainer: Trainer, windows: Windows) -> float:
    """Return how often the first draft is the token that the model itself would write, on held-out text."""
    equal, asked = 0, 0
    trainer.model.eval()
    every = max(1, len(windows) * windows.seq_len // ACCEPTED_TOKENS)
    for tokens, _ in Windows(text=windows.text, starts=windows.starts[::every], seq_len=windows.seq_len).blocks(8):
        out = trainer.model.run(tokens.to(trainer.device), mtp=True)
        drafts, wanted = out.mtp_logits[0].argmax(-1), out.logits.argmax(-1)[:, 1:]
        equal, asked = equal + int((drafts == wanted).sum()), asked + drafts.numel()
    trainer.model.train()
    return equal / asked


def _cache_bytes(trainer: Trainer) -> float | None:
    with suppress(Exception):  # a model of somebody's own may have no cache
        return trainer.model.new_cache(1, trainer.config.seq_len).nbytes_per_token
    return None


# --- the process


def request_of(arm: Arm, seed: int, ranges: Ranges, cache: Path) -> str:
    """Return the line that asks a process for a run."""
    said = {"name": arm.name, "function": arm.function, "seed": seed, "ranges": ranges, "cache": str(cache)}
    return json.dumps(said | {"config": arm.config.to_toml()})


def main() -> None:
    """Do what the first line of the standard input asks for. End when that closes: the command was killed."""
    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a user's function may print, but not into the answer
    keep_freed_memory()
    own_sources()  # now, before somebody edits them

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        config = build(RunConfig, tomllib.loads(asked["config"]), asked["name"], "")
        torch.set_num_threads(config.train.threads or 1)
        arm, cache = Arm(name=asked["name"], config=config, function=asked["function"]), Path(asked["cache"])
        say({"result": run_trial(arm, asked["seed"], asked["ranges"], cache, lambda done: say({"done": done}))})
    except (Exception, SystemExit) as error:
        say({"error": sentence_of(error, asked["function"])})


def sentence_of(error: BaseException, function: str) -> str:
    """Return the first line of an error, and where in a user's file it began.

    Raises: the error, if it is neither the user's nor one that is told to users.
    """
    file = function.rpartition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    words = str(error).partition("\n")[0]
    if isinstance(error, ValueError) and not lines:
        return words
    if not lines:
        raise error
    return f"{type(error).__name__}: {words} (line {lines[-1]} of {file})"


if __name__ == "__main__":
    main()
