"""A run that was stopped anywhere and resumed is the run that was never stopped, bit for bit; and what it saves."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.run_folder import lock_run
from dsmini.checkpoint.training_state import Checkpoint, load_run
from dsmini.config.fields import plain
from dsmini.config.run import ParallelConfig
from dsmini.text.tokenizer import byte_tokenizer_json
from dsmini.training import saving
from dsmini.training.origin import RunOrigin, check_init, check_resume, find_origin
from dsmini.training.outputs import summarise
from dsmini.training.record import History, read_events
from dsmini.training.run import TrainingRun
from dsmini.training.start import started
from tests.conftest import SMALL
from tests.helpers.commands import TINY, check_refused, finish, run, run_all, start
from tests.helpers.configs import DSA, GLM, V4_MODEL, refusal
from tests.helpers.runs import RICH, asked_after, die, differences, new_run, resumed, saved, untimed

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "bf16 moments": {"moments": "bfloat16"},
    "average": {"ema_decay": 0.9},
    "accumulation": {"grad_accum": 2},
    "skipped": {"nan_at": (2, 3)},
    "recompute": {"recompute": True},
    "warm-up of indexers": {"model": DSA, "dsa_stage": "warmup", "optimizer": "muon", "ema_decay": 0.9},
    "sparse attention": {"model": DSA, "optimizer": "muon", "recompute": True, "grad_accum": 2},
    "shared choices": {"model": GLM | {"indexer_target": "served"}, "optimizer": "muon", "recompute": True},
    "V4": {"model": V4_MODEL, "optimizer": "muon", "grad_accum": 2, "ema_decay": 0.9},
    "Engram": {"model": {"engram_layer_ids": (0, 1), "engram_vocab_size": 50}, "optimizer": "muon", "grad_accum": 2},
    "rich": RICH,
}
PLACES: dict[str, tuple[int, Callable[[TrainingRun], bool]]] = {
    "between micro-batches": (4, lambda t: die(t, t.trainer, "losses", 5, 1)),
    "after backward": (4, lambda t: die(t, t.trainer, "forward_backward", 5, after=True)),
    "between the optimizers": (4, lambda t: die(t, t.trainer.optimizers[-1], "step", 5)),
    "in the validation": (6, lambda t: die(t, t.trainer, "_score", 6, after=True)),
    "at a disk without room for a row": (5, lambda t: die(t, t, "_record", 5, error=OSError)),
    "after the last row": (8, lambda t: die(t, t, "_record", 8, after=True)),
    "in the last validation": (8, lambda t: die(t, t.trainer, "validate", 8)),
}
"""Places of death, and the step of the checkpoint from which the run continues."""
# every place with everything on, and every option once: together they would take minutes
CASES = [("rich", place) for place in PLACES] + [(name, "after backward") for name in OPTIONS if name != "rich"]
QUICK = {
    ("rich", "at a disk without room for a row"),
    ("rich", "after backward"),
    ("rich", "between the optimizers"),
    ("rich", "in the validation"),
}
QUICK |= {(options, "after backward") for options in ("adamw", "skipped", "sparse attention")}
SLOW = ((os, "fsync"), (shutil, "rmtree"), (saving, "_write_all"))
"""Calls of a save; os.rename is tried by default."""
Start = Callable[[str, Path], TrainingRun]


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a run with these options that nothing stops; trained once."""

    @cache
    def run(name: str) -> Path:
        training = new_run(tmp_path_factory.mktemp("unstopped"), **OPTIONS[name])
        assert training.train()
        return training.folder

    return run


@pytest.fixture(scope="module")
def at_step_4(tmp_path_factory: pytest.TempPathFactory, half: Path) -> Start:
    """Return a function that puts a run which was killed after step 4 into a folder, ready to take step 5."""

    @cache
    def killed(name: str) -> Path:
        if name == "rich":
            return half
        training = new_run(tmp_path_factory.mktemp("killed"), **OPTIONS[name])
        assert die(training, training.trainer, "forward_backward", 4)
        return training.folder

    def begin(name: str, folder: Path) -> TrainingRun:
        shutil.copytree(killed(name), folder, dirs_exist_ok=True)
        return resumed(folder, **OPTIONS[name])

    return begin


