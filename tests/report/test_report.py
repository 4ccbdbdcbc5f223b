"""Report of any command: from figures and sentences to terminal, page and JSON."""

import io
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dsmini.report import Figure, Plot, Report, Section, Series, Table


def planned() -> Report:
    figures = [
        Figure(question="fit", case={"gpus": n}, metric="bytes_per_gpu", unit="bytes", predicted=80e9 / n, note="BF16")
        for n in (1, 2, 4)
    ]
    line = Series(label="BF16", x=[1, 2, 4], y=[f.predicted or 0.0 for f in figures])
    return Report(
        title="What to run where",
        lead="A plan.",
        sections=[
            Section(
                name="fit",
                title="Does it fit?",
                finding="It fits on 4 GPUs.",
                figures=figures,
                plots=[Plot(title="Memory", x="GPUs", y="bytes", series=[line])],
                tables=[Table(columns=("part", "size", ""), rows=[("weights", "70 GB", "far")], numeric=("size",))],
                warnings=["Activations are a lower bound."],
                errors=[("gpus 8", "ValueError: there are only 4")],
            )
        ],
        facts={"The machine": {"processor": "a <laptop>"}},
    )


def test_terminal_shows_figures_tables_warnings_and_finding() -> None:
    out = io.StringIO()
    planned().show(Console(file=out, width=120))
    for said in ("Does it fit?", "18.6 GiB", "weights", "It fits on 4 GPUs.", "Activations are a lower bound."):
        assert said in out.getvalue()


def test_page_shows_all_of_it() -> None:
    page = planned().html()
    for said in (
        "<h1>What to run where</h1>",
        "18.6 GiB",
        ">weights<",
        "It fits on 4 GPUs.",
        "a &lt;laptop&gt;",
        "BF16",
    ):
        assert said in page
    assert page.count("<svg") == 2, "one for each theme"
    assert "measured / predicted" not in page, "nothing was measured"
    assert "there are only 4" in page


def test_json_has_a_line_for_each_finding_and_figure() -> None:
    found = [json.loads(line) for line in planned().json_lines()]
    assert [line["kind"] for line in found] == ["finding", "figure", "figure", "figure"]
    assert found[0]["finding"] == "It fits on 4 GPUs."
    assert found[1]["predicted"] == 80e9 and found[1]["measured"] is None


def test_a_plot_that_cannot_be_drawn_spares_the_page() -> None:
    broken = Plot(title="Broken", x="", y="", series=[Series(label="a", x=[1, 2, 3], y=[1.0])])
    page = Report(title="t", sections=[Section(name="a", title="a", finding="a", plots=[broken])]).html()
    assert "Broken" in page and "Nothing to draw yet." in page and "ValueError" in page


def test_example_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lines = (Report.__doc__ or "").splitlines()
    first = next(i for i, line in enumerate(lines) if "from dsmini.report import" in line)
    last = next(i for i, line in enumerate(lines) if "print(line)" in line)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), {"Path": Path, "Console": Console})
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    for said in ("70,272 bytes", "98 % less"):
        assert said in page and said in printed
    assert json.loads(printed.splitlines()[-1])["metric"] == "bytes_per_token"
