"""python -m dsmini.plan as a user runs it: answers, JSON, pages, and mistakes in one sentence."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmini.console.progress import Progress
from tests.helpers.commands import ROOT, check_refused, run, run_all, run_apart
from tests.helpers.configs import CONFIGS
from tests.helpers.released_configs import HF_V3

V3 = CONFIGS / "deepseek-v3.toml"
ASKED = {
    "plan": "deepseek-v3",
    "tables": f"{V3} --all",
    "alone": f"{CONFIGS / 'deepseek-v2-lite.toml'} --hardware h100 --gpus 1",
    "json": f"{V3} --json",
    "hf": "config.json --json",
    "explain": f"{V3} --explain kv_cache",
    "explain json": f"{V3} --explain kv_cache --json",
    "list": f"{V3} --explain list",
    "published": "--published",
    "published json": "--published --json",
    "vary": f"{V3} --vary kv_lora_rank=128,512",
    "pairs": f"{V3} --vary kv_lora_rank=128,512 hardware=h100,h800 --of kv_cache --json",
    "search": f"{V3} --gpus 256 --schedule 1f1b --recompute full --search --json",
    "page": f"{CONFIGS / 'toy.toml'} --out page",
    "page of a variation": f"{CONFIGS / 'toy.toml'} --vary batch=4,8 --out varied",
    "own hardware": f"{CONFIGS / 'toy.toml'} --hardware mine.toml --json",
}
EVERY_FLAG = "Every flag: python -m dsmini.plan --help-all"
BAD = {
    "": "a plan needs a config; name a .toml or .json",
    "nothing.toml": "there is no file nothing.toml",
    "llama.json": "llama.json",
    "broken.toml": "broken.toml",
    f"{V3} --hardware h9000": "unknown hardware 'h9000'; use one of",
    f"{V3} --hardware laptop": "no layout on gpus=1 fits 17.2 GB a GPU",
    f"{V3} --gpus 8 --search --schedule 1f1b --recompute full": "no layout on gpus=8 fits 80 GB a GPU",
    f"{V3} --gpus 2048 --pipeline 7": "pipeline=7 and tensor=1 do not divide gpus=2048",
    f"{V3} --gpus 2048 --pipeline 64": "pipeline=64 is more than n_layers=61",
    f"{V3} --gpus 1 --zero 1": "zero=1 divides the state over data-parallel GPUs, of which there is one",
    f"{V3} --vary kv_lora=1": "unknown --vary name 'kv_lora'; did you mean kv_lora_rank",
    f"{V3} --vary kv_lora_rank=x": "kv_lora_rank='x' is not a whole number",
    f"{V3} --vary batch=1 --vary batch=2": "--vary is given twice",
    f"{V3} --explain kv": "unknown figure 'kv'",
    f"{V3} --search --vary batch=1": "--search and --vary are different questions",
    f"{V3} --all --search": "--search and --all are different questions",
    f"{V3} --vary norm_topk_prob=maybe": "norm_topk_prob='maybe' is not true or false",
    f"{V3} --hardware h9000 --out taken": "--out taken cannot be written: it is a file; choose another folder",
    f"{V3} --search --pipeline 4": "--search chooses pipeline",
    f"{V3} --of kv_cache": "--of names the figures that --vary compares",
    f"{V3} --explain list --out page": "--explain prints one figure, and --out writes a page",
    f"{V3} --context 1000000": "context=1000000 is longer than the model's max_seq_len=163840",
    f"{V3} --hardware a100-pcie --precision fp8": "has no fp8 units",
    f"{V3} --out taken": "--out taken cannot be written: it is a file; choose another folder",
    f"{V3} --published": "--published compares published runs, and takes no config; leave out",
    "--published --hardware foo --gpus=7": "--published compares published runs alone, without --gpus, --hardware;",
    f"{V3} --out ''": "--out '' names no folder; name one, such as --out plan",
    f"{V3} --out=": "--out '' names no folder",
    "empty.toml": "empty.toml has no size of a model; write some, or name a config",
    "later.json": "later.json has model_type='deepseek_v4'; dsmini reads deepseek_v2, deepseek_v3, deepseek_v32 and",
    "empty.json": "empty.json has no size of a model",
    f"{V3} extra": "error: unexpected 'extra'; leave it out, or see python -m dsmini.plan --help",
    ".": ". is a folder; name the config in it, such as config.json",
    "notes.md": "notes.md is no .toml or .json; name a config",
    f"{V3} --gpus x": "error: --gpus 'x' is not a whole number; change it, or leave the flag out",
    f"{V3} --tokens=many": "error: --tokens 'many' is not a number; change it",
    f"{V3} --zero 7": "error: --zero '7' is not one of 0, 1, 2, 3; change it",
    f"{V3} --vary": "--vary needs a value, got nothing",
    f"{V3} --gpus --search": "error: --gpus needs a value, got --search",
    f"{V3} --gpus 0": "error: gpus=0 is not positive; use 1 or more",
    f"{V3} --drafts -1": "error: drafts=-1 is negative; use 0 or more",
    f"{V3} --batchs 3": f"error: unknown flag '--batchs'; did you mean --batch? {EVERY_FLAG}",
    f"{V3} --zzz 3": f"error: unknown flag '--zzz'. {EVERY_FLAG}",
}
MINE = """
title = "My own GPU"
peaks.bfloat16 = { value = 100, unit = "TFLOP/s", source = "measured" }
memory = { value = 24, unit = "GB", source = "data sheet" }
memory_bandwidth = { value = 1, unit = "TB/s", source = "data sheet" }
gpus_per_node = { value = 1, source = "one of them" }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "config.json").write_text(json.dumps(HF_V3))
    (folder / "llama.json").write_text('{"model_type": "llama", "hidden_size": 4096}')
    (folder / "broken.toml").write_text("[model\n")
    (folder / "taken").write_text("")
    (folder / "empty.toml").write_text("# nothing\n[train]\n")
    (folder / "later.json").write_text(json.dumps(HF_V3 | {"model_type": "deepseek_v4"}))
    (folder / "empty.json").write_text("{}")
    (folder / "notes.md").write_text("# Notes\n")
    (folder / "mine.toml").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def said(place: Path) -> dict[str, str]:
    """Run all commands once; each must end with status 0."""
    answers = run_all([("dsmini.plan", line) for line in ASKED.values()], place, columns=120)
    assert [status for status, _ in answers] == [0] * len(ASKED), answers
    return dict(zip(ASKED, (output for _, output in answers), strict=True))


