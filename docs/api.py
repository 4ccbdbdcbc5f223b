"""Write the API pages, every class and function with its shapes: python docs/api.py FOLDER

Needs pdoc: pip install -e '.[docs]'. Exits with status 1 if pdoc warns of anything.
"""

import pkgutil
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pdoc

import dsmini

ROOMS = ("accounting", "checkpoint", "config", "functional", "inference", "nn", "numerics", "training")
"""Rooms whose modules get a page each, next to the pages of the packages."""


def children(module: ModuleType) -> dict[str, pkgutil.ModuleInfo]:
    """Return the submodules of a module, without the command dsmini/generate.py: it would hide dsmini.generate."""
    return {name: info for name, info in _children(module).items() if info.name != "dsmini.generate"}


_children, pdoc.extract.iter_modules2 = pdoc.extract.iter_modules2, children


def write_pages(folder: Path) -> list[str]:
    """Write the pages into a folder; return what pdoc warned of."""
    modules = [info.name for info in pkgutil.walk_packages(dsmini.__path__, "dsmini.") if info.name.split(".")[1] in ROOMS]
    pdoc.render.configure(docformat="google", template_directory=Path(__file__).parent / "api_template")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.pdoc("dsmini", *modules, output_directory=folder)
    return [str(warning.message) for warning in caught]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/api.py FOLDER")
    problems = write_pages(Path(sys.argv[1]))
    sys.exit("\n".join(problems) or None)
