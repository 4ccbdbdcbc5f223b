"""The commands as a user runs them: what they print and store, how a mistake ends, and what all of them share."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro
from rich.console import Console

import dsmini
from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsmini.__main__ import COMMANDS, main
from dsmini.config.run import ParallelConfig
from dsmini.console import command
from dsmini.console.command import outcome_of
from dsmini.console.commandline import field_docstrings, flags, parse
from dsmini.console.messages import printable, say
from dsmini.console.progress import Progress
from dsmini.report.units import human
from tests.conftest import SMALL
from tests.helpers.commands import ROOT, TINY, check_refused, finish, place_with_run, run, run_all, run_apart, start
from tests.helpers.configs import CONFIGS, refusal, written
from tests.helpers.corpora import lay_out
from tests.helpers.released_configs import HF_V3


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """Return a folder with a text and runs/x, a finished run of a tiny model on it, and what that run said."""
    folder = tmp_path_factory.mktemp("place")
    return folder, place_with_run(folder)


@pytest.fixture
def place(finished: tuple[Path, Any]) -> Path:
    return finished[0]


def test_a_run_prints_its_figures_and_a_sample(finished: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    summary = json.loads(finished[1].stdout)
    assert summary["steps"] == 5 and summary["tokens"] == 5 * 4 * 32
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / 0.6931471805599453)
    assert 0 < summary["active_parameters"] < summary["parameters"]
    assert summary["cache_bytes_per_token"] < summary["mha_cache_bytes_per_token"]
    for word in ("sha256", "validation", "tokens/s", "GFLOP/s", "bytes a token", "MaxVio", summary["corpus_sha256"]):
        assert word in finished[1].stderr, word
    assert not re.search(r"^step 1/5 .* left$", finished[1].stderr, re.M), "nobody knows yet"
    assert re.search(r"^step 4/5  loss \d\.\d{3}  [\d,]+ tok/s  lr ", finished[1].stderr, re.M), "progress, in a pipe"
    assert len(summary["sample"].encode("utf-8", "replace")) > 8


def test_a_run_folder_holds_what_the_run_was(place: Path) -> None:
    run_folder = place / "runs/x"
    config = RunConfig.from_file(run_folder / "config.toml")
    assert config.train.device == "cpu" and config.train.dtype in ("float32", "bfloat16") and config.train.threads == 1
    assert config.model.dim == 32 and config.train.steps == 5
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["val_loss"] is not None for row in rows] == [False, True, False, True, True]
    corpus = json.loads((run_folder / "corpus.json").read_text())
    assert corpus["train_tokens"] == 4050 and corpus["val_tokens"] == 450 and len(corpus["sha256"]) == 64
    assert (run_folder / "checkpoints/step-000005/model.safetensors").stat().st_size > 1000
    for picture in ("loss.png", "expert_load.png"):
        assert (run_folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_does_not_end_in_a_traceback(place: Path) -> None:
    command = f"--data.path book.txt --out runs/nan --train.steps 4 --train.lr 1e38 --train.dtype float32 {TINY}"
    ((status, said),) = run_all([("dsmini.train", command)], place)
    assert status == 0, said
    assert "the gradient was not finite; the step was skipped" in said and (place / "runs/nan/loss.png").exists()


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_lose_the_model(place: Path) -> None:
    process = start(f"dsmini.train --data.path book.txt --out runs/head --train.steps 5000 {TINY}", place)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(timeout=120) == 1
    assert list((place / "runs/head").glob("checkpoints/step-*/model.safetensors"))


def test_two_runs_of_the_same_command_are_equal(place: Path) -> None:
    """One of the runs has a process of its own."""
    outs = []
    for name, run_it in (("one", run), ("other", run_apart)):
        options = f"--data.path book.txt --out runs/{name} --train.steps 3 --train.dtype bfloat16 {TINY}"
        done = run_it(f"dsmini.train {options}", place)
        assert done.returncode == 0, done.stderr
        outs.append((place / f"runs/{name}/checkpoints/step-000003/model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_model_of_absurd_depth_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dsmini.training.start.divided_model", lambda *_: pytest.fail("layers were made"))
    deep = ["--model.n-layers", "9999", "--model.dim", "8192", "--out", str(tmp_path / "x")]
    assert "training this model with such a batch needs " in refusal(importlib.import_module("dsmini.train").main, deep)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (TypeError, "Trying to convert Float8_e4m3fn to the MPS backend but it does not have support for that dtype."),
        (NotImplementedError, "The operator 'aten::x' is not currently implemented for the MPS device. If you want"),
        (TypeError, "'int' object is not callable"),
    ],
)
def test_what_apples_gpu_lacks_is_a_sentence(
    kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(args: object) -> int:
        raise kind(words)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back at the end
    with pytest.raises(SystemExit if "MPS" in words else kind):
        command.run(main)
    said = capsys.readouterr().err
    assert said.startswith("error: Apple's GPU cannot run this: T") == ("MPS" in words)
    assert said.endswith("; use the device cpu\n") == ("MPS" in words) and said.count("\n") <= 1


def test_a_config_file_comes_first_and_flags_change_it(place: Path) -> None:
    (place / "my.toml").write_text("[model]\ndim = 48\nq_lora_rank = 'none'\n[train]\nsteps = 7\n")
    finish(f"dsmini.train my.toml --data.path book.txt {TINY} --train.steps 1", place)
    config = RunConfig.from_file(place / "runs/my-001/config.toml")
    assert config.model.dim == 32 and config.train.steps == 1 and config.model.q_lora_rank is None


def test_a_mistake_is_a_sentence_and_status_2(place: Path) -> None:
    lay_out(place, {"short.txt": b"short", "x.json": b"{}", "full/mine.txt": b"mine"})
    lay_out(place, {"typo.toml": b"[model]\nn_layer = 3\n", "section.toml": b"[trian]\nsteps = 3\n"})
    check_refused("dsmini.train", place)


@pytest.fixture(scope="module")
def help_of(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Return the help of each command for each way of asking, in a terminal of 80 columns."""
    asked = [(f"dsmini.{c}", flag) for c in ("train", "generate") for flag in ("--help", "-h", "--help-all")]
    asked.append(("dsmini.train", "mine.toml -h --train.lr 1"))
    folder = tmp_path_factory.mktemp("help")
    (folder / "mine.toml").write_text("[train]\nsteps = 77\ncompile = true\n")
    answers = run_all(asked, folder, columns=80)
    assert [status for status, _ in answers] == [0] * len(asked)
    assert [path.name for path in folder.iterdir()] == ["mine.toml"]
    return {command: said for command, (_, said) in zip(asked, answers, strict=True)}


