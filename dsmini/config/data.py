"""The config of the data: the text, its tokens, and the part held out for validation."""

from dataclasses import dataclass
from pathlib import Path

from dsmini.config.fields import check_types, require


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text that is trained on, and the part of it that is held out."""

    path: Path | None = None
    """Text file, or folder of text files, plain or .gz; left out: the source code of Python's standard library."""
    val_fraction: float = 0.1
    """Share of the corpus held out for validation: whole files of a folder, or the end of a single file."""
    tokenizer: Path | None = None
    """File tokenizer.json of the tokenizers library; left out: a token is a byte."""
    fim_rate: float = 0.0
    """Share of the training documents rearranged for fill-in-the-middle, prefix-suffix-middle (V3: 0.1)."""
    document_mask: bool = False
    """Attention mask between the documents packed into a sequence. V3 has none."""
    workers: int = 1
    """Number of threads that prepare batches in advance; 0: each batch when it is needed. The order stays the same."""

    def __post_init__(self) -> None:
        check_types(self, "data.")
        require(
            0 <= self.fim_rate <= 1, f"data.fim_rate={self.fim_rate} is not between 0 and 1; use a share such as 0.1"
        )
        require(0 <= self.workers <= 64, f"data.workers={self.workers} is not from 0 to 64; use for example 1")
        require(
            0 < self.val_fraction < 1,
            f"data.val_fraction={self.val_fraction} is not between 0 and 1; use for example 0.1",
        )
