"""A whole run: stopping at any moment, giving up, validations, what is drawn, and the sample at the end."""

import dataclasses
import io
import itertools
import math
import os
import random
import shlex
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer, accounting
from dsmini.checkpoint.run_folder import new_run_folder
from dsmini.checkpoint.training_state import load_run
from dsmini.config.run import ParallelConfig
from dsmini.diagnosis.diagnosis import training_subject
from dsmini.distributed.heartbeat import LONG_PHASES
from dsmini.machine import peak_memory
from dsmini.nn.engram import Engram
from dsmini.nn.gate import HashGate, hash_table
from dsmini.text.tokenizer import BPETokenizer, ByteTokenizer, compressed_ids
from dsmini.training import start
from dsmini.training.lookups import make_lookups
from dsmini.training.origin import RunOrigin
from dsmini.training.outputs import next_command, summarise, summary_lines, write_sample
from dsmini.training.plots import plot_run, smooth
from dsmini.training.record import KEYS, History, read_events
from dsmini.training.run import TrainingRun
from dsmini.training.start import refuse_oversized, started
from tests.conftest import SMALL, Clock
from tests.distributed.faults import Fault, inject
from tests.helpers.configs import DSA, V4_MODEL, refusal
from tests.helpers.runs import die, differences, new_run, read_records, resumed
from tests.helpers.text_folders import save_tokenizer, tokenizers

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture
def training(tmp_path: Path) -> TrainingRun:
    return new_run(tmp_path, steps=20, batch_size=2, save_every=400)


def assert_saved(training: TrainingRun, step: int) -> None:
    """Check that the model as it is now is saved after this step, and that each step has its row."""
    assert training.trainer.steps_done == training.saver.saved_at == step
    assert len(read_records(training.folder)) == step
    live = training.trainer.model.state_dict()
    saved, _ = load_run(training.folder)
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.state_dict().items())


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """Make hangups stop a run: under nohup they are ignored, by a run too."""
    before = signal.signal(HUP, signal.SIG_DFL)
    yield
    signal.signal(HUP, before)


@pytest.mark.parametrize(
    ("place", "call", "done", "numbers"),
    [
        ("trainer.step", 0, 1, (TERM, INT)),
        ("trainer.validate", 0, 3, (INT,)),
        ("_keep", 0, 1, (HUP, HUP)),
        # the first block of a validation: on the way, at the end, and with the average; a resumed run scores all
        ("trainer._score", 0, 3, (TERM,)),
        ("trainer._score", 24, 20, (TERM,)),
        ("trainer._score", 30, 20, (TERM,)),
    ],
    ids=str,
)
@pytest.mark.usefixtures("hangups_count")
def test_signals_at_any_moment_stop_after_a_step_and_save(
    tmp_path: Path, place: str, call: int, done: int, numbers: tuple[int, ...]
) -> None:
    """They come as a function is called, after this many calls of it."""
    training = new_run(tmp_path, steps=20, batch_size=2, save_every=400, ema_decay=0.9)
    count = itertools.count()
    training.trainer.validate = partial(training.trainer.validate, tokens_at_a_time=16)
    path, _, name = place.rpartition(".")
    owner: Any = getattr(training, path) if path else training
    real = getattr(owner, name)

    def interrupted(*args: object, **kwargs: object) -> object:
        if next(count) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    setattr(owner, name, interrupted)
    before = [signal.getsignal(number) for number in numbers]
    assert not training.train()
    assert [signal.getsignal(number) for number in numbers] == before
    assert_saved(training, done)
    assert training.trainer.model.training
    if name == "_score":
        assert next(count) == call + 1 and read_records(training.folder)[-1]["val_loss"] is None


