"""A quantized tensor in a safetensors file of its own: codes, scales, and what they mean in the metadata."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsmini.numerics import AMAX_MIN, QuantizedTensor
from dsmini.numerics.quantization import SOURCES, check_options, check_parts
from dsmini.numerics.tiles import Tile

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SOURCES}


def save_quantized(q: QuantizedTensor, path: str | Path) -> None:
    """Write a safetensors file that `load_quantized` reads."""
    about = {"scale": q.scale, "format": q.format, "dtype": str(q.dtype).removeprefix("torch.")}
    about |= {"shape": json.dumps(list(q.shape)), "tile": json.dumps(q.tile)}
    save_file({"codes": q.codes.contiguous(), "scales": q.scales.contiguous()}, str(path), about)


def load_quantized(path: str | Path, device: torch.device | str = "cpu") -> QuantizedTensor:
    """Read what `save_quantized` wrote.

    Raises: ValueError for a safetensors file of something else.
    """
    try:
        with safe_open(str(path), "pt", device=str(device)) as file:
            about: dict[str, Any] = file.metadata() or {}
            if set(file.keys()) != {"codes", "scales"} or "tile" not in about:
                raise ValueError(
                    f"it holds {sorted(file.keys())} and metadata of {sorted(about)}; want codes, scales and tile"
                )
            held = {name: file.get_tensor(name) for name in ("codes", "scales")}
        shape, tile = torch.Size(json.loads(about["shape"])), cast(Tile, tuple(json.loads(about["tile"])))
        dtype, format, scale = DTYPES[about["dtype"]], about["format"], about["scale"]
        check_options(scale, AMAX_MIN, format=format)
        check_parts(held["codes"], held["scales"], shape, tile, format)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of save_quantized: {error}") from None
    return QuantizedTensor(**held, shape=shape, tile=tile, scale=scale, format=format, dtype=dtype)