def record(output: str) -> Any:
    return json.loads(output.splitlines()[-1])


def test_plan_is_ten_lines_that_answer_each_question(said: dict[str, str]) -> None:
    for words in (
        "deepseek-v3 on NVIDIA H800 SXM",
        "as DeepSeek-V3 was trained",
        "671 billion parameters, of which a token uses 36.6 billion",
        "2,048 GPUs take 54.1 days and $5.32 million for 14.8 trillion tokens",
        "60 sequences of 4,096 tokens a GPU take 77.7 GB of 80 GB: 39.0 tokens/s each",
        "A failure every 14.4 h",
        "compute, 87 % of a step; next: waiting in the pipeline",
        "--explain kv_cache",
    ):
        assert words in said["plan"].replace("\n", " "), words
    labels = [line.split()[0] for line in said["plan"].splitlines() if line[:1].isalpha() and line[9:10] == " "]
    assert {"model", "training", "time", "failures", "decode", "prefill", "next"} <= set(labels)


def test_all_shows_the_tables(said: dict[str, str]) -> None:
    for words in ("What does serving take?", "decode_longest_context", "Binds: compute, 87 % of a step"):
        assert words in said["tables"], words


def test_serving_is_planned_where_training_does_not_fit(said: dict[str, str]) -> None:
    assert (
        "It does not fit: no layout on gpus=1 fits 80 GB a GPU" in said["alone"] and "tokens/s a GPU" in said["alone"]
    )


def test_json_has_every_figure_in_base_units(said: dict[str, str]) -> None:
    found = record(said["json"])
    assert found["figures"]["model"]["kv_cache"] == {
        "value": 70272,
        "unit": "B/token",
        "title": "Cache of a token, all layers",
        "source": "V2, table 1; INS, table 1",
    }
    assert found["layout"]["pipeline"] == 16 and found["hardware"] == "h800" and found["fits"]
    assert found["binds"] == {"training": "compute", "decode": "memory traffic", "prefill": "links between nodes"}
    assert sum(map(len, found["figures"].values())) > 180


