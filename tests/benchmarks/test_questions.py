"""Run all questions of benchmarks/ in small sizes: figures are complete, and counts equal their predictions."""

import ctypes
import dataclasses
import json
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

from benchmarks import faults, kernel_calls, pipeline_steps, shapes, steps, trained
from benchmarks.case import Figure, Setting, pick
from benchmarks.faults import Fault
from benchmarks.peer_models import nanogpt
from benchmarks.peer_models.llamacpp_model import write_gguf
from benchmarks.questions import (
    Question,
    decode,
    diagnose,
    fp8,
    fp8_error,
    kernels,
    moe_or_dense,
    mtp,
    peers,
    pipeline,
    plan,
    quantize,
    questions_here,
    shakespeare,
    sparse_training,
)
from dsmini import RunConfig, TrainConfig, Transformer, ops
from dsmini.config.parallel import CHUNKS
from dsmini.diagnosis import training
from dsmini.measure import timing as measuring
from dsmini.measure.rates import why_unusable
from dsmini.measure.workloads import StepShape
from dsmini.report.terminal import show_question
from tests.conftest import randomise
from tests.helpers.commands import TINY as TINY_RUN
from tests.helpers.questions import TINY, invented_rates, invented_steps, setting
from tests.helpers.tolerances import relative_error

SUMMARY = ("val_loss", "val_loss_at_eval_context", "tokens", "tokens_per_s", "active_parameters")
"""Keys of a run's summary that questions read."""
LONG = dataclasses.replace(TINY, max_seq_len=32768)


class Want(NamedTuple):
    """Expected figures of a question."""

    predicted: str
    """Metrics with a prediction in every figure."""
    others: str = ""
    """Metrics without."""
    exact: str = ""
    """Those of them whose figures equal their predictions."""
    plots: int = 2


STEP = "tokens_per_s bytes_per_token flops_per_token bandwidth flop_rate seconds_by_kind"
WANTED = {
    "kv-cache": Want("bytes_per_token seconds_per_layer", "context_that_fits", exact="bytes_per_token"),
    "moe": Want("tokens_per_s distinct_experts expert_bytes_per_token", "max_violation"),
    "decode": Want(STEP, "peak_memory useful_share", plots=1),
    "prefill": Want(STEP, "peak_memory useful_share", plots=1),
    "train": Want(STEP, "peak_memory useful_share", plots=1),
    "roofline": Want("flop_rate", "share_of_time roof"),
    "fp8": Want(
        "bytes error kept_ratio bytes_per_token",
        "decode_seconds decode_ratio logit_error kept_by_linears kept step_seconds step_ratio",
        exact="bytes bytes_per_token",
    ),
    "fp8-error": Want("error error_with_e5m2_gradients error_with_fp32_scales", "gain_of_tiles underflow"),
    "mtp": Want("acceptance tokens_per_step speedup same_continuations", "tokens_per_s", exact="same_continuations"),
    "peers": Want("", "tokens_per_s speed_ratio cache_bytes_per_token", exact="cache_bytes_per_token"),
    "kernels": Want("seconds", "share_of_roof over_eager over_reference"),
    "quantize": Want("", "bandwidth share_of_copy over_eager call_seconds"),
    "plan": Want("seconds tensor_memory process_memory", plots=1),
    "diagnose": Want("gain", "right", plots=1),
    "shakespeare": Want("", "seconds loss_as_peer loss"),
    "moe-or-dense": Want("", "loss tokens_per_s active_parameters gain"),
    "pipeline": Want("bubble pipeline_seconds", "step_seconds action_seconds gap"),
    "sparse": Want("decode_seconds prompt_seconds decode_gain prompt_gain bytes_per_token", plots=3),
    "sparse-training": Want("", "loss recall mass kl answered", plots=3),
}
QUESTIONS = questions_here()


def fake_recipe(setting: Setting, *arguments: str) -> tuple[float, dict[str, Any]]:
    """Return seconds and summary of a run without training; the seed changes the loss."""
    loss = 1.5 + 0.01 * int(arguments[arguments.index("--train.seed") + 1]) ** 2 * ("384" in arguments)
    return 1.0, dict.fromkeys(SUMMARY, 1000) | {"val_loss": loss, "val_loss_at_eval_context": loss}


def fake_module(module: str, *arguments: str) -> str:
    """Write what a run leaves that sparse_training reads."""
    if module == "dsmini.train":
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(json.dumps({"val_loss": 1.5}))
        fits = {f"layer_indexer_{name}": [0.25, 0.75] for name in ("recall", "mass", "kl")}
        (out / "metrics.jsonl").write_text(f"{json.dumps(fits)}\n" * 20)
    return ""


