"""Two pages to look at: a plan with all parts of a report, and the benchmarks of fake questions."""

import contextlib
import io
from pathlib import Path

import pytest

from benchmarks import run
from dsmini.report import Detail, Figure, Plot, Report, Section, Series, Table, Toned, units
from tests.helpers import fake_questions as fake


def planned() -> Report:
    """Return a report with figures, plot, table, details, a warning and a failed case."""
    figures = [
        Figure(question="fit", case={"gpus": n}, metric="bytes_per_gpu", unit="bytes", predicted=80e9 / n, note="BF16")
        for n in (1, 2, 4)
    ]
    line = Series(label="BF16", x=[1, 2, 4], y=[f.predicted or 0.0 for f in figures])
    cache = Detail(
        name="kv_cache",
        title="Cache of a token",
        value="70.3 kB",
        lines=["= n_layers * row", "= 61 * 1152 B"],
        note="Source: V2 report",
        needs=["row", "n_layers"],
    )
    fit = Section(
        name="fit",
        title="Does it fit?",
        finding="It fits on 4 GPUs.",
        figures=figures,
        plots=[Plot(title="Memory", x="GPUs", y="bytes", series=[line])],
        tables=[
            Table(columns=("part", "size", ""), rows=[("weights", "70 GB", Toned("far", "far"))], numeric=("size",))
        ],
        warnings=["Activations are a lower bound."],
        errors=[("gpus 8", "ValueError: there are only 4")],
    )
    names, machines = "kv_lora_rank \\ hardware", ["<column 0>", "<column 1>"]
    rows = [("row 0", "1 ms", "2 ms"), ("row 1", units.NOTHING, "3 ms")]
    memory = Section(
        name="memory",
        title="How much?",
        finding="Little.",
        details={"Cache": [cache, Detail(name="row", title="Row of a <layer>", value="1152 B")]},
        tables=[Table(columns=(names, *machines), rows=rows, numeric=machines, common="Time of a step")],
    )
    facts = {"The machine": {"processor": "a <laptop>"}}
    numbers = [("70 kB", "a token")]
    return Report(
        title="A plan", lead="In short.", sections=[fit, memory], highlights=numbers, facts=facts, facts_title="Planned"
    )


@pytest.fixture(scope="package")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "report.html"
    path.write_text(planned().html(), encoding="utf-8")
    return path


@pytest.fixture(scope="package")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw the report of the fake questions, with a case that fails."""
    folder = tmp_path_factory.mktemp("report")

    def fail(key: str) -> None:
        if key == "dsmini 2048":
            raise RuntimeError("no memory for <this> & that")

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        known = {**fake.known(), "fake_decode": fake.decode(fail)}
        assert run.main(["--device", "cpu", "--out", str(folder)], known, fake.roofs) == 1
    return folder / "report.html"
