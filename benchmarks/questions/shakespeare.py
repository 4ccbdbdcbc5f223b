"""What does a minute and a half of training buy, next to nanoGPT's laptop recipe?

For each seed three commands take turns. Peer: nanoGPT's laptop recipe (4 layers, width 128, context 64, 12 sequences a
step, 2000 steps) on transformers' GPT-2, in FP32. Run: python -m dsmini.train configs/shakespeare.toml. Sprint: the
same with 200 steps. Seconds are those of the whole command, imports and final validation included. Losses are nats a
character over the whole held-out tenth.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.case import Case, Figure, Figures, Plot, Setting, cases_over, values
from benchmarks.peer_models import nanogpt
from benchmarks.trained import plots_by_seed, run_command, run_recipe

NAME = "shakespeare"
SEEDS, QUICK_SEEDS = 3, 1
SPRINT, QUICK_SPRINT = 200, 20
"""Steps of the sprint, which ends in about a sixth of the peer's time."""
QUICK_STEPS, QUICK_PEER_STEPS = 165, 200
"""Steps of the others with --quick; in full the recipes say how many."""
WHO = ("peer", "sprint", "run")

figure = Figures(NAME, lower={"seconds": "s", "loss_as_peer": "nats", "loss": "nats"})


def cases(setting: Setting) -> list[Case]:
    assert setting.text is not None, "the question says that it needs a text"
    text = setting.text.resolve()
    seeds = QUICK_SEEDS if setting.quick else SEEDS
    seconds = 40 if setting.quick else 200
    points = [(seed, text.name) for seed in range(seeds)]
    return cases_over("seed={} text={}", points, seconds, lambda seed, _: measure(setting, text, seed))


def measure(setting: Setting, text: Path, seed: int) -> Iterator[Figure]:
    """Run the three commands one after the other: imports, set-up and final validation count."""
    steps = QUICK_PEER_STEPS if setting.quick else nanogpt.STEPS
    peer = ["--seed", str(seed), "--steps", str(steps), "--threads", str(torch.get_num_threads())]
    seconds, answer = run_command("benchmarks.peer_models.nanogpt", str(text), *peer)
    yield from _figures(seed, "peer", seconds, answer["loss"])
    ours = ["--data.path", str(text), "--train.seed", str(seed)]
    lengths = {"sprint": SPRINT, "run": None} if not setting.quick else {"sprint": QUICK_SPRINT, "run": QUICK_STEPS}
    for who, steps in lengths.items():
        seconds, answer = run_recipe(setting, *ours, *(["--train.steps", str(steps)] if steps else []))
        yield from _figures(seed, who, seconds, answer["val_loss_at_eval_context"])
        yield figure("loss", {"seed": seed, "who": who}, answer["val_loss"], note="at the training context")


def _figures(seed: int, who: str, seconds: float, loss: float) -> Iterator[Figure]:
    case = {"seed": seed, "who": who}
    yield figure("seconds", case, seconds, note="of the whole command")
    note = f"a character, over the whole held-out tenth, at context {nanogpt.CONTEXT}"
    yield figure("loss_as_peer", case, loss, note=note)


def finding(figures: list[Figure]) -> str:
    told, peer = [], values(figures, "seconds", who="peer")
    for who in WHO:
        seconds, losses = (values(figures, metric, who=who) for metric in ("seconds", "loss_as_peer"))
        if seconds and losses:
            text = f"{who} {statistics.mean(losses):.3f} nats in {statistics.median(seconds):.0f} s"
            if who != "peer" and peer:
                text += f", {statistics.median(seconds) / statistics.median(peer):.0%} of the peer's time"
            told.append(text)
    return f"Loss at context {nanogpt.CONTEXT}: {'; '.join(told)}." if told else ""


def plots(figures: list[Figure]) -> list[Plot]:
    loss = f"Loss over the held-out tenth, at context {nanogpt.CONTEXT}", "nats a character"
    seconds = "Time of the whole command", "seconds"
    return plots_by_seed(figures, "who", WHO, {"loss_as_peer": loss, "seconds": seconds})
