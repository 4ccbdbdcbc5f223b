"""Show what the tests are worth: put bugs in, drawn at random by a seed, and count those that a test notices.

    python -m tests.mutants SEED NUMBER [FOLDER ...]    # folders of dsmini or kernels to draw from; needs pytest-cov

First all tests but slow ones run once, to know those of each line (.mutants/map.json). A bug, in a copy of the
checkout, meets the tests of its line (of its file, if no test runs the line: it runs at import), those of its own
package first, until one fails, then all tests of its package, slow ones too. Lines of C++ meet those of kernels/ and
inference/. Results are in .mutants/SEED.jsonl; the same command continues where it was stopped.
"""

import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".mutants"
SWAPS = {
    **{"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "**": "*", "%": "*", "@": "*", "+=": "-=", "-=": "+="},
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "in": "not in"},
    **{"and": "or", "or": "and", "&&": "||", "||": "&&", "not": "", "if": "if not", "any": "all", "all": "any"},
    **{"True": "False", "False": "True", "true": "false", "false": "true", "max": "min", "min": "max"},
}
NO_CPP = {"if", "is", "in", "not", "and", "or", "any", "all"}
CPP = re.compile(r"//.*|\"[^\"]*\"|^\s*(?:#|template).*|[\w.]+|(?<= )[-+*/<>=!&|%]+(?= )", re.M)
TEXT = (tokenize.COMMENT, tokenize.STRING)
OWN = {"kernels": ("kernels", "inference"), "ops": ("functional",), "console": ("commands",)}
"""Folders of tests for folders of code, where the name is another."""
CALL = re.compile(r"^ +([\w.]+\(.*\))$", re.M)
Bug = tuple[str, int, str, str]
"""File, place in it, text, and the wrong text."""


def mutants(path: Path) -> Iterator[Bug]:
    """Yield each bug that a source could have: a swapped word or operator, another number, a missing call."""
    source, where = path.read_text(), str(path.relative_to(ROOT))
    if path.suffix == ".py":
        starts = [0, *(match.end() for match in re.finditer(r"\n", source))]
        found = tokenize.generate_tokens(io.StringIO(source).readline)
        tokens = [(starts[t.start[0] - 1] + t.start[1], t.string) for t in found if t.type not in TEXT]
        yield from (
            (where, call.end() - len(call[0].strip()), call[0].strip(), "pass") for call in CALL.finditer(source)
        )
    else:
        tokens = [(match.start(), match[0]) for match in CPP.finditer(source) if match[0] not in NO_CPP]
    for start, text in tokens:
        new = f"({text.rstrip('f')} + 1)" if re.fullmatch(r"\d+(\.\d+)?f?", text) else SWAPS.get(text)
        if new is not None:
            yield where, start, text, new


def with_bug(where: str, start: int, text: str, new: str) -> str:
    """Return the source with the bug; empty for one that is not Python."""
    source = (ROOT / where).read_text()
    changed = source[:start] + new + source[start + len(text) :]
    try:
        return changed if not where.endswith(".py") or compile(changed, where, "exec") else ""
    except SyntaxError:
        return ""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep the tests that a file names, in its order of files. For `pytest -p tests.mutants`."""
    names = json.loads(Path(os.environ["MUTANT_TESTS"]).read_text())
    place = {name.split("::")[0]: i for i, name in reversed([*enumerate(names)])}
    kept = [item for item in items if item.nodeid in {*names}]
    items[:] = sorted(kept, key=lambda item: place[item.nodeid.split("::")[0]])


def run_pytest(root: Path, *arguments: str, limit: int | None = None) -> str:
    """Run tests of a checkout; return the first that failed, or "survived"."""
    env = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "XDG_CACHE_HOME": str(WORK / "cache")}
    env["MUTANT_TESTS"] = str(root / "tests.json")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(command, cwd=root, env=os.environ | env, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no end in {limit} s"
    failed = [*re.findall(r"^(?:FAILED|ERROR).*", done.stdout, re.M), f"status {done.returncode}: {done.stdout[-300:]}"]
    return "survived" if done.returncode in (0, 5) else failed[0][:200]


def known_tests() -> dict[str, dict[str, list[str]]]:
    """Return the tests of each line of each source. Run all tests for it, if that was not done."""
    if not (WORK / "map.json").exists():
        from coverage import CoverageData

        WORK.mkdir(exist_ok=True)
        print("running all tests once, with coverage by test", flush=True)
        coverage = ("--cov=dsmini", "--cov=dsmini_kernels", "--cov-context=test", "--cov-report=")
        if (failed := run_pytest(ROOT, "-m", "not gpu and not slow", *coverage)) != "survived":
            sys.exit(f"tests must pass without a bug and with pytest-cov (pip install -e '.[test,dev]'): {failed}")
        data = CoverageData(str(ROOT / ".coverage"))
        data.read()
        found = {str(Path(file).relative_to(ROOT)): data.contexts_by_lineno(file) for file in data.measured_files()}
        lines = {f: {n: [t.rpartition("|")[0] for t in ts if t] for n, ts in of.items()} for f, of in found.items()}
        (WORK / "map.json").write_text(json.dumps(lines))
    return json.loads((WORK / "map.json").read_text())


def verdict(tree: Path, where: str, tests: list[str]) -> str:
    """Return the test that fails in a checkout with a bug, or "survived"."""
    folder = where.split("/")[0 if where.startswith("kernels") else 1]
    own = ["tests/commands"] if folder.endswith(".py") else [f"tests/{name}" for name in OWN.get(folder, [folder])]
    tests = sorted(tests, key=lambda name: not name.startswith(tuple(own)))
    (tree / "tests.json").write_text(json.dumps(tests))
    chosen = ["-n", "0", "-p", "tests.mutants", *sorted({name.split("::")[0] for name in tests})]
    for arguments in (chosen if tests else [], own):
        if arguments and (found := run_pytest(tree, "-x", *arguments, limit=1800)) != "survived":
            return found
    return "survived"


def main(seed: str, number: str, *folders: str) -> None:
    """Draw bugs, try those without a result, and print each and the share that was killed."""
    files = [path for of in folders or ("dsmini", "kernels") for path in sorted((ROOT / of).rglob("*"))]
    drawn = [bug for path in files if path.suffix in (".py", ".cpp", ".h") for bug in mutants(path)]
    random.Random(seed).shuffle(drawn)
    known, results, tree = known_tests(), WORK / f"{seed}.jsonl", WORK / f"tree-{seed}"
    done = dict(map(json.loads, results.read_text().splitlines())) if results.exists() else {}
    for bug in itertools.islice(filter(lambda bug: with_bug(*bug), drawn), int(number)):
        where, start, text, new = bug
        line = (ROOT / where).read_text().count("\n", 0, start) + 1
        said = f"{where}:{line}:{start} {text} -> {new}"
        print(said, end="  ", flush=True)
        if said not in done:
            shutil.rmtree(tree, ignore_errors=True)
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".mutants", "runs", "__pycache__"))
            (tree / where).write_text(with_bug(*bug))
            of_file = known.get(where, {})
            tests = of_file.get(str(line)) or sorted({*itertools.chain(*of_file.values())})
            done[said] = verdict(tree, where, tests)
            with results.open("a") as file:
                file.write(json.dumps([said, done[said]]) + "\n")
        print(done[said], flush=True)
    killed, late = (sum(map(of, done.values())) for of in ("survived".__ne__, lambda said: said.startswith("no end")))
    print(f"{killed} of {len(done)} killed, {late} of them as tests did not end")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
