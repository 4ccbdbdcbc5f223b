"""Configs: our TOML files, config.json and DeepSeek's inference JSON are read as they are meant, or refused."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsmini import DataConfig, ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.checkpoint.run_folder import run_config
from dsmini.config.model import layer_config
from dsmini.config.published import config_to_json
from dsmini.config.retired import Retired
from dsmini.config.schedule import SPELLINGS
from dsmini.reading import find_config
from tests.helpers.configs import CONFIGS, DSA, V4, V32, refusal, released, written
from tests.helpers.released_configs import HF, HF_GLM, HF_V3, HF_V32, INDEXER, released_json
from tests.helpers.strategies import model_configs

HF_V4 = released_json("deepseek-v4-flash")
CASES = tomllib.loads((Path(__file__).parent / "cases.toml").read_text())
REFUSALS = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text(encoding="utf-8"))


def test_retired_key_is_read_at_its_old_default_and_else_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_train = {"warmup": Retired(0, "use train.lr_schedule"), "decay": Retired("none", "use train.ema_decay")}
    monkeypatch.setattr("dsmini.config.retired.RETIRED", {"TrainConfig": of_train})
    (tmp_path / "config.toml").write_text('[train]\nwarmup = 0\nsteps = 7\ndecay = "none"\n')
    with pytest.warns(UserWarning, match="which this version has no longer: it does") as notes:
        assert run_config(tmp_path) == RunConfig(train=TrainConfig(steps=7))
    assert [str(note.message).partition(",")[0] for note in notes] == [
        "config.toml has train.warmup=0",
        "config.toml has train.decay='none'",
    ]
    for text in ("train.warmup = 20", "train.warmup = false", "train.warmup = 'none'"):
        (tmp_path / "config.toml").write_text(text)
        said = refusal(run_config, tmp_path)
        assert "config.toml has train.warmup=" in said and "has no longer; use train.lr_schedule, or read it" in said
    (tmp_path / "config.toml").write_text("model.warmup = 0")
    assert "unknown key 'model.warmup'" in refusal(run_config, tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_is_found_by_name_and_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ModelConfig.from_file(path.stem)
    assert RunConfig.from_file(path.stem).model == config == ModelConfig.from_file(path)
    with torch.device("meta"):
        assert Transformer(config).config == config


SHARE, ABOVE_0, PARTS = st.floats(0, 1), st.floats(1e-9, 1e9), st.integers(1, 4)
PATHS = st.none() | st.sampled_from(["book.txt", "a b/ü.txt", ".", 'quo"te\\', "[x]"]).map(Path)
TRAIN: dict[str, st.SearchStrategy[Any]] = {  # one or two fields of each type
    "seq_len": st.none() | st.just(3),
    "lr": st.none() | ABOVE_0,
    "lr_schedule": st.tuples(SHARE.map("warmup {}".format), SHARE.map("cosine to {}".format)),
    "recompute": st.booleans(),
    "sample_prompt": st.text(min_size=1, max_size=9),
    "seed": st.integers(0, 2**63 - 1),
    "threads": st.none() | PARTS,
}


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Draw any valid run, paths with spaces and umlauts among them."""
    grad_accum = draw(PARTS)
    drawn = {name: draw(values) for name, values in TRAIN.items()}
    train = TrainConfig(**drawn, grad_accum=grad_accum, batch_size=grad_accum * draw(PARTS))
    data = DataConfig(path=draw(PATHS), val_fraction=draw(st.floats(1e-6, 0.99)))
    return RunConfig(model=draw(model_configs()), data=data, train=train, out=draw(PATHS))


@given(run=runs())
def test_run_is_the_same_after_toml(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("run"), run.to_toml(), "x.toml")
    assert RunConfig.from_file(path) == run
    assert ModelConfig.from_file(path) == run.model


def test_empty_file_and_toy_file_are_the_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "", "x.toml")
    assert ModelConfig.from_file(path) == ModelConfig()
    assert RunConfig.from_file(path) == RunConfig.from_file(CONFIGS / "toy.toml") == RunConfig()


