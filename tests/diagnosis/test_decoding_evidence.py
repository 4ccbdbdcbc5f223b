"""Evidence for decoding: slopes, batches, threads and the roofline, with and without rates."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from dsmini.config import ModelConfig
from dsmini.diagnosis.decoding import steps as stepping
from dsmini.diagnosis.decoding.alternatives import EXPANDED, MHA
from dsmini.diagnosis.decoding.arm import PLAIN, Narrow
from dsmini.diagnosis.decoding.evidence import batches, context_slope
from dsmini.diagnosis.decoding.evidence.every import DECODING_EVIDENCE
from dsmini.diagnosis.decoding.subject import DecodingSubject
from dsmini.diagnosis.evidence import evidence
from dsmini.report import Report, pick, values
from tests.helpers.questions import invented_rates

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MOST_TURNS", 2)
    monkeypatch.setattr(stepping, "TURN", 0.001)
    monkeypatch.setattr(batches, "BATCHES", (1, 2, 4))
    monkeypatch.setattr(context_slope, "SHARES", (0.25, 1.0))


@pytest.mark.parametrize("with_rates", [True, False])
@pytest.mark.parametrize("each", DECODING_EVIDENCE, ids=[each.name for each in DECODING_EVIDENCE])
def test_section_of_each(decoding: DecodingSubject, quick: None, each: evidence.Evidence, with_rates: bool) -> None:
    """Check figures, finding, JSON and page, and that cache and threads are as before."""
    threads, lengths = torch.get_num_threads(), decoding.cache.lengths.tolist()
    if each.needs_rates and not with_rates:
        return
    assert each.why_not(decoding) is None or each.name == "threads"
    section = each.run(decoding, invented_rates() if with_rates else None, 0.0)
    assert section.name == each.name and section.finding.endswith(".") and section.figures
    assert any(f.predicted is not None for f in section.figures) == with_rates
    json.dumps([figure.as_json() for figure in section.figures])
    assert "<svg" in Report(title="A", sections=[section]).html()
    assert torch.get_num_threads() == threads and decoding.cache.lengths.tolist() == lengths


def test_slopes_of_all_forms(decoding: DecodingSubject, quick: None) -> None:
    slopes = {"absorbed": 1e-7, "expanded": 2e-6, "MHA": 3e-7}
    for arm, slope in zip((PLAIN, EXPANDED, MHA), slopes.values(), strict=True):
        decoding.narrow[arm, decoding.batch] = Narrow(beyond=0.0, slope=slope)
    section = context_slope.run(decoding, invented_rates(), 0.0)
    forms = [f.case["form"] for f in pick(section.figures, "seconds_per_cached_token")]
    assert forms == ["absorbed", "expanded", "MHA"]
    predicted = {f.case["form"]: f.predicted or 0.0 for f in pick(section.figures, "seconds_per_cached_token")}
    assert predicted == pytest.approx(slopes)
    assert len(values(section.figures, "step")) == 6


def test_slope_of_a_line_is_found() -> None:
    assert context_slope.slope_of([10, 100, 1000], [0.2 + 3e-4 * n for n in (10, 100, 1000)]) == pytest.approx(3e-4)


def test_least_seconds_of_v3_are_its_published_bytes() -> None:
    """Check 70,272 bytes a token (DeepSeek-V2 report's table 1 at V3's sizes) at a gigabyte a second."""
    config = ModelConfig.from_file(CONFIGS / "deepseek-v3.toml")
    roofs = dataclasses.replace(invented_rates().roofs, bandwidth=1e9, peak={"bfloat16": 1e12})
    memory, arithmetic = context_slope.least_seconds(config, "absorbed", 1, "bfloat16", roofs)
    assert memory == pytest.approx(70_272e-9)
    assert arithmetic == pytest.approx(61 * 2 * 128 * (512 + 64 + 512) * 1e-12)
    expanded = context_slope.least_seconds(config, "expanded", 1, "bfloat16", roofs)[1]
    assert expanded == pytest.approx(61 * 2 * 128 * (512 * 256 + 128 + 64 + 128) * 1e-12)


def test_ridge_is_where_a_weight_has_enough_rows() -> None:
    rates = invented_rates()
    rates = dataclasses.replace(rates, roofs=dataclasses.replace(rates.roofs, bandwidth=1e10, peak={"bfloat16": 1e11}))
    assert batches.ridge_batch(2, rates, "bfloat16") == 10.0


def test_batches_end_where_memory_does(decoding: DecodingSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batches.batches_of(decoding) == [1, 2, 4, 8, 16, 32]
    monkeypatch.setattr(batches, "memory_bytes", lambda _: 1)
    assert batches.batches_of(decoding) == [1, 2], "the subject's own stays"
