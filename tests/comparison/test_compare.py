"""python -m dsmini.compare on tiny models: pairs, files that continue, pictures, and refusals."""

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsmini import ModelConfig, RunConfig, sources
from dsmini.comparison.answer import answer_of, draw
from dsmini.comparison.arms import Arm, Comparison, arms_of, make_model_of, read_claim
from dsmini.comparison.results import HEAD, Results, head_of, opened, read_results, refuse_other, reuse
from dsmini.comparison.runs import Workers
from dsmini.comparison.trial import prepared
from dsmini.config.fields import build
from dsmini.nn.gate import HashGate, hash_table
from tests.helpers.commands import ROOT, check_refused, finish, run, start
from tests.helpers.configs import refusal, written

PLACE = Path(__file__).with_name("place")
IDEA = """\
import dsmini
from torch import nn
def relu(config):
    return dsmini.Transformer(config, score_func=lambda logits: logits.relu())
def plain(config, width=8):
    return nn.Linear(width, width)
def two(config, other):
    return None
def broken(config):
    print('{"done": 2}', end="")
    raise KeyError("boom")
NUMBER = 3
"""
OWN = """\
import dsmini
def zero_head(config):
    model = dsmini.Transformer(config)
    model.head.weight.data.zero_()
    return model
"""
COMPARE = "dsmini.compare base.toml --idea model.n_mtp_layers=0 --seeds 2 --out found.jsonl"
MADE_HERE = {"sources": "0123", "processor": "EPYC", "device": "cpu", "torch": "2.13.0", "python": "3.11.7"}
MADE: dict[str, Any] = MADE_HERE | {"scored": [[1, 9]]}
A_HEAD = {"dsmini": "1", **dict.fromkeys(HEAD, ""), "arms": {"base": {}}, "margin": 0.01}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder with a text, a base, an idea and a claim."""
    words = "the model reads a text and learns what comes next. "
    (tmp_path / "text.txt").write_text("".join(f"{i} {words}" for i in range(400)))
    (tmp_path / "idea.py").write_text(IDEA)
    (tmp_path / "stop.py").write_text("raise SystemExit('bye')")
    return shutil.copytree(PLACE, tmp_path, dirs_exist_ok=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a file in the order of arm and seed, without their times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    kept = [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]
    return sorted(kept, key=lambda row: (row["arm"], row["seed"]))


def test_what_an_idea_imports_is_a_part_of_it(tmp_path: Path) -> None:
    """A package begins with its __init__.py, and imports its modules by a dot."""
    (tmp_path / "part_of_idea").mkdir()
    sources = {
        "idea.py": "from helper_of_idea import scale\nimport json, part_of_idea.sub\ndef make(c): return scale(c)\n",
        "helper_of_idea.py": "import deeper_of_idea as d\ndef scale(c): return d.SCALE\n",
        "deeper_of_idea.py": "SCALE = 1\n",
        "part_of_idea/__init__.py": "ONE = 1\n",
        "part_of_idea/sub.py": "from . import ONE\nfrom .near import TWO\n",
        "part_of_idea/near.py": "TWO = 2\n",
    }
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
    arm = Arm(name="x", config=RunConfig(), function=f"{tmp_path / 'idea.py'}:make")
    seen = [arm.describe()]
    assert make_model_of(arm.function)(ModelConfig()) == 1, "its folder is looked at, wherever the command runs"
    (tmp_path / "other.py").write_text("1")
    assert arm.describe() == seen[0]
    for name in ("deeper_of_idea.py", "part_of_idea/__init__.py", "part_of_idea/near.py"):
        (tmp_path / name).write_text(f"{sources[name]}MORE = 1\n")
        assert arm.describe() not in seen, name
        seen.append(arm.describe())


def test_a_function_has_one_description_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "idea.py").write_text("def make(config): ...")
    monkeypatch.chdir(tmp_path)
    here, there = (arms_of([name], [], []) for name in ("idea.py:make", f"{tmp_path}/idea.py:make"))
    assert here[1].describe() == there[1].describe()


def test_pairs_start_with_equal_weights_where_shapes_agree(place: Path) -> None:
    """All layers of both, but the experts, which are wider; an idea's own weights are kept."""
    (place / "own.py").write_text(OWN)
    wide = "model.moe_inter_dim=48 model.n_layers=3 model.n_mtp_layers=0"
    arms = arms_of([str(place / "base.toml"), f"{place}/own.py:zero_head"], [wide], [f"data.path={place}/text.txt"])
    base, idea, larger = (prepared(arm, 3, place / "corpus") for arm in arms)
    ours, own, theirs = (each.model.state_dict() for each in (base, idea, larger))
    alike = {name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape}
    assert len(alike) > 20 and all(torch.equal(ours[name], theirs[name]) for name in alike)
    assert {name for name in ours if not torch.equal(ours[name], own[name])} == {"head.weight"}
    assert not own["head.weight"].any()
    other = prepared(arms[0], 4, place / "corpus")
    assert not torch.equal(other.model.embed.weight, base.model.embed.weight)


