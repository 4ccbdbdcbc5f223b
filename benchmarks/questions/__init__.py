"""Questions of python -m benchmarks. To add one, write its module here and name it in MODULES.

The first line of the module's docstring is the title, the rest explains the measurement. A module has three functions:

    cases(setting)      return the parts that are measured one by one, from the setting alone
    finding(figures)    return one sentence from figures, which may be incomplete; "" if they are not enough
    plots(figures)      return plots of the same figures

A module is imported when one of them is called, so that listing the questions does not import torch.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.case import Case, Setting
    from dsmini.report import Figure, Plot

MODULES = ("kv_cache", "moe", "fp8", "decode", "prefill", "train", "fp8_error", "mtp", "roofline", "peers", "kernels")
MODULES += ("quantize", "plan", "diagnose", "shakespeare", "moe_or_dense", "pipeline", "sparse", "sparse_training")
"""Modules in the order of the report."""
ON_REQUEST = {"plan", "diagnose", "shakespeare", "moe_or_dense", "pipeline", "sparse", "sparse_training"}
PACKAGES = {"peers": "transformers", "shakespeare": "transformers"}
SHAKESPEARE = "Karpathy's tinyshakespeare, 1,115,394 characters"
TEXTS = {"shakespeare": SHAKESPEARE, "sparse_training": SHAKESPEARE}
NOTHING = "Nothing was measured yet."


@dataclass(frozen=True, kw_only=True)
class Question:
    """Question of the benchmarks."""

    name: str
    """Name in python -m benchmarks NAME."""
    title: str
    about: str = ""
    """Two or three sentences about the measurement, with all that is simulated."""
    cases: Callable[["Setting"], list["Case"]]
    finding: Callable[[list["Figure"]], str]
    """Function that makes one sentence from figures, which may be incomplete."""
    plots: Callable[[list["Figure"]], list["Plot"]]
    needs: str | None = None
    """Reason why the question cannot run here, such as a missing package; None if it can."""
    on_request: bool = False
    """True for a question that takes long: only a run that names it includes it."""
    needs_text: str = ""
    """Description of the text that --text must name; empty if the question reads no text."""


def questions_here() -> dict[str, Question]:
    """Return the questions of this folder by name, which is the module's with hyphens."""
    return {name.replace("_", "-"): _question(name) for name in MODULES}


def _question(module: str) -> Question:
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    title, _, about = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
    package = PACKAGES.get(module)
    missing = package and not find_spec(package)

    def part(name: str) -> Any:
        return lambda given: getattr(import_module(f"benchmarks.questions.{module}"), name)(given)

    return Question(
        name=module.replace("_", "-"),
        title=title,
        about=" ".join(about.split()),
        cases=part("cases"),
        finding=lambda figures: part("finding")(figures) or NOTHING,
        plots=part("plots"),
        needs=f"{package} is not installed; pip install 'dsmini[peers]'" if missing else None,
        on_request=module in ON_REQUEST,
        needs_text=TEXTS.get(module, ""),
    )
