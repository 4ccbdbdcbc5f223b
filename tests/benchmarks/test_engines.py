"""llama.cpp and ik_llama.cpp next to dsmini: found in any Python, run in a process of their own, compared fairly."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.peer_models import engines
from benchmarks.peer_models.engines import Engine
from benchmarks.questions import QUESTIONS, peers
from benchmarks.run import BenchmarksCommand, checked
from dsmini import Transformer
from dsmini.report import pick
from tests.helpers.questions import TINY, setting

LOG = "calls.jsonl"
FAKE = """
import json, os, types
from pathlib import Path
def note(**what):
    with open(Path(__file__).parents[1] / "calls.jsonl", "a") as file:
        print(json.dumps(what), file=file)
def llama_model_default_params(): return types.SimpleNamespace()
llama_context_default_params = llama_model_default_params
def llama_model_load_from_file(path, how):
    note(file=os.path.getsize(path), **vars(how))
    print("noise on standard output")
    return 0 if (Path(__file__).parents[1] / "refuse").exists() else 7
def llama_init_from_model(model, how):
    note(**vars(how))
    return 8
def llama_decode(context, batch):
    note(batch=batch)
    return 1 if batch[0] == [99] else 0
def llama_get_logits_ith(context, i): pass
def llama_batch_free(batch): pass
def llama_kv_cache_clear(context): note(clear=context)
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return a Python in which ik_llama_cpp is a package that notes how it is called."""
    package = tmp_path / "ik_llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_ctypes_api.py").write_text(FAKE)
    (package / "_internals.py").write_text(
        "def make_batch_range(tokens, *, pos_start, logits_last): return [tokens, pos_start, logits_last]"
    )
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    path.chmod(0o700)
    engines.engines.cache_clear()
    return path


def noted(python: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (python.parent / LOG).read_text().splitlines()]


def test_engine_of_another_python_appends_in_parts_at_the_right_place(
    python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect the settings that are fastest for MLA. PYTHONPATH, which is meant for this Python, must not reach it."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert engines.engines((python,))["ik_llama.cpp"] == str(python)
    engine = Engine("ik_llama.cpp", str(python), Transformer(TINY), "Q8_0", room=64, at_once=4)
    engine.fill(torch.arange(6)[None], 8)
    assert 0 < engine.feed(torch.tensor([[50]])) < 10
    engine.start(8)
    engine.feed(torch.tensor([[51]]))
    loaded, how, *calls = noted(python)
    assert loaded.items() >= {"mla": 3, "repack_tensors": True, "use_mmap": False}.items()
    assert how.items() >= {"mla_attn": 3, "flash_attn": True, "fused_moe_up_gate": True, "n_ctx": 64}.items()
    assert how["n_threads"] == how["n_threads_batch"] == torch.get_num_threads()
    parts = [[[0, 1, 2, 3], 0, True], [[4, 5], 4, True], [[50], 6, True], [[51], 0, True]]
    assert [call["batch"] for call in calls if "batch" in call] == parts
    assert [i for i, call in enumerate(calls) if "clear" in call] == [0, 4]
    with pytest.raises(RuntimeError, match=r"ik_llama\.cpp ended with status 1"):
        engine.feed(torch.tensor([[99]]))


def test_engine_that_cannot_load_the_model_says_why(python: Path) -> None:
    pytest.importorskip("gguf")
    (python.parent / "refuse").touch()
    with pytest.raises(RuntimeError, match=r"ik_llama\.cpp does not run: RuntimeError: ik_llama\.cpp cannot load"):
        Engine("ik_llama.cpp", str(python), Transformer(TINY), "BF16", room=64, at_once=4)


def test_wrong_peer_python_is_one_sentence(tmp_path: Path, python: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="--peer-python: there is no file nowhere/python; name another"):
        checked(BenchmarksCommand(peer_python=(Path("nowhere/python"),)), QUESTIONS)
    assert checked(BenchmarksCommand(peer_python=(python,)), QUESTIONS).peer_python == (python,)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o700)
    with pytest.raises(ValueError, match=r"--peer-python .*bare has no engine; install llama-cpp-python or ik-"):
        engines.engines((bare,))
    bare.write_text("no program")
    with pytest.raises(ValueError, match=r"--peer-python .*bare cannot be run: "):
        engines.engines((bare,))
    assert os.access(bare, os.X_OK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_engine_is_compared_with_the_side_of_its_bits(
    python: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(models, "QUICK", dataclasses.replace(TINY, max_seq_len=512))
    monkeypatch.setattr(models, "WIDE", {"n_expert_groups": 1, "n_limited_groups": 1})
    monkeypatch.setattr(peers, "QUICK", peers.Size((16,), turns=1, batch=1))
    monkeypatch.setattr(peers, "PROMPT", 16)
    here = dataclasses.replace(setting(), dtype=dtype, peer_pythons=(python,))
    figures = [f for case in peers.cases(here) if "wide" in case.key for f in case.run()]
    decoded = {str(f.case["who"]): f.case["than"] for f in pick(figures, "times_as_long", what="decode")}
    native = "dsmini" if dtype == torch.bfloat16 else "dsmini BF16"
    assert decoded == {"ik_llama.cpp": native, "ik_llama.cpp Q8_0": "dsmini FP8"}
    read = {str(f.case["who"]): f.case["than"] for f in pick(figures, "times_as_long", what="prefill")}
    assert read == {"ik_llama.cpp": "dsmini", "ik_llama.cpp Q8_0": "dsmini"}
    assert {f.case["shape"] for f in figures} == {"wide"}
    bits, eight = (size for call in noted(python) if isinstance(size := call.get("file"), int))
    assert eight < 0.8 * bits
    told = peers.answer(figures)
    assert "ik_llama.cpp Q8_0 " in told and "decoding at 16 FP8" in told