def test_tables_of_experts_are_those_of_training(place: Path) -> None:
    hashed = "model.n_hash_layers=1 model.n_mtp_layers=0 model.n_dense_layers=0"
    _, arm = arms_of([str(place / "base.toml")], [hashed], [f"data.path={place}/text.txt"])
    trainer = prepared(arm, 0, place / "corpus")
    (gate, *_) = (gate for gate in trainer.model.gates() if isinstance(gate, HashGate))
    counts = torch.from_numpy(trainer.corpus.token_counts(256))
    assert torch.equal(gate.tid2eid, hash_table(counts, 8, 4, 0))
    assert not torch.equal(gate.tid2eid, hash_table(torch.ones_like(counts), 8, 4, 0))


@pytest.mark.slow
def test_a_comparison_answers_continues_and_is_drawn(place: Path) -> None:
    done = finish(f"{COMPARE} --json", place)
    answer = json.loads(done.stdout)
    assert answer["arms"]["base"]["runs"] == answer["arms"]["model.n_mtp_layers=0"]["runs"] == 2
    assert answer["arms"]["model.n_mtp_layers=0"]["word"] in ("better", "worse", "equal", "undecided")
    for words in ("margin  0.01 nats a byte", "4 runs in", "difference, 95 %", "found.jsonl"):
        assert words in done.stderr, words
    assert "not equal" not in done.stderr, "of their tokens"
    assert (place / "found.png").stat().st_size > 5000
    first = lines_of(place / "found.jsonl")
    again = finish(COMPARE.replace("--seeds 2", "--seeds 3"), place)
    assert "2 runs in" in again.stdout, "only the third seed is run"
    after = lines_of(place / "found.jsonl")
    assert [row for row in after if row["seed"] < 2] == first and len(after) == 6
    three = COMPARE.replace("--seeds 2", "--seeds 3")
    other = finish(three.replace("found", "other").replace("n_mtp_layers=0", "route_scale=1"), place)
    assert "reused  1 run of equal arms from found.jsonl" in other.stdout and "5 runs in" in other.stdout
    base = [row for row in lines_of(place / "other.jsonl") if row["arm"] == "base"]
    assert {row["seed"]: row["loss"] for row in base} == {r["seed"]: r["loss"] for r in after if r["arm"] == "base"}
    copies = [line for line in (place / "other.jsonl").read_text().splitlines() if '"cpu_seconds": null' in line]
    assert [json.loads(line)["seed"] for line in copies] == [2]
    refused = run(f"{COMPARE} --set train.steps=4", place)
    assert refused.returncode == 2 and "begun with arms.base.config.train.steps 3, this has 4" in refused.stderr
    (place / "text.txt").write_text((place / "text.txt").read_text() + "more")
    refused = run(COMPARE, place)
    assert refused.returncode == 2 and "another text" in refused.stderr
    (place / "other.jsonl").write_text('{"text": "a data set"}\n')
    report = run("dsmini.compare --report . --json", place)
    assert "left out: other.jsonl is not a file of a comparison" in report.stderr
    assert report.returncode == 0 and len(json.loads(report.stdout)) == 1 and (place / "forest.png").exists()


