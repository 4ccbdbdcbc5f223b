"""Decoding in few calls: states, cache and texts are those of the model, and some blocks run as they are."""

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dsmini import MLA, ModelConfig, Transformer, generate, ops, prepare
from dsmini.inference.fused import Decoder
from dsmini.inference.generation import Generation
from dsmini.nn import Block, MoE
from dsmini.nn.attention import Attention
from dsmini.nn.gate import Gate
from dsmini.nn.layers import LayerNorm
from dsmini.nn.mtp import MTPChain
from dsmini_kernels import cpu
from dsmini_kernels.cpu import build, calls
from tests.conftest import SMALL, randomise, require_cpu_kernels
from tests.helpers.configs import V4
from tests.helpers.decoding import CACHES, COMPRESSED, EXPERTS, GROUPED, MODELS, SPARSE, filled, hold_fp4, model_of
from tests.helpers.tolerances import BF16_CACHE, FP32_MODEL, moved_codes, relative_error

Model = Callable[..., Transformer]
Change = Callable[[Transformer], Any]
WEIGHTS = pytest.mark.parametrize("weights", ["float32", "bfloat16", "fp8"])
NEAR = FP32_MODEL * 4  # sums of 512 terms


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    require_cpu_kernels()


def check_step(
    model: Transformer,
    lengths: list[int],
    s: int,
    new: list[int] | None = None,
    tolerance: float = FP32_MODEL,
    dtype: Any = torch.float32,
) -> None:
    """Compare the states and the cache after a step of a decoder with those of the model as the reference."""
    results = []
    for backend in ("reference", None):
        with ops.use(backend), torch.no_grad():
            cache = model.new_cache(len(lengths), dtype=dtype)
            prompt = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1) % 61
            model(prompt, cache, torch.tensor(lengths))
            tokens = torch.arange(len(lengths) * s).view(-1, s) % 61
            step = model.states if backend else Decoder(model).states
            results.append((step(tokens, cache, None if new is None else torch.tensor(new)), cache))
    (want, a), (got, b) = results
    for row, n in enumerate(new or [s] * len(lengths)):
        for x, y in ((got.normed, want.normed), (got.given, want.given)):
            assert not n or relative_error(x[row, :n], y[row, :n]) < tolerance
    assert torch.equal(a.lengths, b.lengths)
    for x, y in zip(a.stores, b.stores, strict=True):
        for i, length in enumerate(a.lengths.tolist() if hasattr(x, "data") else []):
            assert relative_error(y.data[i, :length], x.data[i, :length]) < tolerance
        for of_x, of_y in zip(*(() if hasattr(x, "data") else store.parts for store in (x, y)), strict=True):
            assert relative_error(of_y.data, of_x.data) < tolerance
    for x, y in zip(got.routing, want.routing, strict=True) if new is None else ():
        assert torch.equal(x.indices, y.indices) and torch.equal(x.counts, y.counts)
        assert relative_error(x.weights, y.weights) < tolerance


@WEIGHTS
@pytest.mark.parametrize("name", MODELS | GROUPED | SPARSE)
def test_a_step_agrees_with_the_model(name: str, weights: str) -> None:
    model = model_of(name, weights, n_layers=3)  # two have experts
    assert None not in Decoder(model).blocks
    check_step(model, [70], 1, tolerance=NEAR)
    check_step(model, [9, 66, 1], 3, tolerance=NEAR)


@pytest.mark.parametrize("weights", EXPERTS)
@pytest.mark.parametrize("name", COMPRESSED)
def test_a_step_of_v4_agrees_with_the_model(name: str, weights: str) -> None:
    """Also where padding would overwrite rows that are read later, and where a step makes more than one entry."""
    model = model_of(name, weights)
    decoder = Decoder(model)
    assert None not in decoder.blocks and not decoder.why
    near = moved_codes(NEAR) if model.config.qat else NEAR
    check_step(model, [70], 1, tolerance=near)
    check_step(model, [131], 9, tolerance=near)
    check_step(model, [9, 66, 126], 5, [5, 0, 3], tolerance=near)


