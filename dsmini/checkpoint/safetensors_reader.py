"""The one reader of safetensors: of a file, of a sharded folder, or of the ranks of DeepSeek's inference layout."""

import mmap
from pathlib import Path

import torch
from torch import Tensor

from dsmini.checkpoint.safetensors_file import DTYPES, StoredPiece, read_header
from dsmini.checkpoint.safetensors_folder import folder_tensors
from dsmini.reading import open_regular


class SafetensorsReader:
    """The tensors of a file or folder, read from mapped files when they are asked for.

    Opening reads and checks all headers, but no tensor. Nothing is unpickled. `release` frees the pages of a tensor
    that was read.

    Raises: ValueError naming every file that is missing or wrong, and what is wrong with it.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, str] = {}
        """Texts in the header of a single file; empty for a folder."""
        if path.is_dir():
            self.tensors = folder_tensors(path)
        else:
            header = read_header(path)
            self.tensors, self.metadata = header.tensors, header.metadata
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; one in a single piece is a view of the file, with copy on write."""
        stored = self.tensors[name]
        dtype = DTYPES[stored.dtype]
        views = [self._view(piece, dtype) for piece in stored.pieces]
        if len(views) == 1:
            return views[0]
        # as bytes, for torch cannot join numbers of every dtype
        joined = torch.cat([view.unsqueeze(-1).view(torch.uint8) for view in views], stored.dim)
        return joined.view(dtype).squeeze(-1)

    def read_all(self) -> dict[str, Tensor]:
        """Return all tensors by name, as `read` gives them."""
        return {name: self.read(name) for name in self.tensors}

    def release(self, name: str) -> None:
        """Free the memory of a tensor's pages. Views of it lose what was written to them."""
        page = mmap.PAGESIZE
        for piece in self.tensors[name].pieces:
            start = piece.start // page * page
            if piece.file in self._maps and piece.end > start and hasattr(mmap, "MADV_DONTNEED"):
                self._maps[piece.file].madvise(mmap.MADV_DONTNEED, start, piece.end - start)

    def _view(self, piece: StoredPiece, dtype: torch.dtype) -> Tensor:
        if piece.end == piece.start:
            return torch.empty(piece.shape, dtype=dtype)
        if piece.file not in self._maps:
            with open_regular(piece.file) as file:  # private, so that torch may have it writable
                self._maps[piece.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(
            self._maps[piece.file], dtype=torch.uint8, count=piece.end - piece.start, offset=piece.start
        )
        raw = raw if piece.start % dtype.itemsize == 0 else raw.clone()
        return raw.view(dtype).view(piece.shape)


def refuse_bad_bias(name: str, bias: Tensor) -> None:
    """Raise ValueError for a selection bias that is infinite or NaN: top-k ranks the same experts first every time."""
    if not bool(bias.isfinite().all()):
        worst = float(bias[~bias.isfinite()][0])
        raise ValueError(f"{name} has the selection bias {worst}; want finite ones: fetch the file again")


def refuse_bad_scales(name: str, scales: Tensor) -> None:
    """Raise ValueError for scales of FP8 codes that are zero, negative, infinite or NaN: codes have no meaning then."""
    values = scales.float()
    good = values.isfinite() & (values > 0)
    if not bool(good.all()):
        worst = float(values[~good].flatten()[0])
        raise ValueError(f"{name} has the FP8 scale {worst}; want finite ones above 0: fetch the file again")
