"""Requests of a plan: what a user may choose, and the sentence for what contradicts itself."""

import dataclasses
from typing import Any

import pytest

from dsmini.planner.request import PlanRequest
from tests.helpers.configs import refusal

BAD: dict[str, dict[str, Any]] = {
    "gpus=0 is out of range": {"gpus": 0},
    "batch=-4 is out of range": {"batch": -4},
    "tokens=nan is out of range": {"tokens": float("nan")},
    "price=inf is out of range": {"price": float("inf")},
    "decode_redundant=-1 is out of range; use 0 or more": {"decode_redundant": -1},
    "utilization=38.9 is no share below 1": {"utilization": 38.9},
    "acceptance=1.5 is no share below 1": {"acceptance": 1.5},
    "pipeline=3 does not divide gpus=16": {"gpus": 16, "pipeline": 3},
    "expert=32 does not divide gpus=16": {"gpus": 16, "expert": 32},
    "decode_tensor=3 does not divide decode_gpus=8": {"decode_gpus": 8, "decode_tensor": 3},
    "schedule='dualpipe' needs pipeline stages": {"schedule": "dualpipe", "pipeline": 1},
    "zero=1 divides the state over GPUs, of which there is one": {"gpus": 1, "zero": 1},
}


@pytest.mark.parametrize("sentence", BAD)
def test_contradiction_is_one_sentence(sentence: str) -> None:
    said = refusal(PlanRequest, **BAD[sentence])
    assert said.startswith(sentence) and "; " in said and "\n" not in said


def test_huge_numbers_are_refused_briefly() -> None:
    said = refusal(PlanRequest, gpus=10**400)
    assert said.startswith("gpus=1000") and len(said) < 250


def test_every_field_may_be_left_open() -> None:
    request = PlanRequest()
    assert request.layout_fields == {} and request.serving_fields == []
    assert dataclasses.replace(request, drafts=0, decode_redundant=0).serving_fields == ["decode_redundant"]


def test_chosen_fields_are_listed() -> None:
    request = PlanRequest(gpus=8, zero=0, precision="bf16", context=100, cache_dtype="fp8")
    assert request.layout_fields == {"gpus": 8, "zero": 0, "precision": "bf16"}
    assert request.serving_fields == ["context", "cache_dtype"]
