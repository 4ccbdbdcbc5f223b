"""Compare an engine's tensors with the vectors of this folder: python check.py MINE.safetensors [--tolerance 1e-2].

MINE has tensors of the names and shapes in index.json, in any dtype that numpy reads. The first one that differs, in
the order of computation, is named. Tensors that MINE lacks are listed. Needs numpy and safetensors alone.

The error of a row is |mine - expected| / |expected|, norms over the last dimension, and over the root mean square of
all rows' norms for a smaller one. That of a tensor is its worst row's. Whole numbers must be equal.
--tolerance takes the place of the tolerances in index.json, which are those of FP32.
Exit status: 0 for no difference, 1 for one, 2 if something is wrong with the files.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file


class Difference(NamedTuple):
    """The first tensor that differs."""

    name: str
    what: str
    """Words for the tensor, and for its difference."""
    agree: int
    """Number of tensors before it that agree."""


def error_of(mine: Any, expected: Any) -> float:
    """Return the error of the worst row; infinite where there are NaN or infinities."""
    rows = expected.astype(np.float64).reshape(-1, expected.shape[-1] if expected.ndim else 1)
    differences = np.linalg.norm(mine.astype(np.float64).reshape(rows.shape) - rows, axis=1)
    norms = np.linalg.norm(rows, axis=1)
    mean = float(np.sqrt(np.mean(norms**2))) or 1.0
    error = float(np.max(differences / np.maximum(norms, mean)))
    return error if np.isfinite(error) else float("inf")


def at_worst(mine: Any, expected: Any) -> str:
    """Return the place of the largest difference, and both numbers there."""
    difference = np.nan_to_num(np.abs(mine.astype(np.float64) - expected.astype(np.float64)), nan=np.inf)
    place = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    return f"worst at {list(place)}: {mine[place]:.6g}, expected {expected[place]:.6g}"


def compare(
    index: dict[str, Any], expected: dict[str, Any], mine: dict[str, Any], tolerance: float | None = None
) -> Any:
    """Return the first Difference in the order of computation, or the number of tensors if none differs."""
    agree = 0
    for entry in index["tensors"]:
        name, want = entry["name"], expected[entry["name"]]
        if name not in mine:
            continue
        got, allowed = mine[name], entry["tolerance"]
        if got.shape != want.shape:
            return Difference(name, f"{entry['is']}; its shape is {list(got.shape)}, want {list(want.shape)}", agree)
        error = error_of(got, want)
        if allowed == 0.0:
            differs, words = not np.array_equal(got, want), "whole numbers differ"
        else:
            allowed = allowed if tolerance is None else tolerance
            differs, words = error > allowed, f"error {error:.2g}, tolerance {allowed:g}"
        if differs:
            return Difference(name, f"{entry['is']}; {words}; {at_worst(got, want)}", agree)
        agree += 1
    return agree


def read(path: Path) -> dict[str, Any]:
    """Return the tensors of a file. Raises: ValueError for one that numpy cannot read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"cannot read {path}: {error}; want safetensors of float32 or int32 tensors") from None


def main(args: list[str]) -> int:
    """Print the first difference; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mine", type=Path)
    parser.add_argument("--tolerance", type=float)
    asked, folder = parser.parse_args(args), Path(__file__).resolve().parent
    try:
        if asked.tolerance is not None and not 0 < asked.tolerance < float("inf"):
            raise ValueError(f"--tolerance is {asked.tolerance}; want a number above 0")
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        names = [entry["name"] for entry in index["tensors"]]
        mine, expected = read(asked.mine), read(folder / "expected.safetensors")
        if {name: list(t.shape) for name, t in expected.items()} != {t["name"]: t["shape"] for t in index["tensors"]}:
            raise ValueError("expected.safetensors is not that of index.json; copy the folder again")
        if not set(names) & set(mine):
            raise ValueError(f"{asked.mine} has none of the names in index.json, such as {names[0]} or logits")
        found = compare(index, expected, mine, asked.tolerance)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if unknown := sorted(set(mine) - set(names)):
        print(f"not compared, for index.json has no such names: {', '.join(unknown)}")
    if isinstance(found, Difference):
        print(f"{found.name} differs: {found.what}. {found.agree} tensors before it agree.")
        return 1
    lacking = [name for name in names if name not in mine]
    print(f"{found} of {len(names)} tensors agree" + (f"; not given: {', '.join(lacking)}" if lacking else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
