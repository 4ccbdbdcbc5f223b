"""The API pages, and the annotated model among them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

pytest.importorskip("pdoc", reason="docs/api.py needs pdoc, of dsmini[docs]")
pytest.importorskip("latex2mathml", reason="docs/api.py needs latex2mathml, of dsmini[docs]")


@pytest.mark.slow
def test_pages_of_the_model_have_equations_above_open_code(tmp_path: Path) -> None:
    from docs.api import equations_by_function, rendered_equations

    done = subprocess.run([sys.executable, ROOT / "docs/api.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rendered = rendered_equations()
    assert rendered.keys() <= equations_by_function().keys()
    for module, name in equations_by_function():
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        assert f'id="{name}"' in page, (module, name)
        assert rendered.get((module, name), "") in page, (module, name)
    page = (tmp_path / "dsmini/nn/mla.html").read_text()
    _, _, latents = page.partition('id="MLA.latents"')
    equation, code = latents.find("<math "), latents.find('class="pdoc-code')
    assert 0 < equation < code
    assert "checked" in latents[:equation] and "../../equations.html" in latents[:code]
    assert (tmp_path / "equations.html").read_text().count('href="dsmini/nn/mla.html"') > 5
