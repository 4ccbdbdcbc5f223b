"""Pictures as PNG files: the name is checked before work is done, and the file is written whole or not at all."""

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dsmini.atomic import new_file
from dsmini.reading import check_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_picture(path: Path) -> None:
    """Make the folder of a picture. Raises: ValueError for a name that is not a .png, or a folder that refuses."""
    check_path(path, "--out")
    if path.suffix != ".png" or path.is_dir():
        raise ValueError(f"--out {path} is not the name of a picture; end it in .png")
    make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder for pictures. Raises: ValueError if it cannot be written."""
    check_path(folder, "--out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from None


def save(figure: "Figure", path: Path) -> None:
    """Save a whole picture, or leave the one before."""
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