@pytest.mark.parametrize("command", ["train", "generate"])
def test_help_fits_a_screen_and_shows_flags_that_exist(help_of: dict[tuple[str, str], str], command: str) -> None:
    said, every = (help_of[f"dsmini.{command}", flag] for flag in ("--help", "--help-all"))
    assert said == help_of[f"dsmini.{command}", "-h"]
    assert "Hugging Face folder" in said, "--init and --help name what they take, however short"
    assert len(said.splitlines()) <= 24 and max(map(len, said.splitlines())) <= 80
    assert f"usage: python -m dsmini.{command} " in said and f"python -m dsmini.{command} --help-all" in said
    named = set(re.findall(r"--[a-z][\w.-]*", said)) - {"--help-all"}
    assert len(named) >= 8 and [flag for flag in named if not re.search(f"{flag}[ ,]", every)] == []


def test_help_shows_defaults_those_of_a_config_file_and_several_processes(help_of: dict[tuple[str, str], str]) -> None:
    assert f"--train.steps {RunConfig().train.steps} " in help_of["dsmini.train", "--help"]
    with_file = help_of["dsmini.train", "mine.toml -h --train.lr 1"]
    assert "--train.steps 77 " in with_file and "--train.compile (on) " in with_file
    said = help_of["dsmini.train", "--help"]
    assert "\n  torchrun --nproc-per-node 4 -m dsmini.train --parallel.ep 2\n" in said
    assert all(flag in said for flag in ("--parallel.pp 1 ", "--parallel.ep 1 ", "--resume auto "))