@pytest.mark.parametrize("name", CACHES, ids=str)
def test_fp4_experts_agree_with_the_model_in_each_cache(name: Any) -> None:
    """A row that rounds to its other neighbour moves what reads it."""
    model = model_of("v4", "fp4")
    assert not Decoder(model).why
    near = {torch.float32: NEAR, torch.bfloat16: BF16_CACHE, "fp8": moved_codes(NEAR)}[name]
    check_step(model, [9, 66, 126], 5, [5, 0, 3], near, name)


def test_rows_that_have_ended_and_padding_agree_with_the_model(small_model: Model) -> None:
    """In the last case an ended row's place is the end of the cache: that runs the model itself."""
    model = small_model(n_mtp_layers=0)
    for lengths, new in (([9, 20, 4], [2, 0, 2]), ([9, 8], [1, 2]), ([32, 8], [0, 2])):
        check_step(model, lengths, 2, new)


def drafted(
    model: Transformer, lengths: list[int], s: int, new: list[int] | None, decoder: Decoder | None
) -> tuple[list[torch.Tensor], Any]:
    """Return the states of multi-token prediction after s tokens, and its cache: of the modules, or of a decoder."""
    torch.manual_seed(5)
    cache = model.new_cache(len(lengths), dtype=torch.float32, mtp=True)
    assert cache.mtp is not None
    with torch.no_grad(), ops.use("reference"):
        prompt = torch.randint(61, (len(lengths), max(lengths)))
        model.run(prompt, cache, mtp=True, lengths=torch.tensor(lengths))
    with torch.no_grad(), ops.use("reference" if decoder is None else None):
        embedding = model.embedded(torch.randint(61, (len(lengths), s)))
        before = torch.randn(embedding.shape).to(embedding.dtype)
        count = None if new is None else torch.tensor(new)
        decode = model.mtp.decode if decoder is None else decoder.mtp
        return decode(embedding, before, cache.mtp, count), cache.mtp


def check_drafts(
    model: Transformer, lengths: list[int], s: int, new: list[int] | None = None, tolerance: float = FP32_MODEL
) -> None:
    want, a = drafted(model, lengths, s, new, None)
    got, b = drafted(model, lengths, s, new, Decoder(model))
    assert torch.equal(a.lengths, b.lengths)
    for x, y in zip(got, want, strict=True):
        for row, n in enumerate(new or [s] * len(lengths)):
            assert not n or relative_error(x[row, :n], y[row, :n]) < tolerance
    for k, (x, y) in enumerate(zip(b.stores, a.stores, strict=True), 1):
        for row, length in enumerate(a.lengths.tolist()):
            filled = max(0, length - k)
            assert not filled or relative_error(x.data[row, :filled], y.data[row, :filled]) < tolerance
    assert all(relative_error(x, y) < tolerance for x, y in zip(b.last, a.last, strict=True))


@WEIGHTS
@pytest.mark.parametrize("mtp_input", ["pre_norm", "post_norm"])
def test_drafts_agree_with_the_modules(weights: str, mtp_input: str) -> None:
    for name in ("blocks", "gqa"):
        model = model_of(name, weights, n_mtp_layers=2, mtp_input=mtp_input)
        assert None not in Decoder(model).mtp_blocks
        check_drafts(model, [70], 1, tolerance=NEAR)
        check_drafts(model, [9, 66, 5], 3, [2, 0, 3], NEAR)


def test_drafts_at_the_ends_of_a_cache_agree_with_the_modules(small_model: Model) -> None:
    """The first tokens of a row have no entry at a depth, and an ended row has no room for padding."""
    model = small_model(n_mtp_layers=2)
    for lengths, s, new in (([1, 9], 1, None), ([2, 9], 2, None), ([9, 32], 2, [2, 0]), ([30], 2, None)):
        check_drafts(model, lengths, s, new)


# models with changes, which run as they are


