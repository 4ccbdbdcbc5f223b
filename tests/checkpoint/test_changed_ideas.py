"""A model that computes what no config says is not written into a folder, which would be read as another model."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import dsmini


class OtherGate(dsmini.Gate):
    def __init__(self, config: dsmini.ModelConfig) -> None:
        super().__init__(config)
        self.options["score_func"] = lambda logits: logits.exp()


class OtherResidual(dsmini.Block):
    def forward(self, x, context=None):
        y, aux = super().forward(x, context)
        return x + y, aux


def build(config: dsmini.ModelConfig, idea: str) -> dsmini.Transformer:
    if idea == "score":
        return dsmini.Transformer(config, score_func=torch.exp)
    make_block = {
        "gate": functools.partial(dsmini.Block, moe_class=functools.partial(dsmini.MoE, gate_class=OtherGate)),
        "mask": functools.partial(
            dsmini.Block, attention_class=functools.partial(dsmini.MLA, mask=lambda q, k: q - k > 4)
        ),
        "residual": OtherResidual,
    }
    model = dsmini.Transformer(config, make_block=make_block.get(idea, dsmini.Block))
    first, second = model.layers
    changes = {
        "forward": lambda: setattr(first.attn_norm, "forward", lambda x: x),
        "hook": lambda: second.attn.wo.register_forward_hook(lambda module, inputs, y: 2 * y),
        "input hook": lambda: second.register_forward_pre_hook(lambda module, inputs: None),
        "scale": lambda: setattr(first.attn, "scale", 1.0),
        "eps": lambda: setattr(model.norm, "eps", 0.5),
        "rope": lambda: setattr(second.attn, "rope", dsmini.nn.Rope(dim=second.attn.rope.dim, rope_theta=5.0)),
        "exchange": lambda: setattr(second.ffn, "exchange", lambda experts, shared, x, routing: x),
    }
    if idea in changes:
        changes[idea]()
    return model


@pytest.mark.parametrize(
    ("idea", "sentence"),
    [
        ("gate", r"layers\.1\.ffn\.gate is a OtherGate with code of its own, which no config says: .*state_dict"),
        (
            "score",
            r"a model with score_func=<built-in method exp .* has no deepseek_v3 folder; want 'sigmoid' or 'softmax'",
        ),
        ("mask", r"layers\.0\.attn\.mask is .*lambda.*which no config says"),
        ("residual", r"layers\.0 is a OtherResidual with code of its own, which no config says"),
        ("forward", r"layers\.0\.attn_norm is a RMSNorm with code of its own"),
        ("hook", r"layers\.1\.attn\.wo is a Linear with code of its own"),
        ("input hook", r"layers\.1 is a Block with code of its own"),
        ("scale", r"layers\.0\.attn\.scale is 1\.0, which no config says"),
        ("eps", r"norm\.eps is 0\.5, which no config says"),
        ("rope", r"layers\.1\.attn\.rope is Rope.*which no config says"),
        ("exchange", r"layers\.1\.ffn\.exchange is .*lambda.*which no config says"),
    ],
)
def test_changed_idea_is_refused_by_name(tmp_path: Path, small_config, idea: str, sentence: str) -> None:
    model = build(small_config(), idea)
    with pytest.raises(ValueError, match=sentence):
        dsmini.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_same_computation_in_other_classes_is_written(tmp_path: Path, small_model) -> None:
    """torch's Linear without a bias computes what the config says."""
    model = small_model()
    plain = model.layers[0].attn.wo
    other = nn.Linear(plain.in_features, plain.out_features, bias=False)
    other.weight = plain.weight
    model.layers[0].attn.wo = other
    dsmini.save_pretrained(model, tmp_path / "x")
    tokens = torch.randint(0, 61, (1, 9))
    assert torch.equal(dsmini.load_pretrained(tmp_path / "x")(tokens), model(tokens))
