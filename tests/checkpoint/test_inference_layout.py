"""DeepSeek's inference layout: the files that its convert.py writes, in and out, and models that come back the same."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsmini import Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.save import SavePlan, save_inference
from dsmini.convert import main
from tests.helpers import folders
from tests.helpers.configs import refusal
from tests.helpers.inference_layouts import INDEX, INFERENCE, inference_layout

Build = Callable[..., Transformer]
WIDE = INFERENCE | {"n_heads": 8, "moe_inter_dim": 256}
"""Sizes of which each of four ranks has whole blocks of FP8 scales."""
V2 = {"score_func": "softmax", "n_expert_groups": 1, "n_limited_groups": 1, "mscale": 0.707, "q_lora_rank": 0}
KINDS: dict[str, dict[str, Any]] = {"v2": V2, "v3": {}, "v32": INDEX}


@pytest.fixture
def build(small_model: Build) -> Callable[..., tuple[Transformer, dict[str, Any]]]:
    """Return a model of a kind, with multi-token prediction, and its JSON file of DeepSeek's inference code."""

    def make(kind: str, **changes: Any) -> tuple[Transformer, dict[str, Any]]:
        raw = WIDE | {"max_seq_len": 64, "original_seq_len": 32} | KINDS[kind]
        more: dict[str, Any] = {"attention": "dsa"} if kind == "v32" else {}
        if kind == "v2":
            more = {"topk_method": "greedy", "norm_topk_prob": False, "mscale_all_dim": 0.707, "q_lora_rank": None}
        return small_model(**{"n_mtp_layers": 1} | raw | more | changes), raw

    return make


def without_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if not name.startswith(("model.layers.2.", "mtp."))}


def files_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


DTYPES, RANKS = ("bfloat16", "float32", "fp8"), (1, 2, 4)
CASES = [
    # every pair of two of the three is in the default part
    pytest.param(kind, ranks, dtype, marks=[] if (i + j + k) % 3 == 0 else pytest.mark.slow)
    for i, kind in enumerate(KINDS)
    for j, ranks in enumerate(RANKS)
    for k, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("kind", "ranks", "dtype"), CASES)
def test_files_are_those_of_deepseek_and_come_back(
    tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch, kind: str, ranks: int, dtype: str
) -> None:
    model, raw = build(kind, **({"moe_inter_dim": 200} if ranks == 1 else {}))  # ragged blocks of scales
    raw |= {"moe_inter_dim": model.config.moe_inter_dim, "dtype": "fp8" if dtype == "fp8" else "bf16"}
    tensors, exact = folders.tensors_of(model, torch.float32 if dtype == "float32" else torch.bfloat16), None
    quantization = {}
    if dtype == "fp8":
        tensors, exact = folders.in_fp8(tensors)
        quantization = {"quantization_config": folders.QUANTIZED | {"scale_fmt": "ue8m0"}}
        raw |= {"scale_fmt": "ue8m0"}
    source = folders.write(tmp_path / "a", tensors, folders.config_json(model.config, **quantization))
    kept = without_mtp(tensors)
    theirs = inference_layout(tmp_path / "theirs", kept, raw, ranks, "config_16B.json")
    monkeypatch.chdir(tmp_path)
    # 1. a folder becomes theirs
    assert main(f"a b --layout inference --ranks {ranks}".split()) == 0
    got, want = files_of(tmp_path / "b"), files_of(theirs)
    assert got.keys() == want.keys() and not any(folders.different(got[file], want[file]) for file in want)
    said = folders.config_of(tmp_path / "b")
    rope = {"mscale", "rope_theta", "rope_factor", "beta_fast", "beta_slow"}
    assert said | raw == said and said.keys() - raw.keys() <= rope
    # 2. theirs is read
    back = load_pretrained(theirs)
    assert not folders.different(back.state_dict(), without_mtp(load_pretrained(source).state_dict()))
    assert back.config == load_pretrained(tmp_path / "b").config == dataclasses.replace(model.config, n_mtp_layers=0)
    tokens = torch.randint(0, 64, (1, 20))
    assert torch.equal(back.float()(tokens), load_pretrained(source).float()(tokens))
    loaded = folders.tensors_of(load_pretrained(theirs, dtype=torch.float32))
    assert not folders.different(loaded, {name: t.float() for name, t in without_mtp(exact or tensors).items()})
    # 3. theirs becomes a folder
    assert main(["theirs", "c"]) == 0
    assert not folders.different(folders.read(tmp_path / "c"), kept)
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert ("quantization_config" in folders.config_of(tmp_path / "c")) == (dtype == "fp8")


