"""Models and folders next to transformers' DeepSeek-V4: table and scores, clamps, streams, each attention, choices."""

import json
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_transformers import LOGITS, assert_close, tokens_for
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from dsmini import ModelConfig, Transformer, load_pretrained, ops, save_pretrained
from dsmini.nn import Context, compressed_attention
from tests import reference_v4
from tests.conftest import SMALL, randomise
from tests.helpers.configs import V4_MODEL
from tests.helpers.tolerances import FP32_MODEL, relative_error

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
# every eps is large, to show its place
CHANGES = hf.v4_layers(0, 4, 7, 4) | {"index_topk": 3, "hc_mult": 4, "hc_sinkhorn_iters": 3}
CHANGES |= {"rms_norm_eps": 1e-2, "hc_eps": 1e-2}


def chosen_sets(indices: Tensor) -> list[set[int]]:
    """Return the entries that each query chose."""
    return [set(row) - {-1} for row in indices.flatten(0, 1).tolist()]


@pytest.mark.parametrize("yarn", [False, True])
def test_logits_choices_and_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, yarn: bool) -> None:
    """At lengths around window and blocks; gradients of all that learns from the output at the longest.

    Queries come in blocks of 16, the last of which is ragged.
    """
    choices: tuple[list[Tensor], list[Tensor]] = [], []
    topk_keys = compressed_attention.topk_keys
    monkeypatch.setattr(compressed_attention, "BLOCK", 16)
    monkeypatch.setattr(
        compressed_attention, "topk_keys", lambda *args: (choices[0].append(topk_keys(*args)), choices[0][-1])[1]
    )
    theirs: Any = hf.v4(tmp_path / "config", **CHANGES, **({"rope_scaling": YARN} if yarn else {}))
    for layer in (1, 3):
        indexer = theirs.model.layers[layer].self_attn.compressor.indexer
        indexer.register_forward_hook(lambda *args: choices[1].append(args[2]))
    mine, tokens = hf.ours(theirs), tokens_for(theirs)
    for s in (1, 3, 4, 8, 9, 10, 16, 35, 61):
        got, want = mine(tokens[:, :s]), theirs(tokens[:, :s]).logits
        assert relative_error(got, want) < LOGITS, s
    blocks = [F.pad(part, (0, 3 - part.shape[2]), value=-1) for part in choices[0][-8:]]  # four of each layer
    for mine_of_layer, theirs_of_layer in zip((blocks[:4], blocks[4:]), choices[1][-2:], strict=True):
        assert chosen_sets(torch.cat(mine_of_layer, 1)) == chosen_sets(theirs_of_layer)
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    grads = hf.gradients(theirs)
    learned = [(name, p) for name, p in mine.named_parameters() if ".indexer." not in name]
    assert len(learned) > 100
    for name, p in learned:
        assert p.grad is not None, name
        assert relative_error(p.grad, grads[name]) < 3e-5, name


# --- folders, in both directions and spellings, with equal logits

CASES: dict[str, dict[str, Any]] = {
    "window, CSA, HCA of 128": {},
    "yarn": {"rope_scaling": YARN},
    "HCA of 7": hf.v4_layers(7, 4, 0, 7) | {"rope_scaling": YARN},
}


@pytest.mark.parametrize("released_names", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_folders_pass_in_both_directions(tmp_path: Path, case: str, released_names: bool) -> None:
    """transformers saves its module names, or by default nearly the released ones. dsmini writes those."""
    model = hf.v4(tmp_path / "config", **CASES[case])
    tokens = tokens_for(model)
    want = model(tokens).logits
    model.save_pretrained(tmp_path / "a", save_original_format=released_names)
    ours = load_pretrained(tmp_path / "a")
    assert_close(ours(tokens), want, LOGITS, "logits of transformers' folder")

    save_pretrained(ours, tmp_path / "b")
    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    back, info = loaded
    assert not any(info.values()), info
    assert_close(back(tokens).logits, want, LOGITS, "logits of dsmini's folder")
    written, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("b", "a"))
    assert sum(t.nbytes for t in written.values()) == sum(t.nbytes for t in given.values())