@pytest.mark.parametrize(
    ("options", "place"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_resumed_run_is_the_one_never_stopped(
    unstopped: Callable[[str], Path], at_step_4: Start, tmp_path: Path, options: str, place: str
) -> None:
    step, killed = PLACES[place]
    assert killed(at_step_4(options, tmp_path))
    again = resumed(tmp_path, **OPTIONS[options])
    assert again.saver.saved_at == (2 if options == "skipped" else step), (
        "weights that no step moved are not saved again"
    )
    assert again.train()
    assert differences(tmp_path, unstopped(options)) == []


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "rename"), *(pytest.param(o, n, marks=pytest.mark.slow) for o, n in SLOW)]
)
def test_a_run_stopped_at_any_moment_of_a_save(
    unstopped: Callable[[str], Path], at_step_4: Start, tmp_path: Path, owner: Any, name: str
) -> None:
    """Stop before each call of a function by the save after step 6, until it makes no further one."""
    for number in itertools.count():
        folder = tmp_path / f"{number}"
        if not die(at_step_4("rich", folder), owner, name, 6, number):
            assert number > 0
            return
        said: list[str] = []
        again = resumed(folder, said=said, **RICH)
        assert again.saver.saved_at in (4, 6) and said == []  # one or the other whole, and nothing half
        assert again.train()
        assert differences(folder, unstopped("rich")) == []
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_a_run_stopped_again_and_again(unstopped: Callable[[str], Path], tmp_path: Path) -> None:
    """Each time asked to stop, as by Ctrl-C, after one step."""
    training = new_run(tmp_path, **RICH)
    for done in range(8):
        asked_after(training, done)
        assert not training.train()
        training = resumed(tmp_path, **RICH)
    assert training.trainer.steps_done == 8
    assert training.train()
    assert differences(tmp_path, unstopped("rich")) == []


# what is restored besides tensors


def test_steps_skipped_in_a_row_are_counted_across_a_stop(tmp_path: Path) -> None:
    options: dict[str, Any] = {"nan_at": (3, 4), "max_skipped": 2}
    training = new_run(tmp_path, **options)
    asked_after(training, 3)
    assert not training.train()
    with pytest.raises(ArithmeticError, match="in the 2 steps up to step 5"):
        resumed(tmp_path, **options).train()
    assert TrainConfig().max_skipped == 10


def test_a_run_that_gave_up_keeps_what_it_can_go_back_to(tmp_path: Path) -> None:
    """Steps 5 to 8 are skipped: checkpoints of the same weights must not take the place of an earlier one."""
    options: dict[str, Any] = {"steps": 12, "keep": 1, "max_skipped": 4}
    training = new_run(tmp_path, **options, save_every=3, nan_at=tuple(range(4, 12)))
    with pytest.raises(ArithmeticError) as error:
        training.train()
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000008"]
    lower = "--train.lr 0.005"
    advice = f"start from an earlier state with --init {folders[0]} {lower}"
    assert advice in str(error.value)
    with pytest.raises(ArithmeticError) as error:  # its last checkpoint is of the state that gave up
        resumed(shutil.copytree(tmp_path, tmp_path / "copy"), **options, nan_at=(8, 9, 10, 11)).train()
    assert advice.replace(str(tmp_path), str(tmp_path / "copy")) in str(error.value)
    again = resumed(tmp_path, **options, save_every=2, nan_at=(8, 9, 10))  # as many as it had before
    assert again.train()
    assert sum(row["skipped"] for row in again.history.records) == 7
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000012"]