@pytest.mark.slow
def test_a_claim_has_its_arms_and_says_who_made_it(place: Path) -> None:
    done = finish("dsmini.compare claim.toml --seeds 2", place)
    head = json.loads((place / "comparisons/claim.jsonl").read_text().splitlines()[0])
    assert list(head["arms"]) == ["base", "no mtp", "relu"] and head["margin"] == 0.5
    losses = {row["arm"]: row["loss"] for row in lines_of(place / "comparisons/claim.jsonl")}
    assert len(set(losses.values())) == 3, "three models"
    assert "source: V3 report, 4.5.1\n" in done.stdout and "hypothesis" not in done.stdout, "what the claim says"


def test_results_that_were_removed_meanwhile_are_written_again(tmp_path: Path) -> None:
    results = Results(path=tmp_path / "found.jsonl", head=A_HEAD)
    for seed in range(3):
        results.add({"arm": "base", "seed": seed, "loss": 1.0})
        if seed == 1:
            results.path.unlink()
    read = read_results(results.path)
    assert read is not None and (read.head, read.lines) == (results.head, results.lines)


def test_a_disk_that_is_full_within_a_line_leaves_none_of_it(tmp_path: Path) -> None:
    """Let 20 bytes of a line be written. Their place is free again once they are gone."""
    results = Results(path=tmp_path / "found.jsonl", head=A_HEAD)
    results.add({"arm": "base", "seed": 0, "loss": 1.0})
    before, limits = results.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            results.add({"arm": "base", "seed": 1, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert results.path.read_bytes() == before and len(results.lines) == 1


def test_a_file_without_runs_is_begun_again(tmp_path: Path) -> None:
    """An idea that failed at once, and was mended, has another hash; nothing was measured with the first."""
    path, arms = tmp_path / "found.jsonl", [Arm(name="base", config=RunConfig())]
    one, two = (head_of(Comparison(name="x", arms=arms, margin=m), {"base": ""}, "1") for m in (0.01, 0.02))
    with opened(path, one, MADE):
        pass
    with opened(path, two, MADE) as results:
        results.add({"arm": "base", "seed": 0, "loss": 1.0} | MADE)
    assert json.loads(path.read_text().splitlines()[0])["margin"] == 0.02
    kept = path.read_text()
    with pytest.raises(ValueError, match=r"begun with margin 0\.02"), opened(path, one, MADE):
        pass
    assert path.read_text() == kept


def results_of(runs: Mapping[str, Sequence[tuple[float | None, float | None]]], margin: float = 0.01) -> Results:
    """Return results of arms whose runs have these losses and seconds."""
    results = Results(path=Path("x.jsonl"), head=A_HEAD | {"arms": {arm: {} for arm in runs}, "margin": margin})
    for arm, each in runs.items():
        lines = [{"loss": loss, "cpu_seconds": seconds} for loss, seconds in each]
        results.lines += [{"arm": arm, "seed": seed} | line for seed, line in enumerate(lines)]
    return results


def test_times_of_runs_that_diverged_do_not_count() -> None:
    results = results_of({"base": [(1.0, 8.0), (1.0, 8.0)], "idea": [(1.0, 8.0), (None, 1.0)]})
    assert results.values("idea", "cpu_seconds") == {0: 8.0} and results.diverged("idea") == 1


def test_seeds_beyond_any_reach_are_not_a_number() -> None:
    results = results_of({"base": [(1.0, None)] * 6, "idea": [(1.5, None), (0.5001, None)] * 3}, margin=1e-9)
    assert "with more than 100,000 would decide" in answer_of(results).sentences[0]


def test_seconds_are_paired_as_losses_are(tmp_path: Path) -> None:
    """A run that was taken from another file has no time."""
    times = {"base": (8.0, 9.0, 10.0, None), "idea": (9.0, 11.0, 13.0, 99.0)}
    results = results_of({arm: [(1.0, seconds) for seconds in of] for arm, of in times.items()})
    found = answer_of(results).record["arms"]["idea"]["seconds_difference"]
    half = 4.3027 / 3**0.5  # Student's t of two degrees of freedom; the deviation of 1, 2 and 3 is 1
    assert (found["value"], found["low"], found["turns"]) == (2.0, pytest.approx(2 - half, abs=1e-3), 3)
    draw(tmp_path / "forest.png", [answer_of(results)])
    results.lines = results.lines[3:5]
    assert answer_of(results).record["arms"]["idea"]["seconds_difference"] is None
    draw(tmp_path / "forest.png", [answer_of(results)])


def test_times_on_a_gpu_are_those_that_passed() -> None:
    results = results_of({"base": [(1.0, 8.0)], "idea": [(1.0, 8.0)]})
    assert results.clock == "cpu_seconds"
    results.lines = [line | {"device": "NVIDIA H100", "train_seconds": 2.0 + line["seed"]} for line in results.lines]
    assert results.clock == "train_seconds" and answer_of(results).record["arms"]["idea"]["seconds"] == 2.0


def test_a_skewed_arm_is_said_to_be() -> None:
    losses = [1 + 0.01 * (2**i) / 100 for i in range(12)]
    results = results_of({"base": [(1.0, None)] * 12, "idea": [(loss, None) for loss in losses]})
    assert any("its differences are skewed (+" in line for line in answer_of(results).sentences)


def test_a_gpu_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmini.comparison.arms.pick_device", torch.device)
    arms = arms_of([], ["model.n_mtp_layers=0"], ["train.device=cuda:1"])
    assert [arm.config.train.device for arm in arms] == ["cuda:1"] * 2
    others = arms_of([], ["model.n_mtp_layers=0"], ["train.device=cuda"])
    assert [arm.describe() for arm in arms] == [arm.describe() for arm in others]


# what a file holds, and what is said of it; "" of one that was killed before its first line
NO_RESULTS: dict[str, str] = {
    **{"": "", '{"dsmini': "", '{"notes": 1}': "is not a file of a comparison"},
    json.dumps(A_HEAD | {"margin": "0.01"}) + "\n": "is not a file of a comparison",
    json.dumps(A_HEAD) + '\n{"arm": "base", "seed": 0, "loss": NaN}\n': "line 2 of .* is not a finished run; remove it",
    json.dumps(A_HEAD) + '\n{"arm": "idea", "seed": 0, "loss": 1}\n': "line 2 of .* is not a finished run",
    json.dumps(A_HEAD) + "\n" + "[" * 200_000 + "\n": "line 2 of .* is not a finished run",
    "[" * 200_000 + "\n": "is not a file of a comparison",
}


@pytest.mark.parametrize("text", NO_RESULTS)
def test_a_file_of_something_else_is_refused_and_left(tmp_path: Path, text: str) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text(text)
    if NO_RESULTS[text]:
        with pytest.raises(ValueError, match=NO_RESULTS[text]), opened(path, A_HEAD, MADE):
            pass
        assert path.read_text() == text
    else:
        with opened(path, A_HEAD, MADE) as results:
            assert results.lines == [] and json.loads(path.read_text()) == A_HEAD


@pytest.mark.parametrize(
    "line",
    ["margin = -1.0", "margin = '0.01'", "question = 3", "set = 3", "set = [3]", "set = 'train.steps=3'"],
)
def test_a_claim_of_other_types_is_refused(tmp_path: Path, line: str) -> None:
    claim = written(tmp_path, f'{line}\n[arms]\nwide = ["model.dim=64"]\n', "wrong.toml")
    assert line.replace(" = ", "=", 1) in refusal(read_claim, claim, [], None)


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_to_the_same_lines(place: Path) -> None:
    finish(COMPARE, place)
    want = lines_of(place / "found.jsonl")
    (place / "found.jsonl").unlink()  # nothing is taken from it
    command = COMPARE.replace("found", "killed") + " --jobs 1"
    for seconds in (2.0, 5.0, 8.0):
        process = start(command, place)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    with (place / "killed.jsonl").open("a") as file:
        if file.tell():  # a busy machine may not have written the first line yet
            file.write('{"arm": "base", "se')  # a line that the disk lost half of
    finish(command, place)
    assert lines_of(place / "killed.jsonl") == want


def test_a_run_that_breaks_is_told_by_its_last_words() -> None:
    assert refusal(Workers().ask, "no request", "seed 3").startswith("seed 3 broke: json.decoder.JSONDecodeError: ")


def test_what_an_idea_prints_is_not_the_answer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "idea.py").write_text("import os\nprint('one')\nos.system('echo two')\ndef make(config): ...")
    make_model_of(f"{tmp_path}/idea.py:make")
    print("answer")
    printed = capfd.readouterr()
    assert printed.out == "answer\n" and sorted(printed.err.split()) == ["one", "two"]


def test_two_functions_of_one_name_are_called_by_their_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("def make(config): ...")
    arms = arms_of([f"{tmp_path}/{name}.py:make" for name in "ab"], [], [])
    assert [arm.name for arm in arms] == ["base", "make", "b:make"]


def test_a_setting_that_nests_too_deeply_is_refused() -> None:
    said = refusal(arms_of, [], ["train.lr=" + "[" * 3000], [])
    assert "nests tables or lists too deeply" in said and len(said) < 200


def test_arms_are_equal_but_for_their_idea() -> None:
    base, idea = arms_of([], ["model.dim=64 train.lr=0.01"], ["train.steps=5"])
    assert (base.config.model.dim, idea.config.model.dim, idea.config.train.lr) == (192, 64, 0.01)
    assert base.config.train.steps == idea.config.train.steps == 5
    assert base.config.train.threads == idea.config.train.threads == 1


def test_a_batch_that_grows_counts_as_it_is() -> None:
    """Four steps of 4 sequences of 256, or of 2, 3, 4 and 4."""
    base, idea = arms_of([], ["train.batch_start=2 train.batch_ramp=0.5"], ["train.steps=4"])
    assert (base.tokens, idea.tokens) == (256 * 16, 256 * 13)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "claims").glob("*.toml")), ids=lambda path: path.stem)
