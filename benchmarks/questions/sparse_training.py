"""Does a model lose anything when it learns to attend to a few keys?

The stages are V3.2's, at toy size. A dense model learns at context 256, then at 2,048, from a text with hidden pairs of
a key and a value. Indexers join it and learn alone (warmup), then all of it learns with attention to 256 keys (sparse).
The dense model continues for the same number of tokens (longer). Losses are over the whole held-out part, which has no
pairs. A needle is a pair among others in some of that text; its value must be the likeliest byte. Fresh is the sparse
model before its indexers have learned. Runs that were stopped continue when the command is given again.
"""

import json
import random
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.case import Case, Figure, Figures, Plot, Setting, Value, cases_over, pick, values
from benchmarks.needles import hide_pairs, share_answered, test_text
from benchmarks.trained import plots_by_seed, run_module
from dsmini.atomic import write_text
from dsmini.checkpoint.load import load_pretrained
from dsmini.checkpoint.trained_model import load_run
from dsmini.nn import Transformer
from dsmini.report.charts import over_labels

NAME = "sparse-training"
SEEDS, QUICK_SEEDS = 3, 1
CONTEXT, SHORT = 2048, 256
TOPK = 256
HELD_OUT = 0.1
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
NEEDLES, QUICK_NEEDLES = 24, 2
STEPS = {"short": 700, "dense": 500, "longer": 200, "warmup": 100, "sparse": 200}
QUICK_STEPS, QUICK_EVAL = dict.fromkeys(STEPS, 3), 4096
WHO = ("dense", "longer", "fresh", "warmup", "sparse")

figure = Figures(
    NAME,
    higher={"recall": "share of the top-k keys", "mass": "share of attention", "answered": "share of needles"},
    lower={"loss": "nats", "kl": "nats"},
)


def cases(setting: Setting) -> list[Case]:
    assert setting.text is not None, "needs_text makes the runner ask for it"
    text = setting.text.resolve()
    points = [(seed, text.name) for seed in range(QUICK_SEEDS if setting.quick else SEEDS)]
    seconds = 60 if setting.quick else 700
    return cases_over("seed={} text={}", points, seconds, lambda seed, _: measure(setting, text, seed))


def measure(setting: Setting, text: Path, seed: int) -> Iterator[Figure]:
    """Train all stages of a seed in folders of their own, and yield what each has learned."""
    folder = setting.out.resolve() / NAME / f"{'quick-' if setting.quick else ''}seed-{seed}"
    words = text.read_text(encoding="ascii")
    cut = int((1 - HELD_OUT) * len(words))
    mixed = hide_pairs(words[:cut], seed) + words[cut:]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "text.txt", mixed)
    train = partial(_train, setting, folder, seed, (len(words) - cut) / len(mixed))
    short = ["--train.seq-len", str(SHORT), "--train.batch-size", "16"]
    long = ["--train.seq-len", str(CONTEXT), "--train.batch-size", "1"]
    topk = ["--model.index-topk", str(TOPK)]
    gently = ["--train.lr", "3e-4", "--train.muon-lr", "1e-3", "--train.lr-schedule", "constant"]
    alone = ["--train.dsa-stage", "warmup", "--train.lr", "1e-3", "--train.lr-schedule", "constant"]
    train("short", "toy", None, *short)
    train("dense", "toy", "short", *long)
    train("longer", "toy", "dense", *long, *gently)
    if not (folder / "fresh").exists():
        sizes = ["--index-n-heads", "4", "--index-head-dim", "32", "--index-topk", str(TOPK)]
        run_module("dsmini.convert", str(folder / "dense"), str(folder / "fresh"), "--dsa", *sizes)
    train("warmup", "toy-dsa", "fresh", *long, *topk, *alone)
    train("sparse", "toy-dsa", "warmup", *long, *topk, *gently)
    for stage in STEPS:
        summary = json.loads((folder / stage / "summary.json").read_text(encoding="utf-8"))
        yield figure("loss", {"seed": seed, "who": stage}, summary["val_loss"], note=f"at the end of {stage}")
    for stage in ("warmup", "sparse"):
        yield from _of_indexers(seed, stage, folder / stage / "metrics.jsonl")
    held_out = words[cut:]
    for who in WHO:
        model = load_pretrained(folder / who) if who == "fresh" else load_run(folder / who)[0]
        yield from _needles(model.eval(), held_out, {"seed": seed, "who": who}, setting.quick)


