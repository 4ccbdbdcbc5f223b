"""python -m dsmini.plan as a user runs it: answers, JSON, pages, and mistakes in one sentence."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsmini.console.progress import Progress
from dsmini.report.units import human
from tests.helpers.commands import ROOT, check_refused, run, run_all, run_apart
from tests.helpers.configs import CONFIGS
from tests.helpers.released_configs import HF_V3

V3 = CONFIGS / "deepseek-v3.toml"
SAYS = {  # a command line, and what it says among other things; tests/planner has whole pages
    "deepseek-v3": """\
as DeepSeek-V3 was trained
2,048 GPUs take 54.1 days and $5.31 million for 14.8 trillion tokens
64 sequences of 4,096 tokens a GPU take 82.3 GB of 85.9 GB: at most 37.0 tokens/s each
DeepSeek measured 1,850 tokens/s a GPU
A failure every 14.4 h
compute, 87 % of a step; next: waiting in the pipeline""",
    "deepseek-v3 --all": "What does serving take?\ndecode_longest_context\nslowest    compute, 87 % of a step",
    "deepseek-v2-lite --hardware h100 --gpus 1": "It does not fit: no layout on gpus=1 fits 85.9 GB\ntokens/s a GPU",
    "deepseek-v2 --hardware b200": "No price of this hardware is published\nwith --precision fp8 this layout",
    "toy": "4.54 million parameters (5.96 million with multi-token prediction)",
    "--compare v3 v3.2 kimi-k2": "on 2,048 GPUs of NVIDIA H800\nkimi-k2\nNumber of tokens",
    "deepseek-v3 --explain mfu --depth 1": "step_seconds\nfigures and inputs more are further away",
    "deepseek-v3 --vary hardware=h100,h800 --of training_cost": "no price of h100 is published; --price",
    "deepseek-v3 --explain kv_cache": "70.3 kB/token (70,272 B/token)\nkv_lora_rank = 512\ndeepseek-v3.toml",
    "--published": "19 are reproduced from sizes of models and machines, 6 follow",
    "deepseek-v3 --vary kv_lora_rank=128,512": "23.4 kB/token\n70.3 kB/token",
    "toy --out page": "written  page/plan.html",
    "toy --vary batch=4,8 --out varied": "written  varied/plan.html",
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
    (folder / "later.json").write_text(json.dumps(HF_V3 | {"model_type": "deepseek_v41"}))
    (folder / "empty.json").write_text("{}")
    (folder / "notes.md").write_text("# Notes\n")
    (folder / "mine.toml").write_text(MINE)
    return folder


def asked(line: str, place: Path) -> str:
    """Return what a command says, which must end with status 0."""
    ((status, said),) = run_all([("dsmini.plan", line)], place, columns=120)
    assert status == 0, said
    return said


def record(line: str, place: Path) -> Any:
    return json.loads(asked(f"{line} --json", place).splitlines()[-1])


@pytest.mark.parametrize("line", SAYS)
def test_answer_holds_what_was_asked_for(line: str, place: Path) -> None:
    said = asked(line, place).replace("\n", " ")
    assert [words for words in SAYS[line].splitlines() if words not in said] == []
    if "--out" in line:
        folder = place / line.split()[-1]
        assert (folder / "plan.html").read_text().startswith("<!DOCTYPE html>")
        assert json.loads((folder / "plan.json").read_text())


def test_json_has_every_figure_in_base_units(place: Path) -> None:
    found = record("deepseek-v3", place)
    assert found["figures"]["model"]["kv_cache"] == {
        "value": 70272,
        "unit": "B/token",
        "title": "Cache of a token, all layers",
        "source": "V2, table 1; INS, table 1",
    }
    assert found["layout"]["pipeline"] == 16 and found["hardware"] == "h800" and found["fits"]
    assert found["binds"] == {"training": "compute", "decode": "memory traffic", "prefill": "links between nodes"}
    assert sum(map(len, found["figures"].values())) > 150
    theirs = record("config.json", place)["figures"]["model"]
    assert {n: f["value"] for n, f in found["figures"]["model"].items()} == {n: f["value"] for n, f in theirs.items()}
    listed = {line.split()[0] for line in asked("deepseek-v3 --explain list", place).splitlines() if line.strip()}
    assert {name for section in found["figures"].values() for name in section} <= listed
    explained = record("deepseek-v3 --explain kv_cache", place)
    assert explained["steps"][0]["name"] == "kv_cache"
    assert "kv_lora_rank" in {line["name"] for line in explained["inputs"]}


def test_json_of_published_figures_variations_and_searches(place: Path) -> None:
    rows = {row["name"]: row for row in record("--published", place)}
    assert rows["v3_parameters"]["ours"] == 671_026_404_352
    assert rows["v3_bubble"]["status"] == "missed" and rows["v3_bubble"]["residual"] == pytest.approx(-0.5109, abs=1e-4)
    pairs = record("deepseek-v3 --vary kv_lora_rank=128,512 hardware=h100,h800 --of kv_cache", place)["plans"]
    assert [(p["kv_lora_rank"], p["hardware"], p["kv_cache"]) for p in pairs] == [
        (rank, hardware, cache) for rank, cache in ((128, 23_424), (512, 70_272)) for hardware in ("h100", "h800")
    ]
    layouts = record("deepseek-v3 --gpus 256 --schedule 1f1b --recompute full --search", place)["layouts"]
    times = [layout["step_seconds"] for layout in layouts]
    assert times == sorted(times) and all(layout["gpus"] == 256 and layout["binds"] for layout in layouts)
    assert all(layout["memory"] <= 80 * 2**30 for layout in layouts)
    own = record("toy --hardware mine.toml", place)
    assert own["hardware"] == "mine" and own["layout"]["gpus"] == 1


def test_page_of_a_search_plans_the_fastest(place: Path) -> None:
    command = "deepseek-v3 --gpus 256 --schedule 1f1b --recompute full --search --out found"
    ((status, _),) = run_all([("dsmini.plan", command)], place)
    fastest = json.loads((place / "found/plan.json").read_text())["layouts"][0]
    page = (place / "found/plan.html").read_text()
    assert status == 0 and f"The fullest GPU needs {human(fastest['memory'], 'B')} of" in re.sub("<[^>]+>", "", page)


def test_mistake_is_a_sentence_and_status_2(place: Path) -> None:
    check_refused("dsmini.plan", place)


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
