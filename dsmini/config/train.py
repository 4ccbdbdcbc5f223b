"""The config of the training: steps, optimizers, schedules, and what is measured and saved on the way."""

from dataclasses import dataclass
from typing import Literal

from dsmini.config.fields import check_types, require, require_multiple, setting
from dsmini.config.lr_schedule import read_phases


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Recipe of a training run. Published values are in DeepSeek-V3's report, section 4.2."""

    steps: int = setting(1600, least=1, most=10**12)
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
    lr: float = setting(3e-3, above=0)
    """Peak learning rate of AdamW."""
    muon_lr: float = setting(0.01, above=0)
    """Peak learning rate of Muon, for an update whose singular values are all about 1."""
    gate_lr: float | None = setting(1e-3, above=0)
    """Peak learning rate of the gates (AdamW); left out: lr. Gates that learn fast fix their choice too early."""
    lr_schedule: tuple[str, ...] = ("warmup 0.05", "cosine to 0.1")
    """Phases of the learning rates: "warmup SHARE", "constant SHARE [at LEVEL]", "cosine to LEVEL", "linear to LEVEL".
    SHARE is a share of the steps, LEVEL a share of the peak. The phase without a share takes the other steps."""
    beta1: float = setting(0.9, least=0, below=1)
    """Decay of AdamW's first moment per step."""
    beta2: float = setting(0.95, least=0, below=1)
    """Decay of AdamW's second moment per step."""
    moments: Literal["float32", "bfloat16"] = setting("float32", resume="refused")
    """Dtype in which AdamW's moments are stored (V3: bfloat16)."""
    muon_momentum: float = setting(0.95, least=0, below=1)
    """Decay of Muon's momentum per step (Nesterov)."""
    newton_schulz: Literal["jordan", "polar-express"] = "jordan"
    """Coefficients of Muon's Newton-Schulz iterations: five times the same, or four times the best for what the
    iteration before leaves."""
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
    """Stage of training with attention "dsa". warmup: only the indexers learn, from attention to all keys; sparse: all
    learns, with attention to the picks (V3.2: 1000 steps of warmup, then 15000 of sparse)."""

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
    """Shorter context in tokens at which the final validation is repeated; left out: no repetition."""
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
