"""The config of a training run: its model, data, recipe and processes, read from and written to TOML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from dsmini.config.fields import build, check_types, plain, require, setting
from dsmini.config.model import ModelConfig
from dsmini.config.parallel import ParallelConfig
from dsmini.config.train import TrainConfig
from dsmini.reading import find_config, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Text that is trained on, and the part of it that is held out."""

    path: Path | None = setting(None, resume="none")
    """Text file, or folder of text files, plain or .gz; left out: the source code of Python's standard library."""
    val_fraction: float = setting(0.1, above=0, below=1, resume="refused")
    """Share of the corpus held out for validation: whole files of a folder, or the end of a single file."""
    tokenizer: Path | None = setting(None, resume="none", none_stays=True)
    """File tokenizer.json of the tokenizers library; left out: a token is a byte."""
    fim_rate: float = setting(0.0, least=0, most=1, resume="refused")
    """Share of the training documents rearranged for fill-in-the-middle, prefix-suffix-middle (V3: 0.1)."""
    document_mask: bool = setting(False, resume="refused")
    """Attention mask between the documents packed into a sequence. V3 has none."""
    workers: int = setting(1, least=0, most=64, resume="none")
    """Number of threads that prepare batches in advance; 0: each batch when it is needed. The order stays the same."""

    def __post_init__(self) -> None:
        check_types(self, "data.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole training run: the model, the data, the recipe, the processes, and the folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    out: Path | None = setting(None, resume="refused")
    """Folder of the run; left out: the next free runs/NAME-NNN."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.seq_len <= self.model.max_seq_len,
            f"train.seq_len={self.seq_len} is longer than model.max_seq_len={self.model.max_seq_len}; "
            "shorten the one or raise the other",
        )
        require(
            self.seq_len > self.model.n_mtp_layers,
            f"a sequence of {self.seq_len} tokens is too short for model.n_mtp_layers={self.model.n_mtp_layers}; "
            f"use at least {self.model.n_mtp_layers + 1}",
        )
        context = self.train.eval_context
        require(
            context is None or context <= self.model.max_seq_len,
            f"train.eval_context={context} is longer than model.max_seq_len={self.model.max_seq_len}; shorten it",
        )
        sparse = self.model.attention == "dsa"
        require(
            sparse or self.train.dsa_stage != "warmup",
            f"train.dsa_stage='warmup' trains indexers, and model.attention='{self.model.attention}' has none; leave "
            "it out, or start from a model that python -m dsmini.convert RUN OUT --dsa has made",
        )
        require(
            not (sparse and self.train.compile),
            "train.compile does not go with model.attention='dsa', whose indexers learn uncompiled; leave it out",
        )

    @property
    def seq_len(self) -> int:
        """Return the length of a training sequence in tokens."""
        return self.train.seq_len or self.model.max_seq_len

    @classmethod
    def from_file(cls, path: str | Path, base: "RunConfig | None" = None) -> "RunConfig":
        """Read a TOML file with the sections model, data, train and parallel.

        Args:
            base: config with the keys that the file leaves out; None: the defaults.

        Raises: ValueError naming the unknown key and the nearest right one, or the wrong value.
        """
        path = find_config(Path(path))
        require(path.suffix == ".toml" or not path.is_file(), f"{path} is not TOML; name a file that ends in .toml")
        return build(cls, read_toml(path), path.name, "", base)

    def to_toml(self) -> str:
        """Return the whole config, defaults included, as the text of a TOML file that from_file reads."""
        return tomli_w.dumps(plain(dataclasses.asdict(self)))
