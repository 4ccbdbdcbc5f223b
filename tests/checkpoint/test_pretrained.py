"""Folders in and out, as published, in FP8, sparse, and of DeepSeek's inference code: the same tensors and configs."""

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsmini
from dsmini import ModelConfig, Transformer, load_pretrained, save_pretrained
from dsmini.checkpoint.load import add_indexers, fresh_sizes
from dsmini.checkpoint.run_folder import TOY, find_model
from dsmini.checkpoint.tensor_files import Entry, SafetensorsReader, write_safetensors
from dsmini.checkpoint.training_state import load_run
from dsmini.convert import main
from dsmini.nn import Indexer
from dsmini.numerics import quantize_tiles
from tests.helpers import folders
from tests.helpers.commands import ROOT, check_refused, finish
from tests.helpers.configs import DSA, refusal
from tests.helpers.folders import to_hf
from tests.helpers.inference_layouts import BUILT, INDEX, INFERENCE, inference_layout
from tests.helpers.tolerances import FP32_MODEL, relative_error

Build = Callable[..., Transformer]
DENSE = [({}, shards, copies) for shards in (1, 4) for copies in (True, False)]
KEYS = {"indexer_rope_interleave": True, "indexer_fp8": True}
SPARSE = [(DSA | changes, 2, True) for changes in ({}, {"q_lora_rank": None}, KEYS)]


@pytest.mark.parametrize(("changes", "shards", "copies"), DENSE + SPARSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_then_save_changes_no_bit(
    tmp_path: Path, small_model: Build, dtype: torch.dtype, changes: dict[str, Any], shards: int, copies: bool
) -> None:
    model = small_model(**changes)
    tensors = folders.tensors_of(model, dtype, copies)
    raw = folders.config_json(model.config, bos_token_id=3, torch_dtype=str(dtype).removeprefix("torch."))
    loaded = load_pretrained(folders.write(tmp_path / "a", tensors, raw, shards))
    assert loaded.config == model.config
    assert loaded.head.weight.dtype == dtype
    assert loaded.norm.weight.dtype == torch.float32
    save_pretrained(loaded, tmp_path / "b", shard_size=20_000 if shards > 1 else "1GB")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    if shards > 1:
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert {*index["weight_map"].values()} == {file.name for file in files} and len(files) > 2
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(file.stat().st_size < 20_000 + 10_000 for file in files)  # and the header
    else:
        assert [file.name for file in files] == ["model.safetensors"]


def test_stored_dtypes_survive_casts(tmp_path: Path, small_model: Build) -> None:
    """The FP32 routing bias of a BF16 folder is neither rounded in the model nor on its way back."""
    model = small_model()
    tensors = folders.tensors_of(model, torch.bfloat16)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert any(not torch.equal(tensors[name], tensors[name].bfloat16().float()) for name in biases)
    loaded = load_pretrained(folders.write(tmp_path / "a", tensors, folders.config_json(model.config)))
    for gate, original in zip(loaded.gates(), model.gates(), strict=True):
        assert gate.bias is not None
        assert torch.equal(gate.bias, original.bias)  # small models have theirs too
        assert gate.weight.dtype == torch.float32
    save_pretrained(copy.deepcopy(loaded).to(torch.bfloat16), tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))


def test_requested_dtype_leaves_norms_and_gates_fp32(tmp_path: Path, folder: Path) -> None:
    loaded = load_pretrained(folder, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    fp32 = {name for name, kind in kinds.items() if kind == torch.float32}
    assert fp32 == {name for name in kinds if "norm" in name or ".gate." in name}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    save_pretrained(load_pretrained(folder), tmp_path / "b", dtype=torch.bfloat16)
    written = {name: tensor.dtype for name, tensor in folders.read(tmp_path / "b").items()}
    assert {name for name, kind in written.items() if kind == torch.float32} == {n for n in written if ".gate." in n}
    assert folders.config_of(tmp_path / "b")["torch_dtype"] == "bfloat16"


def test_small_files_are_copied_along(tmp_path: Path, folder: Path) -> None:
    beside = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    beside += ["generation_config.json", "tiktoken.model", "modeling_deepseek.py", "merges.txt"]
    for name in [*beside, "optimizer.pt"]:
        (folder / name).write_text(name)
    loaded = load_pretrained(folder)
    save_pretrained(loaded, tmp_path / "b")
    there = {path.name for path in (tmp_path / "b").iterdir()}
    assert there == {*beside, "config.json", "model.safetensors"}
    assert all((tmp_path / "b" / name).read_text() == name for name in beside)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="from which the model was loaded, is gone; its tokenizer is not copied"):
        save_pretrained(loaded, tmp_path / "c")


