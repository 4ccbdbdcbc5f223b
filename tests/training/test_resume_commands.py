"""--resume and --init as a user runs them: after a kill, Ctrl-C, changed settings, refusals, and folders of others."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from dsmini import ModelConfig, RunConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.run_folder import lock_run
from dsmini.checkpoint.training_state import load_run
from dsmini.text.tokenizer import byte_tokenizer_json
from dsmini.training.origin import find_origin
from tests.conftest import SMALL
from tests.helpers.commands import TINY, check_refused, finish, run, run_all, start
from tests.helpers.runs import differences, untimed

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
