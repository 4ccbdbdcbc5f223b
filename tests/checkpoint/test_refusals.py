"""Folders and arguments that are refused, each with a sentence that says what is wrong, before memory is taken."""

import json
import os
import re
import struct
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dsmini import MLA, Block, Gate, ModelConfig, MoE, RunConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.run_folder import new_run_folder
from dsmini.checkpoint.save import parse_size
from dsmini.distributed.world import World
from dsmini.nn import Rope
from dsmini.training.start import _weights
from tests.helpers import folders
from tests.helpers.configs import V4_MODEL, refusal, written

FILE = "model.safetensors"
NORM, BIAS = "model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE = f"{EXPERT}_scale_inv"
TABLES = tomllib.loads(Path(__file__).with_name("folders.toml").read_text(encoding="utf-8"))
CASES = [(start, case) for start, cases in TABLES.items() for case in cases if start not in ("v4", "checkpoint")]


@pytest.mark.parametrize(("start", "case"), CASES, ids=[case["said"][-50:] for _, case in CASES])
def test_folder_is_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, start: str, case: dict[str, Any]
) -> None:
    before = case.get("before", "_allocate")
    monkeypatch.setattr(f"dsmini.checkpoint.load.{before}", lambda *_: pytest.fail(f"{before} was called"))
    folder = request.getfixturevalue(start)
    folders.damage(folder, case)
    assert case["said"].format(folder=folder) in refusal(load_pretrained, folder)


def test_header_that_names_a_tensor_twice_is_refused(folder: Path) -> None:
    """The library takes the last entry in silence."""
    file = (folder / FILE).read_bytes()
    end = 8 + struct.unpack("<Q", file[:8])[0]
    header = re.sub(rb'("model.norm.weight":[^}]*})', rb"\1,\1", file[8:end])
    (folder / FILE).write_bytes(struct.pack("<Q", len(header)) + header + file[end:])
    assert f"the header of {folder}/{FILE} names {NORM!r} twice; keep one of" in refusal(load_pretrained, folder)


def test_tensor_in_two_files_is_refused(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file({NORM: tensors[NORM]}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {BIAS: "b.safetensors"}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert f"has {NORM} in two files, a.safetensors and b.safetensors; want one" in refusal(load_pretrained, folder)


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_only_regular_files_are_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: it is a FIFO, want a regular file" in refusal(load_pretrained, folder)


def test_experts_half_in_fp8_are_dequantized(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    folders.change(folder, lambda t: (t.pop(SCALE), t.update({EXPERT: meant[EXPERT].bfloat16()})))
    with pytest.warns(UserWarning, match=r"several formats, which are dequantized: layers.1.ffn.experts.w3"):
        kept = load_pretrained(folder, fp8="keep")
    name = "layers.1.ffn.experts.w3"
    assert torch.equal(kept.get_parameter(name), load_pretrained(folder).get_parameter(name))


LONG = "a" * 5000
CALLS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: load_pretrained(folder, fp8="int8"), "fp8='int8' is unknown"),  # pyright: ignore[reportArgumentType]
    (lambda folder: load_pretrained(folder, dtype=torch.int8), "dtype=torch.int8 is not for weights"),
    (lambda folder: load_pretrained(folder, device="gpu"), "device 'gpu' is unknown"),
    (lambda folder: load_pretrained(folder / "x"), "there is no folder "),
    (lambda folder: load_pretrained(LONG), "is too long for a path"),
    (lambda folder: new_run_folder(None, LONG), "is too long for a path"),
    (lambda folder: save_pretrained(load_pretrained(folder), folder), "holds files already"),
    (lambda folder: ModelConfig(rope_theta=-(10**400)), "... is not a finite number"),
    (
        lambda folder: RunConfig.from_file(written(folder, '[data]\npath = "a\\u0000b"', "x.toml")),
        "x.toml: data.path='a\\x00b' holds a NUL character",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), CALLS)
def test_argument_is_refused(folder: Path, call: Callable[[Path], object], sentence: str) -> None:
    assert sentence in refusal(call, folder)


SOFTMAX = {"score_func": "softmax", "topk_method": "group_limited_greedy"}
MODELS: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # changes of a model, arguments of save_pretrained
    *(
        ({}, {"shard_size": size}, "is not the size of a file; use for example 5GB or 500MB")
        for size in ("big", "1e9GB", 10**400, 0)
    ),
    ({"attention": "mha", "n_mtp_layers": 0}, {}, "a model with attention='mha' has no deepseek_v3 folder; want 'mla'"),
    ({"qk_norm": True}, {}, "a model with qk_norm=True has no deepseek_v3 folder"),
    ({"embed_norm": True}, {}, "a model with embed_norm=True has no deepseek_v3 folder"),
    ({"mtp_input": "pre_norm"}, {}, "a model with mtp_input='pre_norm' has no deepseek_v3 folder"),
    ({"topk_method": "group_limited_greedy"}, {}, "a model with topk_method='group_limited_greedy' has no d"),
    (SOFTMAX, {}, "a model with norm_topk_prob=True has no deepseek_v2 folder; want False"),
    ({"original_seq_len": 8, "mscale": 0.0}, {}, "mscale=0.0 with mscale_all_dim=1.0 has no spelling in config.json"),
    (V4_MODEL | {"hc_mult": 1}, {}, "a model with hc_mult=1 has no deepseek_v4 folder"),
    (V4_MODEL, {"fp4": True}, "experts have rows of dim=24 and moe_inter_dim=12"),
    ({}, {"fp4": True}, "FP4 is the format of DeepSeek-V4's experts"),
]


