"""Check imports, globals and budgets by reading the source; only dsmini itself is imported."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch

import dsmini

ROOT = Path(__file__).parent.parent
COMMANDS = {f"dsmini.{name}" for name in ("train", "generate", "tokenize", "convert", "explain", "plan")}
BY_ALL = {"dsmini.reading"}
"""The reader of JSON and TOML, which imports nothing of dsmini."""
# for each module or package the parts of dsmini that it may import; a package includes its modules
MAY_IMPORT = {
    "dsmini.atomic": set(),
    "dsmini.reading": set(),
    "dsmini.config": {"dsmini.config"},
    "dsmini.config.huggingface": {"dsmini.config.fields", "dsmini.config.inference_json"},
    "dsmini.accounting": {"dsmini.config", "dsmini.accounting"},
    "dsmini.checkpoint": {
        *("dsmini.atomic", "dsmini.config", "dsmini.checkpoint"),
        *("dsmini.nn", "dsmini.numerics", "dsmini.machine", "dsmini.text", "dsmini.console"),
    },
    "dsmini.checkpoint.tensor_names": set(),
    "dsmini.checkpoint.safetensors_file": set(),
    "dsmini.checkpoint.manifest": {"dsmini.atomic"},
    "dsmini.inference.sampling": {"dsmini.config.fields"},
    "dsmini.console": {"dsmini.console"},
    "dsmini.inference": {
        *("dsmini.config.fields", "dsmini.nn", "dsmini.text", "dsmini.inference"),
        *("dsmini.functional.decoding", "dsmini.numerics", "dsmini.ops"),
    },
    "dsmini.text": {"dsmini.config.fields", "dsmini.console.printable", "dsmini.text"},
    "dsmini.text.tokenizer": {"dsmini.text.library"},
    "dsmini.text.library": {"dsmini.text.tokenizer_file"},
    "dsmini.text.tokenizer_file": set(),
    "dsmini.text.renderer": set(),
    "dsmini.text.template_worker": set(),
    "dsmini.text.bpe": {"dsmini.text.tokenizer"},
    "dsmini.text.page": {"dsmini.console.printable"},
    "dsmini.text.prompts": set(),
    "dsmini.text.continuation": {"dsmini.text.tokenizer"},
    "dsmini.text.chat": {"dsmini.text.renderer", "dsmini.text.tokenizer"},
    "dsmini.text.text_side": {"dsmini.config.fields", "dsmini.text"},
    "dsmini.data": {"dsmini.atomic", "dsmini.config", "dsmini.data", "dsmini.text.tokenizer"},
    "dsmini.data.documents": set(),
    "dsmini.data.split": {"dsmini.data.documents"},
    "dsmini.data.order": set(),
    "dsmini.data.fim": {"dsmini.text.tokenizer"},
    "dsmini.train": {
        *("dsmini.atomic", "dsmini.config", "dsmini.console", "dsmini.ops", "dsmini.training"),
        *("dsmini.diagnosis.watch", "dsmini.distributed.chaos", "dsmini.distributed.meeting"),
    },
    "dsmini.generate": {
        *("dsmini.checkpoint", "dsmini.console", "dsmini.inference", "dsmini.ops", "dsmini.text", "dsmini.machine"),
        *("dsmini.distributed", "dsmini.measure.calibration", "dsmini.training.stopping"),
    },
    "dsmini.tokenize": {"dsmini.atomic", "dsmini.config", "dsmini.console", "dsmini.data", "dsmini.text"},
    "dsmini.convert": {
        *("dsmini.accounting", "dsmini.atomic", "dsmini.checkpoint", "dsmini.config", "dsmini.console"),
        *("dsmini.nn", "dsmini.ops", "dsmini.text"),
    },
    "dsmini.explain": {"dsmini.console", "dsmini.ops"},
    "dsmini.plan": {"dsmini.console", "dsmini.planner"},
    "dsmini.diagnose": {"dsmini.atomic", "dsmini.console", "dsmini.diagnosis", "dsmini.ops"},
    "dsmini.__main__": {"dsmini.console", "dsmini.distributed.meeting"},
    "dsmini.training": {
        *("dsmini.accounting", "dsmini.atomic", "dsmini.checkpoint", "dsmini.config", "dsmini.console", "dsmini.data"),
        *("dsmini.distributed", "dsmini.functional", "dsmini.inference", "dsmini.machine", "dsmini.nn"),
        *("dsmini.ops", "dsmini.text.tokenizer", "dsmini.training"),
    },
    "dsmini.distributed": {
        *("dsmini.atomic", "dsmini.checkpoint", "dsmini.config", "dsmini.console", "dsmini.distributed"),
        *("dsmini.functional", "dsmini.machine", "dsmini.nn", "dsmini.numerics", "dsmini.ops", "dsmini.report"),
    },
    "dsmini.distributed.world": {"dsmini.console.command", "dsmini.distributed.meeting"},
    "dsmini.distributed.meeting": {"dsmini.console.command"},
    "dsmini.training.optim": {
        *("dsmini.config", "dsmini.functional.muon", "dsmini.training.adamw", "dsmini.training.muon")
    },
    "dsmini.training.optimizer_state": {"dsmini.training.adamw", "dsmini.training.muon"},
    "dsmini.training.adamw": set(),
    "dsmini.training.muon": {"dsmini.functional.muon"},
    "dsmini.training.average": set(),
    "dsmini.training.schedule": {"dsmini.config"},
    "dsmini.diagnosis.finding": set(),
    "dsmini.diagnosis": {
        *("dsmini.accounting", "dsmini.checkpoint", "dsmini.config", "dsmini.data", "dsmini.diagnosis"),
        *("dsmini.functional", "dsmini.inference", "dsmini.machine", "dsmini.measure", "dsmini.nn", "dsmini.numerics"),
        *("dsmini.ops", "dsmini.planner.binding", "dsmini.report", "dsmini.text.tokenizer", "dsmini.training"),
    },
    "dsmini.machine": set(),
    "dsmini.measure": {
        *("dsmini.atomic", "dsmini.checkpoint.slots", "dsmini.config", "dsmini.inference", "dsmini.machine"),
        *("dsmini.measure", "dsmini.nn", "dsmini.numerics", "dsmini.ops", "dsmini.functional"),
        "dsmini.training.optim",
    },
    **{
        f"dsmini.planner.{room}": {
            *("dsmini.accounting", "dsmini.config", "dsmini.console.commandline", "dsmini.report"),
            "dsmini.planner.hardware",
            *(f"dsmini.planner.{other}" for other in (*below, room)),
        }
        for room, below in {
            "quantities": (),
            "model": ("quantities",),
            "training": ("quantities", "model"),
            "serving": ("quantities", "model", "binding"),
            "published": ("quantities", "model", "training", "serving", "reliability", "outcome", "setup"),
        }.items()
    },
    "dsmini.planner": {
        *("dsmini.accounting", "dsmini.atomic", "dsmini.config", "dsmini.console", "dsmini.machine", "dsmini.measure"),
        *("dsmini.planner", "dsmini.report"),
    },
    "dsmini.ops": {"dsmini.ops"},
    "dsmini.report": {"dsmini.report", "dsmini.console"},
    "dsmini.numerics": {"dsmini.numerics", "dsmini.ops"},
    "dsmini.functional": {"dsmini.functional", "dsmini.numerics", "dsmini.ops"},
    "dsmini.nn": {"dsmini.config", "dsmini.functional", "dsmini.numerics", "dsmini.nn"},
}


def sources(folder: str) -> dict[str, Path]:
    """Return every module under a folder of the checkout by dotted name."""
    names = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / folder).rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


DSMINI = sources("dsmini")
# names that dsmini/__init__.py imports from a module: `from dsmini import generate` is the function
FACE = {
    alias.asname or alias.name
    for node in ast.walk(ast.parse(DSMINI["dsmini"].read_text()))
    if isinstance(node, ast.ImportFrom) and node.module != "dsmini"
    for alias in node.names
}


@cache
def imports(name: str, path: Path) -> frozenset[str]:
    """Return the modules that a source imports, including modules imported from a package by name."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                inside = whole in DSMINI and not (base == "dsmini" and alias.name in FACE)
                found.add(whole if inside else base)
    return frozenset(found)