@pytest.mark.filterwarnings("ignore:.* has routing biases")
@pytest.mark.parametrize("ranks", [1, 4])
def test_fresh_fp8_has_the_codes_of_the_other_layout(tmp_path: Path, build: Any, ranks: int) -> None:
    """Blocks of scales are the same, whether a matrix is quantized whole or rank by rank."""
    model, _ = build("v32", n_mtp_layers=0)
    save_inference(model, tmp_path / "a", ranks, fp8=True, dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "b", fp8=True, dtype=torch.bfloat16)
    got, want = (load_pretrained(tmp_path / name, fp8="keep").state_dict() for name in "ab")
    assert not folders.different(got, want)
    assert folders.FP8 in {t.dtype for t in want.values()}
    assert folders.config_of(tmp_path / "a")["dtype"] == "fp8" and "scale_fmt" not in folders.config_of(tmp_path / "a")
    save_inference(load_pretrained(tmp_path / "b", fp8="keep"), tmp_path / "c", ranks)
    first, again = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    assert first.keys() == again.keys() and not any(folders.different(first[file], again[file]) for file in first)


def test_written_tensors_are_views_of_the_model(build: Any) -> None:
    """Tensors of the held dtype are not copied before their turn comes, and no rank plans another's experts."""
    model, _ = build("v3")
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in model.state_dict().values()}
    plans = [SavePlan(model, False, None, 2, rank) for rank in range(2)]
    for plan in plans:
        entries = [entry for unit in plan.units() for entry in unit]
        assert {entry.make().untyped_storage().data_ptr() for entry in entries} <= held.keys()
        assert sum(entry.nbytes for entry in entries) < 0.75 * sum(held.values())


def test_what_is_left_out_is_said_once(tmp_path: Path, build: Any) -> None:
    model, _ = build("v3")
    with warnings.catch_warnings(record=True) as said:
        save_inference(model, tmp_path / "a", 2)
    assert [str(warning.message) for warning in said] == [
        f"{tmp_path / 'a'} has no multi-token prediction layers, of which the model has 1: DeepSeek's inference layout "
        "leaves them out",
        f"{tmp_path / 'a'} has routing biases, for which DeepSeek's inference code has a place at dim=7168 alone, and "
        "the model has dim=256; dsmini reads them",
    ]
    model, _ = build("v2", n_mtp_layers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_inference(model, tmp_path / "b", 2)


FP8_ROWS = (
    "layers.1.ffn.shared_experts.w1.weight in FP8 has 130 rows on each of 2 ranks, want a multiple of 128, the side of "
    "a block with one scale; use fewer ranks, or another dtype"
)
REFUSALS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [  # kind, changes of the model, arguments
    *(
        (kind, {key: value}, {}, f"a model with {key}={value!r} is not for DeepSeek's inference code, which has {want}")
        for kind, key, value, want in [
            ("v3", "attention", "mha", "'mla' or 'dsa'"),
            ("v3", "qk_norm", True, ""),
            ("v3", "norm_topk_prob", False, ""),
            ("v3", "n_shared_experts", 0, ""),
            ("v32", "indexer_rope_interleave", True, ""),
            ("v32", "q_lora_rank", None, "a compressed query for the indexer"),
        ]
    ),
    ("v3", {}, {"ranks": 0}, "ranks=0 is not positive; use 1 or more"),
    *(
        (
            "v3",
            {key: n},
            {"ranks": ranks},
            f"{key}={n} is not divisible by ranks={ranks}; use {fits} or a divisor of it",
        )
        for key, n, ranks, fits in [
            ("n_routed_experts", 4, 8, 4),
            ("n_heads", 6, 4, 2),
            ("vocab_size", 61, 2, 1),
            ("inter_dim", 510, 4, 2),
        ]
    ),
    ("v3", {"moe_inter_dim": 130}, {"ranks": 2, "fp8": True}, FP8_ROWS),
]


@pytest.mark.parametrize(("kind", "changes", "arguments", "sentence"), REFUSALS)
def test_layout_refuses_in_a_sentence(
    tmp_path: Path, build: Any, kind: str, changes: dict[str, Any], arguments: dict[str, Any], sentence: str
) -> None:
    model, _ = build(kind, **changes)
    assert refusal(save_inference, model, tmp_path / "a", **arguments).startswith(sentence)
    assert not (tmp_path / "a").exists()
