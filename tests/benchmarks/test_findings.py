"""Findings say what figures show, and hedge where they do not."""

import pytest

from benchmarks import shapes
from benchmarks.case import pick
from benchmarks.questions import fp8, kv_cache, moe_or_dense
from dsmini import accounting
from tests.helpers.questions import setting


def test_findings_hedge_what_spreads_wider_than_it_differs() -> None:
    """Compare the same medians with narrow and with wide quartiles."""
    case = {"context": 4096}
    told = {}
    for spread in (0.01, 0.5):
        figures = [
            kv_cache.figure("bytes_per_token", {"attention": kind, "cache": "bfloat16"}, size)
            for kind, size in (("mla", 1.0), ("mha", 8.0))
        ]
        figures += [
            kv_cache.figure("seconds_per_layer", {"attention": kind, **case}, [t * (1 - spread), t, t * (1 + spread)])
            for kind, t in (("mla", 1.0), ("mha", 1.2))
        ]
        told[spread] = kv_cache.finding(figures)
    assert told[0.01].endswith("at context 4,096 its layer decodes 1.2 times as fast.")
    assert told[0.5].endswith("at context 4,096 its layer decodes 0.7 to 2.0 times as fast (unclear).")


def test_fp8_says_how_long_a_step_takes() -> None:
    figures = [fp8.figure("bytes", fp8._case("weights", kind), size) for kind, size in (("fp8", 6), ("bfloat16", 10))]
    figures.append(fp8.figure("decode_ratio", fp8._case("weights"), [1.7, 1.71, 1.72]))
    want = "Simulated FP8 stores weights in 60% of the bytes (a decoding step takes 1.71 times as long)."
    assert fp8.finding(figures) == want


def test_moe_or_dense_withholds_what_its_interval_does_not_show() -> None:
    def told(*gains: float) -> str:
        return moe_or_dense.finding([moe_or_dense.figure("gain", {"seed": i}, gain) for i, gain in enumerate(gains)])

    assert told(0.02, 0.021, 0.019).startswith("MoE is better by 0.0200 nats a byte, 95 % interval")
    assert told(-0.02, -0.021, -0.019).startswith("MoE is worse by 0.0200 nats a byte")
    assert told(0.02, -0.01, 0.005).startswith("No difference is clear")


@pytest.mark.parametrize(("memory", "left"), [(8 << 30, 2 << 30), (100 << 30, 10 << 30)])
def test_context_that_fits_leaves_room_for_the_system(monkeypatch: pytest.MonkeyPatch, memory: int, left: int) -> None:
    monkeypatch.setattr(kv_cache, "memory_bytes", lambda device: memory)
    fits = pick(kv_cache.measure_bytes(setting()), "context_that_fits", attention="mla", cache="bfloat16")[0]
    config = shapes.BIG
    used = accounting.weight_bytes(config).total + (fits.predicted or 0) * accounting.kv_bytes_per_token(config)
    assert 0 <= memory - left - used < accounting.kv_bytes_per_token(config)
    assert f"with {left >> 30}.00 GiB of memory left to the system" in fits.note.replace("10.0 ", "10.00 ")


def test_context_that_fits_is_not_said_where_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "memory_bytes", lambda device: 0)
    assert pick(kv_cache.measure_bytes(setting()), "context_that_fits") == []
