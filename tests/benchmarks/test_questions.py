"""The questions of benchmarks/: their cases run, small; what they promise is there, and what is exact is equal."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import shapes
from benchmarks.peer_models.llamacpp_model import write_gguf
from benchmarks.question import Figure, Setting, pick
from benchmarks.questions import decode, fp8, fp8_error, kv_cache, moe, mtp, peers, prefill, roofline, train
from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer, accounting
from dsmini.measure import timing as measuring
from dsmini.measure.kinds import POINTS, PRODUCTS
from dsmini.measure.rates import Curve, Roofs
from dsmini.numerics import E4M3, E5M2, fp8_matmul, round_tiles
from tests.conftest import randomise
from tests.helpers.tolerances import FP32_UNIT, relative_error, rounding

TINY = ModelConfig(
    dim=128,
    inter_dim=144,
    moe_inter_dim=64,
    n_layers=2,
    n_heads=2,
    q_lora_rank=64,
    kv_lora_rank=64,
    n_routed_experts=8,
    n_activated_experts=2,
    n_mtp_layers=0,
    max_seq_len=128,
)
LONG = dataclasses.replace(TINY, max_seq_len=32768)
STEP = {
    *("tokens_per_s", "bytes_per_token", "flops_per_token", "bandwidth", "flop_rate", "peak_memory"),
    "seconds_by_kind",
}
METRICS = {
    "kv-cache": {"bytes_per_token", "context_that_fits", "seconds_per_layer"},
    "moe": {"tokens_per_s", "distinct_experts", "expert_bytes_per_token", "max_violation"},
    "decode": {*STEP, "bytes_per_token_as_routed"},
    "prefill": {*STEP, "useful_share"},
    "train": {*STEP, "useful_share"},
    "roofline": {"flop_rate", "share_of_time", "roof"},
    "fp8": {
        *("bytes", "error", "decode_seconds", "decode_ratio", "logit_error", "kept_by_linears", "kept", "kept_ratio"),
        *("step_seconds", "step_ratio", "bytes_per_token"),
    },
    "fp8-error": {
        *("error", "gain_of_tiles", "error_with_e5m2_gradients", "error_with_fp32_scales", "underflow", "clamped"),
    },
    "mtp": {"acceptance", "tokens_per_step", "speedup", "tokens_per_s", "same_continuations"},
    "peers": {"tokens_per_s", "speed_ratio", "cache_bytes_per_token"},
}
PREDICTED = {
    "kv-cache": {"bytes_per_token", "seconds_per_layer"},
    "moe": {"tokens_per_s", "distinct_experts", "expert_bytes_per_token"},
    "decode": STEP - {"peak_memory"},
    "prefill": STEP - {"peak_memory"},
    "train": STEP - {"peak_memory"},
    "roofline": {"flop_rate"},
    "fp8": {"bytes", "error", "kept_ratio", "bytes_per_token"},
    "fp8-error": {"error", "error_with_e5m2_gradients", "error_with_fp32_scales", "clamped"},
    "mtp": {"acceptance", "tokens_per_step", "speedup", "same_continuations"},
    "peers": set[str](),
}
PLOTS = {"decode": 1, "prefill": 1, "train": 1, "roofline": 3}
EXACT = {
    "kv-cache": {"bytes_per_token"},
    "fp8": {"bytes", "bytes_per_token"},
    "fp8-error": {"clamped"},
    "mtp": {"same_continuations"},
    "peers": {"cache_bytes_per_token"},
}
ALL = (kv_cache, moe, fp8, decode, prefill, train, fp8_error, mtp, roofline, peers)
MODULES = {module.QUESTION.name: module for module in ALL}


def setting() -> Setting:
    """Quick, on a machine that is made up."""
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-6, 0.1)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e11))
    curves = {
        f"{where} {kind} {dtype}": product if kind in PRODUCTS else point
        for where in ("warm", "cold")
        for kind in (*POINTS, *PRODUCTS)
        for dtype in ("float32", "bfloat16")
    }
    peak = {"float32": 1e11, "bfloat16": 3e11}
    roofs = Roofs(
        card={}, peak=peak, bandwidth=2e10, copy=2e10, call=1e-6, cache_bytes=32 << 20, probes={}, curves=curves
    )
    return Setting(quick=True, device=torch.device("cpu"), dtype=torch.bfloat16, roofs=roofs)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Figure]]]:
    """The figures of every question, each made by all its cases."""
    corpus = tmp_path_factory.mktemp("corpus")
    config = RunConfig(model=dataclasses.replace(TINY, precision="fp8"), train=TrainConfig(batch_size=3))
    small = dataclasses.replace(
        mtp.QUICK, model=TINY, steps=3, batch_size=2, prompts=2, prompt_tokens=8, new_tokens=6, depths=(1, 2)
    )
    changes: list[tuple[Any, str, Any]] = [(module, "CORPUS", corpus) for module in (fp8, fp8_error, mtp, peers)]
    changes += [(shapes, "BIG", LONG), (shapes, "QUICK", LONG), (shapes, "TRAINED", TINY)]
    changes += [(fp8_error, "QUICK", TINY), (mtp, "QUICK", small)]
    changes += [
        (fp8, "trained_config", lambda quick: config),
        (fp8, "QUICK_CONTEXT", 16),
        (fp8_error, "QUICK_STEPS", 2),
    ]
    changes += [(peers, "QUICK_CONTEXTS", (16, 24)), (peers, "PROMPT", 16), (peers, "QUICK_BATCH", 1)]
    changes += [
        (each, "times", lambda run, device, _: measuring.times(run, device, 0.0)) for each in (decode, prefill, train)
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in changes:
            patch.setattr(module, name, value)
        yield {name: run(module) for name, module in MODULES.items()}


def run(module: ModuleType) -> list[Figure]:
    assert module.QUESTION.needs is None
    return [figure for case in module.QUESTION.cases(setting()) for figure in case.run()]


@pytest.mark.parametrize("name", MODULES)
def test_a_question_is_answered_by_its_figures(answers: dict[str, list[Figure]], name: str) -> None:
    figures = answers[name]
    assert {f.metric for f in figures} == METRICS[name]
    assert {f.question for f in figures} == {name}
    keys = [(f.metric, *sorted(f.case.items())) for f in figures]
    assert len(set(keys)) == len(keys)
    for f in figures:
        assert f.metric == "context_that_fits" or (f.measured is not None and math.isfinite(f.measured)), f
        assert f.low is None or f.high is None or f.low <= f.measured <= f.high, f
        assert (f.predicted is not None) or f.metric not in PREDICTED[name], f
    exact = [f for f in figures if f.exact]
    assert {f.metric for f in exact} == EXACT.get(name, set())
    assert [f for f in exact if f.measured != f.predicted] == []


@pytest.mark.parametrize("name", MODULES)
def test_findings_and_plots_are_made_of_what_there_is(answers: dict[str, list[Figure]], name: str) -> None:
    question, figures = MODULES[name].QUESTION, answers[name]
    assert question.finding([]) == "Nothing was measured yet."
    assert question.plots([]) == []
    whole = question.finding(figures)
    assert any(digit in whole for digit in "123456789") and whole.endswith(".")
    assert len(question.plots(figures)) == PLOTS.get(name, 2)
    half = len(figures) // 2
    for some in (figures[:half], figures[half:], figures[::2], figures[1::2], *([f] for f in figures)):
        assert question.finding(some).endswith(".")
        for plot in question.plots(some):
            for series in plot.series:
                assert len(series.x) == len(series.y) > 0
                assert series.dashed or plot.labels is None or max(series.x) < len(plot.labels)


def test_keys_of_cases_differ_between_quick_and_full() -> None:
    for module in MODULES.values():
        cases = [module.QUESTION.cases(dataclasses.replace(setting(), quick=quick)) for quick in (True, False)]
        for each in cases:
            assert len({case.key for case in each}) == len(each)
            assert all(case.seconds > 0 for case in each)


# --- what eight bits hold


@pytest.mark.parametrize(
    "changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 0}, {"n_mtp_layers": 1, "dim": 200}]
)
def test_bytes_of_weights_are_those_of_the_storages(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **changes)
    model = Transformer(config).to(torch.bfloat16).eval()
    held, error = fp8.with_fp8_weights(model)
    native, eight = (accounting.weight_bytes(config, dtype).total for dtype in ("bfloat16", "fp8"))
    assert fp8.held_bytes(model) == native
    assert fp8.held_bytes(held) == eight < 0.8 * native
    assert abs(error / fp8_error.operand_error(E4M3) - 1) < 0.05


# --- what products lose


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_expected_error_is_that_of_rounding(format: Any) -> None:
    x = torch.randn(1024, 256) * torch.rand(1024, 1).mul(4).exp()  # all fractions, whatever the power of two
    rounded = round_tiles(x, (1, 128), "ue8m0", format.name, 1e-4, torch.float32)
    assert abs(relative_error(rounded, x) / fp8_error.operand_error(format) - 1) < 0.03


@pytest.mark.parametrize("k", [130, 1000])
def test_expected_error_of_a_product_does_not_depend_on_its_length(k: int) -> None:
    x, w = torch.randn(300, k), torch.randn(200, k)
    expected = fp8_error.product_error(E4M3, E4M3)
    assert abs(relative_error(fp8_matmul(x, w), x @ w.T) / expected - 1) < 0.05


@pytest.mark.parametrize("saved_format", ["e4m3", "e5m6"])
@pytest.mark.parametrize("way", ["tiles", "e5m2 gradients", "fp32 scales"])
def test_rounded_products_are_those_that_training_makes(way: str, saved_format: Any) -> None:
    x, w, dy = torch.randn(63, 130, requires_grad=True), torch.randn(200, 130, requires_grad=True), torch.randn(63, 200)
    how = fp8_error.WAYS[way]
    y = fp8_matmul(x, w, scale=how.scale, grad_format=how.grad_format, saved_format=saved_format)  # pyright: ignore
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    gemm = fp8_error.Gemm(block="", linear="", x=x.detach(), w=w.detach(), dy=dy, saved_format=saved_format)
    got = fp8_error.rounded_products(gemm, how)
    for product, want in zip(fp8_error.PRODUCTS, (y, dx, dw), strict=True):
        assert relative_error(got[product], want.detach()) < rounding(FP32_UNIT, terms=200), product


def test_captured_matrices_make_the_gradients() -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1)))
    tokens, targets = torch.randint(0, 256, (2, 2, 32)).unbind()
    gemms = fp8_error.captured(model, tokens, targets)
    assert all(p.grad is None for p in model.parameters())
    model.losses(tokens, targets).total.backward()
    assert {g.block for g in gemms} == {"block 0", "block 1", "MTP 1"}
    blocks = {"block 0": model.layers[0], "block 1": model.layers[1], "MTP 1": model.mtp[0].block}
    for g in gemms:
        if not g.linear.startswith("experts"):
            place, name = (blocks[g.block].attn, g.linear) if g.linear.startswith(("wq", "wk", "wo")) else (
                blocks[g.block].ffn, g.linear.replace("shared", "shared_experts"),
            )  # fmt: skip
            want = place.get_submodule(name).weight.grad
            assert relative_error(fp8_error.exact_products(g)["wgrad"], want) < rounding(FP32_UNIT, terms=64, chained=8)
    for block in ("block 1", "MTP 1"):
        for name in ("w1", "w2", "w3"):
            experts = [g for g in gemms if g.block == block and g.linear == f"experts.{name}"]
            grad = getattr(blocks[block].ffn.experts, name).grad
            visited = [j for j in range(8) if grad[j].any()]
            got = torch.stack([fp8_error.exact_products(g)["wgrad"] for g in experts])
            assert relative_error(got, grad[visited]) < rounding(FP32_UNIT, terms=64, chained=8)


# --- guesses


def test_tokens_of_a_step() -> None:
    assert mtp.tokens_per_step([]) == 1
    assert mtp.tokens_per_step([0.8]) == 1.8
    assert mtp.tokens_per_step([0.5, 0.5, 0.5]) == 1.875
    assert mtp.tokens_per_step([0.0, 1.0]) == 1


def test_expected_acceptance_of_guesses_that_are_the_trunks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A depth that knows what the trunk will say of the token is always kept; one that is late is not."""
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=2)))
    tokens = torch.randint(0, 256, (2, 32))
    out = model.run(tokens, mtp=True)
    right = [out.logits[:, 1:], out.logits[:, 1:-1]]  # the second is a token late
    monkeypatch.setattr(model, "run", lambda *_, **__: out._replace(mtp_logits=right))
    for temperature in mtp.TEMPERATURES:
        first, second = mtp.expected_acceptance(model, tokens, temperature)
        assert first == pytest.approx(1)
        assert second < 0.9


