"""llama.cpp and ik_llama.cpp next to dsmini: found in any Python, run in a process of their own, compared fairly."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.peer_models import engine
from benchmarks.peer_models.engine import Engine, write_gguf
from benchmarks.questions import QUESTIONS, peers
from benchmarks.run import BenchmarksCommand, checked
from dsmini import Transformer
from dsmini.console.commandline import parse
from dsmini.report import pick
from tests.conftest import randomise
from tests.helpers.questions import TINY, setting
from tests.helpers.tolerances import relative_error

NOTE = """
import json, os, types
from pathlib import Path
here = Path(__file__).parent
def note(**what):
    with (here / "calls.jsonl").open("a") as file:
        print(json.dumps(what), file=file)
def load(path, **how):
    note(file=os.path.getsize(path), **how)
    print("noise on standard output")
    return not (here / "refuse").exists()
"""
LLAMA = """
class Llama:
    def __init__(self, path, **how):
        if not load(path, **how):
            raise RuntimeError("cannot load the model")
    def eval(self, tokens):
        note(tokens=tokens)
        assert tokens != [99]
    def reset(self):
        note(tokens=[])
"""
IK = """
import sys
sys.modules["ik_llama_cpp._ctypes_api"] = sys.modules["ik_llama_cpp._internals"] = _ctypes_api = sys.modules[__name__]
def llama_model_default_params(): return types.SimpleNamespace()
llama_context_default_params = llama_model_default_params
def llama_model_load_from_file(path, how): return load(path, **vars(how))
def llama_init_from_model(model, how):
    note(**vars(how))
    return 8
def make_batch_range(tokens, *, pos_start, logits_last): return [tokens, pos_start, logits_last]
def llama_decode(context, batch):
    note(batch=batch)
    return 1 if batch[0] == [99] else 0
def llama_get_logits_ith(context, i): pass
def llama_batch_free(batch): pass
def llama_kv_cache_clear(context): note(batch=[])
"""


@pytest.fixture
def pythons(tmp_path: Path) -> dict[str, Path]:
    """Return two Pythons, in which llama_cpp and ik_llama_cpp are modules that note how they are called."""
    pytest.importorskip("gguf")
    found = {}
    for name, text in (("llama_cpp", LLAMA), ("ik_llama_cpp", IK)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(NOTE + text)
        path = found[name.replace("a_cpp", "a.cpp")] = folder / "python"
        path.write_text(f'#!/bin/sh\n[ -z "$PYTHONPATH" ] || exit 3\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
        path.chmod(0o700)
    engine.engines.cache_clear()
    return found


def noted(python: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (python.parent / "calls.jsonl").read_text().splitlines()]


# what an engine notes when six tokens, one more, and none and one are appended; ik's settings are the fastest for MLA
THREADS = {"n_threads": 0, "n_threads_batch": 0}
CALLS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "llama.cpp": (
        [{"n_ctx": 64, "n_batch": 4, "use_mmap": False, **THREADS}],
        [[], [0, 1, 2, 3, 4, 5], [50], [], [51]],
    ),
    "ik_llama.cpp": (
        [
            {"mla": 3, "repack_tensors": True, "use_mmap": False},
            {"mla_attn": 3, "flash_attn": True, "fused_moe_up_gate": True, "n_ctx": 64, "n_ubatch": 4, **THREADS},
        ],
        [[], [[0, 1, 2, 3], 0, True], [[4, 5], 4, True], [[50], 6, True], [], [[51], 0, True]],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_engine_of_another_python_appends_what_it_is_told(
    pythons: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """PYTHONPATH, which is meant for this Python, must not reach it."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    python = pythons[name]
    assert engine.engines(tuple(pythons.values())) == {name: str(path) for name, path in pythons.items()}
    side = Engine(name, str(python), Transformer(TINY), "Q8_0", room=64, at_once=4)
    side.fill(torch.arange(6)[None], 8)
    assert 0 < side.feed(torch.tensor([[50]])) < 10
    side.start(8)
    side.feed(torch.tensor([[51]]))
    settings, calls = CALLS[name]
    for got, want in zip(noted(python), settings, strict=False):
        assert got.items() >= {**want, **dict.fromkeys(want.keys() & THREADS, torch.get_num_threads())}.items()
    assert [call.get("tokens", call.get("batch")) for call in noted(python)[len(settings) :]] == calls
    with pytest.raises(RuntimeError, match=rf"{name} ended with status 1"):
        side.feed(torch.tensor([[99]]))
    (python.parent / "refuse").touch()
    with pytest.raises(RuntimeError, match=rf"{name} does not run: RuntimeError: .*cannot load the model"):
        Engine(name, str(python), Transformer(TINY), "BF16", room=64, at_once=4)


def test_wrong_peer_python_is_one_sentence(pythons: dict[str, Path]) -> None:
    words = [word for path in pythons.values() for word in ("--peer-python", str(path))]
    command = parse(BenchmarksCommand, "benchmarks", [*words, "peers"])
    assert checked(command, QUESTIONS).peer_python == tuple(pythons.values()) and command.names == ("peers",)
    bare = pythons["llama.cpp"].with_name("bare")
    with pytest.raises(ValueError, match=r"--peer-python: there is no file .*bare; name another"):
        checked(dataclasses.replace(command, peer_python=(*command.peer_python, bare)), QUESTIONS)
    for text, why in (
        (f'#!/bin/sh\nexec {sys.executable} -S "$@"\n', "has no engine; install"),
        ("none", "cannot be run"),
    ):
        bare.write_text(text)
        bare.chmod(0o700)
        with pytest.raises(ValueError, match=rf"--peer-python .*bare {why}"):
            engine.engines((bare,))


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
    sizes = {str(call["file"]) for call in noted(pythons["ik_llama.cpp"]) if "file" in call}
    assert len(sizes) == 3
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
