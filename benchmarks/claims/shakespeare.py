"""Tiny Shakespeare next to nanoGPT's laptop recipe.

Peer: nanoGPT's laptop recipe (4 layers, width 128, context 64, 12 sequences a step, 2000 steps) on transformers' GPT-2,
in FP32. Run: python -m dsmini.train configs/shakespeare.toml. Sprint: the same with 200 steps. Times are those of the
whole command, imports and final validation included. Losses are nats a character over the whole held-out tenth, at
context 64.
"""

import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch

from benchmarks.claims import nanogpt
from benchmarks.claims.study import Trial, run_module, study


def run(trial: Trial, arm: str, flags: Sequence[str]) -> Mapping[str, float]:
    """Return the time of the whole command, and the loss at the peer's context."""
    assert trial.setting.text is not None, "needs_text makes the command ask for it"
    text, full, quick = str(trial.setting.text.resolve()), *flags
    steps = quick if trial.setting.quick else full
    if arm != "peer":
        length = ["--train.steps", steps] if steps else []
        summary = trial.train(arm, "shakespeare", "--data.path", text, *length)
        return {"seconds": summary["command_seconds"], "loss_as_peer": summary["val_loss_at_eval_context"]}
    begun = time.perf_counter()
    how = str(trial.seed), steps, str(torch.get_num_threads())
    answer = json.loads(run_module("benchmarks.claims.nanogpt", text, *how).splitlines()[-1])
    return {"seconds": time.perf_counter() - begun, "loss_as_peer": answer["loss"]}


QUESTION = study(
    name="shakespeare",
    title="How good is a minute and a half of training, compared with nanoGPT's laptop recipe?",
    about=__doc__,
    arms={"peer": [str(nanogpt.STEPS), "200"], "sprint": ["200", "20"], "run": ["", "165"]},  # full and quick steps
    run=run,
    pairs=[("loss_as_peer", "sprint", "peer"), ("loss_as_peer", "run", "peer"), ("seconds", "sprint", "peer")],
    seeds=(3, 1),
    seconds=(200.0, 40.0),
    needs="" if find_spec("transformers") else "transformers is not installed; pip install 'dsmini[peers]'",
    needs_text=True,
)
