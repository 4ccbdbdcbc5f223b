"""A quantized tensor in a safetensors file: codes and scales, with their format in the metadata."""

import json
from pathlib import Path
from typing import cast

import torch

from dsmini.atomic import new_file
from dsmini.checkpoint.safetensors_file import entries_of, write_safetensors
from dsmini.checkpoint.safetensors_reader import SafetensorsReader
from dsmini.numerics import AMAX_MIN, QuantizedTensor
from dsmini.numerics.quantization import SOURCES, check_options, check_parts
from dsmini.numerics.tiles import FormatName, Scale, Tile
from dsmini.reading import parse_json

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SOURCES}


def save_quantized(q: QuantizedTensor, path: str | Path) -> None:
    """Write a safetensors file that `load_quantized` reads, whole or not at all."""
    about = {"scale": q.scale, "format": q.format, "dtype": str(q.dtype).removeprefix("torch.")}
    about |= {"shape": json.dumps(list(q.shape)), "tile": json.dumps(q.tile)}
    with new_file(Path(path)) as partial:
        write_safetensors(partial, entries_of({"codes": q.codes, "scales": q.scales}), about)


def load_quantized(path: str | Path, device: torch.device | str = "cpu") -> QuantizedTensor:
    """Read the file that `save_quantized` wrote.

    Raises: ValueError for any other file.
    """
    try:
        reader = SafetensorsReader(Path(path))
        about, names = reader.metadata, sorted(reader.tensors)
        if names != ["codes", "scales"] or "tile" not in about:
            raise ValueError(f"it holds {names} and metadata of {sorted(about)}; want codes, scales and tile")
        codes, scales = (reader.read(name).to(device, copy=True) for name in names)
        shape, tile = (torch.Size(parse_json(about[key], key)) for key in ("shape", "tile"))
        dtype, format, scale = DTYPES[about["dtype"]], about["format"], about["scale"]
        check_options(scale, AMAX_MIN, format=format)
        check_parts(codes, scales, shape, cast(Tile, tile), cast(FormatName, format))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a file of save_quantized: {error}") from None
    return QuantizedTensor(
        codes=codes,
        scales=scales,
        shape=shape,
        tile=cast(Tile, tuple(tile)),
        scale=cast(Scale, scale),
        format=cast(FormatName, format),
        dtype=dtype,
    )