@pytest.mark.parametrize("part", [ModelConfig, DataConfig, TrainConfig, ParallelConfig])
def test_help_all_explains_every_field(help_of: dict[tuple[str, str], str], part: type) -> None:
    said = " ".join(help_of["dsmini.train", "--help-all"].replace("│", " ").split())
    docstrings = field_docstrings(part)
    assert list(docstrings) == [field.name for field in dataclasses.fields(part)]
    for name, docstring in docstrings.items():
        flag = f"--{part.__name__.removesuffix('Config').lower()}.{name.replace('_', '-')}"
        assert re.search(rf"{flag}[ ,].{{0,100}}?{re.escape(docstring)}", said), flag


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("trtion", "error: DSMINI_BACKEND='trtion' is unknown; use one of reference, eager, cpu, triton, or auto"),
        ("triton", "error: DSMINI_BACKEND=triton cannot run here: Triton "),
    ],
)
def test_wrong_backend_is_refused_first(
    place: Path, monkeypatch: pytest.MonkeyPatch, backend: str, sentence: str
) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton can run here")
    monkeypatch.setenv("DSMINI_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    commands = {"train": f"--data.path book.txt --out unmade/x {TINY}", "generate": "runs/x"}
    for name, arguments in (commands | {"convert": "runs/x unmade"}).items():
        check_refused(f"dsmini.{name}", place, {arguments: sentence})


def test_help_comes_from_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module("dsmini.train")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="0"):
            command.main(["--help"])
        assert capsys.readouterr().out[:7] == ("usage: " if rank == "0" else "")


# --- what all commands share: `dsmini COMMAND`, quick imports, printable words, one word after Ctrl-C; and explain

BAD = {
    "trian": "unknown command 'trian'; did you mean 'train'?",
    "zzz": f"unknown command 'zzz'; there are {', '.join(COMMANDS)}",
}
HOSTILE = "name\x1b[31m\x07\x9b2J\r\u202e\x7f"
SHOWN = "name␛[31m␇\ufffd2J␍\ufffd␡"
HEAVY = ("torch", "matplotlib", "tokenizers", "jinja2", "safetensors")
PLAN = f"dsmini.plan {ROOT / 'configs' / 'deepseek-v3.toml'} --json"
# command lines that load none of them; a plan may load jinja2
LIGHT = ["dsmini --help", *(f"dsmini.{name} --help" for name in COMMANDS), PLAN]
PROGRAM = """
import contextlib, io, json, runpy, sys
import dsmini
loaded = {"import dsmini": sorted(set(sys.modules) & set(HEAVY))}
for line in LIGHT:
    module, *sys.argv[1:] = line.split()
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ("usage" if line.endswith("--help") else '"fits": true') in said.getvalue(), line
    loaded[line] = sorted(set(sys.modules) & set(HEAVY))
print(json.dumps(loaded))
"""


def test_script_lists_the_commands_and_runs_them(tmp_path: Path) -> None:
    asked = ["--help", "-h", "", "--version", *BAD, *(f"{name} --help" for name in COMMANDS)]
    alone = [(f"dsmini.{name}", "--help") for name in COMMANDS]
    function = dsmini.generate
    answers = run_all([*(("dsmini", arguments) for arguments in asked), *alone], tmp_path)
    said = dict(zip(asked, answers, strict=False))
    assert said["--help"] == said["-h"] == (0, said[""][1]) and said[""][0] == 2
    lines = said["--help"][1].splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert 20 < len(line) <= 120
    assert said["--version"] == (0, f"dsmini {dsmini.__version__}\n")
    for arguments, sentence in BAD.items():
        assert said[arguments] == (2, f"error: {sentence}\n")
    assert answers[-2 * len(COMMANDS) : -len(COMMANDS)] == answers[-len(COMMANDS) :]
    assert dsmini.generate is function, "the command of that name does not replace it"