class Half(nn.Module):
    """A wrapper as LoRA's, which changes what a Linear returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) / 2


class OtherGate(Gate):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(-x)


class Doubled(Block):
    def forward(self, x: torch.Tensor, *more: Any) -> Any:
        y, routing = super().forward(x, *more)
        return 2 * y, routing


class Twice(MTPChain):
    def decode_depth(self, *args: Any) -> Any:
        normed, given = super().decode_depth(*args)
        return normed * 2, given * 2


def wrap(path: str) -> Change:
    return lambda model: model.set_submodule(path, Half(model.get_submodule(path)))


def hook(path: str, change: Any = lambda module, args, out: out * 0.5) -> Change:
    return lambda model: model.get_submodule(path).register_forward_hook(change)


CHANGES_OF_MTP: dict[str, Change] = {
    "hook on a norm of a block": hook("mtp.1.block.ffn_norm"),
    "hook on a norm": hook("mtp.0.hnorm"),
    "hook on a depth": hook("mtp.0", lambda module, args, out: (out[0] * 2, out[1] * 2, out[2])),
    "wrapped projection": wrap("mtp.1.eh_proj"),
    "chain": lambda model: setattr(model.mtp, "__class__", Twice),
}


@pytest.mark.parametrize("name", CHANGES_OF_MTP)
def test_a_change_of_a_prediction_block_is_heeded(small_model: Model, name: str) -> None:
    model = small_model(n_mtp_layers=2)
    CHANGES_OF_MTP[name](model)
    assert None in Decoder(model).mtp_blocks
    check_drafts(model, [9, 20], 2)


def method(model: Transformer) -> None:
    attn: Any = model.layers[1].attn
    latents = attn.latents
    attn.latents = lambda x, cos_sin: tuple(2 * each for each in latents(x, cos_sin))


def masked(kind: type) -> Any:
    """Return a maker of blocks whose attention sees no key closer than 4."""
    return {"make_block": partial(Block, attention_class=partial(kind, mask=lambda q, k: q - k >= 4))}


def nothing(model: Transformer) -> None:
    """Change nothing: the model is another already."""


def other_scales(model: Transformer) -> None:
    """Hold experts in FP4 with scales that no kernel reads."""
    hold_fp4(model, "layers.1.ffn.experts.w2")
    experts: Any = model.layers[1].ffn.experts
    experts.w2_scale = experts.w2_scale.float()


# how the model is made, and what is changed in it
CHANGES: dict[str, tuple[dict[str, Any], Change]] = {
    "wrapped wkv_b": ({}, wrap("layers.1.attn.wkv_b")),
    "wrapped w2 of shared experts": ({}, wrap("layers.1.ffn.shared_experts.w2")),
    "hook on attn": ({}, hook("layers.1.attn")),
    "hook on attn_norm": ({}, hook("layers.1.attn_norm")),
    "score function": ({}, lambda model: model.layers[1].ffn.gate.options.update(score_func=torch.tanh)),
    "method of attn": ({}, method),
    "mask": (masked(MLA), nothing),
    "gate": ({"make_block": partial(Block, moe_class=partial(MoE, gate_class=OtherGate))}, nothing),
    "block": ({"make_block": Doubled}, nothing),
    "mask of mha": (masked(Attention) | {"attention": "mha"}, nothing),
    "normed heads": ({"qk_norm": True}, nothing),
    "normed heads of mha": ({"qk_norm": True, "attention": "mha"}, nothing),
    "limit of SwiGLU": ({}, lambda model: setattr(model.layers[1].ffn.shared_experts, "limit", 0.01)),
    "another norm": ({}, lambda model: setattr(model.layers[1], "attn_norm", LayerNorm(SMALL["dim"]))),
    "streams of V4": ({"hc_mult": 2}, nothing),
    "FP4 in attention": ({}, lambda model: hold_fp4(model, "layers.1.attn.wo.weight")),
    "FP4 with FP32 scales": ({}, other_scales),
    "wide heads of V4": (V4 | {"head_dim": 1056, "n_heads": 2}, nothing),
}
WHY = {
    "limit of SwiGLU": "layers.1: ffn has another limit of SwiGLU in its shared experts",
    "another norm": "layers.1: attn_norm is a LayerNorm",
    "streams of V4": "layers.0: hc_attn is a HyperConnection of other attention than V4's",
    "FP4 in attention": "layers.1: attn.wo holds codes that are neither E4M3",
    "FP4 with FP32 scales": "layers.1: ffn.experts holds codes that are neither E4M3",
    "wide heads of V4": "layers.0: attn has heads of 1056 numbers",
}
"""Reasons that a decoder gives."""


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_model_is_heeded(name: str) -> None:
    made, change = CHANGES[name]
    model = randomise(Transformer(**SMALL | {"n_mtp_layers": 0} | made)).eval()
    change(model)
    decoder = Decoder(model)
    assert None in decoder.blocks and WHY.get(name, "layers.") in decoder.why
    check_step(model, [9, 20], 1)


def test_kernels_are_compiled_before_the_clock_runs(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of reading the prompts would be the compiler's."""
    loaded = build.Library(build.library().isa)
    for module in (calls, cpu):
        monkeypatch.setattr(module, "library", lambda: loaded)
    ops._load.cache_clear()
    Generation(small_model(), [[1, 2]], 4)
    assert "decoding" in loaded.paths