def test_unknown_name_of_a_config_lists_near_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, fix in REFUSALS["names"].items():
        assert refusal(find_config, Path(name)).startswith(f"there is no file {name}; {fix}")


@pytest.mark.parametrize("changes", CASES["fits"], ids=str)
def test_sizes_that_just_fit_build(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        Transformer(ModelConfig(**changes))


# what is refused


def check(said: str, sentence: str, path: Path | None = None) -> None:
    sentence = sentence.replace("{path}", str(path)).replace("{spellings}", SPELLINGS)
    beginning = sentence.removesuffix("...")
    if sentence.startswith("..."):
        assert sentence[3:] in said
    else:
        assert said.startswith(beginning) if sentence.endswith("...") else said == sentence


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig])
@pytest.mark.parametrize("toml", REFUSALS["model"])
def test_wrong_model_is_refused(tmp_path: Path, toml: str, kind: Any) -> None:
    path = written(tmp_path, toml, "x.toml")
    check(refusal(kind.from_file, path), REFUSALS["model"][toml], path)


@pytest.mark.parametrize(("name", "base"), [("sparse", DSA), ("compressed", V4)])
def test_wrong_sizes_of_an_attention_are_refused(tmp_path: Path, name: str, base: dict[str, Any]) -> None:
    for toml, sentence in REFUSALS[name].items():
        path = written(tmp_path, tomli_w.dumps({"model": base | tomllib.loads(toml)}), "x.toml")
        check(refusal(ModelConfig.from_file, path), sentence)


@pytest.mark.parametrize("toml", REFUSALS["run"])
def test_wrong_run_is_refused(tmp_path: Path, toml: str) -> None:
    check(refusal(RunConfig.from_file, written(tmp_path, toml, "x.toml")), REFUSALS["run"][toml])


BASES = {"hugging_face": HF_V3, "hugging_face_v2": HF["deepseek-v2"], "hugging_face_sparse": HF_V32, "v4": HF_V4}
BASES["glm"] = HF_GLM | {"num_hidden_layers": 4, "indexer_types": ["full", "full", "full", "shared"]}
del BASES["glm"]["index_topk_freq"]  # so that the list alone says it


PATTERN = {"index_topk_pattern": "FF" + 19 * "FSSS"}
LIST = {"indexer_types": ["full"] * 2 + 19 * ["full", "shared", "shared", "shared"]}
GLM_SPELLINGS = {"freq": {}, "pattern": PATTERN | {"index_topk_freq": None}, "list": LIST, "all": LIST | PATTERN}


@pytest.mark.parametrize("spelling", GLM_SPELLINGS)
def test_spellings_of_shared_layers_say_the_same(tmp_path: Path, spelling: str) -> None:
    """So does configs/glm-5.2.toml, whose rope_theta is that of rope_parameters."""
    got = ModelConfig.from_file(written(tmp_path, HF_GLM | GLM_SPELLINGS[spelling], "config.json"))
    assert got == ModelConfig.from_file("glm-5.2")
    full = [layer for layer in range(78) if got.index_source(layer) == layer]
    assert full == [0, 1, 2, *range(6, 75, 4)]
    assert [got.index_source(layer) for layer in (3, 5, 9, 77, 78)] == [2, 2, 6, 74, 78]


def test_without_a_list_all_layers_of_glm_are_full(tmp_path: Path) -> None:
    """As GLM-5 and 5.1."""
    raw = {key: value for key, value in HF_GLM.items() if not key.startswith(("index_topk_f", "index_skip"))}
    assert ModelConfig.from_file(written(tmp_path, raw, "config.json")).indexer_types == ("full",) * 78