@pytest.mark.parametrize(("changes", "arguments", "sentence"), MODELS)
def test_model_without_a_folder_is_refused(
    tmp_path: Path, small_model: Callable[..., Transformer], changes: Any, arguments: Any, sentence: str
) -> None:
    assert sentence in refusal(save_pretrained, small_model(**changes), tmp_path / "b", **arguments)
    assert not list(tmp_path.iterdir())


# values without a meaning are found when they are read or written

NAN, INF = float("nan"), float("inf")
NOT_FINITE, NOT_ABOVE_0 = "infinities or NaN", "an FP8 scale that is not above 0"


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        *((name, value, NOT_FINITE) for name in (BIAS, SCALE, NORM) for value in (NAN, -INF)),
        ("model.layers.2.embed_tokens.weight", NAN, NOT_FINITE),
        *((SCALE, value, NOT_ABOVE_0) for value in (0.0, -1.0)),
        (EXPERT, NAN, "NaN"),
    ],
)
def test_folder_of_values_without_a_meaning_is_refused(fp8: Path, name: str, value: float, fault: str) -> None:
    def change(held: dict[str, Tensor]) -> None:
        held[name].view(-1)[-1] = torch.tensor(value).to(held[name].dtype)

    folders.change(fp8, change)
    said = f"{fp8}: {name} holds {fault}; fetch the file again"
    for treatment in ("dequantize", "keep"):
        assert refusal(load_pretrained, fp8, fp8=treatment) == said
    assert refusal(_weights, fp8, World(), print) == said, "before a run has a folder"


