"""A diagnosis: predictions first, then arms in turns, then the verdict. `answer` is all that the command does.

The predictions are made before any step runs, and shown next to what was measured whatever came out. The folder of a
run, or of a model, is only read.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dsmini import accounting
from dsmini.checkpoint.load import load_pretrained
from dsmini.checkpoint.run_folder import is_model_folder, read_summary, run_config, tokenizer_file
from dsmini.checkpoint.training_state import checkpoint_folders, last_checkpoint, load_run
from dsmini.config import RunConfig
from dsmini.data.corpus import Corpus, cache_next_to, load_corpus
from dsmini.diagnosis import evidence
from dsmini.diagnosis.arms import Arm, measure, patched, predict
from dsmini.diagnosis.decoding import DecodingSubject
from dsmini.diagnosis.findings import other_programs
from dsmini.diagnosis.training import Subject
from dsmini.diagnosis.verdict import Diagnosis
from dsmini.machine import DTYPES, card, cores, pick_device, pick_dtype, refuse_too_large
from dsmini.measure.price import Prices
from dsmini.measure.turns import median_of
from dsmini.nn import Transformer
from dsmini.report.units import plural
from dsmini.training.lookups import make_lookups
from dsmini.training.run import check_state
from dsmini.training.start import refuse_oversized, resolved
from dsmini.training.trainer import Trainer

OnPart = Callable[[float, str, float], None]
"""Told the share that is done, what is next, and the seconds that are left: infinite or nan where nobody knows."""
MOST_ROUNDS = 60
SECONDS = {"train": (75.0, 25.0), "decode": (30.0, 18.0)}
"""Time of the rounds, and that of a quick diagnosis; decoding steps are short."""
PREDICTING = (45.0, 20.0)
"""Time of predictions, and that of a quick diagnosis, after which no operation is timed."""
TOTAL_SECONDS = 150.0
"""Time of predictions, rounds and evidence, so that a command takes less than three minutes where rates are stored. A
quick diagnosis gathers no evidence."""
ROUNDS = 0.65
"""Share of the progress after which rounds are over whose number is given: nobody knows how long they take."""
MOST_TEXT = 1 << 20
"""Tokens of a text that are looked at in decoding."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Time of a diagnosis, and the arms that it tries."""

    seconds: float = 75.0
    """Time of all rounds; infinite where their number is given."""
    predicting: float = PREDICTING[0]
    """Time of predictions. Arms that would need more have none."""
    rounds: int = MOST_ROUNDS
    only: Sequence[str] = ()
    """Names of the arms to try; none: all that apply."""


def answer(
    what: Path | None,
    *,
    work: Literal["train", "decode"] = "train",
    context: int | None = None,
    batch: int | None = None,
    quick: bool = False,
    fresh: bool = False,
    rounds: int | None = None,
    only: Sequence[str] = (),
    on_part: OnPart = lambda share, what, left: None,
) -> Diagnosis:
    """Diagnose training or decoding by a config, a run or a model's folder; gather evidence in the time that is left.

    Args:
        fresh: measure this machine's rates and prices again.
        only: names of the arms to try; none: all that apply.

    Raises: ValueError for what is none of them, a damaged run, a context longer than the model's, and an arm that does
        not apply.
    """
    on_part(0.0, "reading", math.inf)
    subject = training_subject(what) if work == "train" else decoding_subject(what, batch or 1, context)
    device, prices = subject.device, None
    if device.type == "cpu":
        prices = Prices.here(on_part=lambda _, part: on_part(0.0, f"measuring {part}", math.inf), fresh=fresh)
    plan = Plan(seconds=SECONDS[work][quick], predicting=PREDICTING[quick], only=only)
    if rounds is not None:
        plan = dataclasses.replace(plan, seconds=math.inf, rounds=rounds)
    start, seconds = time.perf_counter(), plan.predicting + plan.seconds
    end = 1.0 if quick else min(seconds / TOTAL_SECONDS, 1.0) if rounds is None else ROUNDS
    left = 0.0 if quick else TOTAL_SECONDS - seconds
    found = diagnose(
        subject, plan, prices, lambda share, part: on_part(end * share, part, seconds * (1 - share) + left)
    )
    if not quick and not found.stopped:
        left = max(0.0, TOTAL_SECONDS - (time.perf_counter() - start))
        on_part(end, evidence.NAME, left)
        evidence.gather(found, subject, left)
    found.of = f"{'decoding, ' if work == 'decode' else ''}{what or 'the default run'}"
    found.facts, found.machine = subject.facts, card(device)
    if prices is not None and (disturbed := prices.roofs.disturbed or prices.disturbed):
        found.warnings.append(f"{disturbed[0].upper()}{disturbed[1:]}.")
    return found