def test_an_unequal_continuation_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Transformer(dataclasses.replace(TINY, n_mtp_layers=1))).eval()
    generate = mtp.generate

    def wrong(*args: Any, speculative: bool, **more: Any) -> Any:
        done = generate(*args, speculative=speculative, **more)
        return done._replace(tokens=done.tokens + speculative)

    of = dataclasses.replace(mtp.QUICK, new_tokens=3)
    mtp._turns(model, [torch.tensor([1, 2])], 0.0, of)
    monkeypatch.setattr(mtp, "generate", wrong)
    with pytest.raises(AssertionError, match="changed the greedy continuation"):
        mtp._turns(model, [torch.tensor([1, 2])], 0.0, of)


# --- others


def test_ratios_are_taken_round_by_round() -> None:
    taken = {"dsmini": [1.0, 2.0, 4.0], "transformers": [2.0, 4.0, 8.0]}
    (ratio,) = pick(peers._speeds({"what": "train", "dtype": "float32"}, taken, 1), "speed_ratio")
    assert ratio.measured == ratio.low == ratio.high == 2


def test_a_gguf_file_has_the_models_logits(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama_cpp = pytest.importorskip("llama_cpp")
    model = randomise(Transformer(TINY)).eval()
    write_gguf(model, tmp_path / "m.gguf", "F32")
    path = str(tmp_path / "m.gguf")
    llama = llama_cpp.Llama(path, n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    tokens = torch.randint(0, 256, (1, 40))
    llama.eval(tokens[0].tolist())
    with torch.no_grad():
        want = model(tokens)[0]
    got = torch.stack([torch.from_numpy(row.copy()) for row in llama.scores[:40]])
    assert relative_error(got, want) < 2e-3  # its cache is FP16