def test_no_help_speaks_of_python(tmp_path: Path) -> None:
    for status, said in run_all([(f"dsmini.{name}", "--help-all") for name in COMMANDS if name != "explain"], tmp_path):
        assert status == 0 and "Raises" not in said and "ValueError" not in said


def test_every_help_is_a_screen_in_the_words_of_a_reader(tmp_path: Path) -> None:
    for status, said in run_all([(f"dsmini.{name}", "--help") for name in COMMANDS], tmp_path):
        assert status == 0 and "{None}" not in said and re.search(r"All \d+ in full: .* --help-all\n$", said)
        assert [line for line in said.splitlines() if line != line.rstrip()] == []


def test_help_names_what_a_flag_of_several_values_takes() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Command:
        """Try."""

        python: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
        """Another Python."""

    assert [typed for _, typed, _ in flags(Command)] == ["--python PATH ..."]


def test_flags_leave_a_value_out_by_the_word_of_configs() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Command:
        """Try."""

        threads: int | None = 3
        """Number of threads."""
        rate: float | None = 0.5
        """Rate."""

    for words in (["--threads", "none", "--rate=none"], ["--threads=None", "--rate", "None"]):
        assert parse(Command, "try", words, default=Command()) == Command(threads=None, rate=None)


def test_script_is_installed_as_dsmini() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["dsmini"].partition(":")
    assert list(scripts) == ["dsmini"] and getattr(importlib.import_module(module), name) is main


def test_explain_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    (status, table), (status_json, line) = run_all([("dsmini.explain", ""), ("dsmini.explain", "--json")], tmp_path)
    assert status == status_json == 0
    assert "DSMINI_BACKEND: eager; forced here: eager" in table and "\nlinear " in table and "\nmuon_update " in table
    said = json.loads(line.splitlines()[-1])
    assert said.keys() >= {"quantize", "linear", "blocks_step", "muon_update", "topk_attention"}
    assert said["experts"] == {"backend": "eager", "why": "forced"}
    assert said["quantize"] == {"backend": "reference", "why": "no eager version"}