def diagnose(
    subject: Subject | DecodingSubject,
    plan: Plan,
    prices: Prices | None,
    on_part: Callable[[float, str], None] = lambda share, what: None,
) -> Diagnosis:
    """Diagnose training or decoding.

    Args:
        prices: this machine's; None: nothing is predicted.
        on_part: told the share of the time that is over and what is next.

    Raises: ValueError for an arm that is unknown or does not apply; KeyboardInterrupt if it is interrupted before
        there are rounds enough for an interval.
    """
    arms = chosen(subject.arms(prices), plan.only)
    tried = [arm for arm in arms if arm.why_not is None]
    on_part(0.0, "predicting")
    begun, predicted = time.perf_counter(), dict[str, float]()
    first = plan.predicting / (plan.predicting + plan.seconds)

    def on_call(_share: float, part: str) -> None:
        on_part(first * min(1.0, (time.perf_counter() - begun) / plan.predicting), part)

    if prices is not None:
        with patched(prices, "until", begun + plan.predicting), patched(prices, "on_part", on_call):
            predicted = predict(tried)
    on_part(first, "looking")
    findings = subject.look()

    def on_turn(share: float, number: int) -> None:
        on_part(first + (1 - first) * share, f"round {min(number + 1, plan.rounds)}")

    with tried[0].apply() as step:
        step(0.0)  # the first one compiles kernels, and the clock of the rounds does not run yet
    subject.turns.clear()
    until = time.perf_counter() + plan.seconds
    compared = measure(tried, predicted, count=plan.rounds, until=until, on_turn=on_turn)
    notes = ["It was interrupted, and rests on the rounds until then."] if compared.stopped else []
    if prices is not None and any(arm.predict and arm.name not in predicted for arm in tried):
        notes.append("Some changes have no prediction, as time for them ran out; the next diagnosis has more.")
    gain = compared.gains.get("all_threads")
    if gain is not None and gain.high < 0:
        used, times = plural(torch.get_num_threads(), "thread"), 1 - gain.value
        notes.append(
            f"On {cores()} cores a step takes {times:.1f} times as long as on {used}: other programs use them. Keep "
            f"--train.threads {torch.get_num_threads()}, or stop the other programs."
        )
    others = None
    if seen := subject.contentions:
        others = median_of([each.loss for each in seen], tail=compared.tail)
        findings.append(other_programs(seen, others, subject.work))
    return Diagnosis(
        compared=compared,
        findings=[*subject.look_back(), *findings],
        others=others if others is not None and others.is_clear else None,
        not_tried={arm.name: arm.why_not for arm in arms if arm.why_not is not None},
        roofs=None if prices is None else prices.roofs,
        forecast=subject.forecast() if compared.plain in predicted else None,
        warnings=notes,
        stopped=compared.stopped,
    )


