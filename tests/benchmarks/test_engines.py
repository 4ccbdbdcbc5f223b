"""llama.cpp and ik_llama.cpp next to dsmini: found in any Python, run in a process of their own, compared fairly."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import models
from benchmarks.peer_models import engine
from benchmarks.peer_models.engine import Engine, write_gguf
from benchmarks.peer_models.worker import ik_llama_cpp
from benchmarks.questions import peers
from dsmini import Transformer
from dsmini.report import pick
from tests.conftest import randomise
from tests.helpers.configs import refusal
from tests.helpers.questions import TINY, setting
from tests.helpers.tolerances import relative_error

NOTED = """
import json, os
from pathlib import Path
here = Path(__file__).parent
def load(path, *how, **more):
    with (here / "loads").open("a") as file:
        print(json.dumps({"file": os.path.getsize(path), **more}), file=file)
    print("noise on standard output")
    return not (here / "refuse").exists()
"""
LLAMA = """
from noted import here, load
class Llama:
    def __init__(self, path, **how):
        if not load(path, **how):
            raise RuntimeError("cannot load the model")
        self.eval = lambda tokens: print(tokens, file=(here / "calls").open("a"))
        self.reset = lambda: self.eval([])
"""
IK = """
import sys
from unittest.mock import MagicMock
from noted import load
_ctypes_api = MagicMock(**{"llama_decode.return_value": 0, "llama_model_load_from_file.side_effect": load})
sys.modules["ik_llama_cpp._internals"] = MagicMock()
"""


@pytest.fixture
def pythons(tmp_path: Path) -> dict[str, Path]:
    """Return two Pythons, in which llama_cpp and ik_llama_cpp are modules that note what they are told."""
    pytest.importorskip("gguf")
    found = {}
    for name, module, text in (("llama.cpp", "llama_cpp", LLAMA), ("ik_llama.cpp", "ik_llama_cpp", IK)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "noted.py").write_text(NOTED)
        (folder / f"{module}.py").write_text(text)
        path = found[name] = folder / "python"
        path.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        path.chmod(0o700)
    engine.engines.cache_clear()
    return found


def loads(python: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (python.parent / "loads").read_text().splitlines()]


def test_engine_of_another_python_appends_what_it_is_told(
    pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH, which is meant for this Python, must not reach it."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    python = pythons["llama.cpp"]
    assert engine.engines(tuple(pythons.values())) == {name: str(path) for name, path in pythons.items()}
    side = Engine("llama.cpp", str(python), Transformer(TINY), "Q8_0", room=64, at_once=4)
    side.fill(torch.arange(6)[None], 8)
    assert 0 < side.feed(torch.tensor([[50]])) < 10
    side.start(8)
    side.feed(torch.tensor([[51]]))
    (settings,), threads = loads(python), torch.get_num_threads()
    wanted = {"n_ctx": 64, "n_batch": 4, "n_threads": threads, "n_threads_batch": threads, "use_mmap": False}
    assert settings.items() >= wanted.items()
    assert (python.parent / "calls").read_text().split("\n")[:-1] == ["[]", "[0, 1, 2, 3, 4, 5]", "[50]", "[]", "[51]"]
    side.process.kill()
    with pytest.raises(RuntimeError, match=r"llama.cpp ended with status -?\d"):
        side.feed(torch.tensor([[99]]))
    (python.parent / "refuse").touch()
    with pytest.raises(RuntimeError, match=r"llama.cpp does not run: RuntimeError: cannot load the model"):
        Engine("llama.cpp", str(python), Transformer(TINY), "BF16", room=64, at_once=4)


def test_ik_appends_in_parts_at_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    api, internals = MagicMock(**{"llama_decode.return_value": 0}), MagicMock()
    for name, module in {"": SimpleNamespace(_ctypes_api=api), "._internals": internals}.items():
        monkeypatch.setitem(sys.modules, f"ik_llama_cpp{name}", module)
    feed, reset = ik_llama_cpp("a file", room=64, at_once=4, threads=2)
    feed(range(6))
    feed([50])
    reset()
    feed([51])
    made = [(call.args[0], call.kwargs["pos_start"]) for call in internals.make_batch_range.call_args_list]
    assert made == [([0, 1, 2, 3], 0), ([4, 5], 4), ([50], 6), ([51], 0)]
    api.llama_decode.return_value = 1
    with pytest.raises(RuntimeError, match="cannot append 1 tokens at 1: status 1"):
        feed([99])


def test_wrong_peer_python_is_one_sentence(pythons: dict[str, Path]) -> None:
    bare = pythons["llama.cpp"].with_name("bare")
    for text, why in ((f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', "has no engine"), ("none", "cannot be run")):
        bare.write_text(text)
        bare.chmod(0o700)
        assert f"bare {why}" in refusal(engine.engines, (bare,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_engine_is_compared_with_the_side_of_its_bits(
    pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """ik_llama.cpp has its own shape. A machine without BF16 units compares in FP32 in place of BF16."""
    monkeypatch.setattr(models, "QUICK", dataclasses.replace(TINY, max_seq_len=512))
    monkeypatch.setattr(models, "WIDE", {"n_expert_groups": 1, "n_limited_groups": 1})
    monkeypatch.setattr(peers, "QUICK", peers.Size((16,), (16,), turns=1, batch=1))
    peak = {"float32": 1e11, "bfloat16": 3e11 if dtype == torch.bfloat16 else 1e9}
    here = dataclasses.replace(setting(peak=peak), dtype=dtype, peer_python=tuple(pythons.values()))
    figures = [f for case in peers.cases(here) if "train" not in case.key for f in case.run()]
    bits = {"transformers BF16": "dsmini BF16", "llama.cpp BF16": "dsmini BF16"}
    if dtype == torch.float32:
        bits = {"transformers FP32": "dsmini FP32", "llama.cpp F32": "dsmini FP32"}
    bits |= dict.fromkeys(("llama.cpp Q8_0", "llama.cpp Q8_0, BF16 head"), "dsmini FP8")
    wide = bits | {f"ik_{peer}": than for peer, than in bits.items() if peer.startswith("llama")}
    for what, shape, want in [(w, *s) for w in ("decode", "prefill") for s in (("", bits), ("wide", wide))]:
        mine = [f for f in figures if (f.case["what"], f.case.get("shape", "")) == (what, shape)]
        assert {f.case["who"]: f.case["than"] for f in pick(mine, "times_as_long")} == want
        assert {f.case["who"] for f in pick(mine, "share_of_roof") if f.measured} == want.keys() | set(want.values())
    assert len({call["file"] for call in loads(pythons["ik_llama.cpp"])}) == 3
    told = peers.answer(figures)
    assert "; ik_llama.cpp Q8_0 " in told and "in decoding wide FP8" in told


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
