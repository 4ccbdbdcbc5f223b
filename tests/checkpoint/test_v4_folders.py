"""Folders of DeepSeek-V4: the released tensors, codes in FP4 and FP8, transformers' names, and what is refused."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, load_pretrained, ops, save_pretrained
from dsmini.checkpoint.load import PretrainedTensors
from dsmini.checkpoint.save import SavePlan
from dsmini.convert import main
from dsmini.numerics import dequantize_fp4, dequantize_tiles
from tests.conftest import MODELS, randomise
from tests.helpers import folders
from tests.helpers.configs import refusal, released
from tests.helpers.inference_layouts import cut_ranks

BF16, FP32, FP8, E8M0, FP4 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8
FLASH_BYTES = 159_609_485_896
"""Bytes of DeepSeek-V4-Flash's files, from their index."""
TENSORS = tomllib.loads(Path(__file__).with_name("v4_tensors.toml").read_text())
DTYPES = {"fp32": FP32, "bf16": BF16, "fp8": FP8, "int64": torch.int64}
Table = dict[str, tuple[tuple[int, ...], torch.dtype]]


def config(**changes: Any) -> ModelConfig:
    """Return a model with a layer of each kind, whose matrices have ragged blocks of 128 and whole blocks of 32."""
    return ModelConfig(**MODELS["v4_folder"] | changes)


