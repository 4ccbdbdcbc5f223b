"""python -m dsmini.plan as a user runs it: answers, JSON, pages, and mistakes in one sentence."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsmini.console.progress import Progress
from dsmini.report.units import human
from tests.helpers.commands import ROOT, check_refused, run, run_all
from tests.helpers.configs import CONFIGS, written
from tests.helpers.corpora import lay_out
from tests.helpers.released_configs import HF_V3

V3 = CONFIGS / "deepseek-v3.toml"
SAYS = tomllib.loads(Path(__file__).with_name("plan_says.toml").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    lay_out(folder, {"broken.toml": b"[model\n", "empty.toml": b"# nothing\n[train]\n", "taken": b"", "notes.md": b""})
    written(folder, HF_V3, "config.json")
    written(folder, HF_V3 | {"model_type": "deepseek_v41"}, "later.json")
    written(folder, {"model_type": "llama", "hidden_size": 4096}, "llama.json")
    written(folder, {}, "empty.json")
    (folder / "held" / "plan.html").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("place") / "mine.toml", folder)
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
    theirs = record("config.json", place)["figures"]["model"]
    assert {n: f["value"] for n, f in found["figures"]["model"].items()} == {n: f["value"] for n, f in theirs.items()}
    listed = {line.split()[0] for line in asked("deepseek-v3 --explain list", place).splitlines() if line.strip()}
    assert {name for section in found["figures"].values() for name in section} <= listed
    explained = record("deepseek-v3 --explain kv_cache", place)
    assert explained["steps"][0]["name"] == "kv_cache"
    assert "kv_lora_rank" in {line["name"] for line in explained["inputs"]}


def test_what_does_not_fit_comes_first_without_a_price_and_with_status_2(place: Path) -> None:
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v2-lite --hardware h100 --gpus 1")], place, columns=120)
    _, first, *rest = said.splitlines()
    assert status == 2 and first.startswith("training   does not fit: no layout on gpus=1 fits 90 % of 85.9 GB")
    assert "$" not in said and "tokens/s a GPU" in " ".join(rest)
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v3 --gpus 2048 --sequences 100000")], place, columns=120)
    assert status == 2 and "decode     does not fit: decode on 256 GPUs takes" in said.splitlines()[1]
    assert "$" not in said and "days" in said
    ((status, said),) = run_all([("dsmini.plan", "deepseek-v3 --gpus 8 --all")], place, columns=160)
    assert status == 2 and "$" not in said and "decode_time" in said


def test_own_config_lists_the_sizes_that_it_leaves_to_defaults(place: Path) -> None:
    (place / "few.toml").write_text("[model]\ndim = 512\nn_layers = 8\n")
    said = asked("few.toml", place)
    assert "sizes that its file leaves to dsmini's defaults: vocab_size=256" in said.replace("\n", " ")
    assert "defaults:" not in asked("kimi-k2", place)


def test_json_of_variations_and_searches(place: Path) -> None:
    pairs = record("deepseek-v3 --vary kv_lora_rank=128,512 hardware=h100,h800 --of kv_cache", place)["plans"]
    assert [(p["kv_lora_rank"], p["hardware"], p["kv_cache"]) for p in pairs] == [
        (rank, hardware, cache) for rank, cache in ((128, 23_424), (512, 70_272)) for hardware in ("h100", "h800")
    ]
    layouts = record("deepseek-v3 --gpus 256 --schedule 1f1b --recompute full --search --out found", place)["layouts"]
    times = [layout["step_seconds"] for layout in layouts]
    assert times == sorted(times) and all(layout["gpus"] == 256 and layout["binds"] for layout in layouts)
    assert json.loads((place / "found/plan.json").read_text())["layouts"] == layouts
    page = re.sub("<[^>]+>", "", (place / "found/plan.html").read_text())
    assert f"The fullest GPU needs {human(layouts[0]['memory'], 'B')} of" in page, "the page plans the fastest"
    own = record("toy --hardware mine.toml", place)
    assert own["hardware"] == "mine" and own["layout"]["gpus"] == 1


def test_mistake_is_a_sentence_and_status_2(place: Path) -> None:
    check_refused("dsmini.plan", place)


def test_full_output_is_no_fault_of_a_folder() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dsmini.plan", str(V3)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "free some space or write elsewhere" in done.stderr


def test_ctrl_c_ends_a_search_cleanly(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the first progress, which any search makes, however fast it is."""
    monkeypatch.setattr(Progress, "update", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = run(f"dsmini.plan {V3} --gpus 256 --search", place)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")
