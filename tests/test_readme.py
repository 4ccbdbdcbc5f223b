"""README.md and the pages of docs/ say what works and exists."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import dsmini
from dsmini.console.commandline import parse
from tests.helpers.commands import ROOT, TINY, let_prices_be_invented, run_all

NAMES = ("README.md", "CONTRIBUTING.md", "kernels/README.md")
PAGES = [*map(ROOT.joinpath, NAMES), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, kind: str) -> list[str]:
    """Return the code blocks of one kind on a page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Every python -m dsmini... line of the bash blocks, without its comment, made small enough for a test."""
    pages = [ROOT / "README.md", ROOT / "docs" / "training.md"]
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    found = [re.sub(r"\s+#.*", "", line).split("python -m ", 1)[1] for line in lines if "python -m dsmini" in line]
    return [tuple(command.partition(" ")[::2]) for command in dict.fromkeys(found)]


def smaller(module: str, arguments: str) -> str:
    if "--help" in arguments:
        return arguments
    if module == "dsmini.generate":
        return f"{arguments} --max-new-tokens 4"
    if module == "dsmini.tokenize":
        return arguments.replace("FILE_OR_FOLDER", "book.txt")
    if module == "dsmini.diagnose":
        return "small.toml --quick --rounds 5 --only replay"
    if module == "dsmini.compare":
        return f"{arguments} --seeds 1 --set data.path=book.txt train.steps=1 train.final_eval_tokens=256"
    if module in ("dsmini.convert", "dsmini.explain", "dsmini.plan"):
        return arguments
    if "--train.eval-context" in arguments:  # lengths in the same proportion
        arguments = arguments.replace("1024", "32").replace("256", "8")
    if "--resume" in arguments:  # the only setting that differs from the run it goes on with
        return re.sub(r"--train.steps \d+", "--train.steps 4", arguments)
    text = "" if "--data.path" in arguments else " --data.path book.txt"
    return f"{arguments.replace('FILE_OR_FOLDER', 'book.txt')}{text} --train.steps 2 {TINY}"


def test_pages_that_make_a_tokenizer_name_the_extra() -> None:
    pages = [page for page in PAGES if any("dsmini.tokenize" in block for block in blocks(page, "bash"))]
    assert len(pages) >= 2 and [page.name for page in pages if "[bpe]'" not in page.read_text()] == []


def test_every_command_of_a_page_has_known_flags_and_files() -> None:
    """Commands in text, of several processes, and with lines that continue count too."""
    named: list[tuple[str, str]] = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        named += re.findall(r" -m dsmini\.(\w+)(?!\.)\b([^#`|\n]*)", text)
    assert len(named) > 20
    wrong = []
    for name, arguments in dict.fromkeys(named):
        words = [word for word in shlex.split(arguments) if word not in ("-h", "--help", "--help-all")]
        wrong += [word for word in words if word.startswith("configs/") and not (ROOT / word).exists()]
        kind = getattr(importlib.import_module(f"dsmini.{name}"), f"{name.capitalize()}Command")
        try:
            parse(kind, name, words)
        except ValueError as error:
            if "unknown flag" in str(error):
                wrong.append(f"{name} {arguments}: {error}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_prices_be_invented(monkeypatch)
    (tmp_path / "book.txt").write_text("It was a bright cold day in April. " * 100)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "small.toml").write_text("[model]\nn_layers = 1\nn_dense_layers = 0\n[data]\npath = 'book.txt'\n")
    said = commands()
    assert ("dsmini.train", "") in said and len(said) > 4
    answers = run_all([(module, smaller(module, arguments)) for module, arguments in said], tmp_path)
    for command, (status, words) in zip(said, answers, strict=True):
        assert status == 0, (command, words)


@pytest.mark.parametrize("page", ["README.md", "docs/fp8.md"])
def test_the_python_runs(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert blocks(ROOT / page, "python")
    for block in blocks(ROOT / page, "python"):
        exec(compile(block, page, "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        assert printed == re.findall(r"^print\(.*#\s*(.+)$", block, re.MULTILINE)


def test_map_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "dsmini").rglob("__init__.py")} - {Path("dsmini")}
    assert packages
    assert [str(package) for package in sorted(packages) if f"`{package}/`" not in text] == []


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search("[A-Z]+_PLACE|TODO|TBD", PAGES[0].read_text())


@cache
def names_of_tests() -> set[str]:
    """Return the names of all test functions and of their files."""
    files = list((ROOT / "tests").rglob("*.py"))
    functions = re.findall(r"^ *def (test_\w+)\(", "\n".join(path.read_text() for path in files), re.MULTILINE)
    return {*functions, *(path.stem for path in files)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_tests_exist(page: Path) -> None:
    text = page.read_text()
    paths = re.findall(r"\btests/[\w/]+\.py\b", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert set(re.findall(r"\btest_\w+\b(?!\.py)", text)) - names_of_tests() == set()


def test_style_names_a_dead_link_a_bare_claim_and_an_old_picture(tmp_path: Path) -> None:
    style = runpy.run_path(str(ROOT / ".ci" / "style.py"))
    page = tmp_path / "claims.md"
    table = "| claim | command |\n| --- | --- |\n| it is fast | try |\n"
    page.write_text(f"# One\n[a](#one) [b](#two) [c](none.md)\n\n{table}")
    named = ["heading #two", "none.md", "without its command"]
    found = [words for _, words in style["check_page"](page)]
    assert len(found) == 3 and all(name in words for name, words in zip(named, found, strict=True))
    for picture, (script, drawn) in tomllib.loads((ROOT / "docs" / "pictures.toml").read_text()).items():
        assert (ROOT / picture).exists() and style["code_of"](picture, script) == drawn
    code = style["code_of"].__globals__
    code["ROOT"] = tmp_path
    (tmp_path / "page.md").write_text('```python\nf.savefig("a.png")\n```\n')
    before = style["code_of"]("a.png", "page.md")
    (tmp_path / "page.md").write_text('Words.\n```python\nf.savefig("a.png")  # a comment\n```\n')
    assert style["code_of"]("a.png", "page.md") == before
    (tmp_path / "page.md").write_text('```python\ng.savefig("a.png")\n```\n')
    assert style["code_of"]("a.png", "page.md") != before


def test_no_twelve_words_stand_on_two_pages() -> None:
    """A thing is said on one page, and others link to it. claims.md alone repeats what the README claims."""
    found: dict[str, Path] = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```|\]\(.*?\)", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        words = re.findall(r"[\w.,%-]+", text) if page.name != "claims.md" else []
        for i in range(len(words) - 11):
            passage = " ".join(words[i : i + 12])
            assert found.setdefault(passage, page) == page, f"{page}, {found[passage]}: {passage}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_functions_are_in_their_files(page: Path) -> None:
    """A link [MLA.forward](../dsmini/nn/mla.py) names what that file defines."""
    links = re.findall(r"\[([\w.]+(?:,? (?:and )?[\w.]+)*)\]\(([^)#]*dsmini/[^)#]+\.py)\)", page.read_text())
    for label, link in links:
        names = [name for name in re.split(r",? and |, ", label) if re.fullmatch(r"[\w.]+(?<!\.py)", name)]
        text = (page.parent / link).read_text()
        for name in names:
            for part in name.split("."):
                assert re.search(rf"\b(def|class) {part}\b", text), (name, link)


def test_block_diagram_has_the_counts_of_the_model() -> None:
    text = (ROOT / "docs" / "block.svg").read_text()
    config = dsmini.ModelConfig.from_file(ROOT / "configs" / "deepseek-v3.toml")
    counted = dsmini.accounting.parameters(config)
    moe_layers = config.n_layers - config.n_dense_layers
    per_token = [dsmini.accounting.kv_bytes_per_token(c) for c in (config, dsmini.accounting.mha_twin(config))]
    wanted = [
        f"{config.n_layers} blocks, {moe_layers} of them with experts",
        f"{counted.by_module['attention'] / config.n_layers / 1e6:.0f} MB of weights",
        f"{per_token[0] / config.n_layers:,.0f} bytes",
        f"of {config.v_head_dim}: {per_token[1] / config.n_layers:,.0f}",
        f"{counted.active_by_module['routed experts'] / moe_layers / 1e6:.0f} MB",
        f"of {counted.by_module['routed experts'] / moe_layers / 1e6:,.0f} MB",
        f"{counted.by_module['shared experts'] / moe_layers / 1e6:.0f} MB of the shared expert",
        f"{counted.by_module['mtp projection'] / 1e6:.0f} MB",
    ]
    assert [words for words in wanted if words not in re.sub("<.*?>", "", text)] == []


# commands of claims run all their cases: none is left out or skipped

COLLECT = """
import contextlib, io, json, os, sys, pytest
from _pytest.mark import deselect_by_keyword, deselect_by_mark