@pytest.mark.parametrize(("name", "toml"), [(name, toml) for name in BASES for toml in REFUSALS[name]])
def test_config_json_that_cannot_be_honoured_is_refused(tmp_path: Path, name: str, toml: str) -> None:
    raw, sentence = dict(BASES[name]), REFUSALS[name][toml]
    for key, value in tomllib.loads(toml).items():
        if isinstance(value, dict):
            known = {} if "type" in value else raw.get(key, {})  # changes of keys, or another kind of table
            value = {inner: each for inner, each in (known | value).items() if each != "left out"}
        raw[key] = value
    path = written(tmp_path, {key: value for key, value in raw.items() if value != "left out"})
    check(refusal(ModelConfig.from_file, path), sentence if sentence.startswith("...") else f"{path} {sentence}")


CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
RATIOS = HF_V4["compress_ratios"]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"compress_ratios": [*RATIOS[:-1], 4]}, "for multi-token prediction"),
        ({"layer_types": ["sliding_attention"] * 43}, "in other words; keep one"),
        ({"layer_types": ["mamba"] * 43}, "cannot honour; want sliding_attention"),
        ({"mlp_layer_types": ["moe"] * 42 + ["hash_moe"]}, "want hash_moe for the first layers"),
        ({"mlp_layer_types": ["moe"] * 43}, "num_hash_layers=3, and 0 in other words"),
        ({"layer_types": [CSA] * 43, "compress_rates": {CSA: 4, HCA: 4}}, "a rate of 4 for the second"),
    ],
)
def test_lists_of_layers_without_a_meaning_are_refused(tmp_path: Path, changes: dict[str, Any], want: str) -> None:
    assert want in refusal(ModelConfig.from_file, written(tmp_path, HF_V4 | changes))