def test_totals_and_plots_cover_the_whole_run(at_step_4: Start, tmp_path: Path) -> None:
    again = at_step_4("rich", tmp_path)
    before = again.history.seconds
    assert again.train()
    summary = summarise(again)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)) == [row["step"] for row in again.history.records]
    assert summary["tokens"] == sum(row["tokens"] for row in rows) == 16 * again.trainer.sequences
    assert summary["train_seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert summary["train_seconds"] > before > 0
    assert summary["skipped"] == 1 and summary["val_loss_ema"] == rows[-1]["val_loss_ema"]
    assert all(len(layer) == 8 for row in rows for layer in row["loads"])
    assert [max(row["layer_max_vio"]) >= row["max_vio"] for row in rows] == [True] * 8


def test_resumed_run_forgets_the_loads_of_old_steps() -> None:
    """They are as long as the run, and stay in metrics.jsonl."""
    history, row = History(20), {"loads": [[1]], "skipped": False}
    state: Any = SimpleNamespace(step=30, row=row | {"step": 30}, skipped_in_a_row=0, rewinds=0)
    assert history.restore(state, (row | {"step": step} for step in range(1, 41)), complete=True) == 0
    assert [bool(row["loads"]) for row in history.records] == [False] * 20 + [True] * 10


# checkpoints that a thread writes


@pytest.fixture
def behind(tmp_path: Path) -> TrainingRun:
    """Return a run that saves in the background, after its first step."""
    training = new_run(tmp_path, save_in_background=True, keep=9)
    (tmp_path / "metrics.jsonl").touch()
    training._keep(training.trainer.step())
    return training


def test_save_in_the_background_has_the_state_it_was_asked_for(
    behind: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed in its first save could never be resumed, if the log told of a checkpoint."""
    opened, real = threading.Event(), saving.save_pieces
    behind.saver.save()
    want = saved(behind.folder, 1)
    shutil.rmtree(behind.folder / "checkpoints")
    (behind.folder / "events.jsonl").unlink()
    monkeypatch.setattr(saving, "save_pieces", lambda *args: (opened.wait(20), real(*args)))
    behind.saver.save(background=True)
    behind._keep(behind.trainer.step())  # every parameter and moment moves while the thread has written nothing
    assert not list(behind.folder.glob("checkpoints/step*"))
    assert [event for event in read_events(behind.folder) if event["event"] == "saved"] == []
    opened.set()
    behind.saver.finish()
    got = saved(behind.folder, 1)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)
    assert [event["step"] for event in read_events(behind.folder) if event["event"] == "saved"] == [1]


def test_thread_of_a_save_does_not_say_that_the_steps_move(behind: TrainingRun) -> None:
    """Else a main thread that hangs would count as saving."""
    threads: set[str] = set()
    behind.phase = behind.trainer.phase = lambda name: threads.add(threading.current_thread().name)
    assert behind.train()
    assert threads == {"MainThread"}


def test_failure_of_a_save_does_not_hide_the_first_error(behind: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "save_pieces", Mock(side_effect=RuntimeError("the second")))
    assert die(behind, behind.trainer, "forward_backward", 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not say which files are mapped")
def test_checkpoint_is_read_once_and_unmapped_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapped file counts as memory, and one that is removed still takes its space."""
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    train = TrainConfig(seq_len=16, device="cpu", dtype="float32", steps=2, save_every=1, final_eval_tokens=64)
    data, out = DataConfig(path=tmp_path / "book.txt"), tmp_path / "run"
    config = RunConfig(model=ModelConfig(**SMALL | {"vocab_size": 256}), train=train, data=data, out=out)
    quiet = Console(quiet=True)
    with started(RunOrigin(config=config), config, quiet) as training:
        training.train()
    read: list[str] = []
    rows = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda self, name, part: (read.append(name), rows(self, name, part))[1])
    for origin, by_rows in ((find_origin(None, out, None), False), (find_origin(None, None, out), True)):
        more = dataclasses.replace(origin.config.train, steps=3, seq_len=16, device="cpu", final_eval_tokens=64)
        name = out if origin.resume else tmp_path / "other"
        config = dataclasses.replace(origin.config, train=more, out=name, data=data)
        with started(origin, config, quiet):
            maps = Path("/proc/self/maps").read_text()
            assert "model.safetensors" not in maps and bool(read) == by_rows


# --- --resume and --init as a user runs them: after a kill, Ctrl-C, changed settings, refusals, and folders of others

TRAIN = f"dsmini.train --data.path book.txt {TINY} --train.dtype float32 --train.save-every 3"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, and a finished run of a tiny model on it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    finish(f"{TRAIN} --train.steps 12 --train.ema-decay 0.9 --out runs/x", folder)
    return folder


def refused(arguments: str, place: Path) -> str:
    """Return what dsmini.train says of a command line, which must end with status 2."""
    done = run(f"dsmini.train {arguments}", place)
    assert done.returncode == 2, done.stderr
    return done.stderr


def killed(place: Path, name: str, step: int) -> Path:
    """Return a copy of runs/x as if it was killed after the checkpoint of a step; 0: before the first one."""
    folder = place / "runs" / name
    shutil.copytree(place / "runs/x", folder)
    for written_at_the_end in ("summary.json", "sample.txt"):
        (folder / written_at_the_end).unlink()
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if checkpoint.name > f"step-{step:06d}":
            shutil.rmtree(checkpoint)
    return folder


def test_killed_run_continues_to_the_same_end(place: Path) -> None:
    """While a run lives nobody else may train in its folder."""
    folder = killed(place, "killed", 9)
    with lock_run(folder):
        assert "another process is training in" in refused(f"--resume {folder}", place)
    done = finish(f"dsmini.train --resume {folder}", place)
    assert "resuming after step 9 of 12 from" in done.stdout
    assert not list(folder.glob("config-until-*")), "nothing was changed"
    assert differences(folder, place / "runs/x", 12) == []
    assert (folder / "sample.txt").read_text() == (place / "runs/x/sample.txt").read_text()


def test_a_stopped_run_says_how_to_go_on(place: Path) -> None:
    folder = place / "runs/stopped run"
    process = start(f"{TRAIN} --train.steps 100000 --out 'runs/stopped run'", place)
    deadline = time.monotonic() + 250
    while not (folder / "checkpoints/step-000003").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 130 and "Traceback" not in err
    done = len(untimed(folder))
    (told,) = [line for line in out.splitlines() if "--resume" in line]
    command = told.removeprefix("Continue with: python -m ")
    again = finish(f"{command} --train.steps {done + 2}", place)
    assert f"resuming after step {done} of {done + 2} from" in again.stdout
    assert f"train.steps: 100000 -> {done + 2}" in again.stdout
    assert "with another train.steps the schedule changes from here on" in again.stdout
    assert [row["step"] for row in untimed(folder)] == list(range(1, done + 3))
    assert RunConfig.from_file(folder / "config.toml").train.steps == done + 2
    assert RunConfig.from_file(folder / f"config-until-step-{done:06d}.toml").train.steps == 100000


@pytest.mark.slow
def test_ctrl_c_in_the_sample_says_how_to_continue(place: Path) -> None:
    """All is trained and saved; the resumed run writes the same figures and its sample."""
    folder = place / "runs/sampling"
    process = start(f"{TRAIN} --train.steps 4 --train.sample-tokens 1000000 --out runs/sampling", place)
    assert process.stdout is not None
    while "a sample at temperature" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 130 and err == "", (out, err)
    assert "stopped after step 4; saved in runs/sampling\nContinue with: python -m dsmini.train --resume" in out
    assert not (folder / "summary.json").exists()
    before = untimed(folder)
    finish("dsmini.train --resume runs/sampling --train.sample-tokens 4", place)
    assert untimed(folder) == before and (folder / "summary.json").exists()


def test_run_killed_before_its_first_checkpoint_starts_again(place: Path) -> None:
    folder, text = killed(place, "early", 0), (place / "book.txt").read_text()
    assert "has saved 4 checkpoints, the last after step 12, and they are gone" in refused("--resume runs/early", place)
    (folder / "events.jsonl").unlink()
    (folder / "checkpoints/.step-000003.partial-1-0123abcd").mkdir()
    done = finish("dsmini.train --resume runs/early", place)
    assert "starting again from step 0 of 12: there is no checkpoint yet" in done.stdout
    assert differences(folder, place / "runs/x", 12) == []
    assert len(list((folder / "checkpoints").iterdir())) == 2
    shutil.rmtree(folder / "checkpoints")
    (folder / "events.jsonl").unlink()
    (place / "book.txt").write_text(text.replace("dog", "cat"))
    assert "book.txt now has" in refused("--resume runs/early", place)
    (place / "book.txt").write_text(text)


def test_what_cannot_go_on_is_a_sentence_and_touches_nothing(place: Path) -> None:
    (place / "out.toml").write_text('out = "runs/y"\n')
    (place / "other.txt").write_text("Another text. " * 100)
    run_all([("dsmini.train", "--resume runs/x --train.steps 99 --data.path other.txt")], place)  # it is tokenized now
    check_refused("dsmini.train", place, "resume")


def test_resume_auto_takes_a_finished_run_as_the_end(place: Path) -> None:
    auto = ["--resume auto --out runs/x", "--out runs/x --resume=auto --init runs/x"]
    answers = run_all([("dsmini.train", line) for line in auto], place)
    assert [(status, said.splitlines()) for status, said in answers] == [(0, ["runs/x is finished"])] * 2


def test_resume_auto_stays_in_its_folder_whatever_the_file_says(place: Path) -> None:
    shutil.copytree(place / "runs/x", place / "runs/again")
    command = "dsmini.train runs/x/config.toml --out runs/again --resume auto --train.device auto --train.steps 13"
    done = finish(f"{command} --train.no-tensorboard --model.norm-topk-prob", place)
    assert "resuming after step 12 of 13" in done.stdout and "bit-identical" not in done.stdout
    assert RunConfig.from_file(place / "runs/again/config.toml").out == Path("runs/again")


@pytest.mark.slow
def test_run_resumes_with_a_moved_text_and_a_lost_tokenizer(place: Path) -> None:
    (place / "moved").mkdir()
    shutil.copy(place / "book.txt", place / "moved.txt")
    options = f"{TINY} --train.dtype float32 --train.save-every 3 --model.vocab-size 300"
    train = f"--data.path moved.txt --data.tokenizer bpe.json {options} --train.steps 3 --out runs/moved"
    made = run_all([("dsmini.tokenize", "book.txt --vocab-size 300 --out bpe.json"), ("dsmini.train", train)], place)
    assert [status for status, _ in made] == [0, 0], made
    (place / "moved.txt").rename(place / "moved/text.txt")
    (place / "bpe.json").rename(place / "same.json")
    (place / "another.json").write_text((place / "same.json").read_text() + " ")
    flags = ("--data.path moved/text.txt --train.steps 6", "--train.steps 7 --data.tokenizer same.json")
    flags += ("--train.steps 8 --data.tokenizer another.json", "--train.steps 8 --data.tokenizer nowhere.json")
    again = [("dsmini.train", f"--resume runs/moved {more}") for more in flags]
    (first, said), (second, _), (other, refused), (nowhere, missing) = run_all(again, place)
    assert (first, second) == (0, 0), said
    assert f"data.path: {place.resolve() / 'moved.txt'} -> {place.resolve() / 'moved/text.txt'}" in said
    assert "bit-identical" not in said
    data = RunConfig.from_file(place / "runs/moved/config.toml").data
    assert data.path == place.resolve() / "moved/text.txt" and data.tokenizer == place.resolve() / "same.json"
    assert other == nowhere == 2 and "another.json is another tokenizer" in refused and "there is no file" in missing


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(place: Path) -> None:
    shutil.copytree(place / "runs/x", place / "runs/damaged")
    with (place / "runs/damaged/checkpoints/step-000012/model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    for command in ("generate runs/damaged --max-new-tokens 2 --average", "train --resume runs/damaged"):
        done = run(f"dsmini.{command}", place)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said
        assert "step-000012: model.safetensors has sha256" in said and "using step-000009, the one before" in said
    assert untimed(place / "runs/damaged") == untimed(place / "runs/x")


# --- --init with a DeepSeek or Hugging Face folder

STILL = "--train.optimizer adamw --train.lr 1e-9 --train.gate-lr 1e-9 --train.bias-speed 0 --train.sample-tokens 0"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a text, and a model stored in FP32 and in FP8."""
    folder = tmp_path_factory.mktemp("folders")
    (folder / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    model = Transformer(ModelConfig(**SMALL | {"vocab_size": 256}))
    save_pretrained(model, folder / "float32")
    save_pretrained(model.bfloat16(), folder / "fp8", fp8=True)
    return folder


def test_a_run_starts_from_a_folder_and_may_extend_its_context(models: Path) -> None:
    longer = "--model.max-seq-len 128 --model.original-seq-len 32 --model.rope-factor 4 --train.seq-len 128"
    train = f"--init fp8 --data.path book.txt --train.steps 2 --train.batch-size 2 {longer} {STILL}"
    assert "weights fp8" in finish(f"dsmini.train {train}", models).stdout
    model, config = load_run(models / "runs/fp8-001")
    assert config.model.extended and config.seq_len == 128
    assert json.loads((models / "runs/fp8-001/init.json").read_text()) == {"folder": str((models / "fp8").resolve())}
    before, after = load_pretrained(models / "fp8", torch.float32).state_dict(), model.state_dict()
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-6) for name in before)
    shutil.rmtree(models / "runs/fp8-001/checkpoints")  # as if killed before the first one
    (models / "runs/fp8-001/events.jsonl").unlink()
    (models / "runs/fp8-001/summary.json").unlink()
    assert "starting again from step 0 of 2" in finish("dsmini.train --resume runs/fp8-001", models).stdout
    model, _ = load_run(models / "runs/fp8-001")
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())


def test_tokenizer_and_length_of_a_folder_are_used(models: Path) -> None:
    own = models / "own"
    shutil.copytree(models / "float32", own)
    config = json.loads((own / "config.json").read_text())
    (own / "tokenizer.json").write_text(byte_tokenizer_json())

    def begun() -> RunConfig:
        origin = find_origin(None, None, own)
        return origin.accept(origin.config)

    found = begun()
    assert found.data.tokenizer is None and found.seq_len == config["max_position_embeddings"]
    (own / "tokenizer.json").write_text(byte_tokenizer_json().replace('"version"', '"truncation": null, "version"'))
    (own / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    long = begun()
    assert (long.data.tokenizer, long.model.max_seq_len, long.seq_len) == (own / "tokenizer.json", 100_000, 512)


# --- the changes that a resumed run may make, those that other weights allow, and where each setting comes from

OLD = RunConfig(out=Path("runs/x"))
OTHERS = tomllib.loads(Path(__file__).with_name("other_values.toml").read_text())
BASES: dict[str, Any] = {"toy": {}, "gqa": {"attention": "gqa", "n_kv_heads": 2}, "dsa": DSA, "v4": V4_MODEL}
BASES["engram"] = {"engram_layer_ids": (1, 2)}
OTHER_BITS = "the result is no longer bit-identical to an unstopped run's"
EFFECTS: list[tuple[str, dict[str, Any], str]] = [  # changes, and what follows the lines of the keys
    ("data", dict(path=Path("x"), workers=2), ""),
    ("train", dict(max_skipped=3, max_rewinds=3, save_every=3, keep=3, save_in_background=True, tensorboard=True), ""),
    ("train", dict(eval_every=3, eval_tokens=3, eval_context=9, diagnose=True, sample_tokens=3, sample_prompt="x"), ""),
    ("train", dict(threads=3, dtype="float32", recompute=True, compile=True), OTHER_BITS),
    ("parallel", dict(ep=2, zero=1), OTHER_BITS),
    ("train", dict(steps=9, lr=1.0, batch_size=8, mtp_weight=1.0), "the schedule changes from here on"),
]
REFUSED: dict[str, dict[str, Any]] = {
    "data": dict(val_fraction=0.2, fim_rate=0.5, document_mask=True, tokenizer=Path("x")),
    "train": dict(seed=1, seq_len=99, optimizer="adamw", moments="bfloat16", ema_decay=0.5),
}


def changed(part: str, old: RunConfig = OLD, **changes: Any) -> RunConfig:
    return dataclasses.replace(old, **{part: dataclasses.replace(getattr(old, part), **changes)})


@pytest.mark.parametrize(("part", "changes", "words"), EFFECTS)
def test_what_a_resumed_run_may_change(part: str, changes: dict[str, Any], words: str) -> None:
    lines = check_resume(OLD, changed(part, **changes))
    assert {line.split(": ")[0] for line in lines[: len(changes)]} == {f"{part}.{key}" for key in changes}
    effect = lines[len(changes) :]
    assert len(effect) == bool(words) and all(re.match(f"with another .* {words}$", line) for line in effect)


@pytest.mark.parametrize("part", REFUSED)
def test_every_key_that_makes_it_another_run_is_named(part: str) -> None:
    with pytest.raises(ValueError, match=r"^a run cannot be resumed with another .*--init runs/x$") as error:
        check_resume(OLD, changed(part, changed("train", lr=1.0), **REFUSED[part]))
    assert all(f"{part}.{key} (" in str(error.value) for key in REFUSED[part])
    assert "train.lr" not in str(error.value)


def test_average_and_tokenizer_may_change_but_not_begin_or_end() -> None:
    for part, key, one, other in (("train", "ema_decay", 0.9, 0.99), ("data", "tokenizer", Path("x"), Path("y"))):
        with_one = changed(part, **{key: one})
        assert check_resume(with_one, changed(part, **{key: other}))[0] == f"{part}.{key}: {one} -> {other}"
        with pytest.raises(ValueError, match=rf"{key} \({one} -> none\)"):
            check_resume(with_one, OLD)
    assert check_resume(OLD, OLD) == []


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}


@pytest.mark.parametrize(("base", "key"), [(base, key) for base in BASES for key in OTHERS[base]])
def test_another_model_takes_weights_of_its_shapes_alone(base: str, key: str) -> None:
    value, old = OTHERS[base][key], ModelConfig(**BASES[base])
    new = dataclasses.replace(old, **{key: None if value == "none" else value})
    assert f"model.{key} (" in refusal(check_resume, *(dataclasses.replace(OLD, model=model) for model in (old, new)))
    if shapes(new) == shapes(old):
        check_init(old, new, "runs/x")
    else:
        said = refusal(check_init, old, new, "runs/x")
        assert f"weights of runs/x do not fit model.{key}={plain(getattr(new, key))} (there" in said


def test_a_dense_run_is_not_resumed_as_sparse() -> None:
    sentence = r"^runs/x has no indexers, .* python -m dsmini.convert runs/x OUT --dsa, and start .* --init OUT$"
    with pytest.raises(ValueError, match=sentence):
        check_resume(OLD, dataclasses.replace(OLD, model=ModelConfig(**DSA)))
    with pytest.raises(ValueError, match=sentence):
        check_init(OLD.model, ModelConfig(**DSA), "runs/x")


def test_every_key_of_the_model_is_judged_here() -> None:
    """A new key must be thought about: does it change shapes?"""
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {
        "precision",
        *(key for of in OTHERS.values() for key in of),
    }
    effects = {f.metadata["resume"] for part in (DataConfig, ParallelConfig) for f in dataclasses.fields(part)}
    assert effects <= {"refused", "rounding", "none"}


def test_a_file_changes_a_base(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("[model]\nmax_seq_len = 1024\n[train]\nlr = 0.5\n")
    base = RunConfig(model=ModelConfig(dim=64), train=TrainConfig(steps=3), out=Path("y"))
    config = RunConfig.from_file(tmp_path / "x.toml", base)
    assert config == RunConfig(
        model=ModelConfig(dim=64, max_seq_len=1024), train=TrainConfig(steps=3, lr=0.5), out=Path("y")
    )
