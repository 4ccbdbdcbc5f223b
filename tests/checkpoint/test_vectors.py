"""Vectors for other engines: faults that others shipped are each named by the first tensor they change."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from einops import einsum
from torch import Tensor

from dsmini import Transformer, load_pretrained, ops
from dsmini.checkpoint import vectors
from dsmini.checkpoint.check_vectors import Difference, compare
from dsmini.checkpoint.vectors import GENERATIONS, computed, config_of, drawn, inputs_of
from dsmini.nn import compressed_attention, gate, hyper_connections, mla
from dsmini.nn.cache import Cache
from dsmini.nn.dsa import Choice, Indexer, hadamard
from dsmini.nn.gate import Gate, HashGate
from dsmini.nn.hyper_connections import HyperConnection
from dsmini.nn.mtp import StreamMTP
from dsmini.nn.rope import Rope, apply_rope_to_halves
from tests.helpers.commands import check_refused, finish, run

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the command writes."""
    folder = tmp_path_factory.mktemp("vectors")
    finish("dsmini.vectors out", folder)
    return folder / "out"


class Fault(NamedTuple):
    """A fault, and the first tensor that it changes."""

    generation: str
    tensor: str
    changes: Any = None
    """Fields of the config."""
    plant: Callable[[Patch, Transformer], None] = lambda *_: None


def around(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch, Transformer], None]:
    """Return what puts `change` in the place of a function; it gets the function first, then its arguments."""

    def plant(patch: Patch, _: Transformer) -> None:
        real = owner.reference if isinstance(owner, ops.Operation) else getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **more: change(real, *args, **more))

    return plant


def in_layers(change: Callable[[Any], None], *layers: int) -> Callable[[Patch, Transformer], None]:
    """Return what changes these blocks of a model, or all of them."""

    def plant(_: Patch, model: Transformer) -> None:
        with torch.no_grad():
            for i, layer in enumerate(model.layers):
                if i in layers or not layers:
                    change(layer)

    return plant