@pytest.mark.parametrize("content", REFUSALS["inference"])
def test_wrong_inference_json_is_refused(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    check(refusal(ModelConfig.from_file, path), REFUSALS["inference"][content], path)


@pytest.mark.parametrize("name", REFUSALS["unwritten"])
def test_parts_that_a_folder_has_no_words_for_are_not_written(name: str) -> None:
    for toml, sentence in REFUSALS["unwritten"][name].items():
        changes = {key: None if value == "none" else value for key, value in tomllib.loads(toml).items()}
        assert sentence in refusal(config_to_json, dataclasses.asdict(released(name)) | changes)


Changes = dict[str, Any]


def read(folder: Path, raw: Changes) -> ModelConfig:
    return ModelConfig.from_file(written(folder, raw))


# config.json


def in_the_new_spelling(raw: Changes) -> Changes:
    """As transformers 5 writes it: one dict for all that is rotary, dtype for torch_dtype, widths spelt out."""
    new = {key: value for key, value in raw.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    rope = dict(raw["rope_scaling"] or {"type": "default"})
    rope = {"rope_type": rope.pop("type"), "rope_theta": raw["rope_theta"], **rope}
    extra = {"rope_interleave": True, "head_dim": 64, "qk_head_dim": 192, "dtype": raw["torch_dtype"]}
    return {**new, "rope_parameters": rope, **extra}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("respell", [dict, in_the_new_spelling], ids=["rope_scaling", "rope_parameters"])
def test_released_config_json_is_read_in_both_spellings(tmp_path: Path, name: str, respell: Any) -> None:
    assert ModelConfig.from_file(written(tmp_path, respell(HF[name]), "config.json")) == released(name)


def test_config_of_v32_is_v3_with_an_indexer(tmp_path: Path) -> None:
    lists = {"layer_types": ["indexed_attention"] * 61, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58}
    for more, changes in (({}, {}), ({"indexer_rope_interleave": True},) * 2, (lists, {})):
        assert read(tmp_path, HF_V32 | more) == released("deepseek-v3", **V32, **changes)


def test_missing_method_goes_by_the_model_type(tmp_path: Path) -> None:
    """transformers writes neither scoring_func nor topk_method for V3."""
    for name in ("deepseek-v3", "kimi-k2", "moonlight", "deepseek-v2-lite"):
        raw = {key: value for key, value in HF[name].items() if key not in ("scoring_func", "topk_method")}
        assert read(tmp_path, raw) == released(name)


@pytest.mark.parametrize("case", CASES["hugging_face"], ids=str)
def test_keys_of_config_json_are_honoured(tmp_path: Path, case: dict[str, Changes]) -> None:
    raw = {key: value for key, value in (HF_V3 | case["raw"]).items() if value != "left out"}
    assert read(tmp_path, raw) == released("deepseek-v3", **case["want"])


# DeepSeek's inference JSON

V3_INFERENCE = released_json("deepseek-v3.inference")


def test_omitted_keys_take_model_args_defaults(tmp_path: Path) -> None:
    want = released("deepseek-v2-lite", max_seq_len=16384, mscale=1.0, mscale_all_dim=1.0)
    for changes in ({}, {"dtype": "bf16", "scale_fmt": "ue8m0", "max_batch_size": 8, "q_lora_rank": 0}):
        assert read(tmp_path, changes) == want and want.extended


@pytest.mark.parametrize("case", CASES["inference"], ids=str)
def test_inference_keys_are_honoured(tmp_path: Path, case: dict[str, Changes]) -> None:
    config = read(tmp_path, case["raw"])
    assert {key: getattr(config, key) for key in case["want"]} == case["want"]


def test_released_inference_json_is_the_released_config(tmp_path: Path) -> None:
    released_v3: Changes = {"n_mtp_layers": 0, "max_seq_len": 16384}
    config = read(tmp_path, V3_INFERENCE)
    assert config == released("deepseek-v3", **released_v3) and config.extended
    sizes = INDEXER | {"scale_fmt": "ue8m0"}
    config = read(tmp_path, V3_INFERENCE | sizes)
    assert config == released("deepseek-v3", **released_v3, **V32)
    assert read(tmp_path, V3_INFERENCE | {"index_topk": 2048}) == config


# DeepSeek-V4

HF_FLASH, HF_PRO = released_json("deepseek-v4-flash"), released_json("deepseek-v4-pro")
RELEASED = pytest.mark.parametrize(("name", "raw"), [("deepseek-v4-flash", HF_FLASH), ("deepseek-v4-pro", HF_PRO)])


def as_transformers_writes(raw: Changes) -> Changes:
    """Spell out the kind of each layer, and nest both kinds of rotary tables, as save_pretrained of 5.24 does."""
    n, hashed = raw["num_hidden_layers"], raw["num_hash_layers"]
    kinds = {0: "sliding_attention", 4: CSA, 128: HCA}
    part, yarn = {"partial_rotary_factor": 0.125}, dict(raw["rope_scaling"])
    left_out = ("compress_ratios", "num_hash_layers", "rope_scaling", "quantization_config", "torch_dtype")
    return {key: value for key, value in raw.items() if key not in left_out} | {
        "layer_types": [kinds[ratio] for ratio in raw["compress_ratios"][:n]],
        "compress_rates": {CSA: 4, HCA: 128},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (n - hashed),
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000, **part},
            "compress": {**yarn, "rope_type": "yarn", "attention_factor": 1.0, "rope_theta": 160000, **part},
        },
        **{"partial_rotary_factor": 0.125, "dtype": "bfloat16", "mlp_bias": False, "output_router_logits": False},
        **{"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "pad_token_id": None},
    }


@RELEASED
def test_released_config_json_is_the_toml_in_both_spellings(tmp_path: Path, name: str, raw: Changes) -> None:
    want = released(name)
    for spelling in (raw, raw | {"compress_ratios": raw["compress_ratios"][:-1]}, as_transformers_writes(raw)):
        assert read(tmp_path, spelling) == want
    spelling.pop("qk_rope_head_dim")  # it follows from partial_rotary_factor
    assert read(tmp_path, spelling) == want


@RELEASED
def test_config_is_written_in_the_released_spelling(tmp_path: Path, name: str, raw: Changes) -> None:
    out = config_to_json(dataclasses.asdict(released(name)))
    unwritten = ("torch_dtype", "transformers_version", "quantization_config", "expert_dtype")
    unwritten += ("bos_token_id", "eos_token_id")
    kept = {key: value for key, value in raw.items() if key not in unwritten}
    assert kept == {key: out[key] for key in kept}
    assert read(tmp_path, out) == released(name)


def test_rounded_entries_are_written_and_read(tmp_path: Path) -> None:
    config = released("deepseek-v4-flash", qat=True)
    out = config_to_json(dataclasses.asdict(config))
    assert out["qat"] is True and read(tmp_path, out) == config


def test_a_ratio_that_transformers_does_not_know_is_written_in_its_words_too(tmp_path: Path) -> None:
    ratios = (0, 4, 16, *[4] * 40)
    config = released("deepseek-v4-flash", compress_ratios=ratios, original_seq_len=None, rope_factor=40.0)
    out = config_to_json(dataclasses.asdict(config))
    assert out["compress_rates"] == {CSA: 4, HCA: 16}
    assert read(tmp_path, out) == config
    del out["compress_ratios"]
    assert read(tmp_path, out) == config


def test_numbers_beyond_any_are_a_sentence(tmp_path: Path) -> None:
    large = {**released_json("deepseek-v4-flash.inference"), "rope_factor": 1e308, "original_seq_len": 65536}
    with pytest.raises(ValueError, match="max_seq_len"):
        read(tmp_path, large)


def test_inference_json_of_v4(tmp_path: Path) -> None:
    """ModelArgs' defaults are a small model. YaRN is on at any length, so max_seq_len becomes what it is for."""
    flash = released_json("deepseek-v4-flash.inference")  # whose code rounds entries at every call
    assert read(tmp_path, flash) == released("deepseek-v4-flash", qat=True)
    assert read(tmp_path, flash | {"qat": False}) == released("deepseek-v4-flash")
    small = read(tmp_path, {"n_hash_layers": 0})
    assert (small.dim, small.n_layers, small.compress_ratios) == (4096, 7, (0, 0, 4, 128, 4, 128, 4))
    assert (small.compress_rope_theta, small.original_seq_len, small.swiglu_limit) == (40000.0, None, None)
    assert (small.n_routed_experts, small.n_activated_experts, small.n_mtp_layers) == (8, 2, 1)
    assert small.norm_topk_prob and not small.extended


def test_attention_factor_of_transformers_spelling_is_refused(tmp_path: Path) -> None:
    raw = as_transformers_writes(HF_FLASH)
    raw["rope_parameters"]["compress"]["attention_factor"] = 1.277
    said = refusal(read, tmp_path, raw)
    assert "attention_factor=1.277, which dsmini cannot honour; want 1.0" in said
    del raw["rope_parameters"]["compress"]["attention_factor"]  # transformers then takes 1.277 too
    said = refusal(read, tmp_path, raw)
    assert "YaRN in rope_parameters.compress without attention_factor" in said and "say attention_factor=1.0" in said
    raw["rope_parameters"]["compress"]["rope_type"] = "default"  # no YaRN needs none
    for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings", "type"):
        raw["rope_parameters"]["compress"].pop(key, None)
    assert read(tmp_path, raw).original_seq_len is None


def test_a_folder_and_an_unlike_argument_are_refused_in_a_short_sentence(tmp_path: Path) -> None:
    assert refusal(ModelConfig.from_file, tmp_path) == f"{tmp_path} is a folder without a .toml or .json; name a config"
    for name in ("z.json", "b.toml", "a.toml", "config.json"):
        (tmp_path / name).touch()
        want = f"{tmp_path} is a folder; name the config in it, such as {tmp_path / name}"
        assert refusal(ModelConfig.from_file, tmp_path) == want
    said = refusal(layer_config, None, {"mask": None})
    assert said.startswith("unknown key 'mask' in the arguments; the nearest of ") and len(said) < 140
