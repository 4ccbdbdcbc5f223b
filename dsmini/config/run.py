"""The config of a training run: its model, data, recipe and processes, read from and written to TOML."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import tomli_w

from dsmini.config.fields import build, check_types, plain, require, require_multiple, setting
from dsmini.config.model import CSA_RATIO, ModelConfig
from dsmini.config.schedule import rate_share, read_phases
from dsmini.reading import find_config, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Recipe of a training run. Published values are in DeepSeek-V3's report, section 4.2."""

    steps: int = setting(1450, least=1, most=10**12)
    """Number of optimizer steps."""
    batch_size: int = setting(4, least=1, most=10**9)
    """Number of sequences in an optimizer step."""
    batch_start: int | None = setting(None, least=1)
    """Number of sequences in the first step, for a batch that grows; left out: batch_size from the start."""
    batch_ramp: float = setting(0.0, least=0, most=1)
    """Share of the steps over which the batch grows from batch_start to batch_size."""
    grad_accum: int = setting(1, least=1, resume="rounding")
    """Number of parts that a step's batch is computed in: more parts need less memory and give the same result."""
    seq_len: int | None = setting(None, least=1, resume="refused")
    """Length of a training sequence in tokens; left out: the model's max_seq_len."""

    optimizer: Literal["adamw", "muon"] = setting("muon", resume="refused")
    """Optimizer of the matrices in attention, feed-forwards and each expert; AdamW for all else (V3: adamw)."""
    lr: float | None = setting(None, above=0)
    """Peak learning rate of AdamW; left out: 0.03 of the embedding, the head and the norms next to Muon, else 0.003."""
    muon_lr: float = setting(0.012, above=0)
    """Peak learning rate of Muon, for an update whose singular values are all about 1."""
    gate_lr: float | None = setting(1e-3, above=0)
    """Peak learning rate of the gates (AdamW), or lr where that is smaller. Gates that learn fast fix their choice too
    early."""
    engram_lr: float | None = setting(None, above=0)
    """Peak learning rate of Engram's tables (AdamW, without weight decay); left out: 5 times AdamW's, as published."""
    lr_schedule: tuple[str, ...] = ("warmup 0.01", "constant", "linear 0.8 to 0")
    """Phases of the learning rates: "warmup SHARE", "constant SHARE [at LEVEL]", "cosine to LEVEL", "linear to LEVEL".
    SHARE is a share of the steps, LEVEL a share of the peak. The phase without a share takes the other steps."""
    beta1: float = setting(0.9, least=0, below=1)
    """Decay of AdamW's first moment per step."""
    beta2: float = setting(0.95, least=0, below=1)
    """Decay of AdamW's second moment per step."""
    moments: Literal["float32", "bfloat16"] = setting("float32", resume="refused")
    """Dtype in which AdamW's moments are stored (V3: bfloat16)."""
    muon_momentum: float = setting(0.9, least=0, below=1)
    """Decay of Muon's momentum per step (Nesterov)."""
    newton_schulz: Literal["jordan", "halley", "v4"] = "halley"
    """Iterations of Muon: Jordan's five of Newton and Schulz, V4's ten, or two of Halley, which are closer to the
    nearest orthogonal matrix than Jordan's, and faster on a CPU."""
    qk_clip: float | None = setting(None, above=0)
    """Largest attention logit of a head, above which a step scales its projections down (Kimi K2: 100); None: any.
    For MLA in one process."""
    weight_decay: float = setting(0.01, least=0)
    """Coefficient of the decoupled weight decay, on matrices only (V3: 0.1)."""
    grad_clip: float = setting(1.0, above=0)
    """Maximum norm of the gradient over all parameters; a longer one is scaled down to it."""
    ema_decay: float | None = setting(None, least=0, below=1, none_stays=True)
    """Decay per step of an EMA of the parameters, such as 0.99; left out: no EMA."""
    max_skipped: int = setting(10, least=1, resume="none")
    """Number of steps in a row without a finite loss and gradient after which the run stops."""
    max_rewinds: int = setting(0, least=0, resume="none")
    """Number of times that a spike of the loss sends the run back to its last checkpoint, to leave out the batches
    since; 0: never."""

    bias_speed: float = setting(1e-3, least=0)
    """Change of the routing bias after each optimizer step (V3: 0.001)."""
    bias_until: float = setting(1.0, least=0, most=1)
    """Share of the steps in which the routing bias moves (V3: all but the last 500B of 14.8T tokens)."""
    balance_alpha: float = setting(1e-4, least=0)
    """Weight of the sequence-wise balance loss (V3: 0.0001)."""
    balance_counts: Literal["published", "routed"] = "published"
    """Selections that the balance loss counts: the report's top-k of scores without bias, or the real routing."""
    mtp_weight: float = setting(0.3, least=0)
    """Weight of the multi-token prediction loss until mtp_until (V3: 0.3)."""
    mtp_until: float = setting(1.0, least=0, most=1)
    """Share of the steps with mtp_weight, before mtp_weight_after holds."""
    mtp_weight_after: float = setting(0.1, least=0)
    """Weight of the multi-token prediction loss after mtp_until (V3: 0.1)."""
    dsa_stage: Literal["warmup", "sparse"] = setting("sparse", resume="refused")
    """Stage of training with indexers (V3.2, V4). warmup: only the indexers learn, from attention to all keys; sparse:
    all learns, with attention to the chosen keys (V3.2: 1000 steps of warmup, then 15000 of sparse)."""

    recompute: bool = setting(False, resume="rounding")
    """Recomputation of each block in the backward pass: less memory, about a third more work."""
    compile: bool = setting(False, resume="rounding")
    """Compilation of the training step by torch.compile: half a minute or more at the start, faster steps."""
    eval_every: int = setting(200, least=1, resume="none")
    """Number of steps between validations."""
    eval_tokens: int = setting(65536, least=1, resume="none")
    """Number of held-out tokens in a validation on the way."""
    final_eval_tokens: int | None = setting(None, least=1, resume="none")
    """Maximum number of held-out tokens in the validation at the end; left out: half the number of trained tokens,
    about a tenth of the training time, but at least 131072 tokens, which take longer after a short training. A large
    number takes the whole held-out split."""
    eval_context: int | None = setting(None, least=1, resume="none")
    """Context in tokens at which each validation is repeated, shorter or longer than the training's; left out: no
    repetition. Beyond the training length it needs a model.max_seq_len above train.seq_len."""
    save_every: int = setting(400, least=1, resume="none")
    """Number of steps between checkpoints; the last step is always saved."""
    save_in_background: bool = setting(False, resume="none")
    """Writing of checkpoints on the way by a thread, from a copy of the state, while the steps continue."""
    keep: int = setting(2, least=1, resume="none")
    """Number of newest checkpoints in the run's folder; older ones are removed."""
    tensorboard: bool = setting(False, resume="none")
    """TensorBoard logs in the run's folder, next to metrics.jsonl."""
    diagnose: bool = setting(False, resume="none")
    """Watch of what binds the run: Data, Algorithm or Machine. A message and metrics.jsonl say when that changes."""
    sample_tokens: int = setting(300, least=0, most=10**6, resume="none")
    """Length of the sample printed at the end, in tokens; 0 for none."""
    sample_prompt: str = setting("\n", resume="none")
    """Text that the sample continues."""
    seed: int = setting(0, least=0, below=2**63, resume="refused")
    """Seed of the initial weights, the data order and the sample."""
    device: str = setting("auto", resume="rounding")
    """Device to train on: auto, cpu, cuda, mps, or one such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", resume="rounding")
    """Dtype of the computation; auto: bfloat16 where this hardware multiplies it faster. Parameters stay float32."""
    threads: int | None = setting(None, least=1, most=1024, resume="rounding")
    """Number of CPU threads; left out: torch's choice."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        require(
            self.sample_prompt != "" or self.sample_tokens == 0,
            "train.sample_prompt is empty; give it a character or more",
        )
        self._check_batch()
        phases = read_phases(self.lr_schedule)
        object.__setattr__(self, "lr_schedule", tuple(map(str, phases)))  # equal schedules have equal texts

    @property
    def adamw_lr(self) -> float:
        """Peak learning rate of AdamW, but for `table_lr`."""
        return 0.003 if self.lr is None else self.lr

    @property
    def gates_lr(self) -> float:
        """Peak learning rate of the gates and the small weights of V4."""
        return min(self.gate_lr or self.adamw_lr, self.adamw_lr)

    @property
    def engram_tables_lr(self) -> float:
        """Peak learning rate of Engram's tables."""
        return self.engram_lr or 5 * self.adamw_lr

    @property
    def table_lr(self) -> float:
        """Peak learning rate of the embedding, the head and the norms."""
        return 0.03 if self.lr is None and self.optimizer == "muon" else self.adamw_lr

    def rate_share_at(self, step: int) -> float:
        """Return the share of its peak that every learning rate has at a step, counted from 0."""
        return rate_share(step, self.steps, read_phases(self.lr_schedule))

    def batch_size_at(self, step: int, parts: int = 1) -> int:
        """Return the number of sequences in a step.

        It grows linearly from batch_start to batch_size, rounded down so that each of the parts of the batch has a
        multiple of grad_accum. The first step after the ramp has batch_size.

        Args:
            parts: number of processes that share the batch.
        """
        ramp = round(self.batch_ramp * self.steps)
        if self.batch_start is None or step >= ramp:
            return self.batch_size
        unit = self.grad_accum * parts
        return self.batch_start + (self.batch_size - self.batch_start) // unit * step // ramp * unit

    def bias_speed_at(self, step: int) -> float:
        """Return the change of the routing bias after a step: none while only indexers learn."""
        moves = self.dsa_stage != "warmup" and step < round(self.bias_until * self.steps)
        return self.bias_speed if moves else 0.0

    def mtp_weight_at(self, step: int) -> float:
        """Return the weight of the multi-token prediction loss in a step."""
        return self.mtp_weight if step < round(self.mtp_until * self.steps) else self.mtp_weight_after

    def _check_batch(self) -> None:
        require_multiple("train.batch_size", self.batch_size, "train.grad_accum", self.grad_accum)
        require(
            (self.batch_start is None) == (self.batch_ramp == 0),
            f"train.batch_start={self.batch_start} and train.batch_ramp={self.batch_ramp} go together; "
            "a batch that grows needs where it starts and over which share of the steps",
        )
        if self.batch_start is not None:
            require_multiple("train.batch_start", self.batch_start, "train.grad_accum", self.grad_accum)
            require(
                self.batch_start <= self.batch_size,
                f"train.batch_start={self.batch_start} is more than train.batch_size={self.batch_size}; use less",
            )