def test_claims_of_the_docs_say_what_they_ask(path: Path) -> None:
    claim = read_claim(path, [], None)
    assert claim.question.endswith("?") and claim.hypothesis and claim.source and len(claim.arms) > 1
    assert claim.arms[0].name != "base", "base_name says what it is"
    if results := read_results(path.with_suffix(".jsonl")):
        stored = {name: (as_now(arm), arm.get("sha256")) for name, arm in results.head["arms"].items()}
        described = {arm.name: (arm.describe()["config"], arm.describe().get("sha256")) for arm in claim.arms}
        assert stored == described and list(stored) == list(described)
        assert results.head["margin"] == claim.margin
        assert all(re.fullmatch("[0-9a-f]{8}", line["commit"]) for line in results.lines)
        made = results.lines[0].get("sources") or f"commit {results.lines[0]['commit']}"
        want = f"has runs of other sources, {made}; this would add those of 0123"
        assert want in refusal(refuse_other, results, results.head, MADE)


def as_now(arm: dict[str, Any]) -> dict[str, Any]:
    """Return the config of an arm as it is written now, with the fields that configs have had since."""
    data = {key: value for key, value in arm["config"]["data"].items() if (key, value) != ("tokenizer", "bytes")}
    config = build(RunConfig, arm["config"] | {"data": data}, "stored", "")
    return Arm(name="", config=config).describe()["config"]


