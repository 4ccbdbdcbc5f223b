"""Write the API pages, every class and function with its shapes: python docs/api.py FOLDER

The pages of dsmini.nn are the annotated model: the code of each function is open, below the equations that
docs/equations.md has for it, as MathML where docs/equations.toml has them as LaTeX. The pages need no network.

Needs pdoc: pip install -e '.[docs]'. Exits with status 1 if pdoc warns of anything.
"""

import pkgutil
import re
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
from latex2mathml.converter import convert
from markupsafe import Markup
from pdoc.render_helpers import to_html

import dsmini

EQUATIONS = (Path(__file__).parent / "equations.md").read_text()
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


def equations_by_function() -> dict[tuple[str, str], list[str]]:
    """Return the equations of equations.md as Markdown, by the module and the qualified name that a row links."""
    found: dict[tuple[str, str], list[str]] = {}
    for section in EQUATIONS.split("\n## ")[1:]:
        title, _, rows = section.partition("\n")
        for row in re.findall(r"^\|.*\|$", rows, re.MULTILINE):
            cells = [cell.strip() for cell in re.split(r"(?<![^ ])\|(?![^ ])", row)]
            at = next((i for i, cell in enumerate(cells) if "](../dsmini/nn/" in cell), 0)
            if at < 2:
                continue
            about = " ".join(filter(None, (title, *cells[1 : at - 1])))
            equation = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cells[at - 1])  # the words of a link, without its address
            for names, file in re.findall(r"\[([\w., ]+)\]\(\.\./(dsmini/nn/\w+)\.py\)", cells[at]):
                for name in names.split(", "):
                    # four spaces make code, whose signs Markdown leaves as they are
                    of_function = found.setdefault((file.replace("/", "."), name), [])
                    of_function.append(f"{about}:\n\n    {equation}")
    return found


def rendered_equations() -> dict[tuple[str, str], Markup]:
    """Return the equations of equations.toml as MathML, by the module and the qualified name of a function."""
    files = tomllib.loads((Path(__file__).parent / "equations.toml").read_text())
    return {
        (f"dsmini.nn.{file}", name): Markup("".join(convert(formula, display="block") for formula in formulas))
        for file, functions in files.items()
        for name, formulas in functions.items()
    }


def linked_equations() -> str:
    """Return equations.md with links to pages of the API, and without those to other files."""
    pages = re.sub(r"\]\(\.\./(dsmini/[\w/]+)\.py\)", r"](\1.html)", EQUATIONS)
    return re.sub(r"\[([^\]]*)\]\((?!dsmini/|http)[^)]*\)", r"\1", pages)


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
    equations = {place: to_html("\n\n".join(found)) for place, found in equations_by_function().items()}
    equations |= rendered_equations()
    pdoc.render.env.filters["equations"] = lambda doc: equations.get((doc.modulename, doc.qualname))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("dsmini", output_directory=folder)
    (folder / "equations.html").write_text(f"<!doctype html><meta charset='utf-8'>{to_html(linked_equations())}")
    return [str(warning.message) for warning in caught]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/api.py FOLDER")
    sys.exit("\n".join(write_pages(Path(sys.argv[1]))) or None)