def is_in(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("name", DSMINI)
def test_module_imports_only_what_it_may(name: str) -> None:
    inside = {module for module in imports(name, DSMINI[name]) if is_in(module, {"dsmini"})}
    for place, allowed in MAY_IMPORT.items():
        if is_in(name, {place}):
            assert not {module for module in inside if not is_in(module, allowed | BY_ALL)}
    assert not inside & (COMMANDS - {name})


def room_of(module: str) -> str:
    """Return the part of dsmini that a module is in: a package or a file directly below it."""
    return ".".join(module.split(".")[:2])


@cache
def rooms() -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found: dict[str, set[str]] = {room_of(name): set() for name in DSMINI}
    for name, path in DSMINI.items():
        others = {room_of(module) for module in imports(name, path) if is_in(module, {"dsmini"})}
        found[room_of(name)] |= others - {room_of(name)}
    return found


def test_every_room_says_what_it_may_import() -> None:
    assert rooms().keys() - MAY_IMPORT.keys() == {"dsmini"}, "but the public face, which imports all that it shows"


def test_rooms_import_each_other_in_no_circle() -> None:
    graph = TopologicalSorter(rooms())
    graph.prepare()  # raises CycleError, which names the rooms


def test_package_imports_nothing_that_is_not_installed() -> None:
    users = {n for n, path in DSMINI.items() if any(is_in(m, {"benchmarks", "tests"}) for m in imports(n, path))}
    assert users == set()


@pytest.mark.parametrize("folder", ["dsmini", "tests", "benchmarks", "kernels"])
def test_command_generate_is_imported_by_nobody(folder: str) -> None:
    """Keep dsmini.generate a function, which importing the command would rebind."""
    assert not [name for name, path in sources(folder).items() if "dsmini.generate" in imports(name, path)]


@pytest.mark.parametrize("folder", ["dsmini", "tests", "kernels"])
def test_transformers_is_imported_only_as_an_oracle(folder: str) -> None:
    users = {n for n, path in sources(folder).items() if any(is_in(m, {"transformers"}) for m in imports(n, path))}
    assert {name for name in users if not is_in(name, {"tests.oracle"})} == set()
    assert bool(users) == (folder == "tests")


def test_kernels_are_a_plain_folder_that_knows_no_dsmini() -> None:
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name, path in sources("kernels").items():
        assert not [module for module in imports(name, path) if is_in(module, {"dsmini"})]


def globals_of(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            yield from ((ast.unparse(target), node.value) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield ast.unparse(node.target), node.value


LITERALS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MAKERS = {"dict", "list", "set", "defaultdict", "OrderedDict", "Counter", "deque"}
MUTATORS = {"append", "add", "update", "extend", "pop", "popitem", "clear", "remove", "setdefault", "insert", "discard"}


def is_mutable(value: ast.expr) -> bool:
    made = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in MAKERS
    return made or isinstance(value, LITERALS)


@pytest.mark.parametrize("name", DSMINI)
def test_module_has_no_global_that_changes(name: str) -> None:
    tree = ast.parse(DSMINI[name].read_text())
    held = {target for target, value in globals_of(tree) if is_mutable(value)} - {"__all__"}
    assert held == {target for target in held if target == target.upper()}, "only UPPER_CASE constants"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            assert ast.unparse(node.func.value) not in held, ast.unparse(node)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            assert ast.unparse(node.value) not in held, ast.unparse(node)


def test_public_classes_have_a_name_of_their_own() -> None:
    places: dict[str, list[str]] = {}
    for module, path in DSMINI.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_every_public_name_exists() -> None:
    for module in (dsmini, dsmini.nn, dsmini.numerics):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
        assert len(set(module.__all__)) == len(module.__all__)


# --- Budgets. One that proves wrong is changed in a commit of its own, with the reason.

FILE_LINES, FUNCTION_LINES = 350, 60
ROOM_LINES = {
    "benchmarks": 5450,
    "dsmini/accounting": 1450,
    "dsmini/functional": 2140,
    "dsmini/inference": 1490,
    "dsmini/measure": 2270,
    "dsmini/nn": 2670,
    "dsmini/planner": 9270,
    "dsmini/report": 1620,
}
FORWARD_FILES, FORWARD_FUNCTIONS = 9, 20
"""Files and functions of nn/ in a forward pass. An operation of functional/ counts as the one name that nn/ calls,
because its equation is first in its file. Files are nine, not eight: Experts in moe.py would import nn/fp8.py in a
circle."""
CODE = [path for folder in ("dsmini", "benchmarks", "kernels", "tests") for path in sorted((ROOT / folder).rglob("*"))]
CODE = [path for path in CODE if path.suffix in (".py", ".cpp", ".h") and "__pycache__" not in path.parts]


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_files_are_at_most_350_lines_long() -> None:
    assert {str(path.relative_to(ROOT)): n for path in CODE if (n := lines_of(path)) > FILE_LINES} == {}


def test_functions_are_at_most_60_lines_long() -> None:
    long = {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= FUNCTION_LINES:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


@pytest.mark.parametrize("room", ROOM_LINES)
def test_room_keeps_its_budget(room: str) -> None:
    assert sum(map(lines_of, (ROOT / room).rglob("*.py"))) <= ROOM_LINES[room]


def test_layers_ask_for_no_device_mode_or_precision() -> None:
    """Keep nn/ the specification: functional/ decides how to compute, and one factory decides on FP8."""
    asked = re.compile(r"device\.type|is_compiling|is_grad_enabled|precision ==")
    found = {
        f"{path.name}:{i}": line.strip()
        for path in sorted((ROOT / "dsmini" / "nn").glob("*.py"))
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if asked.search(line)
    }
    factories = {"def make_linear(", "def make_experts("}
    text = (ROOT / "dsmini" / "nn" / "fp8.py").read_text()
    assert all(name in text for name in factories)
    assert len(found) == len(factories) and all(place.startswith("fp8.py") for place in found), found


def test_forward_opens_few_files_and_functions() -> None:
    """Count files and functions of nn/ from token ids to logits of the default model."""
    model, tokens = dsmini.Transformer(), torch.zeros(1, 200, dtype=torch.int64)
    room, seen = str(ROOT / "dsmini" / "nn"), set()

    def note(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        inside = event == "call" and code.co_filename.startswith(room) and "<" not in code.co_name
        seen.update({(code.co_filename, code.co_qualname)} if inside else ())

    sys.setprofile(note)
    try:
        model(tokens)
    finally:
        sys.setprofile(None)
    assert any(name == "MLA.forward" for _, name in seen) and any(name == "route" for _, name in seen)
    assert len({file for file, _ in seen}) <= FORWARD_FILES, seen
    assert len(seen) <= FORWARD_FUNCTIONS, seen