def test_a_new_model_with_mtp_loads_in_transformers(tmp_path: Path) -> None:
    """A config.json that dsmini makes, with a ratio that transformers does not know, and MTP that it ignores."""
    raw = tmp_path / "config.json"
    raw.write_text(json.dumps(hf.MODELS["v4"] | CASES["HCA of 7"] | {"num_nextn_predict_layers": 1}))
    torch.manual_seed(5)
    ours = Transformer(ModelConfig.from_file(raw)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    save_pretrained(ours, tmp_path / "a")
    back: Any = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="eager", dtype=torch.float32)
    tokens = tokens_for(back)
    assert_close(ours(tokens), back(tokens).logits, LOGITS, "logits of a new model")


# --- BF16 next to a definition with the roundings of DeepSeek's released code, with and without its FP8

SIZES: dict[str, Any] = SMALL | V4_MODEL | {"dim": 64, "head_dim": 96, "moe_inter_dim": 48, "n_activated_experts": 6}
SIZES |= {"n_routed_experts": 16, "swiglu_limit": 1.5, "index_topk": 99, "n_mtp_layers": 0, "max_seq_len": 64}


def model_of(qat: bool) -> Any:
    """Return a model whose weights are BF16 numbers, and whose experts are chosen alike by every precision."""
    model: Any = randomise(Transformer(**SIZES, qat=qat)).bfloat16().eval()
    for gate in model.gates():
        if gate.bias is not None:
            gate.bias.copy_(10.0 * torch.randperm(len(gate.bias)))
    return model


@pytest.mark.parametrize("qat", [False, True])
@torch.no_grad()
def test_bf16_is_as_near_to_the_exact_model_as_deepseeks_order(qat: bool) -> None:
    errors = []
    for _ in range(4):
        model, tokens = model_of(qat), torch.randint(0, SMALL["vocab_size"], (64,))
        exact, theirs = (reference_v4.logits(model, tokens, dtype) for dtype in (torch.float64, torch.bfloat16))
        mine = []
        for backend in ("reference", None):
            with ops.use(backend):
                mine.append(model(tokens[None])[0])
        dtypes = {one.dtype for one in (theirs, *mine)}
        errors.append([relative_error(one, exact) for one in (theirs, *mine)])
    assert dtypes == {torch.float32}
    of_theirs, *of_mine = torch.tensor(errors).mean(0)
    assert all(error <= 1.05 * of_theirs for error in of_mine)


@pytest.mark.parametrize("s", [1, 64])
@pytest.mark.parametrize("layer", [0, 1], ids=["hash", "scores"])
@torch.no_grad()
def test_experts_and_streams_round_where_deepseek_does(layer: int, s: int) -> None:
    """Sums of FP32 have orders, so that a number in a hundred may be rounded to the neighbour."""
    model, tokens = model_of(qat=False), torch.randint(0, SMALL["vocab_size"], (s,))
    block, c = model.layers[layer], model.config
    x, streams = torch.randn(s, c.dim).bfloat16(), torch.randn(s, c.hc_mult, c.dim).bfloat16()
    context = Context(positions=torch.arange(s)[None], tokens=tokens[None])
    written = block.hc_attn.write(streams[None], x[None], block.hc_attn.read(streams[None])[1])[0]
    expected = reference_v4.sublayer(streams, block.hc_attn, block.attn_norm, lambda _: x, c)
    experts = block.ffn(x, context)[0], reference_v4.moe(block.ffn, x, tokens, c)
    for got, want in (experts, (written, expected)):
        assert got.dtype == want.dtype == torch.bfloat16
        assert (got != want).float().mean() < 0.01


@torch.no_grad()
def test_the_definition_is_the_model_in_fp32() -> None:
    model, tokens = model_of(qat=False).float(), torch.randint(0, SMALL["vocab_size"], (64,))
    assert relative_error(model(tokens[None])[0], reference_v4.logits(model, tokens, torch.float64)) <= FP32_MODEL
