"""The sources and the commit that figures come from."""

import subprocess
from pathlib import Path

import pytest

from dsmini.report import provenance


def test_sources_that_figures_depend_on_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dsmini/a.py", "dsmini/measure/a.py", "benchmarks/questions/a.py", "configs/a.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    (tmp_path / "dsmini" / "report").mkdir()
    (tmp_path / "pyproject.toml").touch()  # as in a checkout
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    seen = {provenance.code()}
    for path in sorted(tmp_path.rglob("a.*")):
        path.write_text("2")
        seen.add(provenance.code())
    assert len(seen) == 5
    (tmp_path / "dsmini" / "report" / "page.py").write_text("3")
    (tmp_path / "benchmarks" / "runner.py").write_text("3")
    assert provenance.code() in seen, "what shows figures changes none"


def test_installed_package_has_no_commit_and_its_own_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel, in a folder that another project's git knows, next to strangers of our folders' names."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    site = tmp_path / "site-packages"
    for name in ("dsmini/a.py", "dsmini_kernels/cpu/a.cpp", "benchmarks/a.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("1")
    monkeypatch.setattr(provenance, "ROOT", site)
    monkeypatch.setattr(provenance.metadata, "version", lambda name: f"{name} 1.2.3")
    assert provenance.commit() is None
    assert provenance.versions()["dsmini"] == "dsmini 1.2.3"
    seen = {provenance.code()}
    (site / "benchmarks" / "a.py").write_text("2")
    assert provenance.code() in seen
    for name in ("dsmini/a.py", "dsmini_kernels/cpu/a.cpp"):
        (site / name).write_text("2")
        seen.add(provenance.code())
    assert len(seen) == 3


def test_commit_of_a_checkout_says_if_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsmini").mkdir()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "dsmini" / "__init__.py").write_text('__version__ = "1"')
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *args], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    clean = provenance.commit()
    assert clean and len(clean) == 40
    (tmp_path / "dsmini" / "__init__.py").write_text('__version__ = "2"')
    assert provenance.commit() == f"{clean}-dirty"
    assert provenance.versions()["dsmini"] == "2"