def test_a_second_ctrl_c_interrupts_at_once(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.trainer, "step", lambda: [os.kill(os.getpid(), INT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        training.train()
    assert training.trainer.steps_done == 0
    assert read_events(training.folder)[-1]["event"] == "stopped"


def test_wait_for_a_batch_counts_as_no_long_phase(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    phases, waits, take = [""], set(), training.trainer.loader.take
    training.phase = training.trainer.phase = phases.append
    monkeypatch.setattr(training.trainer.loader, "take", lambda of: waits.add(phases[-1]) or take(of))
    assert training.train() and "validating" in phases
    assert waits == {"batch"} and not waits & {*LONG_PHASES}


def test_average_of_the_parameters_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("dsmini.training.start.refuse_too_large", lambda nbytes, *_: asked.append(nbytes))
    for decay in (None, 0.99):
        refuse_oversized(RunConfig(train=TrainConfig(ema_decay=decay)), torch.device("cpu"))
    assert asked[1] - asked[0] == accounting.weight_bytes(RunConfig().model, "float32").total


def test_token_ids_of_a_batch_in_many_parts_count_as_memory() -> None:
    config = RunConfig(train=TrainConfig(batch_size=10**9, grad_accum=10**9))
    assert "training this model with such a batch needs 4," in refusal(refuse_oversized, config, torch.device("cpu"))


def test_default_folders_are_numbered_and_never_shared(tmp_path: Path) -> None:
    first, second = (new_run_folder(None, "toy", tmp_path) for _ in range(2))
    assert (first.name, second.name) == ("toy-001", "toy-002")
    (tmp_path / "toy-017").mkdir()
    assert new_run_folder(None, "toy", tmp_path).name == "toy-018"


def test_validation_is_repeated_at_a_longer_context_and_capped_at_the_end(tmp_path: Path) -> None:
    training = new_run(tmp_path, steps=4, final_eval_tokens=64, eval_context=32)
    training.console = Console(file=io.StringIO(), width=200)
    assert training.train()
    rows, windows = read_records(tmp_path), training.trainer.corpus.windows
    assert [row["step"] for row in rows if row["val_loss_at_eval_context"] is not None] == [3, 4]
    for key, length in (("val_loss", 16), ("val_loss_at_eval_context", 32)):
        assert windows(length, 64).tokens == 64
        assert rows[-1][key] == pytest.approx(training.trainer.validate(windows(length, 64)), rel=1e-6)
    assert rows[-1]["val_loss_at_eval_context"] != rows[-1]["val_loss"]
    said = training.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "validating on 64 of 96 held-out tokens, spread evenly (all of them: --train.final-eval-tokens 96)" in said
    summary = summarise(training)
    assert (summary["val_tokens"], summary["held_out_tokens"]) == (64, 96)
    lines = dict(summary_lines(summary))
    assert "64 of 96 held-out tokens, in windows of 16" in lines["validation"]
    assert "nats in windows of 32" in lines["at context"]


@pytest.mark.parametrize(("trained", "tokens"), [(1_638_400, 819_200), (2048, 131_072)])
def test_final_validation_takes_half_the_trained_tokens(training: TrainingRun, trained: int, tokens: int) -> None:
    trainer = training.trainer
    trainer.corpus = dataclasses.replace(trainer.corpus, val=np.zeros(1_000_000, np.uint8))
    trainer.sequences = trained // trainer.config.seq_len
    assert trainer.final_windows().tokens == tokens


def test_record_has_data_wait_and_memory_of_the_step(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s, of which it waits half a second for its batch."""
    clock, trainer = Clock(monkeypatch), training.trainer
    take = trainer.loader.take

    def slow_take(requests: Any) -> Any:
        clock.pay(0.5)
        return take(requests)

    def phase(name: str) -> None:
        clock.pay(1.5 if name == "optimizer" else 0.0)

    monkeypatch.setattr(trainer.loader, "take", slow_take)
    trainer.phase = phase
    training._keep(trainer.step())
    row = training.history.records[-1]
    assert (row["seconds"], row["data_wait"]) == (2.0, 0.25)
    assert row["memory"] == pytest.approx(peak_memory(torch.device("cpu")), rel=0.01)


def test_drawings_on_the_way_are_far_apart(training: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("dsmini.training.run.plot_run", lambda *_: drawn.append(training.history.seconds))
    for n in range(40):
        training.history.records = [{"seconds": 10.0 * n, "loads": None}]
        if training.history.seconds >= training.next_plot:
            training.plot()
    assert drawn == [100, 200, 300]


def test_picture_that_cannot_be_written_ends_no_run(
    training: TrainingRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several processes it would end rank 0 alone, and the others without a save. The old picture stays."""

    def half(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    (training.folder / "loss.png").write_text("old")
    training.next_plot, training.console.quiet = 0.0, False
    assert training.train()
    assert_saved(training, 20)
    assert f"cannot draw the plots of {training.folder}: No space left" in " ".join(capsys.readouterr().out.split())
    assert [path.read_text() for path in training.folder.glob("*.png*")] == ["old"]


@pytest.mark.filterwarnings("error")
def test_run_without_a_finite_figure_has_a_picture(tmp_path: Path) -> None:
    plot_run(tmp_path, [dict.fromkeys(KEYS) | {"step": 1, "lr": 1e38}], {"block 1": [1.0, 1.0]})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_smoothed_curve_does_not_lag() -> None:
    falling = [10.0 - 0.01 * step for step in range(400)]
    assert np.allclose(smooth([*falling[:200], math.nan, *falling[201:]])[:180], falling[:180], atol=1e-9)
    assert smooth([math.nan, 1.0])[1] == 1.0 and math.isnan(smooth([math.nan])[0])
    noise = [5.0 + (-1) ** step for step in range(401)]
    assert np.abs(smooth(noise)[20:] - 5.0).max() < 0.1


# the sample at the end, and the command that a run offers


@pytest.fixture
def run(tmp_path: Path) -> TrainingRun:
    """Make an untrained run whose tokens are bytes below 61: half of them are control characters."""
    run = new_run(tmp_path, sample_tokens=60)
    run.config = dataclasses.replace(run.config, data=DataConfig(path=tmp_path))
    run.console = Console(file=io.StringIO(), width=80)
    return run


def test_sample_is_shown_without_control_characters(run: TrainingRun) -> None:
    text = write_sample(run)
    shown = run.console.file.getvalue()
    controls = {character for character in text if ord(character) < 32} - set("\n\t")
    assert len(controls) > 5 and not controls & set(shown)
    assert all(chr(0x2400 + ord(character)) in shown for character in controls)


def test_prompt_that_leaves_no_room_is_said_and_the_run_is_whole(run: TrainingRun) -> None:
    train = dataclasses.replace(run.config.train, sample_prompt="1" * 999)
    run.config = dataclasses.replace(run.config, train=train)
    assert write_sample(run) == ""
    assert "no sample: a prompt of 999 tokens" in run.console.file.getvalue()


def test_a_model_without_finite_logits_has_no_sample_and_says_so(run: TrainingRun) -> None:
    torch.nn.init.constant_(run.trainer.model.head.weight, math.nan)
    write_sample(run)
    assert "no sample: " in run.console.file.getvalue()


def test_interrupted_sample_ends_its_line(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.console, "out", Mock(side_effect=[None, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        write_sample(run)
    assert run.console.file.getvalue().endswith(f"\n\n{'─' * 80}\n")


def test_next_command_fits_the_stage_and_the_end_of_the_run(run: TrainingRun) -> None:
    folder = shlex.quote(str(run.folder))
    run.history.records.append({"loss": 1.0})
    assert next_command(run) == f"python -m dsmini.generate {folder}"
    run.config = dataclasses.replace(run.config, data=DataConfig())
    assert next_command(run) == f"python -m dsmini.generate {folder} --prompt 'def '"
    model, train = run.config.model, run.config.train
    sparse = {"model": dataclasses.replace(model, **DSA), "train": dataclasses.replace(train, dsa_stage="warmup")}
    run.config = dataclasses.replace(run.config, **sparse)
    assert next_command(run) == f"python -m dsmini.train --init {folder}"
    run.history.records.append({"loss": None})
    assert next_command(run) == f"python -m dsmini.diagnose {folder}"


# --- spikes of the loss: healthy losses are none, injected ones are; a run goes back before one, and leaves it out


def healthy(seed: int, steps: int = 600) -> list[float]:
    """Return a loss curve: warm-up with a bump, a power law, noise whose size and tails vary, and odd batches."""
    draw = random.Random(seed)
    top, floor, power = draw.uniform(4, 12), draw.uniform(0.5, 2.5), draw.uniform(0.2, 0.8)
    warm, noise = draw.randint(1, 100), draw.choice([0.0, 0.01, 0.05, 0.1, 0.2])
    bump, tail = draw.uniform(0, 0.5), draw.choice([math.inf, 15, 8])
    losses = []
    for step in range(steps):
        learnt = max(1.0, step * min(1.0, step / warm))
        loss = floor + (top - floor) * learnt**-power + bump * math.exp(-(((step - warm) / 10) ** 2))
        scale = noise * (1 + 2 * math.exp(-step / 20))  # the first steps are noisier
        heavy = 1.0 if tail == math.inf else math.sqrt(tail / draw.gammavariate(tail / 2, 2))  # Student's t
        odd = draw.uniform(0.2, 0.6) if draw.random() < 0.01 else 0.0
        losses.append(loss + scale * draw.gauss(0, 1) * heavy + odd)
    return losses


def spikes(losses: list[float]) -> Iterator[int]:
    """Yield the steps whose losses are spikes."""
    history = History(len(losses))
    for step, loss in enumerate(losses):
        if loss > history.spike_limit():
            yield step
        history.add({"loss": loss, "skipped": False})


@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 200), marks=pytest.mark.slow)], ids=str)
def test_healthy_noise_is_no_spike(seeds: range) -> None:
    for seed in seeds:
        assert list(spikes(healthy(seed))) == [], seed


@pytest.mark.parametrize("seed", range(0, 200, 5))
def test_spike_of_a_few_nats_is_found_at_once(seed: int) -> None:
    losses = healthy(seed)
    for at in (300, 599):
        assert next(spikes([loss + (4.0 if step >= at else 0.0) for step, loss in enumerate(losses)])) == at


def test_losses_that_are_not_finite_are_no_spikes() -> None:
    assert list(spikes([2.0] * 40 + [math.nan])) == []
    history = History(40)
    history.records = [{"loss": None}] * 64 + [{"loss": 2.0}] * 31
    assert history.spike_limit() == math.inf
    history.records.append({"loss": 2.0})
    assert history.spike_limit() == 3.0


def test_run_killed_after_a_rewind_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """It meets the spike again, and returns again."""
    options: dict[str, Any] = {"steps": 40, "max_rewinds": 2, "eval_every": 40, "model": {"n_mtp_layers": 0}}
    spikes = [Fault("spike", 0, 36, "forward"), Fault("spike", 0, 37, "forward")]
    never = new_run(tmp_path / "never", **options)
    inject(never, spikes)
    assert never.train()
    training = new_run(tmp_path / "killed", **options)
    inject(training, spikes)
    assert die(training, training.trainer, "forward_backward", 34, number=1) and training.history.rewinds == 1
    next(training.folder.glob("faults-*")).unlink()  # the spike is in the batch, so it comes again
    again = resumed(training.folder, **options)
    assert (again.trainer.steps_done, again.history.rewinds) == (34, 0)
    inject(again, spikes)
    assert again.train() and again.history.rewinds == 2
    assert differences(again.folder, never.folder, 40) == []
    tokens = 64 * len(again.history.records)
    assert summarise(again)["tokens"] == tokens < 16 * again.trainer.sequences, "steps taken back do not count"


def test_infinite_loss_is_skipped_and_no_spike(tmp_path: Path) -> None:
    training = new_run(tmp_path, steps=36, max_rewinds=1, save_every=9, model={"n_mtp_layers": 0})
    inject(training, [Fault("infinite", 0, 34, "forward")])
    assert training.train() and training.history.rewinds == 0
    assert [row["step"] for row in training.history.records if row["skipped"]] == [34]


# --- lookups, made of the text: Engram's ids, which refuse another tokenizer, and V4's tables of experts

MODEL: dict[str, Any] = {"engram_layer_ids": (1,), "engram_vocab_size": 50}


def test_texts_compress_as_the_normalizers_of_the_demo_do(tmp_path: Path) -> None:
    """A part of a character has its own name, and a lone space stays one. The library has the normalizers."""
    library, path = tokenizers(), tmp_path / "tokenizer.json"
    plain = save_tokenizer(path)
    tokenizer = BPETokenizer(path)
    n, alone = library.normalizers, "\ue000"
    steps = [n.NFKC(), n.NFD(), n.StripAccents(), n.Lowercase(), n.Replace(library.Regex(r"[ \t\r\n]+"), " ")]
    steps += [n.Replace(library.Regex(r"^ $"), alone), n.Strip(), n.Replace(alone, " ")]
    seen: dict[str, int] = {}
    want = []
    for token in range(400):
        text = plain.decode([token], skip_special_tokens=False)
        key = plain.id_to_token(token) if "\ufffd" in text else n.Sequence(steps).normalize_str(text) or text
        want.append(seen.setdefault(key, len(seen)))
    got = compressed_ids(tokenizer, 400).tolist()
    assert got == want and 256 < max(got) + 1 < 390
    assert np.array_equal(compressed_ids(ByteTokenizer(), 256), np.arange(256))


def test_a_run_makes_ids_and_refuses_those_of_another_tokenizer(tmp_path: Path) -> None:
    training = new_run(tmp_path, model=MODEL)
    (engram,) = (module for module in training.trainer.model.modules() if isinstance(module, Engram))
    config = RunConfig(model=training.trainer.model.config)
    assert torch.equal(engram.compressed, torch.arange(61))
    make_lookups(training.trainer.model, config, training.trainer.corpus, trained=True)
    engram.compressed[60] = 1
    with pytest.raises(ValueError, match=r"tables of n-grams of another tokenizer than bytes; use the one they were"):
        make_lookups(training.trainer.model, config, training.trainer.corpus, trained=True)


V4: dict[str, Any] = SMALL | V4_MODEL


def test_tables_are_made_of_the_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from weights keeps theirs, whatever its text."""
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    sizes: dict[str, Any] = {"vocab_size": 256, "n_hash_layers": 2}
    model = ModelConfig(**V4 | sizes)
    train = TrainConfig(seq_len=16, device="cpu", dtype="float32")
    config = RunConfig(model=model, train=train, data=DataConfig(path=tmp_path / "book.txt"), out=tmp_path / "x")
    with started(RunOrigin(config=config), config, Console(quiet=True)) as training:
        counts = torch.from_numpy(np.bincount(training.trainer.corpus.train, minlength=256))
        first = training.trainer.model
    assert counts.sum() == int(0.9 * 4500)
    diagnosed = training_subject(tmp_path / "x").trainer.model
    for layer, (gate, of_diagnosis) in enumerate(zip(first.gates()[:2], diagnosed.gates(), strict=False)):
        assert isinstance(gate, HashGate) and isinstance(of_diagnosis, HashGate)
        assert torch.equal(of_diagnosis.tid2eid, gate.tid2eid)
        e, k = len(gate.weight), gate.tid2eid.shape[1]
        assert torch.equal(gate.tid2eid, hash_table(counts, e, k, layer))
    state = Transformer(model).state_dict()
    found = start.Found(folder=tmp_path, rows=lambda name, rows: state[name][rows])
    monkeypatch.setattr(start, "_weights", lambda *_: found)
    weights = RunOrigin(config=config, before=config, init=tmp_path)
    again = dataclasses.replace(config, out=tmp_path / "y")
    with started(weights, again, Console(quiet=True)) as training:
        name = "layers.0.ffn.gate.tid2eid"
        assert torch.equal(training.trainer.model.state_dict()[name], state[name])


def test_attention_without_indexers_goes_with_a_pipeline() -> None:
    config = ModelConfig(**V4 | {"compress_ratios": (0, 8, 8)})
    ParallelConfig(pp=2).check(config, TrainConfig(seq_len=16, grad_accum=2), 2)