def table(c: ModelConfig, experts: torch.dtype = FP4) -> Table:
    """Return the released names, shapes and dtypes."""
    out: Table = {}

    def add(part: str, prefix: str, **more: Any) -> None:
        for name, text in TENSORS[part].items():
            sizes, _, kind = text.partition(": ")
            shape, dtype = eval(f"({sizes},)", {}, dataclasses.asdict(c) | more), DTYPES.get(kind, experts)
            scale = f"{prefix}{name}".replace(".weight", ".scale")
            if dtype == FP4:
                shape, out[scale] = (shape[0], shape[1] // 2), ((shape[0], shape[1] // 32), E8M0)
            elif dtype == FP8:
                out[scale] = (-(-shape[0] // 128), -(-shape[1] // 128)), E8M0
            out[f"{prefix}{name}"] = shape, dtype

    def block(prefix: str, ratio: int, gate: str) -> None:
        add("block", prefix)
        add(gate, prefix)
        for i in range(c.n_routed_experts):
            add("expert", f"{prefix}ffn.experts.{i}.")
        if ratio:
            add("compressor", f"{prefix}attn.compressor.", m=ratio, width=c.head_dim, series=1 + (ratio == 4))
        if ratio == 4:
            add("indexer", f"{prefix}attn.indexer.")
            add("compressor", f"{prefix}attn.indexer.compressor.", m=4, width=c.index_head_dim, series=2)

    add("model", "")
    for i, ratio in enumerate(c.compress_ratios or ()):
        block(f"layers.{i}.", ratio, "hashed" if i < c.n_hash_layers else "learned")
    for i in range(c.n_mtp_layers):
        block(f"mtp.{i}.", 0, "learned")
        add("mtp", f"mtp.{i}.")
    return out


def drawn(c: ModelConfig, of: Table) -> dict[str, Tensor]:
    """Return random tensors of a table: any code, negative zero too, and scales of any size that fit a model."""
    out: dict[str, Tensor] = {}
    for name, (shape, dtype) in of.items():
        if name.endswith("tid2eid"):
            rows = [torch.randperm(c.n_routed_experts)[: c.n_activated_experts] for _ in range(c.vocab_size)]
            out[name] = torch.stack(rows).to(dtype)
        elif dtype == FP4:
            out[name] = torch.randint(0, 256, shape, dtype=torch.uint8).view(FP4)
        elif dtype == E8M0:
            out[name] = torch.randint(118, 122, shape, dtype=torch.uint8).view(E8M0)
        else:
            value = torch.randn(shape) * (4.0 if dtype == FP8 else shape[-1] ** -0.5)
            out[name] = value.to(dtype)
    return out


RAW = {"expert_dtype": "fp4", "torch_dtype": "bfloat16"}


def raw_of(c: ModelConfig, **more: Any) -> dict[str, Any]:
    return folders.config_json(c, quantization_config=folders.QUANTIZED | {"scale_fmt": "ue8m0"}) | RAW | more


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return drawn(config(), table(config()))


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    return folders.write(tmp_path / "released", tensors, raw_of(config()), shards=3)


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of codes, next to what is none, by name."""
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}
    for name in filter(lambda name: name.endswith(".scale"), tensors):
        weight, scale = name.replace(".scale", ".weight"), tensors[name]
        codes = tensors[weight]
        if codes.dtype == FP4:
            out[weight] = dequantize_fp4(codes, scale)
        else:
            out[weight] = dequantize_tiles(codes, scale.float(), (128, 128))
    return out


def test_released_table_has_the_bytes_of_flash_and_is_what_is_written() -> None:
    """Every tensor of Flash has its released name and shape, and but for gates, which stay FP32, its dtype."""
    c = released("deepseek-v4-flash")
    want = table(c)
    assert sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in want.values()) == FLASH_BYTES
    with torch.device("meta"):
        plan = SavePlan(Transformer(c), fp8=True, dtype=BF16, fp4=True)
    got = {entry.name: (tuple(entry.shape), entry.dtype) for unit in plan.units() for entry in unit}
    gates = {name: (shape, FP32) for name, (shape, _) in want.items() if name.endswith(".gate.weight")}
    assert got == want | gates


@pytest.mark.parametrize("experts", [FP4, FP8])
def test_released_folder_is_kept_and_written_bit_by_bit(tmp_path: Path, experts: torch.dtype) -> None:
    c = config()
    tensors = drawn(c, table(c, experts))
    raw = raw_of(c) if experts == FP4 else raw_of(c, expert_dtype="fp8")
    model = load_pretrained(folders.write(tmp_path / "a", tensors, raw, shards=2), fp8="keep")
    assert model.config == c
    held = {tensor.dtype for name, tensor in model.state_dict().items() if re.search(r"experts\.w\d$", name)}
    assert held == {torch.uint8 if experts == FP4 else FP8}
    save_pretrained(model, tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert folders.config_of(tmp_path / "b") == raw


@pytest.mark.parametrize("fp8", ["dequantize", "keep"])
def test_codes_mean_what_they_say(folder: Path, tensors: dict[str, Tensor], tmp_path: Path, fp8: Any) -> None:
    """The model computes what one computes that is loaded from the values of all codes."""
    model = load_pretrained(folder, dtype=FP32, fp8=fp8)
    exact = load_pretrained(folders.write(tmp_path / "x", values(tensors), folders.config_json(config())), dtype=FP32)
    tokens = torch.randint(0, 61, (2, 23))
    with ops.use("eager"):
        assert torch.equal(model(tokens), exact(tokens))
        for a, b in zip(model.run(tokens, mtp=True).mtp_logits, exact.run(tokens, mtp=True).mtp_logits, strict=True):
            assert torch.equal(a, b)
    torch.testing.assert_close(model(tokens), exact(tokens), rtol=0, atol=1e-5)  # kernels add in another order
    if fp8 == "dequantize":
        save_pretrained(model, tmp_path / "b")
        again = folders.read(tmp_path / "b")
        assert again.keys() == values(tensors).keys() and {"expert_dtype", "quantization_config"}.isdisjoint(
            folders.config_of(tmp_path / "b")
        )
        assert load_pretrained(tmp_path / "b", dtype=FP32)(tokens).isfinite().all()


def test_rows_for_a_training_run(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Experts are numbers, of which a process reads its own, and the table stays what it is."""
    there, meant = PretrainedTensors(folder), values(tensors)
    w2 = there.rows("layers.1.ffn.experts.w2", slice(2, 4))
    assert torch.equal(w2, torch.stack([meant[f"layers.1.ffn.experts.{i}.w2.weight"] for i in (2, 3)]))
    assert torch.equal(there.rows("layers.0.ffn.gate.tid2eid"), meant["layers.0.ffn.gate.tid2eid"])


def test_default_dtypes_of_a_released_folder(folder: Path) -> None:
    """Parts that DeepSeek uses in FP32 are FP32, the table has whole numbers, and all else is BF16."""
    fp32 = re.compile(r"norm|hc_|ape$|attn_sink$|gate\.(weight|bias)$|compressor|weights_proj")
    for name, tensor in load_pretrained(folder).state_dict().items():
        want = FP32 if fp32.search(name) else BF16
        assert tensor.dtype == (torch.int32 if name.endswith("tid2eid") else want), name


def test_fp4_becomes_fp8_without_a_change(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    assert main([str(folder), str(tmp_path / "b"), "--fp8"]) == 0
    got = folders.read(tmp_path / "b")
    assert {name: (tuple(t.shape), t.dtype) for name, t in got.items()} == table(config(), FP8)
    assert all(torch.equal(value, values(got)[name]) for name, value in values(tensors).items())
    assert "expert_dtype" not in folders.config_of(tmp_path / "b")
    assert main([str(folder), str(tmp_path / "plain"), "--dtype", "bfloat16"]) == 0  # BF16 holds them all
    plain = folders.read(tmp_path / "plain")
    matrices = [name for name in values(tensors) if name.replace(".weight", ".scale") in tensors]
    assert matrices and all(torch.equal(plain[name].float(), values(tensors)[name]) for name in matrices)
    tensors["layers.1.ffn.experts.2.w1.weight"][:] = 0x11
    scales = tensors["layers.1.ffn.experts.2.w1.scale"].view(torch.uint8)
    scales[0, 0], scales[0, 1] = 90, 110
    far = folders.write(tmp_path / "far", tensors, raw_of(config()))
    said = refusal(save_pretrained, load_pretrained(far, fp8="keep"), tmp_path / "c", fp8=True)
    assert said.startswith("layers.1.ffn.experts.2.w1.weight: FP4 scales") and not (tmp_path / "c").exists()


def test_a_trained_model_is_written_in_fp4(tmp_path: Path) -> None:
    model = randomise(Transformer(config()))
    save_pretrained(model, tmp_path / "a", fp4=True, dtype=BF16)
    got = folders.read(tmp_path / "a")
    assert {name: (tuple(t.shape), t.dtype) for name, t in got.items() if ".gate.weight" not in name} == {
        name: of for name, of in table(config()).items() if ".gate.weight" not in name
    }
    back = values(got)
    for name, tensor in folders.tensors_of(model).items():
        near = 0.3 if ".experts." in name else 0.07
        assert (back[name].float() - tensor.float()).norm() <= near * tensor.float().norm(), name
    assert folders.config_of(tmp_path / "a")["expert_dtype"] == "fp4"
    kept = load_pretrained(tmp_path / "a", fp8="keep")
    assert kept(torch.randint(0, 61, (1, 9))).isfinite().all()


def test_inference_layout_of_ranks(tmp_path: Path) -> None:
    """Two ranks have half of the heads and experts each, and compressors and shared experts whole."""
    c = config(vocab_size=62, index_n_heads=4)
    tensors = values(drawn(c, table(c)))
    same = (
        "vocab_size dim moe_inter_dim n_layers n_hash_layers n_heads n_routed_experts head_dim n_activated_experts "
        "route_scale swiglu_limit q_lora_rank o_groups o_lora_rank rope_factor window_size compress_ratios "
        "compress_rope_theta index_n_heads index_head_dim index_topk max_seq_len original_seq_len"
    )
    raw = {name: getattr(c, name) for name in same.split()} | {"rope_head_dim": 8, "dtype": "bf16"}
    ranks = cut_ranks(tmp_path / "ranks", tensors, raw, 2)
    model = load_pretrained(ranks)
    assert model.config == dataclasses.replace(c, qat=True), "DeepSeek's code rounds entries at every call"
    save_pretrained(model, tmp_path / "b")
    assert not folders.different(tensors, folders.read(tmp_path / "b"))
    assert load_pretrained(tmp_path / "b").config.qat
    assert load_pretrained(ranks, qat=False).config == load_pretrained(tmp_path / "b", qat=False).config == c


# refusals

DAMAGES = tomllib.loads(Path(__file__).with_name("folders.toml").read_text(encoding="utf-8"))["v4"]


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case["said"])
def test_a_damaged_folder_is_refused(tmp_path: Path, folder: Path, case: dict[str, Any]) -> None:
    folders.damage(folder, case)
    for fp8 in ("dequantize", "keep"):
        assert case["said"] in refusal(load_pretrained, folder, fp8=fp8)
    assert refusal(main, [str(folder), str(tmp_path / "b")]) and not (tmp_path / "b").exists()


def test_experts_partly_in_fp4_are_dequantized(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    name = "layers.0.ffn.experts.1.w1"
    mixed = tensors | {f"{name}.weight": torch.ones(32, 160).to(FP8), f"{name}.scale": torch.ones(1, 2).to(E8M0)}
    source = folders.write(tmp_path / "a", mixed, raw_of(config()))
    with pytest.warns(UserWarning, match="several formats, which are dequantized: layers.0.ffn.experts.w1"):
        kept = load_pretrained(source, fp8="keep").state_dict()
    assert kept["layers.0.ffn.experts.w2"].dtype == torch.uint8
    for state in (kept, load_pretrained(source, dtype=FP32).state_dict()):
        assert state["layers.0.ffn.experts.w1"][1].eq(1).all()
    assert main([str(source), str(tmp_path / "b"), "--fp8"]) == 0
    assert folders.read(tmp_path / "b")[f"{name}.weight"].dtype == FP8


def test_nan_and_scales_that_may_be_negative(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    """hc_*_scale are weights, no scales of codes."""
    tensors["hc_head_scale"][:] = -0.5
    tensors["layers.0.hc_attn_scale"][:] = 0
    load_pretrained(folders.write(tmp_path / "a", tensors, raw_of(config())))
    scale = tensors["layers.2.ffn.experts.3.w2.scale"].view(torch.uint8)
    scale[5, 0] = 255
    source = folders.write(tmp_path / "b", tensors, raw_of(config()))
    assert "experts.3.w2.scale holds infinities or NaN" in refusal(load_pretrained, source, fp8="keep")


def test_table_that_names_an_expert_twice_is_not_written(tmp_path: Path) -> None:
    model = Transformer(config())
    model.get_buffer("layers.0.ffn.gate.tid2eid").zero_()
    assert "layers.0.ffn.gate.tid2eid names the experts [0, 0]" in refusal(save_pretrained, model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_fp4_of_odd_rows_is_refused(tmp_path: Path) -> None:
    c = config(moe_inter_dim=40)
    tensors = drawn(c, table(c, FP8))
    tensors["layers.0.ffn.experts.0.w2.weight"] = torch.zeros(160, 20, dtype=FP4)
    source = folders.write(tmp_path / "a", tensors, raw_of(c))
    assert "w2.weight is FP4, and rows of 40 have no whole blocks of 32" in refusal(load_pretrained, source)