def small_sizes(corpus: Path) -> list[tuple[Any, str, Any]]:
    """Return the constants and functions to replace: small models, few rounds, and no other processes."""
    config = RunConfig(model=dataclasses.replace(TINY, precision="fp8"), train=TrainConfig(batch_size=3))
    guesses = dataclasses.replace(
        mtp.QUICK, model=TINY, steps=3, prompts=2, prompt_tokens=8, new_tokens=6, depths=(1, 2)
    )
    wide = dataclasses.replace(LONG, inter_dim=1024, vocab_size=1152)  # smaller ones are left to torch
    run = Fault(name="small", axis="", model=TINY, train=TrainConfig(batch_size=2, optimizer="adamw", threads=1))
    one: dict[str, Any] = {"config": TINY, "dtype": "float32", "batch": 1, "train": config.train}
    forecast = {w: StepShape(work=w, tokens=16, **one) for w in ("training", "decode")}
    random_weights = Transformer(dataclasses.replace(TINY, vocab_size=256, max_seq_len=192))
    return [
        *((shapes, "BIG", LONG), (shapes, "QUICK", LONG), (shapes, "TRAINED", TINY), (shapes, "QUICK_WIDE", wide)),
        *((each, "times", lambda run, device, _: measuring.times(run, device, 0.0)) for each in (decode, steps)),
        *((fp8, "trained_config", lambda quick: config), (fp8, "QUICK_CONTEXT", 16)),
        *((fp8_error, "QUICK", TINY), (fp8_error, "QUICK_STEPS", 2)),
        *((mtp, "QUICK", guesses), (mtp, "BATCH", 2)),
        *((peers, "QUICK", peers.Size((16, 24), rounds=2, batch=1)), (peers, "PROMPT", 16)),
        *((quantize, "QUICK_SHAPE", (64, 256)), (quantize, "CALLS", 10)),
        *((kernel_calls, "CACHES", 0.01), (kernel_calls, "QUICK_ACTIVATIONS", (64, 256)), (kernels, "QUICK_TURN", 0.0)),
        *((diagnose, "faults", lambda: [run]), (diagnose, "SECONDS", math.inf), (diagnose, "ROUNDS", 5)),
        *((faults, "CORPUS", corpus), (training, "cores", lambda: 1)),
        *((plan, "held_out", lambda quick: forecast), (plan, "SECONDS", 0.0)),
        *((plan.step_rates, "rates_beyond", lambda *_: invented_rates()), (trained, "CORPUS", corpus)),
        (plan, "peak_of_process", lambda shape: 400 << 20),
        (shakespeare, "run_command", lambda *_: (2.0, {"loss": 2.0})),
        *((each, "run_recipe", fake_recipe) for each in (shakespeare, moe_or_dense)),
        *((pipeline, "why_not", lambda: ""), (pipeline, "draw", lambda lines, path: None)),
        (pipeline_steps, "record", lambda size: {name: invented_steps(name) for name in CHUNKS}),
        *((sparse_training, "run_module", fake_module), (sparse_training, "CONTEXT", 192)),
        (sparse_training, "load_run", lambda _: (random_weights, None)),
        (sparse_training, "load_pretrained", lambda _: random_weights),
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Figure]]]:
    """Yield the figures of every question from all its cases."""
    corpus = tmp_path_factory.mktemp("corpus")
    (corpus / "book.txt").write_text("A line of a book.\n" * 200)
    # kernels may read such small weights from a cache, and are faster than the invented machine
    fast: dict[str, Any] = {"bandwidth": 1e12, "peak": {"float32": 1e12, "bfloat16": 1e13}}
    there = {"text": corpus / "book.txt", "out": corpus}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small_sizes(corpus):
            patch.setattr(module, name, value)
        yield {
            n: run(q, dataclasses.replace(setting(**fast if n == "kernels" else {}), **there))
            for n, q in QUESTIONS.items()
        }


def run(question: Question, here: Setting) -> list[Figure]:
    if question.needs:
        return []
    return [figure for case in question.cases(here) for figure in case.run()]


def figures_of(answers: dict[str, list[Figure]], name: str) -> list[Figure]:
    if QUESTIONS[name].needs:
        pytest.skip(f"{name}: {QUESTIONS[name].needs}")
    if name in ("kernels", "quantize") and (reason := quantize.why_not()):
        pytest.skip(f"{name}: {reason}")
    return answers[name]


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_is_answered_by_its_figures(answers: dict[str, list[Figure]], name: str) -> None:
    figures, want = figures_of(answers, name), WANTED[name]
    assert {f.metric for f in figures} == {*want.predicted.split(), *want.others.split()}
    assert {f.question for f in figures} == {name}
    keys = [(f.metric, *sorted(f.case.items())) for f in figures]
    assert len(set(keys)) == len(keys)
    for f in figures:
        assert f.metric == "context_that_fits" or (f.measured is not None and math.isfinite(f.measured)), f
        assert f.low is None or f.high is None or (f.measured is not None and f.low <= f.measured <= f.high), f
        assert (f.predicted is not None) or f.metric not in want.predicted.split(), f
    exact = [f for f in figures if f.exact]
    assert {f.metric for f in exact} == {*want.exact.split()}
    assert [f for f in exact if f.measured != f.predicted] == []


