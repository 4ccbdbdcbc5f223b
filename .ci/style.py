"""Check what ruff and pyright do not: who imports whom, plain English, and pages. Print the size of every package.

`python .ci/style.py` exits with status 1 after naming every place that breaks a rule. After a picture was drawn again,
or its script changed in a way that does not show, `python .ci/style.py --drawn` writes docs/pictures.toml anew."""

import ast
import graphlib
import hashlib
import io
import re
import shlex
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Every package of dsmini, from below, with those that it may import besides SHARED. It may import only what is above it
# here, so there is no cycle. Commands import anything, and no package imports a command.
MAY_IMPORT = {
    **{"atomic": "", "machine": "", "reading": "", "sources": "", "ops": "", "config": "", "console": ""},
    "report": "console",
    "accounting": "config",
    "numerics": "ops",
    "functional": "numerics ops",
    "nn": "config functional numerics ops",
    "text": "config console",
    "data": "config text",
    "inference": "config nn numerics ops report text",
    "checkpoint": "config console nn numerics ops text",
    "distributed": "checkpoint config console nn numerics ops report",
    "training": "accounting checkpoint config console data distributed inference nn numerics ops text",
    "measure": "config inference nn numerics ops training",
    "planner": "accounting config console measure report",
    "diagnosis": "accounting checkpoint config data inference measure nn numerics ops planner report text training",
    "comparison": "accounting config console data measure nn report text training",
}
SHARED = ("atomic", "machine", "reading", "sources")
IMPORTERS = ("import_module", "importorskip")
"""Functions that import by a string."""
COMMANDS = [
    "train",
    "generate",
    "compare",
    "tokenize",
    "convert",
    "vectors",
    "explain",
    "plan",
    "diagnose",
    "selfcheck",
    "__main__",
    "__init__",
]
# names that no file in these folders may import
FORBIDDEN = (
    (rf"dsmini\.({'|'.join(COMMANDS)})\b", "dsmini/.*/"),
    (r"dsmini\.generate\.", ""),  # it would hide the function dsmini.generate
    (r"transformers\b", "dsmini/(?!checkpoint/inspection)|kernels|tests/(?!oracle)"),
    (r"(dsmini|benchmarks)\b", "kernels"),
    (r"(tests|benchmarks)\b", "dsmini|kernels"),
)
MOST = {"pages": 4e-4, "code": 1.5e-4}
"""Words that slow a reader down, most of all words of pages, and of docstrings and comments."""
WORDS = {
    "a clause without a subject": r"(?:^|(?<=[.:;] ))(?-i:What|Of|Whether|How|Those|Which|Whose|So many|As many)\b"
    r"[^?]*?(?:[.:;](?= |$)|$)",
    "behind (after)": r"\bbehind\b",
    "so many (this many)": r"\b(?:so|as) many (?!as\b)",
    "anew (again)": r"\banew\b",
    "is no (is not a)": r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|bigger\b|worse\b)",
    "beside (next to, compared with)": r"\bbeside\b",
    "twin (baseline)": r"\btwins?\b",
    "room (package)": r"\brooms\b|\b(?:a|the|this|each|every|per|no) room\b(?! for)",
    "foresee (predict)": r"\bforesee\w*",
    "go on (continue, run)": r"\b(?:go|goes|going|went) on\b",
}
MUTATORS = {"append", "add", "update", "extend", "pop", "popitem", "clear", "remove", "setdefault", "insert", "discard"}


