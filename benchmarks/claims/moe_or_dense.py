"""Experts next to dense layers, on equal tokens with equal active parameters. Source: V2 and V3 reports, 2.1.2.

The recipe is configs/shakespeare.toml: two layers of MLA with eight experts each, of which a token chooses two and the
shared one. The feed-forwards of the dense model are as wide as these three experts together. Both models train on the
source code of Python's standard library; the loss is that of the whole held-out split.
"""

from collections.abc import Mapping, Sequence

from benchmarks.claims.study import Trial, study

STEPS, QUICK_STEPS = 1000, 50


def run(trial: Trial, arm: str, flags: Sequence[str]) -> Mapping[str, float]:
    steps = str(QUICK_STEPS if trial.setting.quick else STEPS)
    length = ["--train.steps", steps, "--train.eval-every", steps]
    summary = trial.train(arm, "shakespeare", *flags, *length)
    return {
        "loss": summary["val_loss"],
        "tokens_per_s": summary["tokens_per_s"],
        "active_parameters": float(summary["active_parameters"]),
    }


QUESTION = study(
    name="moe-or-dense",
    title="Is a mixture of experts better than a dense model, on equal tokens with equal active parameters?",
    about=__doc__,
    arms={
        "moe": ["--model.n-dense-layers", "0"],
        "dense": ["--model.n-dense-layers", "2", "--model.inter-dim", "384"],
    },
    run=run,
    pairs=[("loss", "dense", "moe"), ("tokens_per_s", "dense", "moe")],
)
