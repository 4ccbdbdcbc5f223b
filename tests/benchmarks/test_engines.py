"""llama.cpp next to dsmini: found in any Python, run in a process of its own, compared fairly."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models
from benchmarks.peer_models.engine import Engine, engine_python, write_gguf
from benchmarks.questions import QUESTIONS, peers
from benchmarks.run import BenchmarksCommand, checked
from dsmini import Transformer
from dsmini.report import pick
from tests.conftest import randomise
from tests.helpers.questions import TINY, setting
from tests.helpers.tolerances import relative_error

FAKE = """
import json, os
from pathlib import Path
here = Path(__file__).parent
def note(**what):
    with (here / "calls.jsonl").open("a") as file:
        print(json.dumps(what), file=file)
class Llama:
    def __init__(self, path, **how):
        note(file=os.path.getsize(path), **how)
        print("noise on standard output")
        if (here / "refuse").exists():
            raise RuntimeError("cannot load the model")
    def eval(self, tokens):
        note(tokens=tokens)
        assert tokens != [99]
    def reset(self):
        note(tokens=[])
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return a Python in which llama_cpp is a package that notes how it is called."""
    pytest.importorskip("gguf")
    (tmp_path / "llama_cpp.py").write_text(FAKE)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    path.chmod(0o700)
    engine_python.cache_clear()
    return path


def noted(python: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (python.parent / "calls.jsonl").read_text().splitlines()]


def test_engine_of_another_python_appends_what_it_is_told(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH, which is meant for this Python, must not reach it."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert engine_python(python) == str(python)
    engine = Engine(str(python), Transformer(TINY), "Q8_0", room=64, at_once=4)
    engine.fill(torch.arange(6)[None], 8)
    assert 0 < engine.feed(torch.tensor([[50]])) < 10
    engine.start(8)
    loaded, *calls = noted(python)
    threads = torch.get_num_threads()
    assert loaded.items() >= {"n_ctx": 64, "n_batch": 4, "n_threads": threads, "n_threads_batch": threads}.items()
    assert [call["tokens"] for call in calls] == [[], [0, 1, 2, 3, 4, 5], [50], []]
    with pytest.raises(RuntimeError, match=r"llama\.cpp ended with status 1"):
        engine.feed(torch.tensor([[99]]))
    (python.parent / "refuse").touch()
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not run: RuntimeError: cannot load the model"):
        Engine(str(python), Transformer(TINY), "BF16", room=64, at_once=4)


def test_wrong_peer_python_is_one_sentence(python: Path) -> None:
    with pytest.raises(ValueError, match="--peer-python: there is no file nowhere/python; name another"):
        checked(BenchmarksCommand(peer_python=Path("nowhere/python")), QUESTIONS)
    assert checked(BenchmarksCommand(peer_python=python), QUESTIONS).peer_python == python
    bare = python.with_name("bare")
    for text in (f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', "no program"):
        bare.write_text(text)
        bare.chmod(0o700)
        with pytest.raises(ValueError, match=r"--peer-python .*bare has no llama-cpp-python .*; install it there"):
            engine_python(bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_engine_is_compared_with_the_side_of_its_bits(
    python: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(models, "QUICK", dataclasses.replace(TINY, max_seq_len=512))
    monkeypatch.setattr(peers, "QUICK", peers.Size((16,), turns=1, batch=1))
    monkeypatch.setattr(peers, "PROMPT", 16)
    here = dataclasses.replace(setting(), dtype=dtype, peer_python=python)
    figures = [f for case in peers.cases(here) if "train" not in case.key for f in case.run()]
    native = "dsmini" if dtype == torch.bfloat16 else "dsmini BF16"
    for what, low, eight in (("decode", native, "dsmini FP8"), ("prefill", "dsmini", "dsmini")):
        than = {str(f.case["who"]): f.case["than"] for f in pick(figures, "times_as_long", what=what)}
        assert than == {"transformers": "dsmini", "llama.cpp": low, "llama.cpp Q8_0": eight}
    bits, codes = (size for call in noted(python) if isinstance(size := call.get("file"), int))
    assert codes < 0.8 * bits
    told = peers.answer(figures)
    assert "llama.cpp Q8_0 " in told and "decoding at 16 FP8" in told


def test_a_gguf_file_has_the_models_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    model = randomise(Transformer(TINY)).eval()
    write_gguf(model, tmp_path / "m.gguf", "F32")
    path = str(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(path, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    tokens = torch.randint(0, 256, (1, 40))
    llama.eval(tokens[0].tolist())
    with torch.no_grad():
        want = model(tokens)[0]
    got = torch.stack([torch.from_numpy(row.copy()) for row in llama.scores[:40]])
    assert relative_error(got, want) < 2e-3  # llama.cpp's cache is FP16
