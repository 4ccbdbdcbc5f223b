"""Every pytest command of README.md and docs/claims.md runs all cases of its claim: none is left out or skipped."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
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


def commands(pages: list[Path]) -> dict[str, tuple[list[str], str, str | None]]:
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


def test_commands_of_claims_run_all_their_cases() -> None:
    said = commands([ROOT / "README.md", ROOT / "docs" / "claims.md"])
    default = re.search(r"-m '(.*?)'", (ROOT / "pyproject.toml").read_text())[1]
    asked = [(paths, k, default if m is None else m) for paths, k, m in said.values()]
    every = [(paths, k, "") for paths, k, _ in said.values()]
    found = cases(ROOT, [*asked, *every])
    for command, some, whole in zip(said, found, found[len(said) :], strict=False):
        assert whole, f"`{command}` runs no case"
        assert not (skipped := [case for case in whole if case.endswith(" (skipped)")]), skipped
        assert some == whole, f"`{command}` leaves cases out; give it -m ''"