def test_hugging_face_config_is_the_same_model(said: dict[str, str]) -> None:
    ours, theirs = record(said["json"])["figures"], record(said["hf"])["figures"]
    assert {n: f["value"] for n, f in ours["model"].items()} == {n: f["value"] for n, f in theirs["model"].items()}


def test_explanation_goes_down_to_inputs_with_sources(said: dict[str, str]) -> None:
    for words in ("= n_layers × cache_row", "70.3 kB/token (70,272 B/token)", "kv_lora_rank = 512", "deepseek-v3.toml"):  # noqa: RUF001
        assert words in said["explain"], words
    found = record(said["explain json"])
    assert found["steps"][0]["name"] == "kv_cache"
    assert "kv_lora_rank" in {line["name"] for line in found["inputs"]}


def test_list_names_every_figure(said: dict[str, str]) -> None:
    named = {line.split()[0] for line in said["list"].splitlines() if line.strip()}
    figures = record(said["json"])["figures"]
    assert {name for section in figures.values() for name in section} <= named


def test_published_figures_are_shown_without_a_config(said: dict[str, str]) -> None:
    assert "10 are reproduced from sizes of models and machines, 4 follow" in said["published"].replace("\n", " ")
    rows = {row["name"]: row for row in record(said["published json"])}
    assert rows["v3_parameters"]["ours"] == 671_026_404_352
    assert rows["v3_bubble"]["status"] == "missed" and rows["v3_bubble"]["residual"] == pytest.approx(-0.4981, abs=1e-4)


def test_variation_shows_values(said: dict[str, str]) -> None:
    assert "23.4 kB/token" in said["vary"] and "70.3 kB/token" in said["vary"]
    places = record(said["pairs"])["plans"]
    assert [(p["kv_lora_rank"], p["hardware"], p["kv_cache"]) for p in places] == [
        (128, "h100", 23_424),
        (128, "h800", 23_424),
        (512, "h100", 70_272),
        (512, "h800", 70_272),
    ]


def test_search_finds_layouts_with_what_binds_them(said: dict[str, str]) -> None:
    layouts = record(said["search"])["layouts"]
    times = [layout["step_seconds"] for layout in layouts]
    assert times == sorted(times) and all(layout["gpus"] == 256 and layout["binds"] for layout in layouts)
    assert all(layout["memory"] <= 80e9 for layout in layouts)


def test_out_writes_a_page_and_json(said: dict[str, str], place: Path) -> None:
    for folder in ("page", "varied"):
        assert f"written  {folder}/plan.html" in said["page" if folder == "page" else "page of a variation"]
        assert (place / folder / "plan.html").read_text().startswith("<!DOCTYPE html>")
        assert json.loads((place / folder / "plan.json").read_text())


def test_own_hardware_file(said: dict[str, str]) -> None:
    found = record(said["own hardware"])
    assert found["hardware"] == "mine" and found["layout"]["gpus"] == 1


def test_mistake_is_a_sentence_and_status_2(place: Path) -> None:
    check_refused("dsmini.plan", BAD, place)


def test_help_names_the_choices_of_a_flag_without_a_default(place: Path) -> None:
    ((status, output),) = run_all([("dsmini.plan", "--help")], place, columns=120)
    assert status == 0 and "--recompute none|selective|full" in output and "--zero 0|1|2|3" in output
    assert "--gpus INT" in output and "LITERAL" not in output


def test_full_output_is_no_fault_of_a_folder() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dsmini.plan", str(V3)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "free some space or write elsewhere" in done.stderr


@pytest.mark.parametrize("command", ["plan", pytest.param("tokenize", marks=pytest.mark.slow)])
def test_ctrl_c_while_modules_load_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A module of the name of the first one that a command loads sends the signal."""
    (tmp_path / "tyro.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    monkeypatch.setenv("EXTRA_PATH", str(tmp_path))
    done = run_apart(f"dsmini.{command} --help", tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


def test_ctrl_c_ends_a_search_cleanly(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the first progress, which any search makes, however fast it is."""
    monkeypatch.setattr(Progress, "update", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = run(f"dsmini.plan {V3} --gpus 256 --search", place)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")
