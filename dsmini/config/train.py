"""The config of the training: steps, optimizers, schedules, and what is measured and saved on the way."""

from dataclasses import dataclass
from typing import Literal

from dsmini.config.fields import check_types, require, require_multiple
from dsmini.config.lr_schedule import read_phases


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Recipe of a training run. Published values are in DeepSeek-V3's report, section 4.2."""

    steps: int = 1600
    """Number of optimizer steps."""
    batch_size: int = 4
    """Number of sequences in an optimizer step."""
    batch_start: int | None = None
    """Number of sequences in the first step, for a batch that grows; left out: batch_size from the start."""
    batch_ramp: float = 0.0
    """Share of the steps over which the batch grows from batch_start to batch_size."""
    grad_accum: int = 1
    """Number of parts that a step's batch is computed in: more parts need less memory and give the same result."""
    seq_len: int | None = None
    """Length of a training sequence in tokens; left out: the model's max_seq_len."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """Optimizer of the matrices in attention, feed-forwards and each expert; AdamW for all else (V3: adamw)."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.01
    """Peak learning rate of Muon, for an update whose singular values are all about 1."""
    gate_lr: float | None = 1e-3
    """Peak learning rate of the gates (AdamW); left out: lr. Gates that learn fast fix their choice too early."""
    lr_schedule: tuple[str, ...] = ("warmup 0.05", "cosine to 0.1")
    """Phases of the learning rates: "warmup SHARE", "constant SHARE [at LEVEL]", "cosine to LEVEL", "linear to LEVEL".
    SHARE is a share of the steps, LEVEL a share of the peak. The phase without a share takes the other steps."""
    beta1: float = 0.9
    """Decay of AdamW's first moment per step."""
    beta2: float = 0.95
    """Decay of AdamW's second moment per step."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which AdamW's moments are stored (V3: bfloat16)."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum per step (Nesterov)."""
    newton_schulz: Literal["jordan", "polar-express"] = "jordan"
    """Coefficients of Muon's Newton-Schulz iterations: five times the same, or four times the best for what the
    iteration before leaves."""
    weight_decay: float = 0.01
    """Coefficient of the decoupled weight decay, on matrices only (V3: 0.1)."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient over all parameters; a longer one is scaled down to it."""
    ema_decay: float | None = None
    """Decay per step of an EMA of the parameters, such as 0.99; left out: no EMA."""
    max_skipped: int = 10
    """Number of steps in a row without a finite loss and gradient after which the run stops."""
    max_rewinds: int = 0
    """Number of times that a spike of the loss sends the run back to its last checkpoint, to leave out the batches
    since; 0: never."""

    bias_speed: float = 1e-3
    """Change of the routing bias after each optimizer step (V3: 0.001)."""
    bias_until: float = 1.0
    """Share of the steps in which the routing bias moves (V3: all but the last 500B of 14.8T tokens)."""
    balance_alpha: float = 1e-4
    """Weight of the sequence-wise balance loss (V3: 0.0001)."""
    balance_counts: Literal["published", "routed"] = "published"
    """Selections that the balance loss counts: the report's top-k of scores without bias, or the real routing."""
    mtp_weight: float = 0.3
    """Weight of the multi-token prediction loss until mtp_until (V3: 0.3)."""
    mtp_until: float = 1.0
    """Share of the steps with mtp_weight, before mtp_weight_after holds."""
    mtp_weight_after: float = 0.1
    """Weight of the multi-token prediction loss after mtp_until (V3: 0.1)."""
    dsa_stage: Literal["warmup", "sparse"] = "sparse"
    """Stage of training with attention "dsa". warmup: only the indexers learn, from attention to all keys; sparse: all
    learns, with attention to the picks (V3.2: 1000 steps of warmup, then 15000 of sparse)."""

    recompute: bool = False
    """Recomputation of each block in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Compilation of the training step by torch.compile: half a minute or more at the start, faster steps."""
    eval_every: int = 200
    """Number of steps between validations."""
    eval_tokens: int = 65536
    """Number of held-out tokens in a validation on the way."""
    final_eval_tokens: int | None = None
    """Maximum number of held-out tokens in the validation at the end; left out: half the number of trained tokens,
    about a tenth of the training time, but at least 131072 tokens, which take longer after a short training. A large
    number takes the whole held-out split."""
    eval_context: int | None = None
    """Shorter context in tokens at which the final validation is repeated; left out: no repetition."""
    save_every: int = 400
    """Number of steps between checkpoints; the last step is always saved."""
    save_in_background: bool = False
    """Writing of checkpoints on the way by a thread, from a copy of the state, while the steps continue."""
    keep: int = 2
    """Number of newest checkpoints in the run's folder; older ones are removed."""
    tensorboard: bool = False
    """TensorBoard logs in the run's folder, next to metrics.jsonl."""
    diagnose: bool = False
    """Watch of what binds the run: Data, Algorithm or Machine. A message and metrics.jsonl say when that changes."""
    sample_tokens: int = 300
    """Length of the sample printed at the end, in tokens; 0 for none."""
    sample_prompt: str = "\n"
    """Text that the sample continues."""
    seed: int = 0
    """Seed of the initial weights, the data order and the sample."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda, mps, or one such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the computation; auto: bfloat16 where this hardware multiplies it faster. Parameters stay float32."""
    threads: int | None = None
    """Number of CPU threads; left out: torch's choice."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        self._check_ranges()
        self._check_limits()
        self._check_batch()
        phases = read_phases(self.lr_schedule)
        object.__setattr__(self, "lr_schedule", tuple(map(str, phases)))  # equal schedules have equal texts

    def _check_ranges(self) -> None:
        for name in (
            *("steps", "batch_size", "grad_accum", "lr", "muon_lr", "grad_clip", "max_skipped"),
            *("eval_every", "eval_tokens", "save_every", "keep"),
        ):
            value = getattr(self, name)
            require(value > 0, f"train.{name}={value} is not positive; use more than 0")
        for name in (
            *("weight_decay", "bias_speed", "balance_alpha", "mtp_weight", "mtp_weight_after"),
            *("sample_tokens", "seed", "max_rewinds"),
        ):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} is negative; use 0 or more")
        for name in ("batch_ramp", "bias_until", "mtp_until"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}={value} is not between 0 and 1; use a share of one")
        for name in ("beta1", "beta2", "muon_momentum", *(["ema_decay"] if self.ema_decay is not None else [])):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}={value} is not from 0 to below 1; use for example 0.9")
        for name in ("seq_len", "threads", "batch_start", "eval_context", "final_eval_tokens", "gate_lr"):
            value = getattr(self, name)
            least = "more than 0" if name == "gate_lr" else "1 or more"
            require(value is None or value > 0, f"train.{name}={value} is not positive; use {least}, or leave it out")

    def _check_limits(self) -> None:
        require(self.steps <= 10**12, f"train.steps={self.steps} is too many; use 10^12 or fewer")
        for name, most in (("batch_size", 10**9), ("sample_tokens", 10**6)):
            value = getattr(self, name)
            require(value <= most, f"train.{name}={value} is too many; use {most:,} or fewer")
        require(self.seed < 2**63, f"train.seed={self.seed} is too large; use less than 2^63")
        require(
            self.threads is None or self.threads <= 1024, f"train.threads={self.threads} is too many; use 1024 or fewer"
        )
        require(
            self.sample_prompt != "" or self.sample_tokens == 0,
            "train.sample_prompt is empty; give it a character or more",
        )

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