# --- several processes


ScheduleName = Literal["1f1b", "interleaved1f1b", "zero_bubble", "zbv", "dualpipev"]
CHUNKS: Mapping[ScheduleName, int] = MappingProxyType(
    {"1f1b": 1, "interleaved1f1b": 2, "zero_bubble": 2, "zbv": 2, "dualpipev": 2}
)
"""Number of stages of a pipeline that each process has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout of the processes, pp x dp x ep of them. Without torchrun or another launcher there is one process."""

    pp: int = setting(1, least=1, resume="rounding")
    """Number of processes that the layers are divided among, as stages of a pipeline. The train.grad_accum parts of
    a step pass through them one after the other: pp parts or more with 1f1b, 2 pp or more with dualpipev. A multiple of
    pp goes with the other schedules."""
    dp: int | None = setting(None, least=1, resume="rounding")
    """Number of parts of the batch for each expert; left out: as many as there are processes for."""
    ep: int = setting(1, least=1, resume="rounding")
    """Number of processes that the experts of a layer are divided among. Each has its own part of the batch too."""
    zero: Literal[0, 1, 2, 3] = setting(0, resume="rounding")
    """Division among the processes with the same parameters: 0 nothing, 1 the optimizer state, 2 the gradients
    too, 3 the parameters too (FSDP2)."""
    schedule: ScheduleName = setting("1f1b", resume="rounding")
    """Order of the forwards and backwards of a pipeline."""
    timeout: float = setting(300.0, above=0, resume="none")
    """Seconds after which a process that does not answer ends the run."""
    check_replicas: int = setting(100, least=0, resume="none")
    """Number of steps between two comparisons of what several processes hold alike; 0: never."""

    def __post_init__(self) -> None:
        check_types(self, "parallel.")

    def parts(self, world_size: int) -> int:
        """Return the number of parts of the batch, dp * ep.

        Raises: ValueError for a number of processes that the layout does not fit.
        """
        group = self.pp * self.ep
        dp = self.dp or max(1, world_size // group)
        want = group * dp
        if want != world_size:
            have = "1 process" if world_size == 1 else f"{world_size} processes"
            shape = f"pp={self.pp} x dp={dp} x ep={self.ep}"
            raise ValueError(
                f"parallel: {shape} needs {want} processes, there {'is' if world_size == 1 else 'are'} {have}; start "
                f"torchrun --nproc-per-node {want} -m dsmini.train, or change the layout"
            )
        return dp * self.ep

    def check(self, model: ModelConfig, train: TrainConfig, world_size: int) -> None:
        """Raise ValueError for a model or a batch that this layout does not divide."""
        parts = self.parts(world_size)
        if self.ep > 1:
            require(
                any(map(model.is_moe, range(model.n_layers + model.n_mtp_layers))),
                f"parallel.ep={self.ep}, but the model has no experts to divide; use parallel.dp",
            )
            require_multiple("model.n_routed_experts", model.n_routed_experts, "parallel.ep", self.ep)
        if self.pp > 1:
            self._check_pipeline(model, train)
        frozen = model.has_indexers and train.dsa_stage == "warmup"
        require(
            not frozen or self.zero == 0,
            f"parallel.zero={self.zero} does not go with train.dsa_stage='warmup', in which little has a gradient; "
            "leave it out",
        )
        if world_size == 1:
            return
        require(train.qk_clip is None, "train.qk_clip needs the largest logit of one process; leave it out")
        rows = parts * train.grad_accum
        for name in ("batch_size", "batch_start"):
            value = getattr(train, name)
            if value is not None and value % rows:
                raise ValueError(
                    f"train.{name}={value} is not divisible into {parts} processes' parts of train.grad_accum="
                    f"{train.grad_accum} each; use a multiple of {rows}"
                )
        require(not train.compile, "train.compile does not go with several processes; leave it out")

    def _check_pipeline(self, model: ModelConfig, train: TrainConfig) -> None:
        """Raise ValueError for layers or parts of a batch that a pipeline does not take."""
        name, parts = self.schedule, train.grad_accum
        stages = self.pp * CHUNKS[name]
        require(
            stages <= model.n_layers,
            f"parallel.pp={self.pp} with parallel.schedule={name} has {stages} stages, more than model.n_layers="
            f"{model.n_layers}; use fewer, since a stage has one layer or more",
        )
        least = {"1f1b": self.pp, "dualpipev": stages}.get(name, 1)
        require(
            parts >= least,
            f"train.grad_accum={parts} is too small for parallel.schedule={name} with parallel.pp={self.pp}; use "
            f"{least} or more",
        )
        rounds = max(1, parts // self.pp)
        require(
            name not in ("interleaved1f1b", "zero_bubble") or parts % rounds == 0,
            f"train.grad_accum={parts} does not go with parallel.schedule={name}, which has {rounds} equal rounds for "
            f"parallel.pp={self.pp}; use {rounds * self.pp}",
        )
        require(
            self.zero == 0,
            f"parallel.zero={self.zero} does not go with a pipeline, parallel.pp={self.pp}; leave it out",
        )


# --- the run


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
            f"train.eval_context={context} is longer than model.max_seq_len={self.model.max_seq_len}; raise that, and "
            f"set train.seq_len={self.seq_len} to train as before",
        )
        sparse = self.model.has_indexers
        which = f"model.attention='{self.model.attention}'"
        fix = "start from a model that python -m dsmini.convert RUN OUT --dsa has made"
        if self.model.attention == "compressed":
            which, fix = "a model without a ratio of 4 in model.compress_ratios", "set one"
        require(
            sparse or self.train.dsa_stage != "warmup",
            f"train.dsa_stage='warmup' trains indexers, and {which} has none; leave it out, or {fix}",
        )
        require(
            self.train.dsa_stage != "warmup" or self.model.attention != "compressed" or self.seq_len >= CSA_RATIO,
            f"a sequence of {self.seq_len} tokens has no entry for the indexers of train.dsa_stage='warmup' to learn "
            f"from; use at least {CSA_RATIO}",
        )
        require(
            self.train.qk_clip is None or (self.model.is_mla and not self.model.qk_norm and not self.train.compile),
            "train.qk_clip looks at the logits of uncompiled MLA whose heads have no norm; leave it out, or "
            "model.qk_norm, train.compile and other attention",
        )
        require(
            not (sparse and self.train.compile),
            f"train.compile does not go with model.attention='{self.model.attention}', whose indexers learn "
            "uncompiled; leave it out",
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
        sections = {name: section for name, section in read_toml(path).items() if name != "serving"}  # a plan reads it
        return build(cls, sections, path.name, "", base)

    def to_toml(self) -> str:
        """Return the whole config, defaults included, as the text of a TOML file that from_file reads."""
        return tomli_w.dumps(plain(dataclasses.asdict(self)))