@pytest.mark.parametrize(
    ("command", "module"), [("plan --help", "tyro.py"), ("train", "dsmini_kernels/cpu/__init__.py")]
)
def test_ctrl_c_at_the_start_is_one_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, module: str
) -> None:
    """A module of the name of the first or of a late import of the command sends the signal. Before, Python answers."""
    lay_out(tmp_path, {"dsmini_kernels/__init__.py": b"", module: b"import os\nos.kill(os.getpid(), 2)\n"})
    monkeypatch.setenv("EXTRA_PATH", str(tmp_path))
    monkeypatch.setenv("DSMINI_BACKEND", "cpu")
    done = run_apart(f"dsmini.{command}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


# words that are not ours reach no terminal as they are


def test_control_characters_become_pictures() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a line\n\tand é 日本 🙂 \u200f") == "a line\n\tand é 日本 🙂 \u200f"


def test_lines_errors_and_warnings_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]12 :smile: " + "x" * 300
    say(Console(width=200), text + HOSTILE)
    assert capsys.readouterr().out == text + SHOWN + "\n"
    program = (
        "import warnings; from dsmini.console.command import run\n"
        "def main(args):\n    warnings.warn(args[0])\n    raise ValueError(args[0])\n"
        "run(main)"
    )
    done = subprocess.run([sys.executable, "-c", program, HOSTILE], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"warning: {SHOWN}\nerror: {SHOWN}\n"


# what a command says of an error that is not the user's


def test_only_what_does_not_fit_is_too_large_for_this_machine() -> None:
    for size in ((1 << 52,), (1 << 40, 1 << 40)):
        with pytest.raises(RuntimeError) as met:
            torch.empty(size)
        assert outcome_of(met.value)[0].startswith("too large for this machine: ")  # pyright: ignore[reportOptionalMemberAccess]
    for words in (
        *("CUDA out of memory. Tried to allocate 2.00 GiB.", "MPS backend out of memory (MPS allocated: 8 GB)"),
        *("CUDA error: out of memory", "not enough memory: you tried to allocate 8 bytes"),
    ):
        assert "too large" in (outcome_of(RuntimeError(words))[0] or ""), words
    for words in (
        *("CUDA error: an illegal memory access was encountered", "CUDA error: misaligned address"),
        *("pin_memory needs a CUDA device", "Expected a tensor in contiguous memory format"),
    ):
        assert outcome_of(RuntimeError(words)) == (None, 1), words


# heavy libraries are loaded where they are used


def printed_by(program: str) -> str:
    """Return what a program prints in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_and_plans_load_no_heavy_library() -> None:
    loaded = json.loads(printed_by(f"HEAVY, LIGHT = {HEAVY!r}, {LIGHT!r}\n{PROGRAM}"))
    assert set(loaded.pop(PLAN)) <= {"jinja2"}, "importing torch alone takes longer than a plan may"
    assert loaded == {line: [] for line in ["import dsmini", *LIGHT[:-1]]}


def test_layers_and_loading_load_no_compiler(tmp_path: Path) -> None:
    """torch._dynamo takes longer to import than all of dsmini."""
    dsmini.save_pretrained(dsmini.Transformer(**SMALL), tmp_path / "m")
    code = f"import sys, dsmini; dsmini.generate, dsmini.load_pretrained({str(tmp_path / 'm')!r})"
    assert printed_by(f"{code}; print('torch._dynamo' in sys.modules)") == "False\n"


# --- plans: answers, JSON, pages, and mistakes

V3 = CONFIGS / "deepseek-v3.toml"
SAYS = tomllib.loads(Path(__file__).with_name("plan_says.toml").read_text())


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder, {"broken.toml": b"[model\n", "empty.toml": b"# nothing\n[train]\n", "taken": b"", "notes.md": b""})
    written(folder, HF_V3, "config.json")
    written(folder, HF_V3 | {"model_type": "deepseek_v41"}, "later.json")
    written(folder, {"model_type": "llama", "hidden_size": 4096}, "llama.json")
    written(folder, {}, "empty.json")
    (folder / "held" / "plan.html").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("place") / "mine.toml", folder)
    return folder


def asked(line: str, planned: Path) -> str:
    """Return what a command says, which must end with status 0."""
    ((status, said),) = run_all([("dsmini.plan", line)], planned, columns=120)
    assert status == 0, said
    return said


def record(line: str, planned: Path) -> Any:
    return json.loads(asked(f"{line} --json", planned).splitlines()[-1])


@pytest.mark.parametrize("line", SAYS)
def test_answer_holds_what_was_asked_for(line: str, planned: Path) -> None:
    said = asked(line, planned).replace("\n", " ")
    assert [words for words in SAYS[line].splitlines() if words not in said] == []
    if "--out" in line:
        folder = planned / line.split()[-1]
        assert (folder / "plan.html").read_text().startswith("<!DOCTYPE html>")
        assert json.loads((folder / "plan.json").read_text())


def test_json_has_every_figure_in_base_units(planned: Path) -> None:
    found = record("deepseek-v3", planned)
    assert found["figures"]["model"]["kv_cache"] == {
        "value": 70272,
        "unit": "B/token",
        "title": "Cache of a token, all layers; V4's without the window",
        "source": "V2, table 1; INS, table 1; V4, section 2.3",
    }
    assert found["layout"]["pipeline"] == 16 and found["hardware"] == "h800" and found["fits"]
    assert found["binds"] == {"training": "compute", "decode": "links", "prefill": "experts"}
    assert found["work"] == {"batch": 15360, "seq_len": 4096, "tokens": pytest.approx(14.8e12, rel=1e-3)}
    decode = found["deployments"]["decode"]
    points = {name: point["gpus"] for name, point in decode["points"].items()}
    assert found["serving"]["context"] == 4096 and points.pop("DeepSeek's own") == 320
    assert points == {"in time": 48, "cheapest": 256, "fastest": 256}
    rates = [each["gpu_tokens_per_second"] for each in decode["front"]]
    assert rates == sorted(rates) and [e["time"] for e in decode["front"]] == sorted(e["time"] for e in decode["front"])
    assert decode["bound"]["gpu_tokens_per_second"] >= max(rates) and decode["left_out"]
    theirs = record("config.json", planned)["figures"]["model"]
    assert {n: f["value"] for n, f in found["figures"]["model"].items()} == {n: f["value"] for n, f in theirs.items()}
    listed = {line.split()[0] for line in asked("deepseek-v3 --explain list", planned).splitlines() if line.strip()}
    assert {name for section in found["figures"].values() for name in section} <= listed
    explained = record("deepseek-v3 --explain kv_cache", planned)
    assert explained["steps"][0]["name"] == "kv_cache"
    assert "kv_lora_rank" in {line["name"] for line in explained["inputs"]}


def test_what_does_not_fit_comes_first_without_a_price_and_with_status_2(planned: Path) -> None:
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v2-lite --hardware h100 --gpus 1")], planned, columns=120)
    _, first, *rest = said.splitlines()
    assert status == 2 and first.startswith("training   does not fit: no layout on gpus=1 fits 90 % of 85.9 GB")
    assert "$" not in said and "tokens/s a GPU" in " ".join(rest)
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v3 --gpus 2048 --sequences 100000")], planned, columns=120)
    assert status == 2 and "decode     does not fit: decode on 256 GPUs takes" in said.splitlines()[1]
    assert "$" not in said and "days" in said
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v3 --gpus 8 --all")], planned, columns=160)
    assert status == 2 and "$" not in said and "decode_time" in said


def test_own_config_lists_the_sizes_that_it_leaves_to_defaults(planned: Path) -> None:
    (planned / "few.toml").write_text("[model]\ndim = 512\nn_layers = 8\n")
    said = asked("few.toml", planned)
    assert "sizes that its file leaves to dsmini's defaults: vocab_size=256" in said.replace("\n", " ")
    assert "defaults:" not in asked("kimi-k2", planned)


def test_json_of_variations_and_searches(planned: Path) -> None:
    pairs = record("deepseek-v3 --vary kv_lora_rank=128,512 hardware=h100,h800 --of kv_cache", planned)["plans"]
    assert [(p["kv_lora_rank"], p["hardware"], p["kv_cache"]) for p in pairs] == [
        (rank, hardware, cache) for rank, cache in ((128, 23_424), (512, 70_272)) for hardware in ("h100", "h800")
    ]
    layouts = record("deepseek-v3 --gpus 256 --schedule 1f1b --recompute full --search --out found", planned)["layouts"]
    times = [layout["step_seconds"] for layout in layouts]
    assert times == sorted(times) and all(layout["gpus"] == 256 and layout["binds"] for layout in layouts)
    assert json.loads((planned / "found/plan.json").read_text())["layouts"] == layouts
    page = re.sub("<[^>]+>", "", (planned / "found/plan.html").read_text())
    assert f"The fullest GPU needs {human(layouts[0]['memory'], 'B')} of" in page, "the page plans the fastest"
    own = record("toy --hardware mine.toml", planned)
    assert own["hardware"] == "mine" and own["layout"]["gpus"] == 1


def test_mistake_of_a_plan_is_a_sentence_and_status_2(planned: Path) -> None:
    check_refused("dsmini.plan", planned)


def test_full_output_is_no_fault_of_a_folder() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dsmini.plan", str(V3)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "free some space or write elsewhere" in done.stderr


def test_ctrl_c_ends_a_search_cleanly(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the first progress, which any search makes, however fast it is."""
    monkeypatch.setattr(Progress, "update", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = run(f"dsmini.plan {V3} --gpus 256 --search", planned)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")