def chosen(arms: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """Return plain steps and the arms of these names, or all.

    Raises: ValueError for a name that is unknown, or of an arm that does not apply.
    """
    by_name = {arm.name: arm for arm in arms[1:]}
    for name in only:
        if name not in by_name:
            raise ValueError(f"unknown change {name!r}; use one of {', '.join(by_name)}")
        if why := by_name[name].why_not:
            raise ValueError(f"--only {name} does not apply: {why}; leave it out")
    return [arm for arm in arms if not only or arm.name in (arms[0].name, *only)]


# --- what a path names


def config_of(path: Path | None) -> RunConfig:
    """Return the config that a path names: a file, or the folder of a run. Raises: ValueError if it is neither."""
    if path is None:
        return RunConfig()
    return run_config(path) if path.is_dir() else RunConfig.from_file(path)


def training_subject(what: Path | None) -> Subject:
    """Make the subject of a config, or of a run, also a finished one, from its last checkpoint.

    Raises: ValueError for a run that is damaged, and a text that is missing or too short.
    """
    config, run = config_of(what), what if what is not None and what.is_dir() else None
    device = _device_of(config)
    refuse_oversized(config, device)
    config = resolved(config, device)
    if run is not None and (run / "summary.json").exists() and not read_summary(run):
        raise ValueError(f"{run}/summary.json is damaged; remove it, or diagnose the config of the run")
    corpus = _corpus_of(config, run)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model, compute_dtype=DTYPES[config.train.dtype]).to(device)
    trainer = Trainer(model, corpus, config, device)
    if run is not None and checkpoint_folders(run):
        parts, notes = ["model", "optimizer", *([] if trainer.average is None else ["average"])], list[str]()
        checkpoint = last_checkpoint(run, parts, check_state, notes.append)
        _refuse_damaged(run, notes)
        state, done = checkpoint.state, min(checkpoint.state.step, trainer.config.train.steps - 1)
        rest = {"sequences": state.sequences, "average_updates": state.average_updates}
        trainer.load(checkpoint.tensors, steps_done=done, **rest)
    else:
        make_lookups(model, config, corpus)
    return Subject(trainer)


def decoding_subject(what: Path | None, batch: int, context: int | None) -> DecodingSubject:
    """Make the subject of a model that a path names, or of one of a config with random weights.

    Args:
        what: a config, a run, one of its checkpoints, a DeepSeek or Hugging Face folder, or None for the default run.

    Raises: ValueError for a path that is none of them, a damaged run or folder, and a model larger than memory.
    """
    if what is None or not what.is_dir():
        config = config_of(what)
        device, nbytes = _device_of(config), accounting.weight_bytes(config.model, "float32").total
        refuse_too_large(int(nbytes), "this model with random weights", device)
        torch.manual_seed(config.train.seed)
        with torch.device(device):
            model = Transformer(config.model, compute_dtype=pick_dtype("auto", device)).eval()
        return DecodingSubject(model, batch, context)
    device = pick_device("auto")
    if is_model_folder(what):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a folder without its multi-token prediction, and of slow BF16
            return DecodingSubject(load_pretrained(what, device=device), batch, context, trained=True)
    notes: list[str] = []
    model, config = load_run(what, pick_dtype("auto", device), say=notes.append)
    _refuse_damaged(what, notes)
    text, run = None, what if (what / "checkpoints").is_dir() else what.parent.parent
    try:
        corpus = _corpus_of(config, run)
        text, source = torch.as_tensor(corpus.val[:MOST_TEXT].astype("int64")), f"held-out part of {corpus.source}"
    except (ValueError, OSError) as error:  # its text may be gone: decoding does not need it
        source = f"random tokens, as the run's text cannot be read: {error}"
    return DecodingSubject(model.to(device), batch, context, trained=True, text=text, source=source)


def _corpus_of(config: RunConfig, run: Path | None) -> Corpus:
    """Return the text of a config, or of a run with its own tokenizer."""
    data, cache = config.data, cache_next_to(run)
    if run is not None:
        data = dataclasses.replace(data, tokenizer=tokenizer_file(run, config))
    return load_corpus(data, config.seq_len, config.model.vocab_size, cache, config.train.seed)


def _device_of(config: RunConfig) -> torch.device:
    """Return the device of a run, after its threads are set."""
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return pick_device(config.train.device)


def _refuse_damaged(run: Path, notes: Sequence[str]) -> None:
    if notes:
        raise ValueError(f"{run} is damaged: {notes[0]}; resume it once, or name an older copy")
