"""What README.md and docs/equations.md say works and exists."""

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, TINY, run_all

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every python -m dsmini... line of the bash blocks, without its comment, made small enough for a test."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    found = [re.sub(r"\s+#.*", "", line).split("python -m ", 1)[1] for line in lines if "python -m dsmini" in line]
    return [tuple(command.partition(" ")[::2]) for command in found]


def smaller(module: str, arguments: str) -> str:
    if "--help" in arguments:
        return arguments
    if module == "dsmini.generate":
        return f"{arguments} --max-new-tokens 4"
    if module == "dsmini.tokenize":
        return arguments.replace("FILE_OR_FOLDER", "book.txt")
    if module == "dsmini.convert":
        return arguments
    if "--resume" in arguments:  # the only setting that differs from the run it goes on with
        return re.sub(r"--train.steps \d+", "--train.steps 4", arguments)
    text = "" if "--data.path" in arguments else " --data.path book.txt"
    return f"{arguments.replace('FILE_OR_FOLDER', 'book.txt')}{text} --train.steps 2 {TINY}"


def test_every_command_runs(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was a bright cold day in April. " * 100)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    said = commands()
    assert ("dsmini.train", "") in said and len(said) > 4
    answers = run_all([(module, smaller(module, arguments)) for module, arguments in said], tmp_path)
    for command, (status, words) in zip(said, answers, strict=True):
        assert status == 0, (command, words)


def test_the_python_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        assert printed == re.findall(r"^print\(.*#\s*(.+)$", block, re.MULTILINE)


def test_map_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.parent.relative_to(ROOT) for path in (ROOT / "dsmini").rglob("__init__.py")} - {Path("dsmini")}
    assert rooms
    assert [str(room) for room in sorted(rooms) if f"`{room}/`" not in text] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search("[A-Z]+_PLACE|TODO|TBD", README)


@pytest.mark.parametrize("document", ["README.md", "docs/equations.md", "docs/architecture.md"])
def test_links_and_test_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / document).parent / link).exists(), link
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"\btest_\w+\b(?!\.py)", text)):
        assert f"def {name}(" in tests or list((ROOT / "tests").rglob(f"{name}.py")) or f"{name}.py" in text, name