@pytest.mark.parametrize("name", QUESTIONS)
def test_findings_and_plots_are_made_of_what_there_is(answers: dict[str, list[Figure]], name: str) -> None:
    question, figures = QUESTIONS[name], figures_of(answers, name)
    assert question.finding([]) == "Nothing was measured yet."
    assert question.plots([]) == []
    whole = question.finding(figures)
    assert any(digit in whole for digit in "123456789") and whole.endswith(".")
    assert len(question.plots(figures)) == WANTED[name].plots
    half = len(figures) // 2
    for some in (figures[:half], figures[half:], figures[::2], figures[1::2], *([f] for f in figures)):
        assert question.finding(some).endswith(".")
        for plot in question.plots(some):
            for series in plot.series:
                assert len(series.x) == len(series.y) > 0
                assert series.dashed or plot.labels is None or max(series.x) < len(plot.labels)


def test_the_roofline_is_drawn_without_the_rates_of_a_kind(answers: dict[str, list[Figure]]) -> None:
    figures = answers["roofline"]
    for kind in {str(f.case["kind"]) for f in pick(figures, "flop_rate")}:
        some = [f for f in figures if f.metric != "flop_rate" or f.case["kind"] != kind]
        drawn = [series.label for plot in QUESTIONS["roofline"].plots(some) for series in plot.series]
        assert "roof" in drawn and kind not in drawn


def test_keys_of_cases_differ_between_quick_and_full() -> None:
    for question in QUESTIONS.values():
        cases = [question.cases(dataclasses.replace(setting(), quick=quick)) for quick in (True, False)]
        for each in cases:
            assert len({case.key for case in each}) == len(each)
            assert all(case.seconds > 0 for case in each)


def test_ratios_are_taken_round_by_round() -> None:
    taken = {"dsmini": [1.0, 2.0, 4.0], "transformers": [2.0, 4.0, 8.0]}
    (ratio,) = pick(peers.speeds({"what": "train", "dtype": "float32"}, taken, 1), "speed_ratio")
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
    assert relative_error(got, want) < 2e-3  # llama.cpp's cache is FP16


# --- runs of whole commands


@pytest.mark.slow
def test_recipe_gives_the_summary_that_questions_read(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("It was a bright cold day in April. " * 200)
    tiny = [*TINY_RUN.split(), "--train.eval-context", "16", "--train.steps", "2", "--data.path", str(book)]
    seconds, summary = trained.run_recipe(dataclasses.replace(setting(), dtype=torch.float32), *tiny)
    assert seconds > 0
    assert all(isinstance(summary[key], int | float) for key in SUMMARY)


def test_command_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)json.tool ended with status 2: .*--no-such"):
        trained.run_command("json.tool", "--no-such")


def test_nanogpt_learns_a_text() -> None:
    text = "It was a bright cold day in April. " * 60
    first, last = (nanogpt.train(text, seed=0, steps=steps) for steps in (1, 15))
    assert 0 < last < first - 0.1 < math.log(len(set(text))) + 0.4


# --- kernels, and machines without BF16 units


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this is not glibc")
def test_freed_memory_is_kept_only_inside() -> None:
    """Count the pages that the system gives for a tensor of 128 MiB when it is made again."""

    def pages() -> int:
        torch.ones(1 << 25)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 25)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with quantize.freed_memory_kept():
        assert pages() < 20
    assert pages() > 50


def test_kernel_whose_bits_differ_is_an_error() -> None:
    def run() -> torch.Tensor:
        return torch.tensor([1.0 if ops.chosen() == "cpu" else 2.0])

    with pytest.raises(AssertionError, match="round: the kernel's bits are not those of plain PyTorch"):
        quantize.check("round", run)


def test_bf16_cases_are_left_out_where_its_products_are_slow(answers: dict[str, list[Figure]]) -> None:
    """Expect the reason in the figure's note; counts that need no product remain."""
    fast = setting()
    slow = dataclasses.replace(fast.roofs, peak={"float32": 170e9, "bfloat16": 0.3e9})
    here = dataclasses.replace(fast, dtype=torch.float32, roofs=slow)
    (told,) = peers.train(dataclasses.replace(here, dtype=torch.bfloat16))
    assert told.measured is None and told.case == {"what": "train", "dtype": "bfloat16"}
    assert told.note == "left out: bfloat16 products run at 0.3 GFLOP/s here, float32 at 170"
    figures = run(QUESTIONS["fp8"], here)
    left = [f for f in figures if f.measured is None]
    assert [(f.case["what"], f.note) for f in left] == [(w, told.note) for w in ("weights", "activations", "cache")]
    assert {f.metric for f in figures if f.measured is not None} == {"bytes", "error", "bytes_per_token"}
    assert all(f.measured == f.predicted for f in figures if f.exact)
    for question, some in (("peers", [told]), ("fp8", figures), ("fp8", left)):
        assert QUESTIONS[question].finding(some).endswith(".")
        QUESTIONS[question].plots(some)
    console = Console(record=True, width=120)
    show_question(console, "Others?", "Nothing was measured yet.", [told])
    assert f"\n{told.note}\n" in console.export_text()
    assert why_unusable(torch.float32, slow.peak) is why_unusable(torch.bfloat16, fast.roofs.peak) is None
    assert why_unusable(torch.bfloat16, {}) is None
