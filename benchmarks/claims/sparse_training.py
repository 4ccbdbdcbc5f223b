"""Training that learns to attend to a few keys, in V3.2's stages at toy size. Source: V3.2 report, section 2.1.1.

The stages are V3.2's, at toy size, on a text with hidden pairs of a key and a value. Losses are over the whole held-out
part, which has no pairs. A needle is a pair among others in some of that text; its value must be the likeliest byte,
and a guess finds 1 of 6. Nothing is lost if the whole 95 % interval says that the loss is at most 0.02 nats higher and
that at most 10 % of the needles are lost. Fresh is the sparse model before its indexers have learned. Recall is the
share of the top-k keys that the indexers pick, in the last tenth of the steps. Runs that were stopped continue.
"""

import json
import random
import statistics
from collections.abc import Mapping, Sequence

import torch

from benchmarks.claims.study import Trial, run_module, study
from dsmini import Transformer
from dsmini.atomic import write_text
from dsmini.checkpoint.load import load_pretrained
from dsmini.checkpoint.training_state import load_run

CONTEXT, TOPK = 2048, 256
HELD_OUT = 0.1
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
NEEDLES, QUICK_NEEDLES = 24, 2
STEPS, QUICK_STEPS = {"short": 700, "dense": 500, "longer": 200, "warmup": 100, "sparse": 200}, 3
STARTS = {"short": "", "dense": "short", "longer": "dense", "warmup": "fresh", "sparse": "warmup"}
LONG = f"--train.seq-len {CONTEXT} --train.batch-size 1"
KEYS = f"--model.index-topk {TOPK}"
GENTLY = "--train.lr 3e-4 --train.muon-lr 1e-3 --train.lr-schedule constant"
OPTIMIZER = ["--train.muon-momentum", "0.95", "--train.newton-schulz", "jordan"]
RECIPE = ["--train.lr", "0.003", "--train.muon-lr", "0.01", "--train.lr-schedule", "warmup 0.05", "cosine to 0.1"]