def test_small_file_that_cannot_be_read_is_noticed_first(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").touch()
    loaded, real = load_pretrained(folder), os.open

    def closed(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", closed)
    monkeypatch.setattr("dsmini.checkpoint.save.write_safetensors", lambda *_: pytest.fail("it is written"))
    sentence = f"cannot read {folder}/tokenizer.json: Permission denied; check its permissions"
    assert refusal(save_pretrained, loaded, tmp_path / "b") == sentence
    assert not (tmp_path / "b").exists()


def test_double_precision_comes_back(tmp_path: Path, small_model: Build) -> None:
    model = small_model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-12 * torch.randn_like(parameter)
    save_pretrained(model, tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a")
    assert not folders.different(model.state_dict(), loaded.state_dict())
    save_pretrained(load_pretrained("toy", dtype=torch.float64), tmp_path / "b")
    assert load_pretrained(tmp_path / "b").head.weight.dtype == torch.bfloat16, "as it was stored"


def test_folder_may_be_named_by_a_link(tmp_path: Path, small_model: Build) -> None:
    (tmp_path / "empty").mkdir()
    for name, target in (("to a folder", "empty"), ("to nothing", "new"), ("to itself", "to itself")):
        (tmp_path / name).symlink_to(target)
    model = small_model()
    for name, target in (("to a folder", "empty"), ("to nothing", "new")):
        save_pretrained(model, tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert not folders.different(folders.read(tmp_path / target), folders.tensors_of(model, torch.float32))
    assert "holds files already" in refusal(save_pretrained, model, tmp_path / "to itself")


def test_folder_that_cannot_be_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Build
) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.chdir(tmp_path / "disk")
    for here, fix in ((".", "such as model"), (tmp_path / "disk", f"such as {tmp_path}/disk/model")):
        said = refusal(save_pretrained, small_model(), here)
        assert said.startswith(f"{here} is the current folder") and said.endswith(fix)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    (tmp_path / "link").symlink_to("disk")
    assert "link is a mount point" in refusal(save_pretrained, small_model(), "link")
    assert not list((tmp_path / "disk").iterdir())


def test_rotary_frequencies_of_old_folders_are_ignored(folder: Path) -> None:
    folders.change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    load_pretrained(folder)


def test_mtp_copies_that_differ_warn(folder: Path) -> None:
    folders.change(folder, lambda t: t.update({"model.layers.3.shared_head.head.weight": t["lm_head.weight"] + 1}))
    with pytest.warns(UserWarning, match="has model.layers.3.shared_head.head.weight other than the model's own"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_mtp_layers": 0, "n_dense_layers": 2},
        {"q_lora_rank": None, "rope_theta": 5e4, "norm_eps": 1e-5},
        {"original_seq_len": 8, "beta_fast": 1.0, "rope_factor": 32.0},
        {"original_seq_len": 8, "mscale": 0.707, "mscale_all_dim": 0.707},
        {"original_seq_len": 8, "mscale": 1.0, "mscale_all_dim": 0.0},
        {"score_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {"n_shared_experts": 0},
    ],
)
def test_config_json_round_trip(tmp_path: Path, small_model: Build, changes: dict[str, Any]) -> None:
    model = small_model(**changes)
    save_pretrained(model, tmp_path / "a")
    loaded = load_pretrained(tmp_path / "a")
    assert loaded.config == model.config
    tokens = torch.randint(0, 61, (2, 20))
    assert torch.equal(loaded(tokens), model(tokens))


# files of tensors

TENSORS = {
    "b": torch.arange(12.0).view(3, 4).t(),
    "é\n/a": torch.tensor([1.0, -2.0]).bfloat16(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "codes": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    "step": torch.tensor([5]),
    "mask": torch.tensor([True, False]),
}


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def test_written_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    """Except where dtypes of one width are mixed, which checkpoints do not: the library has its own order of those."""
    tensors = {name: t for name, t in TENSORS.items() if name not in ("bytes", "mask")}
    write_safetensors(tmp_path / "ours", entries_of(tensors), {"step": "3"})
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"step": "3"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_every_bit_comes_back_by_either_reader(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", entries_of(TENSORS), {"format": "pt"})
    assert not folders.different(load_file(tmp_path / "x"), TENSORS)
    assert not folders.different(SafetensorsReader(tmp_path / "x").read_all(), TENSORS)


def test_writing_to_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, tmp_path / "x")
    reader = SafetensorsReader(tmp_path / "x")
    view = reader.read("a")
    view.zero_()
    assert torch.equal(SafetensorsReader(tmp_path / "x").read("a"), torch.ones(9))
    del reader
    assert torch.equal(view, torch.zeros(9))  # outlives the reader


# in FP8: dequantized, kept, and saved


def test_ragged_fp8_dequantizes_block_by_block(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    folder, meant = fp8_folder
    exact = load_pretrained(folder, dtype=torch.float32)
    assert not folders.different(meant, to_hf(exact))
    short = load_pretrained(folder)
    assert not folders.different(
        {name: t.bfloat16() if folders.is_matrix(name) else t for name, t in meant.items()},
        to_hf(short),
    )


def test_kept_fp8_survives_casts(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    before = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
    assert sum(t.nbytes for t in before.values()) < 0.35 * sum(4 * t.numel() for t in before.values())
    tokens = torch.randint(0, 61, (2, 20))
    for cast in (torch.bfloat16, torch.float64):
        model = copy.deepcopy(kept).to(cast)
        after = model.state_dict()
        fp8 = [name for name, tensor in before.items() if tensor.dtype == folders.FP8 or "scale" in name]
        assert len(fp8) > 20
        assert not folders.different({n: before[n] for n in fp8}, {n: after[n] for n in fp8})
        assert model.head.weight.dtype == cast
        if cast != torch.float64:
            still = {name for name in after if "norm" in name or ".gate." in name}
            assert not folders.different({n: before[n] for n in still}, {n: after[n] for n in still})
        model(tokens)


def test_kept_fp8_does_not_depend_on_the_default_dtype(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    """DeepSeek's own code sets it to BF16, which would round the scales."""
    want = load_pretrained(fp8_folder[0], fp8="keep").state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = load_pretrained(fp8_folder[0], fp8="keep").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not folders.different(want, got)


def test_kept_fp8_refuses_training(fp8_folder: tuple[Path, dict[str, Tensor]]) -> None:
    kept = load_pretrained(fp8_folder[0], fp8="keep")
    tokens = torch.randint(0, 61, (1, 9))
    assert "load the model with fp8='dequantize' to train it" in refusal(kept.train)
    kept.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()  # through codes, as through frozen weights
    assert all(p.grad is None for p in kept.parameters() if p.dtype == torch.float8_e4m3fn)
    trained = load_pretrained(fp8_folder[0]).train()
    trained.losses(tokens[:, :-1], tokens[:, 1:]).total.backward()
    assert all(parameter.grad is not None for parameter in trained.layers[0].parameters())


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_kept_fp8_is_saved_bit_by_bit(
    tmp_path: Path, fp8_folder: tuple[Path, dict[str, Tensor]], scale_dtype: torch.dtype
) -> None:
    folder = fp8_folder[0]
    raw = folders.config_of(folder)
    tensors = folders.read(folder)
    if scale_dtype != torch.float32:
        raw["quantization_config"] |= {"scale_fmt": "ue8m0"}
        tensors = {n: t.to(scale_dtype) if n.endswith("_scale_inv") else t for n, t in tensors.items()}
        folder = folders.write(tmp_path / "ue8m0", tensors, raw)
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "b", shard_size="100KB")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw
    save_pretrained(load_pretrained(folder, fp8="keep"), tmp_path / "c", dtype=torch.bfloat16)
    save_pretrained(load_pretrained(folder), tmp_path / "d")
    for path in (tmp_path / "c", tmp_path / "d"):
        written = folders.read(path)
        assert "quantization_config" not in folders.config_of(path)
        assert written.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
        assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {torch.bfloat16}


def test_save_in_fp8_quantizes_matrices_alone(tmp_path: Path, fp8_model: Build) -> None:
    model = fp8_model()
    save_pretrained(model, tmp_path / "a", fp8=True, shard_size="200KB")
    written, plain = folders.read(tmp_path / "a"), folders.tensors_of(model)
    codes = {name for name, tensor in written.items() if tensor.dtype == folders.FP8}
    assert codes == {name for name in plain if folders.is_matrix(name)}
    for name in codes:
        want = quantize_tiles(plain[name], (128, 128), "fp32", "e4m3", 2.0**-100)
        assert torch.equal(written[name].float(), want[0].float())
        assert torch.equal(written[name.replace(".weight", ".weight_scale_inv")], want[1])
    rest = {name: t for name, t in written.items() if name not in codes and not name.endswith("_scale_inv")}
    assert not folders.different(rest, {name: t for name, t in plain.items() if name not in codes})
    assert folders.config_of(tmp_path / "a")["quantization_config"] == folders.QUANTIZED
    again = load_pretrained(tmp_path / "a", fp8="keep")
    save_pretrained(again, tmp_path / "b", fp8=True)
    assert not folders.different(written, folders.read(tmp_path / "b"))


# of DeepSeek-V3.2, and made from a dense model

PREFIX = "model.layers.{}.self_attn.indexer."


def test_norms_and_head_weights_of_a_bf16_folder_are_held_in_fp32(tmp_path: Path, small_model: Build) -> None:
    model = small_model(**DSA)
    tensors = folders.tensors_of(model, torch.bfloat16)
    norms = {name: t.float() for name, t in tensors.items() if ".k_norm." in name}  # one listing has them in FP32
    source = folders.write(tmp_path / "a", tensors | norms, folders.config_json(model.config))
    loaded = load_pretrained(source)
    fp32 = {name for name, t in loaded.layers[0].attn.indexer.state_dict().items() if t.dtype == torch.float32}
    assert fp32 == {"k_norm.weight", "k_norm.bias", "weights_proj.weight"}
    save_pretrained(loaded, tmp_path / "b")
    assert not folders.different(tensors | norms, folders.read(tmp_path / "b"))


@pytest.mark.parametrize("fp8", ["dequantize", "keep"])
def test_indexer_in_fp8_has_scales_for_two_matrices(tmp_path: Path, fp8_model: Build, fp8: Any) -> None:
    """As released: wq_b and wk are codes with weight_scale_inv, weights_proj and k_norm are not."""
    model = fp8_model(**DSA | {"index_n_heads": 5, "q_lora_rank": 130})
    tensors, meant = folders.in_fp8(folders.tensors_of(model, torch.bfloat16))
    scales = {name for name in tensors if ".0.self_attn.indexer." in name and name.endswith("_scale_inv")}
    assert scales == {PREFIX.format(0) + f"{name}.weight_scale_inv" for name in ("wq_b", "wk")}
    raw = folders.config_json(model.config, quantization_config=folders.QUANTIZED | {"scale_fmt": "ue8m0"})
    source = folders.write(tmp_path / "a", tensors, raw)
    loaded = load_pretrained(source, dtype=torch.float32, fp8=fp8)
    exact = Transformer(model.config)
    exact.load_state_dict(load_pretrained(folders.write(tmp_path / "x", meant, raw), torch.float32).state_dict())
    tokens = torch.randint(0, 61, (1, 20))
    got, want = loaded.run(tokens, mtp=True), exact.run(tokens, mtp=True)
    assert relative_error(got.logits, want.logits) < FP32_MODEL
    assert relative_error(got.mtp_logits[0], want.mtp_logits[0]) < FP32_MODEL
    if fp8 == "keep":
        assert loaded.layers[0].attn.indexer.wk.weight.dtype == folders.FP8
        save_pretrained(loaded, tmp_path / "b")
        assert not folders.different(tensors, folders.read(tmp_path / "b"))
        assert folders.config_of(tmp_path / "b") == raw
    else:
        save_pretrained(loaded, tmp_path / "b", fp8=True)
        again = folders.read(tmp_path / "b")
        assert {n for n, t in again.items() if t.dtype == folders.FP8} == set(filter(folders.is_matrix, again))


# a dense model becomes a sparse one


def test_convert_adds_fresh_indexers(tmp_path: Path, small_model: Build) -> None:
    model, tokens = small_model(), torch.randint(0, 61, (2, 20))
    tensors = folders.tensors_of(model, torch.bfloat16)
    ids = {"bos_token_id": 3, "eos_token_id": [5, 6], "pad_token_id": 7}
    folders.write(tmp_path / "a", tensors, folders.config_json(model.config, **ids))
    done = finish("dsmini.convert a b --dsa --index-n-heads 3 --index-head-dim 32 --index-topk 8 --json", tmp_path)
    sparse = load_pretrained(tmp_path / "b", torch.float32)
    dense = load_pretrained(tmp_path / "a", torch.float32)
    assert sparse.config == ModelConfig.from_file(tmp_path / "b" / "config.json")
    assert (sparse.config.attention, sparse.config.index_topk) == ("dsa", 8)
    assert folders.config_of(tmp_path / "b").items() >= ids.items()
    assert torch.equal(sparse(tokens[:, :8]), dense(tokens[:, :8]))
    assert not torch.equal(sparse(tokens), dense(tokens))
    saved = folders.read(tmp_path / "b")
    assert not folders.different(tensors, {name: t for name, t in saved.items() if ".indexer." not in name})
    assert sum(isinstance(part, Indexer) for part in sparse.modules()) == 4
    assert (saved[PREFIX.format(3) + "k_norm.bias"] == 0).all() and (saved[PREFIX.format(3) + "wk.weight"] != 0).all()
    drawn = [saved[PREFIX.format(layer) + "wk.weight"] for layer in (0, 1)]
    assert not torch.equal(*drawn)
    assert json.loads(done.stdout)["parameters"] == sum(p.numel() for p in sparse.parameters())


def test_fresh_indexers_have_the_sizes_of_their_model() -> None:
    """V3 gets V3.2's sizes, a toy sizes so small enough that its tokens have a choice."""
    v3 = ModelConfig.from_file(ROOT / "configs" / "deepseek-v3.toml")
    assert fresh_sizes(v3) == {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
    toy = fresh_sizes(ModelConfig())
    assert toy == {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 64}
    odd = ModelConfig(n_heads=1, qk_nope_head_dim=24, qk_rope_head_dim=48, max_seq_len=3)
    dataclasses.replace(odd, attention="dsa", **fresh_sizes(odd))


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        (DSA, {}, "an indexer belongs to MLA, and this model has attention='dsa'; use a model of DeepSeek-V3"),
        ({"qk_norm": True}, {}, "attention='dsa' with qk_norm: it has no form"),
        ({}, {"topk": 0}, "index_topk=0 is not positive; use 1 or more"),
        ({}, {"head_dim": 2}, "index_head_dim=2 is smaller than qk_rope_head_dim=4, which it holds; use 4"),
    ],
)
def test_impossible_indexers_are_refused(
    small_model: Build, changes: dict[str, Any], sizes: dict[str, int], sentence: str
) -> None:
    model = small_model(**changes)
    assert refusal(add_indexers, model, **{"n_heads": 3, "head_dim": 32, "topk": 8} | sizes).startswith(sentence)
    assert model.config.attention == changes.get("attention", "mla")


# the files that DeepSeek's convert.py writes

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


def test_dense_layers_that_the_folder_lacks_are_left_out(tmp_path: Path, small_model: Build) -> None:
    """The absent block of multi-token prediction is one of those that the config counts as dense."""
    model = small_model(n_mtp_layers=1, n_layers=2, n_dense_layers=3)
    kept = without_mtp(folders.tensors_of(model))
    with pytest.warns(UserWarning, match="holds nothing of the 1 multi-token prediction layers"):
        back = load_pretrained(folders.write(tmp_path / "a", kept, folders.config_json(model.config)))
    assert back.config == dataclasses.replace(model.config, n_mtp_layers=0, n_dense_layers=2)
    save_pretrained(back, tmp_path / "b")
    assert load_pretrained(tmp_path / "b").config == back.config
    assert folders.config_of(tmp_path / "b") == folders.config_of(tmp_path / "a") | {"num_nextn_predict_layers": 0}


DTYPES, RANKS = ("bfloat16", "float32", "fp8"), (1, 2, 4)
CASES = [
    # every pair of two of the three
    (kind, ranks, dtype)
    for i, kind in enumerate(KINDS)
    for j, ranks in enumerate(RANKS)
    for k, dtype in enumerate(DTYPES)
    if (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("kind", "ranks", "dtype"), CASES)
def test_files_of_deepseek_become_a_folder(tmp_path: Path, build: Any, kind: str, ranks: int, dtype: str) -> None:
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
    # 1. theirs is read
    back = load_pretrained(theirs)
    assert not folders.different(back.state_dict(), without_mtp(load_pretrained(source).state_dict()))
    assert back.config == dataclasses.replace(model.config, n_mtp_layers=0)
    tokens = torch.randint(0, 64, (1, 20))
    assert torch.equal(back.float()(tokens), load_pretrained(source).float()(tokens))
    loaded = folders.tensors_of(load_pretrained(theirs, dtype=torch.float32))
    assert not folders.different(loaded, {name: t.float() for name, t in without_mtp(exact or tensors).items()})
    # 2. theirs becomes a folder
    assert main([str(theirs), str(tmp_path / "c")]) == 0
    assert not folders.different(folders.read(tmp_path / "c"), kept)
    assert (tmp_path / "c" / "tokenizer.json").exists()
    assert ("quantization_config" in folders.config_of(tmp_path / "c")) == (dtype == "fp8")


# the command


def test_checkpoint_is_written_in_fp8_and_bf16(trained: Path, tmp_path: Path) -> None:
    source = trained / "checkpoints" / "step-000002"
    done = finish(f"dsmini.convert {source} short --fp8 --dtype bfloat16 --shard-size 20KB", tmp_path)
    written = folders.read(tmp_path / "short")
    assert {t.dtype for n, t in written.items() if folders.is_matrix(n)} == {folders.FP8}
    assert written["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert written["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert len(list((tmp_path / "short").glob("model-*.safetensors"))) > 1
    assert "parameters" in done.stdout
    want, _ = load_run(source)
    tokens = torch.randint(0, 61, (1, 30))
    got = load_pretrained(tmp_path / "short", fp8="keep")(tokens)
    assert (got - want(tokens)).norm() < 0.2 * want(tokens).norm()


def test_mistakes_are_refused_and_write_nothing(tmp_path: Path, small_model: Build) -> None:
    save_pretrained(small_model(**BUILT), tmp_path / "a")
    check_refused("dsmini.convert", tmp_path)


def test_full_disk_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Build) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsmini.checkpoint.tensor_files.os.pwrite", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/b'$"):
        save_pretrained(small_model(), tmp_path / "b")
    assert not list(tmp_path.iterdir())


# --- the model that dsmini comes with, which every later version has to load

RECORDED = json.loads(Path(__file__).with_name("toy_logits.json").read_text())
TOLERANCE = 1e-4
"""Largest relative difference of logits in FP32, whose sums are in another order on another CPU."""


@pytest.mark.parametrize(
    ("backend", "fp8"), [("reference", "dequantize"), ("eager", "keep"), (None, "dequantize"), (None, "keep")]
)
def test_toy_has_the_logits_that_were_recorded(backend: str | None, fp8: Literal["dequantize", "keep"]) -> None:
    tokens, wanted = torch.tensor([list(RECORDED["prompt"].encode())]), torch.tensor(RECORDED["logits"])
    with dsmini.ops.use(backend), torch.no_grad():
        model = dsmini.load_pretrained("toy", torch.float32, fp8)
        logits = model(tokens)[0]
        cache = model.new_cache(max_seq_len=tokens.shape[1])
        parts = tokens.split([tokens.shape[1] - 4, 1, 1, 1, 1], 1)
        steps = torch.cat([model(part, cache=cache)[0] for part in parts])
    for got in (logits, steps):
        got = got[RECORDED["positions"]][:, RECORDED["bytes"]]
        assert ((got - wanted).norm() / wanted.norm()).item() < TOLERANCE
    assert bytes(logits.argmax(-1).tolist()).decode() == RECORDED["guesses"]


def test_toy_is_small_and_a_folder_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(file.stat().st_size for file in TOY.iterdir()) < 7_000_000
    monkeypatch.chdir(tmp_path)
    assert find_model(Path("toy")) == TOY
    (tmp_path / "toy").mkdir()
    assert find_model(Path("toy")) == Path("toy")
