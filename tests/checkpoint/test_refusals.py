"""Folders and arguments that are refused, each with a sentence that says what is wrong, before memory is taken."""

import json
import os
import re
import shutil
import struct
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
from dsmini.nn import Rope
from dsmini.training.origin import find_origin
from tests.helpers import folders
from tests.helpers.configs import refusal, written

Damage = Callable[[Path], object]
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config(**changes: Any) -> Damage:
    return lambda folder: written(folder, folders.config_of(folder) | changes, "config.json")


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = folders.read(folder)
        change(held)
        folders.write(folder, held, folders.config_of(folder), shards=len(list(folder.glob("*.safetensors"))))

    return damage


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(folder: Path) -> None:
        held = json.loads((folder / INDEX).read_text())
        change(held["weight_map"])
        written(folder, held, INDEX)

    return damage


def content(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def named_twice(file: bytes) -> bytes:
    """Repeat an entry of the header: the library takes the last one in silence."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    header = re.sub(rb'("model.norm.weight":[^}]*})', rb"\1,\1", file[8:end])
    return struct.pack("<Q", len(header)) + header + file[end:]


def renamed(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def removed(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def part(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], to: str = "model1-mp2.safetensors") -> Damage:
    """Change the tensors of the second rank."""

    def damage(folder: Path) -> None:
        held = change(load_file(folder / RANK))
        (folder / RANK).unlink()
        save_file(held, folder / to)

    return damage


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {name: t for name, t in held.items() if name not in names}


def many_faults(held: dict[str, Tensor]) -> None:
    for name in ("model.norm.weight", "model.layers.1.mlp.experts.6.up_proj.weight"):
        del held[name]
    held["model.extra.weight"] = held["model.layers.0.bias"] = torch.ones(3)
    held["lm_head.weight"] = torch.ones(61, 23)
    held["model.layers.0.input_layernorm.weight"] = torch.ones(24, dtype=torch.int32)
    held["model.layers.2.embed_tokens.weight"] = torch.ones(60, 24)


def no_indexer(held: dict[str, Tensor]) -> None:
    for name in [name for name in held if ".indexer." in name]:
        del held[name]


ALL_FAULTS = (
    "{folder} does not hold the model that its config describes: "
    "it lacks model.layers.1.mlp.experts.6.up_proj.weight, model.norm.weight; "
    "it has tensors that belong nowhere: model.extra.weight, model.layers.0.bias; "
    "model.layers.0.input_layernorm.weight is I32, want BF16 or F32 or F16; "
    "lm_head.weight is [61, 23], want [61, 24]; "
    "model.layers.2.embed_tokens.weight is [60, 24], want [61, 24]; "
    "fetch its files again, or mend the config"
)
NO_INDEXER = (
    "{folder} has an indexer in its config and no tensor of one, of which it wants 20; fetch the files of "
    "DeepSeek-V3.2, or give V3's config.json to V3's tensors and add a fresh indexer by python -m dsmini.convert --dsa"
)
OFFSETS = re.compile(rb'("model.norm.weight":[^}]*"data_offsets":)(\[\d+,\d+\])')
NORM, RANK = "model.norm.weight", "model1-mp2.safetensors"
UP, EXPERT = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE, BIAS = f"{EXPERT}_scale_inv", "model.layers.1.mlp.gate.e_score_correction_bias"
TITLE = "\x1b]0;title\x07\x1b[31m"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FOLDERS: dict[str, list[tuple[Damage, str]]] = {  # by the folder that is damaged
    "folder": [
        # its files
        (shutil.rmtree, "there is no folder {folder}; name one"),
        (renamed("config.json", "config.toml"), "{folder} has no config.json; it is a training run, so use python"),
        (renamed("config.json", "x.json"), "{folder} has no config.json; name a folder that holds a model"),
        (lambda folder: written(folder, {}, "config.json"), "{folder}/config.json has no model_type; want"),
        (removed(FILE), "{folder} has neither model.safetensors nor model.safetensors.index.json"),
        (
            renamed(FILE, "pytorch_model.bin"),
            "; dsmini opens no pickles, such as pytorch_model.bin, for they can run code: convert them",
        ),
        (lambda folder: written(folder, "{}", INDEX), f"{{folder}} has both {FILE} and {INDEX}"),
        (
            renamed(FILE, "model0-mp1000000000.safetensors"),
            "has model0-mp1000000000.safetensors; want the files of one",
        ),
        # damaged files
        *(
            (content(change), "{folder}/model.safetensors is not a safetensors file, is cut short or damaged: ")
            for change in (
                lambda file: file[:-5],
                lambda file: file + b"x",
                lambda file: struct.pack("<Q", 4) + b"{{{{",
                lambda file: struct.pack("<Q", 2**40) + file[8:],
                lambda file: file.replace(b"[61,24]", b"[61,25]", 1),
                lambda file: file.replace(b'"F32"', b'"F9" ', 1),
                lambda file: OFFSETS.sub(lambda found: found[1] + b"[0,96]".ljust(len(found[2])), file),
            )
        ),
        (content(lambda file: b"version https://git-lfs.github.com/spec/v1\n"), f"{FILE} is a Git LFS pointer"),
        (content(named_twice), "the header of {folder}/model.safetensors names 'model.norm.weight' twice; keep one of"),
        # tensors
        (tensors(many_faults), ALL_FAULTS),
        (tensors(lambda t: t.update({TITLE: torch.ones(1)})), f"it has tensors that belong nowhere: {TITLE!r};"),
    ],
    "sharded": [
        (removed(INDEX), f"{{folder}} has neither {FILE} nor {INDEX}, which says what is in several files; fetch its"),
        (removed(SHARDS[0], SHARDS[2]), f"{{folder}} lacks {SHARDS[0]}, {SHARDS[2]}, which {INDEX} names; fetch what"),
        *(
            (
                index(lambda m, file=file: m.update(a=file)),
                f"{INDEX} names {file!r}; want a safetensors file of that folder",
            )
            for file in ("../x.safetensors", "..", "", "a\\b.safetensors", "x.bin")
        ),
        (index(lambda m: m.update(a=SHARDS[0], b=SHARDS[1])), f"has not in the files that {INDEX} names: a, b; fetch"),
        (index(lambda m: m.update({NORM: m["lm_head.weight"]})), f"not in the files that {INDEX} names: {NORM};"),
        (lambda folder: written(folder, {}, INDEX), f"{{folder}}/{INDEX} names None; want"),
    ],
    "fp8": [
        (tensors(lambda t: t.pop(f"{UP}_scale_inv")), f"it lacks {UP}_scale_inv;"),
        (tensors(lambda t: t.update({f"{UP}_scale_inv": torch.ones(2, 1)})), f"{UP}_scale_inv is [2, 1], want [2, 2]"),
        (tensors(lambda t: t.update({UP: torch.zeros(200, 136)})), f"belong nowhere: {UP}_scale_inv"),
        (config(quantization_config=None), "kv_b_proj.weight is F8_E4M3, want BF16 or F32 or F16"),
    ],
    "sparse": [
        (tensors(no_indexer), NO_INDEXER),
        (tensors(lambda t: (no_indexer(t), t.pop("lm_head.weight"))), "the model that its config describes: it lacks"),
    ],
    "ranks": [
        (part(without("embed.weight", "norm.weight")), f"lacks embed.weight in {RANK}, norm.weight in {RANK}; convert"),
        (part(without("layers.1.ffn.experts.3.w1.weight")), "it lacks layers.1.ffn.experts.3.w1.weight;"),
        (part(dict, "model2-mp2.safetensors"), "model2-mp2.safetensors; want the files of one conversion"),
        (part(dict, "model1-mp3.safetensors"), "model1-mp3.safetensors; want the files of one conversion"),
        (removed("config.json"), "copy the one of DeepSeek's inference code there"),
    ],
}
CONFIGS: list[tuple[dict[str, Any], str]] = [  # changes of config.json, and what is said before a model is made
    ({"num_nextn_predict_layers": 10**18}, f"config.json: n_mtp_layers={10**18} is too large; use 10,000 or less"),
    ({"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1}, "make a matrix of 4,611,686,014,132,420,609 numbers"),
    ({"num_hidden_layers": 9000, "num_nextn_predict_layers": 0}, "tensors for the 9000 layers of its config"),
    ({"n_routed_experts": 2**20}, "experts of its config; use the model's own"),
    ({"eos_token_id": [3, 61]}, "is [3, 61], but the model has 61 tokens; want ids below that"),
]
CASES = [(start, *case) for start, cases in FOLDERS.items() for case in cases]


@pytest.mark.parametrize(("start", "damage", "sentence"), CASES, ids=[sentence[-50:] for *_, sentence in CASES])
def test_folder_is_refused(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    damage: Damage,
    sentence: str,
) -> None:
    monkeypatch.setattr("dsmini.checkpoint.load._allocate", lambda *_: pytest.fail("memory was taken"))
    folder = request.getfixturevalue(start)
    damage(folder)
    assert sentence.format(folder=folder) in refusal(load_pretrained, folder)


@pytest.mark.parametrize(("changes", "sentence"), CONFIGS)
def test_config_is_refused_before_a_model_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr("dsmini.checkpoint.load.Transformer", lambda *_: pytest.fail("a model was made"))
    config(**changes)(folder)
    assert sentence.format(folder=folder) in refusal(load_pretrained, folder)


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_only_regular_files_are_read(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: it is a FIFO, want a regular file" in refusal(load_pretrained, folder)


def test_experts_half_in_fp8_load_only_dequantized(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    tensors(lambda t: (t.pop(SCALE), t.update({EXPERT: meant[EXPERT].bfloat16()})))(folder)
    load_pretrained(folder)
    assert "in layers.1.ffn.experts.w3; load it with fp8='dequantize'" in refusal(load_pretrained, folder, fp8="keep")


LONG = "a" * 5000
CALLS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: load_pretrained(folder, fp8="int8"), "fp8='int8' is unknown"),  # pyright: ignore[reportArgumentType]
    (lambda folder: load_pretrained(folder, dtype=torch.int8), "dtype=torch.int8 is not for weights"),
    (lambda folder: load_pretrained(folder, device="gpu"), "device 'gpu' is unknown"),
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

    tensors(change)(fp8)
    said = f"{fp8}: {name} holds {fault}; fetch the file again"
    for treatment in ("dequantize", "keep"):
        assert refusal(load_pretrained, fp8, fp8=treatment) == said
    assert refusal(find_origin, None, None, fp8, print) == said, "before a run begins"


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
BUILT_OTHERWISE: dict[str, Callable[[ModelConfig], Transformer]] = {
    "layers.1.ffn.gate is a OtherGate with code of its own, which no config says: ": (
        lambda c: Transformer(c, make_block=other_gate)
    ),
    "a model with score_func=<built-in method exp ": lambda c: Transformer(c, score_func=torch.exp),
    "layers.0.attn.mask is <function ": lambda c: Transformer(c, make_block=other_mask),
    "layers.0 is a OtherResidual with code of its own": lambda c: Transformer(c, make_block=OtherResidual),
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
    "layers.1.ffn.exchange is <function ": lambda m: setattr(m.layers[1].ffn, "exchange", lambda *x: x[2]),
}


@pytest.mark.parametrize("sentence", [*BUILT_OTHERWISE, *CHANGED])
def test_changed_idea_is_refused_by_name(tmp_path: Path, small_config: Any, sentence: str) -> None:
    model = BUILT_OTHERWISE.get(sentence, Transformer)(small_config())
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