def test_modules_run_where_kernels_cannot_be_built(small_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each call of a kernel would fail, and each weight be converted for each token."""
    broken = build.Library(build.library().isa)
    broken.entries |= {name: build.library().entry(name) for name in build.FUNCTIONS["rounding"]}
    broken._failed["decoding"] = build.BuildError("it is late")
    for module in (calls, cpu):
        monkeypatch.setattr(module, "library", lambda: broken)
    assert ops.serving("cpu") == "cpu" and set(Decoder(small_model()).blocks) == {None}
    said = ops.explain()
    assert "none for decoding: it is late" in said and prepare() in said
    assert re.search(r"blocks_step +reference +it is late\n", said) and re.search(r"quantize +cpu\n", said)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_forced_backends_run_the_model_itself(small_model: Model, backend: str) -> None:
    with ops.use(backend):
        assert set(Decoder(small_model()).blocks) == {None}


def stepped(decoder: Decoder) -> torch.Tensor:
    """Return the states after two tokens, from a cache whose content needs no weights."""
    torch.manual_seed(3)
    cache = filled(decoder.model, [9], torch.float32)
    with torch.no_grad():
        return decoder.states(torch.arange(2)[None], cache).normed


def test_a_moved_model_leaves_the_decoder_its_weights() -> None:
    model = model_of("odd")
    decoder = Decoder(model)
    before = stepped(decoder)
    model.share_memory()  # moves what the tensors hold, and frees what they held
    assert torch.equal(stepped(decoder), before)
    for parameter in model.layers.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    assert torch.equal(stepped(decoder), before)


def test_a_copy_of_a_decoder_reads_its_own_weights() -> None:
    decoder = Decoder(model_of("odd"))
    before, other = stepped(decoder), copy.deepcopy(decoder)
    for model, same in ((decoder.model, True), (other.model, False)):
        with torch.no_grad():
            for parameter in model.layers.parameters():
                parameter.fill_(0.1)
        assert torch.equal(stepped(other), before) == same


@pytest.mark.parametrize(("attention", "speculative"), [("mla", True), ("mqa", False)])
def test_texts_are_those_of_plain_torch(attention: str, speculative: bool) -> None:
    model = randomise(Transformer(ModelConfig(**(SMALL | {"max_seq_len": 256, "attention": attention})))).eval()
    prompts = [[5, 3, 8], [1], [7] * 20]
    for ends in (None, [3, 19]):  # rows that end early leave the cache
        with ops.use("eager"):
            want = generate(model, prompts, 200, eos_token_id=ends)
        got = generate(model, prompts, 200, eos_token_id=ends, speculative=speculative)
        assert torch.equal(got.tokens, want.tokens)
        assert ends is None or len(set(got.lengths.tolist())) > 1