def while_routing(method: str, change: Callable[..., Any]) -> Callable[[Patch, Transformer], None]:
    """Return what changes a method of tensors while a gate routes."""

    def routed(route: Any, *args: Any, **options: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            real = getattr(Tensor, method)
            patch.setattr(Tensor, method, lambda *inner, **more: change(real, *inner, **more))
            return route(*args, **options)

    return around(gate, "route", routed)


def bias_in_weights(route: Any, logits: Tensor, bias: Tensor | None, **options: Any) -> Any:
    routing = route(logits, bias, **options)
    if bias is None:
        return routing
    weights = (routing.scores + bias).gather(1, routing.indices)
    return routing._replace(weights=2.5 * weights / weights.sum(-1, keepdim=True))


def last_rotated(rotate: Any, indexer: Indexer, x: Tensor, cos_sin: Any) -> Tensor:
    r = 2 * cos_sin[0].shape[-1]
    return hadamard(hadamard(rotate(indexer, x.roll(r, -1), cos_sin)).roll(-r, -1))


def not_turned_back(rotate: Any, x: Tensor, cos_sin: Any) -> Tensor:
    return x if float(cos_sin[1][..., -1].sum()) < 0 else rotate(x, cos_sin)


def by_number(cos_sin: Any, rope: Rope, positions: Tensor) -> Any:
    step = int((positions[0, 1:] - positions[0, :-1]).max()) if positions.shape[-1] > 1 else 1
    return cos_sin(rope, positions // step)


def without_overlap(forward: Any, compressor: Any, x: Tensor, blocks: Any, cache: Any = None) -> Tensor:
    at = dataclasses.replace(blocks.at, positions=torch.zeros_like(blocks.at.positions))
    return forward(compressor, x, blocks._replace(at=at), cache)


def no_bias(layer: Any) -> None:
    layer.attn.indexer.k_norm.bias.zero_()


def wide_eps(layer: Any) -> None:
    layer.attn.q_norm.eps = layer.attn.kv_norm.eps = 1e-3


def hot(layer: Any) -> None:
    layer.attn.scale *= (0.1 * torch.tensor(4.0).log().item() + 1) ** 2


def no_sink(layer: Any) -> None:
    layer.attn.attn_sink.fill_(-torch.inf)


def unclamped(layer: Any) -> None:
    layer.ffn.shared_experts.limit = None


def narrow(layer: Any) -> None:
    layer.attn.window_size -= 1


def main_theta(layer: Any) -> None:
    layer.attn.rope = Rope(dim=8)


def takes_all(layer: Any) -> None:
    layer.attn.choose = lambda *_: Choice(None)


def takes_the_first(layer: Any) -> None:
    layer.attn.source, layer.attn.passed_on = 0, 1


def starts_shared(_: Patch, model: Transformer) -> None:
    """Let the MTP block take what the last full layer chose."""
    last, attn, seen = model.layers[4].attn, model.mtp[0].block.attn, list[Any]()
    real = last.choose
    last.choose = lambda *args: (seen.append(real(*args)), seen[-1])[1]
    attn.choose = lambda context, inputs: Choice(seen[-1].topk_indices[:, : inputs[0].shape[1]])


def swapped(_: Patch, model: Transformer) -> None:
    eh_proj: Any = model.mtp[0].eh_proj.weight
    eh_proj.data = eh_proj.data.roll(24, 1)


COUNTED = around(Cache, "place_tokens", lambda place, cache, config, tokens, lengths=None: place(cache, config, tokens))
index_scores = ops.find("index_scores")
FAULTS = {
    "keys rotated by halves": Fault(
        "v3", "layers.0.attn.k_rope", plant=around(mla, "apply_rope", lambda _, *args: apply_rope_to_halves(*args))
    ),
    "no YaRN": Fault("v3", "layers.0.attn.k_rope", {"original_seq_len": None}),
    "YaRN without its temperature": Fault(
        "v3", "layers.0.attn", plant=in_layers(lambda layer: setattr(layer.attn, "scale", 20**-0.5))
    ),
    "rms_norm_eps in the latents' norms": Fault("v3", "layers.0.attn.q_norm", plant=in_layers(wide_eps)),
    "routing bias in the weights": Fault(
        "v3", "layers.1.ffn.gate.weights", plant=around(gate, "route", bias_in_weights)
    ),
    "excluded groups at 0": Fault(
        "v3",
        "layers.1.ffn.gate.experts",
        plant=while_routing("masked_fill", lambda real, x, mask, _: real(x, mask, 0)),
    ),
    "groups by their best expert": Fault(
        "v3", "layers.1.ffn.gate.experts", plant=while_routing("topk", lambda real, x, k, dim: real(x, 1, dim))
    ),
    "no routing factor": Fault("v3", "layers.1.ffn.gate.weights", {"route_scale": 1.0}),
    "weights as they are": Fault("v3", "layers.1.ffn.gate.weights", {"norm_topk_prob": False}),
    "softmax scores": Fault("v3", "layers.1.ffn.gate.scores", {"score_func": "softmax"}),
    "hidden state before the embedding": Fault("v3", "mtp.0.block", plant=swapped),
    "padding cached": Fault("v3", "decode.logits", plant=COUNTED),
    "indexer rotated by pairs": Fault("v3.2", "layers.0.attn.index_keys", {"indexer_rope_interleave": True}),
    "indexer rotated at its end": Fault(
        "v3.2", "layers.0.attn.index_keys", plant=around(Indexer, "_rotated", last_rotated)
    ),
    "indexer's norm without a bias": Fault("v3.2", "layers.0.attn.index_keys", plant=in_layers(no_bias)),
    "indexer without ReLU": Fault(
        "v3.2",
        "layers.0.attn.topk",
        plant=around(index_scores, "reference", lambda _, q, k, w: einsum(q, k, w, "b s h d, b t d, b s h -> b s t")),
    ),
    "Hadamard on keys alone": Fault(
        "v3.2", "layers.0.attn.topk", plant=around(Indexer, "queries", lambda real, *args: hadamard(real(*args)))
    ),
    "shared choices ignored": Fault("glm-5.2", "layers.2.attn", plant=in_layers(takes_all, 2, 3)),
    "one choice for the whole model": Fault("glm-5.2", "layers.2.attn", plant=in_layers(takes_the_first, 0, 2, 3)),
    "theta outside rope_parameters": Fault("glm-5.2", "layers.0.attn.k_rope", {"rope_theta": 10000.0}),
    "GLM's indexer rotated by halves": Fault("glm-5.2", "layers.0.attn.index_keys", {"indexer_rope_interleave": False}),
    "multi-token prediction takes the last choice": Fault("glm-5.2", "mtp.0.block", plant=starts_shared),
    "no inverse rotation": Fault("v4", "layers.0.attn", plant=around(compressed_attention, "rotated", not_turned_back)),
    "no norm of query heads": Fault(
        "v4", "layers.0.attn", plant=around(compressed_attention, "rms_norm", lambda _, x, *rest: x)
    ),
    "no sink": Fault("v4", "layers.0.attn", plant=in_layers(no_sink)),
    "window one token short": Fault("v4", "layers.0.attn", plant=in_layers(narrow)),
    "the window's theta everywhere": Fault("v4", "layers.1.attn.window", plant=in_layers(main_theta, 1, 2)),
    "YaRN's temperature in V4": Fault("v4", "layers.1.attn", plant=in_layers(hot, 1, 2)),
    "entries seen one token late": Fault(
        "v4",
        "layers.1.attn.topk",
        plant=around(
            compressed_attention.CompressedAttention, "hidden", lambda real, of, ends, *rest: real(of, ends + 1, *rest)
        ),
    ),
    "entries rotated by their number": Fault("v4", "layers.1.attn.entries", plant=around(Rope, "cos_sin", by_number)),
    "entries without the block before": Fault(
        "v4", "layers.1.attn.entries", plant=around(compressed_attention.Compressor, "forward", without_overlap)
    ),
    "padding pooled into entries": Fault("v4", "decode.logits", plant=COUNTED),
    "comb not transposed": Fault(
        "v4",
        # attention writes to equal streams, and the sums of one token's comb are not 1 yet
        "layers.0.hc_ffn.post",
        plant=around(
            HyperConnection, "write", lambda real, of, x, y, mix: real(of, x, y, mix._replace(comb=mix.comb.mT))
        ),
    ),
    "Sinkhorn ends with rows": Fault(
        "v4",
        "layers.0.hc_attn.comb",
        plant=around(hyper_connections, "sinkhorn", lambda real, logits, *rest: real(logits.mT, 1, rest[1]).mT),
    ),
    "post without its factor": Fault(
        "v4",
        "layers.0.hc_attn.post",
        plant=around(hyper_connections, "Mix", lambda real, post, comb: real(post / 2, comb)),
    ),
    "shared expert unclamped": Fault("v4", "layers.0.ffn", plant=in_layers(unclamped)),
    "no hash layer": Fault(
        "v4",
        "layers.0.ffn.gate.experts",
        plant=around(HashGate, "forward", lambda _, of, x, *__: Gate.forward(of, x)),
    ),
    "one stream given to multi-token prediction": Fault(
        "v4",
        "mtp.0.block",
        plant=around(StreamMTP, "join", lambda real, of, x, e: real(of, x.mean(-2, keepdim=True).expand_as(x), e)),
    ),
}


@functools.cache
def reference(generation: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the index and the arrays of a generation."""
    expected = computed(drawn(config_of(generation)), **inputs_of(generation))
    tensors = [{"name": name, "tolerance": vectors.tolerance_of(name, t), "is": ""} for name, t in expected.items()]
    return {"tensors": tensors}, {name: t.numpy() for name, t in expected.items()}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_by_the_first_tensor_that_it_changes(monkeypatch: Patch, name: str) -> None:
    fault = FAULTS[name]
    index, expected = reference(fault.generation)
    config = config_of(fault.generation)
    model = Transformer(dataclasses.replace(config, **(fault.changes or {}))).eval()
    model.load_state_dict(drawn(config).state_dict())
    fault.plant(monkeypatch, model)
    mine = {key: value.numpy() for key, value in computed(model, **inputs_of(fault.generation)).items()}
    found = compare(index, expected, mine)
    assert isinstance(found, Difference) and found.name == fault.tensor, found


PROGRAM = """
import runpy, sys
sys.modules.update(dict.fromkeys(("dsmini", "torch", "transformers")))  # importing one of them fails
sys.argv = ["check.py", *sys.argv[1:]]
runpy.run_path("check.py", run_name="__main__")
"""


def checked(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run the checker of a folder in a process that has numpy and safetensors alone."""
    line = [sys.executable, "-I", "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def test_each_folder_is_small_and_its_own_answers_pass(written: Path, tmp_path: Path) -> None:
    for generation in GENERATIONS:
        folder = written / generation
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 1_000_000
        done = checked(folder, "expected.safetensors")
        n = len(json.loads((folder / "index.json").read_text())["tensors"])
        assert done.returncode == 0 and done.stdout == f"{n} of {n} tensors agree\n", done
    finish("dsmini.vectors again --config v3", tmp_path)
    for file in (written / "v3").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "v3" / file.name).read_bytes(), file.name


def test_the_folder_loads_as_the_model_of_the_vectors(written: Path) -> None:
    for generation in GENERATIONS:
        _, expected = reference(generation)
        model = load_pretrained(written / generation)
        with ops.use("reference"):
            logits = model(inputs_of(generation)["tokens"])
        assert (logits - torch.from_numpy(expected["logits"])).norm() < 1e-6 * logits.norm()


def test_choices_are_the_same_with_rounded_weights() -> None:
    """An engine that sums in another order chooses the same tokens, experts and keys: none is a near tie."""
    for generation in GENERATIONS:
        _, expected = reference(generation)
        model = drawn(config_of(generation))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn_like(p))
        for name, value in computed(model, **inputs_of(generation)).items():
            assert value.is_floating_point() or value.tolist() == expected[name].tolist(), name


def test_the_checker_says_what_is_wrong(written: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, mine = written / "v3", tmp_path / "mine.safetensors"
    expected = load_file(folder / "expected.safetensors")
    some = {name: expected[name] for name in ("layers.1", "logits", "loss")}

    def said(status: int, **changes: Tensor) -> str:
        save_file(some | changes, mine)
        done = checked(folder, mine)
        assert done.returncode == status, done
        return done.stdout + done.stderr

    assert "3 of" in said(0) and "not given: embed, layers.0.attn_norm" in said(0)
    assert said(1, logits=some["logits"][:, 1:]).startswith("logits differs: logits of the next token")
    assert "its shape is [1, 23, 48], want [1, 24, 48]. 1 tensors before" in said(
        1, logits=some["logits"][:, 1:].clone()
    )
    wrong = some["logits"].clone()
    wrong[0, 3, 5] = torch.nan
    assert "error inf, tolerance 1e-05; worst at [0, 3, 5]: nan" in said(1, logits=wrong)
    noisy = some["logits"] * (1 + 1e-3 * torch.randn_like(some["logits"]))
    assert "logits differs" in said(1, logits=noisy) and checked(folder, mine, "--tolerance", "1e-2").returncode == 0
    assert "no such names: lm_head" in said(0, lm_head=wrong)
    one = some["logits"].clone()
    one[0, 7] *= 1 + 3e-5  # a token of 24: 6e-6 of the whole
    assert "error 3e-05, tolerance 1e-05; worst at [0, 7, " in said(1, logits=one)
    tokens = expected["decode.tokens"] + 1
    assert "whole numbers differ; worst at [0, 0]" in said(1, **{"decode.tokens": tokens})
    for tolerance in ("nan", "0", "-1", "inf"):
        done = checked(folder, mine, "--tolerance", tolerance)
        assert done.returncode == 2 and "want a number above 0" in done.stderr, done
    save_file({"other": wrong}, mine)
    assert checked(folder, mine).returncode == 2 and "none of the names" in checked(folder, mine).stderr
    mine.write_bytes(b"no tensors")
    assert checked(folder, mine).returncode == 2 and "want safetensors" in checked(folder, mine).stderr


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("index.json", None, "No such file"),
        ("index.json", "{", "error: "),
        ("expected.safetensors", "v4", "not that of"),
    ],
)
def test_a_damaged_folder_of_vectors_is_one_sentence(
    written: Path, tmp_path: Path, file: str, text: str | None, said: str
) -> None:
    folder = tmp_path / "v3"
    shutil.copytree(written / "v3", folder)
    (folder / file).unlink()
    if text == "v4":
        shutil.copyfile(written / "v4" / file, folder / file)
    elif text:
        (folder / file).write_text(text)
    done = checked(folder, written / "v3" / "expected.safetensors")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done


def test_wrong_arguments_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    check_refused("dsmini.vectors", tmp_path)
    assert "--config" in run("dsmini.vectors --help", tmp_path).stdout