@pytest.mark.parametrize("arguments", [{}, {"fp8": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)
def test_model_of_values_without_a_meaning_is_not_saved(
    tmp_path: Path, small_model: Callable[..., Transformer], arguments: dict[str, Any]
) -> None:
    model = small_model()
    with torch.no_grad():
        model.layers[1].get_parameter("attn.wo.weight")[0, 0] = (
            1e9 if torch.float16 in arguments.values() else torch.nan
        )
    name = f"model.layers.1.self_attn.o_proj.weight{'_scale_inv' * ('fp8' in arguments)}"
    said = refusal(save_pretrained, model, tmp_path / "b", **arguments)
    assert said.startswith(f"{name} would hold {NOT_FINITE}, with which no folder is read; mend the model, or save")
    assert not list(tmp_path.iterdir())


def test_model_held_in_fp8_with_nan_is_not_saved(tmp_path: Path, fp8: Path) -> None:
    model = load_pretrained(fp8, fp8="keep")
    model.state_dict()["layers.1.ffn.experts.w3"].view(torch.uint8)[3, 0, 0] = 0xFF
    assert refusal(save_pretrained, model, tmp_path / "b").startswith(f"{EXPERT} would hold NaN, with which no folder ")


def test_sizes_of_files_have_units() -> None:
    sizes = {7: 7, "7": 7, "5KB": 5000, "1.5 mb": 1_500_000, "5GB": 5 * 10**9, "2KiB": 2048, "2 MiB": 2**21}
    assert {text: parse_size(text) for text in sizes} == sizes


# a model that computes what no config says is not written: its folder would be read as another model


class OtherGate(Gate):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.options["score_func"] = lambda logits: logits.exp()


class OtherResidual(Block):
    def forward(self, x, context=None):
        y, aux = super().forward(x, context)
        return x + y, aux


other_gate = partial(Block, moe_class=partial(MoE, gate_class=OtherGate))
other_mask = partial(Block, attention_class=partial(MLA, mask=lambda q, k: q - k > 4))
BUILT_OTHERWISE: dict[str, dict[str, Any]] = {
    "layers.1.ffn.gate is a OtherGate with code of its own, which no config says: ": {"make_block": other_gate},
    "a model with score_func=<built-in method exp ": {"score_func": torch.exp},
    "layers.0.attn.mask is <function ": {"make_block": other_mask},
    "layers.0 is a OtherResidual with code of its own": {"make_block": OtherResidual},
}
CHANGED: dict[str, Callable[[Transformer], object]] = {
    "layers.0.attn_norm is a RMSNorm with code of its own": (
        lambda m: setattr(m.layers[0].attn_norm, "forward", lambda x: x)
    ),
    "layers.1.attn.wo is a Linear with code of its own": (
        lambda m: m.layers[1].attn.wo.register_forward_hook(lambda module, inputs, y: 2 * y)
    ),
    "layers.1 is a Block with code of its own": (
        lambda m: m.layers[1].register_forward_pre_hook(lambda module, inputs: None)
    ),
    "layers.0.attn.scale is 1.0, which no config says": lambda m: setattr(m.layers[0].attn, "scale", 1.0),
    "norm.eps is 0.5, which no config says": lambda m: setattr(m.norm, "eps", 0.5),
    "layers.1.attn.rope is Rope": lambda m: setattr(m.layers[1].attn, "rope", Rope(dim=4, rope_theta=5.0)),
    "layers.1.attn.norm_eps is 0.5, which no config says": lambda m: setattr(m.layers[1].attn, "norm_eps", 0.5),
    "layers.1.ffn.experts.limit is 9.0, which no config says": lambda m: setattr(m.layers[1].ffn.experts, "limit", 9.0),
    "layers.1.ffn.exchange is <function ": lambda m: setattr(m.layers[1].ffn, "exchange", lambda *x: x[2]),
}


@pytest.mark.parametrize("sentence", [*BUILT_OTHERWISE, *CHANGED])
def test_changed_idea_is_refused_by_name(tmp_path: Path, small_config: Any, sentence: str) -> None:
    model = Transformer(small_config(), **BUILT_OTHERWISE.get(sentence, {}))
    CHANGED.get(sentence, lambda model: None)(model)
    assert refusal(save_pretrained, model, tmp_path / "x").startswith(sentence)
    assert not (tmp_path / "x").exists()


def test_same_computation_in_other_classes_is_written(tmp_path: Path, small_model: Callable[..., Transformer]) -> None:
    """torch's Linear without a bias computes what the config says."""
    model = small_model()
    plain = model.layers[0].attn.wo
    other = nn.Linear(plain.in_features, plain.out_features, bias=False)
    other.weight = plain.weight
    model.layers[0].attn.wo = other
    save_pretrained(model, tmp_path / "x")
    tokens = torch.randint(0, 61, (1, 9))
    assert torch.equal(load_pretrained(tmp_path / "x")(tokens), model(tokens))