def imports(where: Path, top: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the full name of all that a file imports, also by a string that is or begins with it."""
    for node in ast.walk(top):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = where.parent.parts[: len(where.parts) - node.level] if node.level else ()
            of = [*above, *filter(None, [node.module])]
            yield from ((node.lineno, ".".join([*of, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS:
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                yield node.lineno, name.value


def check_imports(where: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the imports of a file that no rule allows. A package names those it may import, one by one."""
    mine = where.with_suffix("").parts[1] if where.parts[0] == "dsmini" else ""
    allowed = {mine, *(() if mine in SHARED else SHARED), *MAY_IMPORT.get(mine, "").split()}
    for line, name in imports(where, tree):
        of_dsmini, inner = name.split(".")[0] == "dsmini", f"{name}.".split(".")[1]
        forbidden = any(re.match(what, name) and re.match(folders, str(where)) for what, folders in FORBIDDEN)
        if forbidden or (of_dsmini and mine in MAY_IMPORT and inner not in allowed):
            yield line, f"{name} must not be imported here"


def check_cycles(trees: dict[Path, ast.Module]) -> Iterator[str]:
    """Yield files of dsmini that import each other when they are loaded."""
    known = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in trees}
    graph = {path: set[Path]() for path in trees if path.parts[0] == "dsmini"}
    for path in graph:
        for top in trees[path].body:
            if isinstance(top, ast.Import | ast.ImportFrom):
                names = [name if name in known else name.rpartition(".")[0] for _, name in imports(path, top)]
                graph[path] |= {known[name] for name in names if name in known} - {path, Path("dsmini/__init__.py")}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "import each other: " + ", ".join(map(str, error.args[1]))


def arrows(trees: dict[Path, ast.Module]) -> set[tuple[str, str]]:
    """Return who imports whom among the packages and commands of dsmini, also inside of functions and by strings."""
    found = set[tuple[str, str]]()
    for path in (path for path in trees if path.parts[0] == "dsmini"):
        mine = path.with_suffix("").parts[1]
        names = (name.split(".") for _, name in imports(path, trees[path]) if name.startswith("dsmini."))
        found |= {(mine, parts[1]) for parts in names if parts[1] not in ("", mine)}
    return found


