"""The default corpus, and a small subject whose steps take milliseconds."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from dsmini import ModelConfig, RunConfig, TrainConfig, Transformer
from dsmini.config import DataConfig
from dsmini.data.corpus import Corpus, load_corpus
from dsmini.diagnosis.decoding.subject import DecodedModel, DecodingSubject
from dsmini.diagnosis.subject import Subject
from dsmini.measure.rates import Curve
from dsmini.measure.step_rates import OTHERS, Rates, StepRates
from dsmini.training.trainer import Trainer
from tests.helpers.corpora import TEXTS, load
from tests.helpers.questions import made_up_roofs

MODEL = ModelConfig(
    dim=32,
    inter_dim=40,
    moe_inter_dim=16,
    n_layers=2,
    n_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=8,
    n_activated_experts=2,
    n_expert_groups=1,
    n_limited_groups=1,
    n_mtp_layers=1,
    max_seq_len=8,
)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Load the default corpus."""
    return load_corpus(DataConfig(), 256, 256, tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Return a subject of the small model, with multi-token prediction, in FP32."""
    place = tmp_path_factory.mktemp("subject")
    (place / "texts").mkdir()
    for name, text in TEXTS.items():
        (place / "texts" / name).write_bytes(text)
    torch.manual_seed(0)
    config = RunConfig(model=MODEL, train=TrainConfig(batch_size=4, dtype="float32", device="cpu"))
    trainer = Trainer(Transformer(MODEL, compute_dtype=torch.float32), load(place), config, torch.device("cpu"))
    yield Subject(trainer)
    trainer.loader.close()


@pytest.fixture
def rates() -> Rates:
    """Return a machine that moves a byte in 1 ns, multiplies at 1 GFLOP/s in FP32 and 2 in BF16; a call takes 1 us."""
    point, product = Curve(sizes=(1.0, 1e9), costs=(1e-9, 1.0)), Curve(sizes=(1.0, 1e3), costs=(1e9, 1e9))
    peak = {"float32": 1e9, "bfloat16": 2e9}
    roofs = made_up_roofs(point, product, peak=peak, bandwidth=1e9, copy=1e9, call=1e-6)
    each = StepRates(factors={OTHERS: 1.0}, call=1e-6)
    return Rates(roofs=roofs, steps={f"training {dtype}": each for dtype in ("float32", "bfloat16")}, process=1000)


@pytest.fixture
def decoding() -> DecodingSubject:
    """Return a subject of the small model that decodes 2 sequences after 64 tokens, in FP32."""
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(MODEL, max_seq_len=160), compute_dtype=torch.float32).eval()
    decoded = DecodedModel(model=model, trained=False, text=None, source="random tokens")
    return DecodingSubject(decoded, batch=2, context=64)