commands = json.load(sys.stdin)  # each: paths, -k, -m

class Selected:
    def pytest_collection_finish(self, session):
        session.config.hook.pytest_deselected = lambda items: None
        self.cases = []
        for paths, session.config.option.keyword, session.config.option.markexpr in commands:
            items = [item for item in session.items if item.nodeid.startswith(tuple(paths))]
            deselect_by_keyword(items, session.config)
            deselect_by_mark(items, session.config)
            left_out = [any(map(item.get_closest_marker, ("skip", "xfail"))) for item in items]
            self.cases.append([f"{item.nodeid}{' (skipped)' * out}" for item, out in zip(items, left_out)])

selected, paths = Selected(), {path for command in commands for path in command[0]}
with contextlib.redirect_stdout(io.StringIO()):
    pytest.main([*sorted(paths), "--collect-only", "-q", "-n", "0", "-m", ""], plugins=[selected])
json.dump(selected.cases, sys.stdout)
"""


def pytest_commands(pages: list[Path]) -> dict[str, tuple[list[str], str, str | None]]:
    """Return the paths, the -k and the -m of each pytest command of some pages; -m is None where it has none."""
    found = {}
    for command in re.findall(r"`(?:\w+=\w+ )*(pytest [^`]+)`", "\n".join(page.read_text() for page in pages)):
        words = shlex.split(command)
        options = {name: words[words.index(name) + 1] for name in ("-k", "-m") if name in words}
        found[command] = [w for w in words if w.startswith("tests/")], options.get("-k", ""), options.get("-m")
    return found


def cases(root: Path, asked: list[tuple[list[str], str, str]]) -> list[list[str]]:
    """Return the names of the cases that each of these commands would run in a checkout."""
    run = [sys.executable, "-c", COLLECT]
    done = subprocess.run(run, input=json.dumps(asked), cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_commands_of_claims_run_all_their_cases() -> None:
    said = pytest_commands([ROOT / "README.md", ROOT / "docs" / "claims.md"])
    default = re.search(r"-m '(.*?)'", (ROOT / "pyproject.toml").read_text())[1]
    asked = [(paths, k, default if m is None else m) for paths, k, m in said.values()]
    every = [(paths, k, "") for paths, k, _ in said.values()]
    found = cases(ROOT, [*asked, *every])
    for command, some, whole in zip(said, found, found[len(said) :], strict=False):
        assert whole, f"`{command}` runs no case"
        assert not (skipped := [case for case in whole if case.endswith(" (skipped)")]), skipped
        assert some == whole, f"`{command}` leaves cases out; give it -m ''"
