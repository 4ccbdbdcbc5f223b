"""python -m dsmini.explain: the same table as dsmini.ops.explain(), or JSON."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run_all


def test_explain_command_prints_a_table_or_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMINI_BACKEND", "eager")
    (status, table), (status_json, line) = run_all([("dsmini.explain", ""), ("dsmini.explain", "--json")], tmp_path)
    assert status == status_json == 0
    assert "DSMINI_BACKEND: eager; forced here: eager" in table and "\nlinear " in table and "\nmuon_update " in table
    said = json.loads(line.splitlines()[-1])
    assert said.keys() >= {"quantize", "linear", "blocks_step", "muon_update", "topk_attention"}
    assert said["experts"] == {"backend": "eager", "why": "forced"}
    assert said["quantize"] == {"backend": "reference", "why": "no eager version"}


def test_unknown_backend_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMINI_BACKEND", "gpu")
    ((status, said),) = run_all([("dsmini.explain", "--json")], tmp_path)
    assert status == 2 and said.startswith("error: DSMINI_BACKEND='gpu' is unknown; ") and said.count("\n") == 1