def _train(
    setting: Setting, folder: Path, seed: int, held_out: float, stage: str, recipe: str, start: str | None, *flags: str
) -> None:
    """Train a stage from another one's weights, finish it, or leave it as it is if it is finished."""
    steps = (QUICK_STEPS if setting.quick else STEPS)[stage]
    init = () if start is None else ("--init", str(folder / start))
    run_module(
        *("dsmini.train", f"configs/{recipe}.toml", "--out", str(folder / stage), "--resume", "auto", *init, *flags),
        *("--data.path", str(folder / "text.txt"), "--data.val-fraction", f"{held_out:.6f}", "--train.seed", str(seed)),
        *("--model.max-seq-len", str(CONTEXT), "--model.n-mtp-layers", "0", "--train.steps", str(steps)),
        *("--train.final-eval-tokens", str(QUICK_EVAL if setting.quick else 10**12), "--train.sample-tokens", "0"),
        *("--train.device", str(setting.device), "--train.dtype", str(setting.dtype).removeprefix("torch.")),
        *("--train.save-every", "100"),
    )


def _of_indexers(seed: int, stage: str, metrics: Path) -> Iterator[Figure]:
    """Yield what each layer's indexer reached: means over the last tenth of the steps."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    for name in ("recall", "mass", "kl"):
        for layer, of_steps in enumerate(zip(*(row[f"layer_indexer_{name}"] for row in last), strict=True)):
            case = {"seed": seed, "stage": stage, "layer": layer}
            yield figure(name, case, statistics.mean(of_steps), note="mean over the last tenth of the steps")


def _needles(model: Transformer, text: str, case: dict[str, Value], quick: bool) -> Iterator[Figure]:
    """Yield the share of needles that are found at each depth. All models get the same texts."""
    draw = random.Random(0)
    for depth in DEPTHS:
        some = [test_text(text, CONTEXT, depth, draw) for _ in range(QUICK_NEEDLES if quick else NEEDLES)]
        yield figure("answered", {**case, "depth": depth}, share_answered(model, some), note="a guess finds 1 of 6")


def finding(figures: list[Figure]) -> str:
    longer, sparse = (values(figures, "loss", who=who) for who in ("longer", "sparse"))
    if not longer or not sparse:
        return ""
    within = "within" if min(longer) <= statistics.mean(sparse) <= max(longer) else "outside"
    told = [
        f"with {TOPK} of {CONTEXT:,} keys the loss is {statistics.mean(sparse):.4f}, {within} the {min(longer):.4f} to "
        f"{max(longer):.4f} of {len(longer)} seeds with all keys and as many tokens"
    ]
    recall = values(figures, "recall", stage="sparse")
    if recall:
        told.append(f"the indexers pick {statistics.mean(recall):.0%} of the top-k keys")
    found = {who: values(figures, "answered", who=who) for who in ("longer", "fresh", "sparse")}
    if all(found.values()):
        shares = ", ".join(f"{who} {statistics.mean(share):.0%}" for who, share in found.items())
        told.append(f"needles found: {shares}")
    return f"Sparse training, next to dense: {'; '.join(told)}."


def plots(figures: list[Figure]) -> list[Plot]:
    return [
        *plots_by_seed(figures, "who", STEPS, {"loss": ("Loss over the held-out text", "nats a byte")}),
        *_over(figures, "recall", "stage", "layer", ("Top-k keys that are picked, seed 0", "share")),
        *_over(figures, "answered", "who", "depth", ("Needles found, seed 0", "share")),
    ]


def _over(figures: list[Figure], metric: str, by: str, along: str, words: tuple[str, str]) -> list[Plot]:
    """Draw a metric of the first seed along a key of its cases, with a group for each value of another."""
    groups: dict[str, dict[str, Figure]] = {}
    for f in pick(figures, metric, seed=0):
        groups.setdefault(str(f.case[by]), {})[f"{along} {f.case[along]}"] = f
    return over_labels(*words, groups)
