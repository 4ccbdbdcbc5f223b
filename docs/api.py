"""Write the API pages, every class and function with its shapes: python docs/api.py FOLDER

Needs pdoc: pip install -e '.[docs]'. Exits with status 1 if pdoc warns of anything.
"""

import pkgutil
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
from markupsafe import Markup

import dsmini

HIDDEN = ("dsmini.__main__", "dsmini.generate")
"""Modules without a page. The command dsmini/generate.py has the name of the function dsmini.generate."""


def children(module: ModuleType) -> dict[str, pkgutil.ModuleInfo]:
    """Return the submodules of a module; pdoc would leave out those that are not in its __all__."""
    found = pkgutil.iter_modules(getattr(module, "__path__", []), f"{module.__name__}.")
    return {info.name.rpartition(".")[2]: info for info in found if info.name not in HIDDEN}


def equations_apart(docstring: str) -> str:
    """Put a blank line around indented lines: in Markdown they are then code, and else a part of the sentence."""
    section = r"(?:Args|Raises|Warns|Returns|Yields):"
    docstring = re.sub(rf"^(?!{section})(\S.*)\n(?= {{4}})", r"\1\n\n", docstring, flags=re.MULTILINE)
    return re.sub(rf"^( {{4}}.*)\n(?=\S)(?!{section})", r"\1\n\n", docstring, flags=re.MULTILINE)


def write_pages(folder: Path) -> list[str]:
    """Write the pages into a folder; return what pdoc warned of."""
    google, signature = pdoc.docstrings.google, pdoc.render.env.filters["format_signature"]
    # dsmini imports a name when it is first used, and pdoc finds only those that are there
    vars(dsmini).update({name: getattr(dsmini, name) for name in dsmini.__all__})
    pdoc.extract.iter_modules2 = children
    pdoc.docstrings.google = lambda docstring: google(equations_apart(docstring))
    # a shape reads better without the name of its package: Float[Tensor, 'b s m']
    pdoc.render.env.filters["format_signature"] = lambda sig, colon: Markup(
        re.sub(r"(<span class=\"n\">)?jaxtyping(</span>)?<span class=\"o\">\.</span>", "", signature(sig, colon))
    )
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent / "api_template")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("dsmini", output_directory=folder)
    return [str(warning.message) for warning in caught]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/api.py FOLDER")
    sys.exit("\n".join(write_pages(Path(sys.argv[1]))) or None)
