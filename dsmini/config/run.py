"""The config of a training run: its model, data, recipe and processes, read from and written to TOML."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w

from dsmini.config.data import DataConfig
from dsmini.config.fields import build, plain, refuse_unknown, require
from dsmini.config.model import SECTIONS, ModelConfig
from dsmini.config.old_schedule import with_phases
from dsmini.config.parallel import ParallelConfig
from dsmini.config.train import TrainConfig
from dsmini.reading import brief, check_path, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole training run: the model, the data, the recipe, the processes, and the folder."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    out: Path | None = None
    """Folder of the run; left out: the next free runs/NAME-NNN."""

    def __post_init__(self) -> None:
        if self.out is not None:
            check_path(self.out, "out")
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
        path = Path(path)
        check_path(path, "path")
        require(path.suffix == ".toml" or not path.is_file(), f"{path} is not TOML; name a file that ends in .toml")
        sections, base = read_toml(path), base or cls()
        train = with_phases(sections.get("train", {}), base.train.lr_schedule, path.name)
        model = build(ModelConfig, sections.get("model", {}), path.name, "model.", base.model)
        data = build(DataConfig, sections.get("data", {}), path.name, "data.", base.data)
        train = build(TrainConfig, train, path.name, "train.", base.train)
        parallel = build(ParallelConfig, sections.get("parallel", {}), path.name, "parallel.", base.parallel)
        refuse_unknown(sections, SECTIONS, path.name, "")
        out = sections.get("out")
        require(out is None or isinstance(out, str), f"{path.name}: out={brief(out)} is not a path; use a text")
        try:
            out = base.out if out is None else Path(out)
            return cls(model=model, data=data, train=train, parallel=parallel, out=out)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    @classmethod
    def from_run(cls, path: str | Path) -> "RunConfig":
        """Read the config.toml that a run saved. A key that is younger than the run means what the run did."""
        return cls.from_file(path, cls(train=TrainConfig(newton_schulz="jordan")))

    def to_toml(self) -> str:
        """Return the whole config, defaults included, as the text of a TOML file that from_file reads."""
        return tomli_w.dumps(plain(dataclasses.asdict(self)))