def test_what_another_base_began_is_refused(tmp_path: Path) -> None:
    results = Results(path=tmp_path / "x.jsonl", head=A_HEAD | {"arms": {"a": {}, "b": {}}})
    results.lines = [{"arm": "a", "seed": 0, "loss": 1.0} | MADE]
    head = A_HEAD | {"arms": {"b": {}, "a": {}}}
    assert "was begun with the base 'a', this has 'b'" in refusal(refuse_other, results, head, MADE)


# what changed since a file was begun, and what is said
OTHERS = {
    "sources": ({"sources": "4567"}, "has runs of other sources, 0123; this would add those of 4567"),
    "machine": ({"processor": "Xeon"}, "has runs of another processor, EPYC; this would add those of Xeon"),
    "device": ({"device": "H100"}, "has runs of another device, cpu"),
    "scored": ({"scored": [[1, 7]]}, "has runs of other bytes of the text, [[1, 9]]; this would add those of [[1, 7]]"),
    "torch": ({"torch": "2.9.1"}, "has runs of another version of torch, 2.13.0; this would add those of 2.9.1"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_runs_that_something_else_made_are_not_mixed(tmp_path: Path, what: str) -> None:
    """They are not continued, not taken from other files, and not read from one file."""
    other, said = OTHERS[what]
    path, run = tmp_path / "found.jsonl", {"arm": "base", "seed": 2, "loss": 1.0}
    with opened(path, A_HEAD, MADE) as results:
        results.add(run | MADE)
    kept = path.read_text()
    with pytest.raises(ValueError, match=re.escape(said)), opened(path, A_HEAD, MADE | other):
        pass
    with opened(path, A_HEAD, MADE | {"python": "3.13.1"}) as results:  # changes no bit
        assert len(results.lines) == 1 and path.read_text() == kept
    for made, count in ((MADE, 1), (MADE | other, 0)):
        copy = Results(path=tmp_path / "copy.jsonl", head=A_HEAD)
        assert sum(reuse(copy, 5, made).values()) == count
        copy.path.unlink(missing_ok=True)
    path.write_text(kept + json.dumps(run | MADE | other | {"seed": 3}) + "\n")
    assert "line 3 of" in refusal(read_results, path) and "part them" in refusal(read_results, path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model.max_seq_len=64", "arms.base.config.model.max_seq_len 32, this has 64"),
        ("data.tokenizer=b.json", "arms.base.config.data.tokenizer 'bytes', this has '"),
    ],
)
def test_another_context_or_tokenizer_is_named(place: Path, settings: str, said: str) -> None:
    (place / "b.json").write_text("{}")
    heads = []
    for changes in ("train.steps=3", settings.replace("b.json", f"{place}/b.json")):
        arm, _ = arms_of([str(place / "base.toml")], ["model.n_mtp_layers=0"], [changes])
        heads.append(head_of(Comparison(name="x", arms=[arm], margin=0.01), {"base": "1"}, "1"))
    results = Results(path=Path("x.jsonl"), head=heads[0], lines=[MADE])
    assert said in refusal(refuse_other, results, heads[1], MADE)


def test_a_changed_source_has_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a file of the package, one in C++ of the kernels, and add a file."""
    seen = {sources.own_sources.__wrapped__()}
    for name in ("dsmini/nn/mtp.py", "dsmini_kernels/cpu/a.h"):
        (tmp_path / name).parent.mkdir(parents=True)
    for place in (tmp_path / "dsmini", tmp_path / "dsmini_kernels"):
        (place / "__init__.py").write_text("")
    (tmp_path / "dsmini/sources.py").write_text(Path(sources.__file__).read_text())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "dsmini/sources.py"))
    where = SimpleNamespace(submodule_search_locations=[str(tmp_path / "dsmini_kernels")])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: where)
    for file in ("dsmini/nn/mtp.py", "dsmini_kernels/cpu/a.h", "dsmini/nn/other.py"):
        seen.add(sources.own_sources.__wrapped__())
        (tmp_path / file).write_text("1")
        seen.add(sources.own_sources.__wrapped__())
    assert len(seen) == 5 and all(re.fullmatch("[0-9a-f]{16}", each) for each in seen)


def test_what_cannot_be_compared_is_refused(place: Path) -> None:
    check_refused("dsmini.compare", place)


@pytest.mark.slow
def test_a_function_that_returns_no_model_is_refused(place: Path) -> None:
    for function, said in {"plain": "returned a Linear; want a", "broken": "KeyError: 'boom' (line 11 of"}.items():
        done = run(f"dsmini.compare base.toml idea.py:{function} --seeds 2 --out {function}.jsonl", place)
        assert done.returncode == 2 and said in done.stderr, done.stderr