def run(trial: Trial, arm: str, flags: Sequence[str]) -> Mapping[str, float]:
    """Train a stage, or convert the dense model to one with fresh indexers; return what it has learned."""
    assert trial.setting.text is not None, "needs_text makes the command ask for it"
    words, path = trial.setting.text.read_text(encoding="ascii"), trial.folder / "text.txt"
    cut = int((1 - HELD_OUT) * len(words))
    mixed = hide_pairs(words[:cut], trial.seed) + words[cut:]
    if not path.exists():
        write_text(path, mixed)
    found: dict[str, float] = {}
    if arm == "fresh":
        if not (trial.folder / arm).exists():
            both = (str(trial.folder / name) for name in ("dense", arm))
            run_module("dsmini.convert", *both, "--dsa", *flags)
        model = load_pretrained(trial.folder / arm)
    else:
        quick, recipe = trial.setting.quick, "toy-dsa" if arm in ("warmup", "sparse") else "toy"
        text = ["--data.path", str(path), "--data.val-fraction", f"{(len(words) - cut) / len(mixed):.6f}"]
        size = f"--model.max-seq-len {CONTEXT} --model.n-mtp-layers 0 --train.save-every 100 --train.steps".split()
        every = [*size, str(QUICK_STEPS if quick else STEPS[arm]), *text, *OPTIMIZER, *flags]
        how = {"start": STARTS[arm], "eval_tokens": 4096 if quick else 10**12}
        found["loss"] = trial.train(arm, recipe, *every, **how)["val_loss"]
        if recipe == "toy-dsa":
            lines = (trial.folder / arm / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            last = lines[-max(1, len(lines) // 10) :]
            found["recall"] = statistics.fmean(x for line in last for x in json.loads(line)["layer_indexer_recall"])
        model = load_run(trial.folder / arm)[0]
    draw, needles = random.Random(0), QUICK_NEEDLES if trial.setting.quick else NEEDLES  # the same texts for all
    texts = [test_text(words[cut:], CONTEXT, depth, draw) for depth in DEPTHS for _ in range(needles)]
    return {**found, "answered": share_answered(model.eval(), texts)}


QUESTION = study(
    name="sparse-training",
    title="Does a model lose anything when it learns to attend to a few keys?",
    about=__doc__,
    arms={
        "short": ["--train.seq-len", "256", "--train.batch-size", "16", *RECIPE],
        "dense": [*LONG.split(), *RECIPE],
        "longer": f"{LONG} {GENTLY}".split(),
        "fresh": f"--index-n-heads 4 --index-head-dim 32 --index-topk {TOPK}".split(),
        "warmup": f"{LONG} {KEYS} --train.dsa-stage warmup --train.lr 1e-3 --train.lr-schedule constant".split(),
        "sparse": f"{LONG} {KEYS} {GENTLY}".split(),
    },
    run=run,
    pairs=[("loss", "sparse", "longer"), ("answered", "sparse", "longer"), ("answered", "fresh", "longer")],
    seeds=(3, 1),
    seconds=(700.0, 60.0),
    margins={"loss": 0.02, "answered": -0.1},
    needs_text=True,
)


# --- the needles: pairs of a key and a value, hidden in a text. A pair is a line of its own: a sign, and one of its
# values. In a text to learn from, each sign of a passage comes again and again with its value, some signs more often
# than others, so that a model can learn to look values up, near and far. A test hides one pair of each sign in a text
# that was held out, and names one of the signs at the end

VALUES = {"#": "012456", "%": "789<=>", "*": "()[]{}", "+": "@\\^_|~"}
"""Values of each key. None of these signs occurs in a text of words, where other needles would be guessed."""
APART = 24
"""Mean number of bytes between the pairs of a text to learn from."""
PASSAGE = 4096
"""Bytes through which keys keep their values."""


def hide_pairs(text: str, seed: int) -> str:
    """Return the text with pairs between its lines."""
    draw = random.Random(seed)
    out: list[str] = []
    length = following = passage = 0
    pairs: list[str] = []
    for line in text.splitlines(keepends=True):
        out.append(line)
        length += len(line)
        if length >= passage:
            pairs, passage = _pairs(draw), length + PASSAGE
        while length >= following:
            pair = draw.choices(pairs, weights=[2.0**-n for n in range(len(pairs))])[0]
            out.append(pair)
            length += len(pair)
            following += draw.randint(1, 2 * APART)
    return "".join(out)


def _pairs(draw: random.Random) -> list[str]:
    """Return a pair of each key, in random order."""
    return [f"{key}{draw.choice(VALUES[key])}\n" for key in draw.sample(list(VALUES), len(VALUES))]


def test_text(text: str, length: int, depth: float, draw: random.Random) -> tuple[str, str]:
    """Return a text of `length` bytes that ends in a key, and the key's value.

    Args:
        text: is ASCII; a random part of it is taken.
        depth: share of the text that lies before the pair.
    """
    pairs = _pairs(draw)
    question, value, _ = pairs[0]
    room = length - sum(map(len, pairs)) - len(question)
    start = draw.randrange(len(text) - room)
    hay = text[start : start + room]
    places = sorted([(int(depth * room), pairs[0]), *((draw.randrange(room), pair) for pair in pairs[1:])])
    out, last = [], 0
    for at, pair in places:
        at = max(last, hay.rfind("\n", last, at) + 1)
        out += [hay[last:at], pair]
        last = at
    return "".join([*out, hay[last:].rstrip("\n"), "\n", question])[-length:], value


@torch.no_grad()
def share_answered(model: Transformer, cases: Sequence[tuple[str, str]]) -> float:
    """Return the share of texts whose value is the likeliest byte. A token is a byte."""
    right = 0
    for text, value in cases:
        tokens = torch.tensor([list(text.encode())], device=model.device)
        right += chr(int(model(tokens)[0, -1].argmax())) == value
    return right / len(cases)