def check_globals(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the places that change a list, set or dict at the top of a file."""
    tops = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    names = {ast.unparse(it) for node in tops for it in getattr(node, "targets", [getattr(node, "target", None)]) if it}
    for node in (inner for top in tops for inner in ast.walk(top)):
        changed = node.value if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            changed = node.func.value
        if changed is not None and ast.unparse(changed) in names:
            yield node.lineno, f"{ast.unparse(node)} changes a global"


def without_code(page: str) -> str:
    """Return a page with its blocks of code left empty."""
    return re.sub(r"^ *```.*?^ *```", lambda code: "\n" * code[0].count("\n"), page, flags=re.M | re.S)


def check_page(path: Path) -> Iterator[tuple[int, str]]:
    """Yield links to files and headings that are not there, and claims without a command."""
    for line, text in enumerate(without_code(path.read_text()).splitlines(), 1):
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text) + re.findall(r'src="([^"]+)()"', text)
        for link, heading in links:
            target = path.parent / link if link else path
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading and target.is_file() else []
            if not target.exists():
                yield line, f"links to {link}, which is not there"
            elif heading and heading not in [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]:
                yield line, f"links to the heading #{heading}, which is not there"
        # a link [MLA.forward](../dsmini/nn/mla.py) names what that file defines
        for label, link in re.findall(r"\[([\w.]+(?:,? (?:and )?[\w.]+)*)\]\(([^)#]*dsmini/[^)#]+\.py)\)", text):
            names = [name for name in re.split(r",? and |, ", label) if not name.endswith(".py")]
            source = (path.parent / link).read_text()
            for name in names:
                if not all(re.search(rf"\b(def|class) {part}\b", source) for part in name.split(".")):
                    yield line, f"links to {name}, which {link} does not define"
        if path.name == "claims.md" and re.match(r"\| (?!claim \||---)", text) and "`" not in text.split("|")[-2]:
            yield line, "a claim without its command in the last column"


def code_of(picture: str, script: str) -> str:
    """Return a hash of what draws a picture: a script without its words, or the block of a page that saves it."""
    if not (ROOT / script).exists():
        return "gone"
    source = (ROOT / script).read_text()
    if script.endswith(".md"):
        blocks = re.findall(r"^```python\n(.*?)^```", source, re.M | re.S)
        source = "".join(block for block in blocks if f'savefig("{Path(picture).name}"' in block)
    lines = sorted({token.start[0] for token in tokens(ast.parse(source), source)})
    code = [re.sub(r"  # .*", "", source.splitlines()[line - 1]).strip() for line in lines]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]


def check_pictures(drawn: bool) -> Iterator[str]:
    """Yield pictures that are older than what draws them, by the hashes in docs/pictures.toml; drawn writes those."""
    page = ROOT / "docs" / "pictures.toml"
    head = re.match(r"(#.*\n)*", page.read_text())[0]
    listed = tomllib.loads(page.read_text())
    now = {picture: [script, code_of(picture, script)] for picture, (script, _) in listed.items()}
    if drawn:
        page.write_text(head + "".join(f'"{name}" = ["{row[0]}", "{row[1]}"]\n' for name, row in now.items()))
        return
    for picture, row in listed.items():
        if row != now[picture]:
            yield f"{picture}: older than {row[0]}; draw it again, then run python .ci/style.py --drawn"


def check_docs() -> Iterator[str]:
    """Yield lists in docs/ that lack something, names that no source has, and numbers of lines that are not true."""
    docs, text = ROOT / "docs", {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
    order = re.search(r"in this order, so that there\s+is no cycle: (.*?)\.", text["architecture.md"], re.S)[1]
    if re.findall(r"`(\w+)`", order) != [name for name in MAY_IMPORT if name not in SHARED]:
        yield "docs/architecture.md: packages are not in the order of MAY_IMPORT"
    reading = text["reading.md"].partition("## Shapes")[0]
    for file in sorted(
        {path.name for path in (ROOT / "dsmini/nn").glob("[!_]*.py")} - {*re.findall(r"dsmini/nn/(\w+\.py)", reading)}
    ):
        yield f"docs/reading.md: {file} of dsmini/nn is not there"
    minutes = sum(map(int, re.findall(r"^\| (\d+) \|", reading, re.M)))
    if "Three hours and a half" not in reading or abs(minutes - 210) > 10:
        yield f"docs/reading.md: {minutes} minutes are not three hours and a half"
    pictures = list((docs / "gallery").iterdir())
    if {*re.findall(r"\]\(gallery/(.+?)\)", text["gallery.md"])} != {path.name for path in pictures}:
        yield "docs/gallery.md: shows other pictures than docs/gallery has"
    if sum(path.stat().st_size for path in pictures) >= 1_500_000:
        yield "docs/gallery: 1.5 MB or more"
    for folder in sorted(path.parent.relative_to(ROOT) for path in (ROOT / "dsmini").glob("*/**/__init__.py")):
        if f"`{folder}/`" not in text["architecture.md"]:
            yield f"docs/architecture.md: {folder}/ is not there"
    yield from check_names(text)
    yield from check_tutorials(docs / "tutorials")


def check_pages(pages: list[Path]) -> Iterator[str]:
    """Yield tests that are not there, words to fill in, tokenizers without their extra, and what stands on two pages.

    A thing is said on one page, and others link to it. claims.md alone repeats what the README claims."""
    files = list((ROOT / "tests").rglob("*.py"))
    functions = re.findall(r"^ *def (test_\w+)\(", "\n".join(path.read_text() for path in files), re.M)
    tests, passages = {*functions, *(path.stem for path in files)}, dict[str, Path]()
    for page in pages:
        where, text = page.relative_to(ROOT), page.read_text()
        gone = [path for path in re.findall(r"\btests/[\w/]+\.py\b", text) if not (ROOT / path).exists()]
        gone += sorted({*re.findall(r"\btest_\w+\b(?!\.py)", text)} - tests)
        yield from (f"{where}: {name} is not there" for name in gone)
        if page.name == "README.md" and re.search("[A-Z]+_PLACE|TODO|TBD", text):
            yield f"{where}: something is left to fill in"
        if re.search(r"^```bash\n(?:(?!```).)*dsmini\.tokenize", text, re.M | re.S) and "[bpe]'" not in text:
            yield f"{where}: makes a tokenizer, and does not name the extra [bpe]"
        words = re.findall(r"[\w.,%-]+", re.sub(r"\]\(.*?\)", "", without_code(text)))
        for i in range(len(words) - 11 if page.name != "claims.md" else 0):
            passage = " ".join(words[i : i + 12])
            if passages.setdefault(passage, page) != page:
                yield f"{where}: has twelve words of {passages[passage].relative_to(ROOT)}: {passage}"


def check_claims(page: str) -> Iterator[str]:
    """Yield the pytest commands of a page that would leave cases out: slow, skipped or misspelt ones."""
    for command in re.findall(r"`(?:\w+=\w+ )*(pytest [^`]+)`", page):
        words = shlex.split(command)
        paths = [ROOT / word for word in words if word.startswith("tests/")]
        files = [file for path in paths for file in ([path] if path.suffix else sorted(path.rglob("test_*.py")))]
        code = "\n".join(file.read_text() for file in files)
        names = " ".join([*map(str, files), *re.findall(r"^def (test_\w+)", code, re.M)])
        chosen = words[words.index("-k") + 1].split(" or ") if "-k" in words else ["test_"]
        if any(word not in names for word in chosen):
            yield f"`{command}` has no case of {' or '.join(word for word in chosen if word not in names)}"
        if "-m" not in words and re.search(r"mark\.(?:slow|gpu)\b", code):
            yield f"`{command}` leaves slow cases out; give it -m ''"
        if re.search(r"mark\.(?:skip|xfail)\b", code):
            yield f"`{command}` has a case that is always skipped, or expected to fail"


def check_names(text: dict[str, str]) -> Iterator[str]:
    """Yield names in backquotes, such as `Trainer.step`, that are no words of sources, configs and dependencies."""
    folders = ("dsmini", "kernels", "benchmarks", "configs", ".ci", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml", ".h")]
    words = set(re.findall(r"\w+", " ".join([*map(str, files), *(path.read_text() for path in files)])))
    for page in ("architecture.md", "decisions.md", "reading.md", "equations.md"):
        named = {part for code in re.findall(r"`([\w./]+)`", text[page]) for part in re.findall(r"[^\W\d]\w+", code)}
        yield from (f"docs/{page}: no source has the name {name}" for name in sorted(named - words))


def check_tutorials(folder: Path) -> Iterator[str]:
    """Yield pages that the index lacks, and definitions whose number of lines is not what a page says."""
    index, code = (folder / "README.md").read_text(), dict[str, str]()
    for page in sorted(folder.glob("[!R]*.md")):
        source = page.read_text()
        code[page.stem] = "\n".join(re.findall(r"^```python\n(.*?)^```", source, re.M | re.S))
        title, minutes = re.match(r"# (.+)\n\n\*(\d+ minutes)[.,]", source).groups()
        if not re.search(rf"\[{re.escape(title)}\]\({page.name}\).*\b{minutes}\b", index):
            yield f"docs/tutorials/README.md: {page.name} is not there with its title and its {minutes}"
    for name, most in (("mla", 60), ("gate", 40)):
        if sum(definitions(code[name]).values()) > most:
            yield f"docs/tutorials/{name}.md: more than {most} lines"
    written, page = definitions(code["change_one_idea"]), folder / "change_one_idea.md"
    for row in re.findall(r"^\| [\w ]+ \| (\[.*) \| (\d+) \| (`.*`) \| (\d+) \|$", page.read_text(), re.M):
        links = re.findall(r"\[(.+?)\]\((.+?)\)", row[0])
        read = sum(
            definitions((folder / file).read_text())[name] for names, file in links for name in names.split(", ")
        )
        made = sum(written[name] for name in re.findall(r"`(\w+)`", row[2]))
        if abs(read - int(row[1])) > 5 or made != int(row[3]):
            yield f"docs/tutorials/change_one_idea.md: {row[2]} reads {read} lines and writes {made}"


def definitions(source: str) -> dict[str, int]:
    """Return the number of lines of each function and class of a source that are not blank, decorators included."""
    lines, found = source.splitlines(), dict[str, int]()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = sum(bool(line.strip()) for line in lines[first - 1 : node.end_lineno])
    return found


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each paragraph of a page, or of each docstring and comment of a source."""
    source = path.read_text()
    if path.suffix == ".md":
        for line, text in enumerate(without_code(source).splitlines(), 1):
            yield from ((line, re.sub(r"^[#>*\-\d. ]+", "", cell.strip())) for cell in text.split("|"))
        return
    for node in ast.walk(ast.parse(source)):
        if is_docstring(node):
            yield from ((node.lineno, " ".join(text.split())) for text in re.split(r"\n\s*\n", node.value.value))
    for comments in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.M):
        text = " ".join(line.strip("#:! \t") for line in comments[0].splitlines())
        yield source.count("\n", 0, comments.start()) + 1, text


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def tokens(tree: ast.Module, source: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of a source without comments and docstrings."""
    docs = {line for n in ast.walk(tree) if is_docstring(n) for line in range(n.lineno, n.end_lineno + 1)}
    found = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.string.strip()]
    return [token for token in found if token.type != tokenize.COMMENT and token.start[0] not in docs]


def size(tree: ast.Module, source: str) -> tuple[int, int]:
    """Return the lines of code without comments and docstrings, and the tokens on them."""
    found = tokens(tree, source)
    return len({line for token in found for line in range(token.start[0], token.end[0] + 1)}), len(found)


def main() -> int:
    """Print what breaks a rule and the table of sizes; return the exit status."""
    wrong: list[str] = []
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    trees: dict[Path, ast.Module] = {}
    spoken, slow = Counter(), defaultdict(list)
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").rglob("*.md")]
    sources = [path for name in ("dsmini", "kernels", "benchmarks", "tests") for path in (ROOT / name).rglob("*.py")]
    for path in sorted([*sources, *pages]):
        where = path.relative_to(ROOT)
        if path.suffix == ".py":
            tree = ast.parse(path.read_text())
            trees[where] = tree
            places = [*check_imports(where, tree), *(check_globals(tree) if where.parts[0] == "dsmini" else ())]
            wrong += [f"{where}:{line}: {words}" for line, words in places]
            row = sizes["/".join(where.parts[:2]) if where.parts[0] in ("dsmini", "tests") else where.parts[0]]
            row[:] = [a + b for a, b in zip(row, (1, *size(tree, path.read_text())), strict=True)]
        else:
            wrong += [f"{where}:{line}: {words}" for line, words in check_page(path)]
        place = "pages" if path.suffix == ".md" else "code"
        for line, text in prose(path):
            spoken[place] += len(text.split())
            for rule, pattern in WORDS.items():
                for hit in re.finditer(pattern, text, re.I):
                    said = text[max(0, hit.start() - 40) : hit.end() + 40]
                    slow[place].append(f"{where}:{line}: {rule}: {said}")
    wrong += [*check_cycles(trees), *check_pictures("--drawn" in sys.argv), *check_docs()]
    wrong += check_pages([page for page in pages if page.name != "CHANGELOG.md"])
    wrong += [words for name in ("README.md", "docs/claims.md") for words in check_claims((ROOT / name).read_text())]
    for place, found in slow.items():
        wrong += found if len(found) > MOST[place] * spoken[place] else []
    print(f"{'package':32}{'files':>7}{'code':>8}{'tokens':>9}")
    print(*(f"{name:32}{n:7,}{code:8,}{tokens:9,}" for name, (n, code, tokens) in sorted(sizes.items())), sep="\n")
    found, order = arrows(trees), {name: i for i, name in enumerate([*MAY_IMPORT, *COMMANDS])}
    circles = sum((b, a) in found for a, b in found) // 2
    back = [f"{a} -> {b}" for a, b in found if order.get(a, len(order)) < order.get(b, 0)]
    print(f"\n{len(found)} arrows between packages and commands, {circles} circles, {len(back)} against the order")
    wrong += [f"{arrow}: against the order of packages" for arrow in back]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
