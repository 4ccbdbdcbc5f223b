"""README.md and the pages of docs/ say what works and exists."""

import importlib
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import dsmini
from dsmini.console.commandline import parse
from dsmini.functional import attention
from dsmini.inference import generation
from dsmini.nn.mla import attention_work
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


FEW = {
    "dsmini.generate": "--max-new-tokens 4",
    "dsmini.compare": "--seeds 2 --set data.path=book.txt train.steps=1 train.final_eval_tokens=256",
}
"""Flags that let a command do little."""


def smaller(module: str, arguments: str) -> str:
    arguments = arguments.replace("FILE_OR_FOLDER", "book.txt")
    if module == "dsmini.diagnose":
        return "small.toml --quick --rounds 5 --only replay"
    if module != "dsmini.train" or "--help" in arguments:
        return f"{arguments} {FEW.get(module, '')}"
    if "--train.eval-context" in arguments:  # lengths in the same proportion
        arguments = arguments.replace("1024", "32").replace("256", "8")
    if "--resume" in arguments:  # the only setting that differs from the run it goes on with
        return re.sub(r"--train.steps \d+", "--train.steps 4", arguments)
    text = "" if "--data.path" in arguments else " --data.path book.txt"
    return f"{arguments}{text} --train.steps 2 {TINY}"


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
        module = importlib.import_module(f"dsmini.{name}")
        try:
            parse(getattr(module, f"{name.capitalize()}Command"), name, words)
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


def test_the_sample_is_what_the_first_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """In FP32; the kernels give the same text in BF16."""
    (sample,) = blocks(ROOT / "README.md", "text sample")
    (command,) = [arguments for module, arguments in commands()[:1] if module == "dsmini.generate"]
    main = importlib.import_module("dsmini.generate").main
    assert not main([*shlex.split(command), "--dtype", "float32", "--max-new-tokens", str(len(sample))])
    assert capsys.readouterr().out.startswith(sample)


def test_style_names_a_dead_link_and_a_bare_claim(tmp_path: Path) -> None:
    style = runpy.run_path(str(ROOT / ".ci" / "style.py"))
    page = tmp_path / "claims.md"
    table = "| claim | command |\n| --- | --- |\n| it is fast | try |\n"
    page.write_text(f"# One\n[a](#one) [b](#two) [c](none.md)\n\n{table}")
    named = ["heading #two", "none.md", "without its command"]
    found = [words for _, words in style["check_page"](page)]
    assert len(found) == 3 and all(name in words for name, words in zip(named, found, strict=True))


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


# --- statements about the code are true; those that need no import are checked by .ci/style.py


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_everything_to_try_runs() -> None:
    names = {"torch": torch, "dsmini": dsmini, "attention_work": attention_work, "model": dsmini.Transformer()}
    names["x"] = torch.zeros(1, 9, dtype=torch.int64)
    rows = re.findall(r"^\| \d+ \|.*\| (.*) \|$", page("reading.md"), re.MULTILINE)
    code = [expression for row in rows for expression in re.findall(r"`([^`]*\([^`]*)`", row)]
    assert len(code) == 16
    for expression in code:
        eval(expression, names)


def test_sizes_in_the_text_are_those_of_the_code() -> None:
    limits = (attention.EXPLICIT_UP_TO_BF16, attention.EXPLICIT_UP_TO, attention.EXPLICIT_UP_TO_COMPILED)
    decided = "up to {} tokens in BF16 ({} in FP32, {} compiled)".format(*limits)
    assert decided in page("decisions.md") and f"logits, {attention.BLOCK} queries at a time" in page("decisions.md")
    assert f"{generation.PREFILL} tokens at a time" in page("architecture.md")
