"""What a model, its data and its training are: frozen dataclasses, checked when they are made.

Every field has a default; together the defaults are configs/toy.toml. None means off.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tomli_w

from dsmini.fields import build, check_types, parse_file, plain, read_toml, refuse_unknown, require, require_multiple
from dsmini.hf_config import config_from_json

SECTIONS = ["model", "data", "train", "out"]
"""What a TOML file may hold at its top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A DeepSeek-V3 style transformer, in the spelling of DeepSeek's released inference code.

    Raises: ValueError for every combination of sizes that cannot be built.
    """

    vocab_size: int = 256
    """Number of token ids; 256 for bytes."""
    dim: int = 192
    """Width of the residual stream."""
    inter_dim: int = 512
    """Hidden width of the dense feed-forward layers."""
    moe_inter_dim: int = 128
    """Hidden width of one routed expert; the shared experts are n_shared_experts times as wide."""
    n_layers: int = 4
    """Number of blocks, the multi-token prediction blocks not counted."""
    n_dense_layers: int = 1
    """The first so many blocks have a dense feed-forward; n_layers + n_mtp_layers makes the whole model dense."""
    n_heads: int = 4
    """Number of attention heads."""

    attention: Literal["mla", "mha", "gqa", "mqa"] = "mla"
    """Multi-head Latent Attention, or one of its twins with keys of qk_nope_head_dim and values of v_head_dim."""
    n_kv_heads: int | None = None
    """Number of key-value heads; only for attention "gqa"."""
    q_lora_rank: int | None = 96
    """Width of the compressed query; None projects the query directly."""
    kv_lora_rank: int = 64
    """Width of the compressed key-value latent c_kv, which is what MLA caches."""
    qk_nope_head_dim: int = 32
    """Width of a query or key head without position."""
    qk_rope_head_dim: int = 16
    """Width of the rotary part of a query head, and of the one rotary key that all heads share."""
    v_head_dim: int = 32
    """Width of a value head."""

    n_routed_experts: int = 16
    """Number of routed experts in a MoE layer."""
    n_shared_experts: int = 1
    """Number of experts that every token visits; 0 for none."""
    n_activated_experts: int = 4
    """Number of routed experts a token visits (top-k)."""
    n_expert_groups: int = 4
    """Number of equal groups the routed experts are divided in."""
    n_limited_groups: int = 2
    """A token's experts come from at most so many groups."""
    score_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """How gate logits become scores: sigmoid in V3, softmax in V2."""
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    """noaux_tc (V3): selection bias, a group is scored by its best two; group_limited_greedy (V2): no bias, a group
    is scored by its best one; greedy (V2-Lite): no bias, no groups."""
    norm_topk_prob: bool = True
    """Divide a token's weights by their sum."""
    route_scale: float = 2.5
    """Factor on the routed experts' weights."""

    n_mtp_layers: int = 1
    """Depth of multi-token prediction: so many extra blocks, each predicting one token further."""
    mtp_input: Literal["post_norm", "pre_norm"] = "post_norm"
    """Feed the MTP block the hidden state after or before the final norm; the sources disagree."""

    max_seq_len: int = 256
    """Longest sequence in tokens; beyond original_seq_len the context counts as extended and YaRN is on."""
    original_seq_len: int | None = None
    """Context the rotary frequencies were trained at; None: never extended, no YaRN."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_factor: float = 40.0
    """YaRN's extension factor."""
    beta_fast: float = 32.0
    """YaRN keeps frequencies that turn more often than this within original_seq_len."""
    beta_slow: float = 1.0
    """YaRN stretches by rope_factor the frequencies that turn less often than this."""
    mscale: float = 1.0
    """YaRN's attention temperature, for the rotary part of the logit."""
    mscale_all_dim: float = 1.0
    """YaRN's attention temperature, for the whole logit."""

    norm_eps: float = 1e-6
    """Epsilon of RMSNorm; the two latent norms use 1e-6 whatever this says, as DeepSeek's code does."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; DeepSeek-V3 trained with 0.006."""
    zero_init: bool = False
    """Start the head and every matrix that writes into the residual stream at zero. Not DeepSeek's."""
    embed_norm: bool = False
    """Norm the embedding before the first block. Not DeepSeek's."""
    qk_norm: bool = False
    """Norm each head's query and key, whole. Not DeepSeek's, who norm the latents; excludes the absorbed form."""
    precision: Literal["native", "fp8"] = "native"
    """native: matrix products in the compute dtype; fp8: those of attention and feed-forwards in simulated FP8."""

    def __post_init__(self) -> None:
        check_types(self)
        optional = {"n_shared_experts", "n_dense_layers", "n_mtp_layers", "mscale", "mscale_all_dim"}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in optional:
                require(value >= 0, f"{f.name}={value} is negative; use 0 or more")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                least = "1 or more" if isinstance(value, int) else "more than 0"
                require(value > 0, f"{f.name}={value} is not positive; use {least}")
        self._check_layers()
        self._check_attention()
        self._check_experts()

    def _check_layers(self) -> None:
        deepest = self.n_layers + self.n_mtp_layers
        require(
            self.n_dense_layers <= deepest,
            f"n_dense_layers={self.n_dense_layers} is more than the {deepest} blocks there are "
            f"(n_layers + n_mtp_layers); use {deepest} or fewer",
        )

    def _check_attention(self) -> None:
        rotary = "qk_rope_head_dim" if self.attention == "mla" else "qk_nope_head_dim"
        width = getattr(self, rotary)
        require(width % 2 == 0, f"{rotary}={width} is odd; RoPE turns pairs, use {width + 1}")
        if self.attention == "gqa":
            require(self.n_kv_heads is not None, "attention='gqa' needs n_kv_heads; set it to a divisor of n_heads")
            assert self.n_kv_heads is not None
            require_multiple("n_heads", self.n_heads, "n_kv_heads", self.n_kv_heads)
        else:
            require(
                self.n_kv_heads is None,
                f"n_kv_heads={self.n_kv_heads} has no meaning with attention='{self.attention}'; "
                "leave it out, or use attention='gqa'",
            )
        require(self.rope_theta > 1, f"rope_theta={self.rope_theta} makes no slower frequencies; use more than 1")
        if self.extended:
            require(self.rope_factor >= 1, f"rope_factor={self.rope_factor} shrinks the context; use 1 or more")
            require(
                self.beta_fast >= self.beta_slow,
                f"beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; swap them",
            )

    def _check_experts(self) -> None:
        e, g, k = self.n_routed_experts, self.n_expert_groups, self.n_activated_experts
        require_multiple("n_routed_experts", e, "n_expert_groups", g)
        require(
            self.n_limited_groups <= g,
            f"n_limited_groups={self.n_limited_groups} is more than n_expert_groups={g}; use {g} or fewer",
        )
        require(k <= e, f"n_activated_experts={k} is more than n_routed_experts={e}; use {e} or fewer")
        reachable = e // g * self.n_limited_groups
        require(
            k <= reachable,
            f"n_activated_experts={k} is more than the {reachable} experts in n_limited_groups="
            f"{self.n_limited_groups} groups of {e // g}; use {reachable} or fewer, or allow more groups",
        )
        if self.topk_method == "greedy":
            require(g == 1, f"topk_method='greedy' ignores groups, got n_expert_groups={g}; use 1, or another method")
        if self.topk_method == "noaux_tc" and g > 1:
            require(e // g >= 2, f"noaux_tc scores a group by its best two, got groups of {e // g}; use fewer groups")

    @property
    def extended(self) -> bool:
        """Whether YaRN applies: the context was stretched beyond the one trained at."""
        return self.original_seq_len is not None and self.max_seq_len > self.original_seq_len

    @property
    def output_init_std(self) -> float:
        """Standard deviation of the initial weights of the head and of what writes into the residual stream."""
        return 0.0 if self.zero_init else self.init_std

    @property
    def qk_head_dim(self) -> int:
        """Width of a whole query or key head of MLA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Key-value heads a twin of MLA keeps."""
        return {"mqa": 1, "gqa": self.n_kv_heads or self.n_heads}.get(self.attention, self.n_heads)

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` has experts; MTP blocks follow the last layer."""
        return layer >= self.n_dense_layers

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Read a TOML file's [model], DeepSeek's inference JSON, or Hugging Face's config.json.

        Raises: ValueError naming the key that is unknown, cannot be honoured, or has a wrong value.
        """
        path = Path(path)
        if path.suffix == ".json":
            raw = parse_file(path, json.loads)
            return build(cls, config_from_json(raw, str(path)), path.name, "")
        sections = read_toml(path)
        refuse_unknown(sections, SECTIONS, path.name, "")
        return build(cls, sections.get("model", {}), path.name, "model.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is read, and how much of it is held out."""

    path: Path | None = None
    """A text file, or a folder of them, plain or .gz; left out: the source code of Python's own standard library."""
    val_fraction: float = 0.1
    """Share of the corpus held out for validation: whole files of a folder, the end of a single file."""
    tokenizer: Path | None = None
    """A tokenizer.json of the tokenizers library; left out: a token is a byte."""
    fim_rate: float = 0.0
    """Share of the training documents rearranged for fill-in-the-middle, prefix-suffix-middle (V3: 0.1)."""
    document_mask: bool = False
    """Let no token attend to another document packed into its sequence; V3 lets it."""
    workers: int = 1
    """Threads that prepare batches ahead of the training; 0 prepares each when it is needed. No effect on the order."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The recipe. Published values are in DeepSeek-V3's report, section 4.2."""

    steps: int = 1600
    """Number of optimizer steps."""
    batch_size: int = 4
    """Sequences in an optimizer step."""
    batch_start: int | None = None
    """Sequences in the first steps, for a batch that grows; left out: batch_size from the start."""
    batch_ramp: float = 0.0
    """Share of the steps in which the batch grows from batch_start to batch_size."""
    grad_accum: int = 1
    """Parts a step's batch is computed in; the result is that of one part, in less memory."""
    seq_len: int | None = None
    """Tokens in a training sequence; left out: the model's max_seq_len."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """muon for the matrices of attention and feed-forwards, expert by expert, and adamw for all else; or adamw (V3)."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.01
    """Peak learning rate of Muon, for an update whose singular values are all about 1."""
    gate_lr: float | None = 1e-3
    """Peak learning rate of the gates (AdamW); left out: lr. Gates that learn fast fix their choice too early."""
    warmup: float = 0.05
    """Share of the steps in which the learning rates rise linearly from 0."""
    constant: float = 0.0
    """Share of the steps that follow at the peak; then comes the decay."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Shape of the way down to lr_final."""
    lr_final: float = 0.1
    """Learning rate after the decay, as a share of the peak."""
    final: float = 0.0
    """Share of the steps spent at lr_final, behind the decay."""
    lr_last: float = 0.1
    """Learning rate of the last steps, as a share of the peak (V3: 1/30)."""
    last: float = 0.0
    """Share of the steps spent at lr_last, at the very end."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW's moments are kept (V3: bfloat16)."""
    muon_momentum: float = 0.95
    """Muon's decay of the momentum (Nesterov)."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only (V3: 0.1)."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the parameters with this decay, such as 0.99; left out: none."""
    max_skipped: int = 10
    """Give up after so many steps in a row whose loss or gradient was not finite."""

    bias_speed: float = 1e-3
    """Step of the routing bias after each optimizer step (V3: 0.001)."""
    bias_until: float = 1.0
    """Share of the steps after which the routing bias stays as it is (V3: the last 500B of 14.8T tokens)."""
    balance_alpha: float = 1e-4
    """Weight of the sequence-wise balance loss (V3: 0.0001)."""
    balance_counts: Literal["published", "routed"] = "published"
    """Which selections the balance loss counts: the report's top-k of plain scores, or the real routing."""
    mtp_weight: float = 0.3
    """Weight of the multi-token prediction loss (V3: 0.3)."""
    mtp_until: float = 1.0
    """Share of the steps after which that weight becomes mtp_weight_after."""
    mtp_weight_after: float = 0.1
    """Weight of the multi-token prediction loss from then on (V3: 0.1)."""

    recompute: bool = False
    """Recompute each block in the backward pass: less memory, about a third more work."""
    compile: bool = False
    """Compile the training step with torch.compile: half a minute or more at the start, faster steps."""
    eval_every: int = 200
    """Steps between validations."""
    eval_tokens: int = 65536
    """Held-out tokens of a validation on the way; the one at the end reads the whole held-out split."""
    eval_context: int | None = None
    """At the end score the whole held-out split at this shorter context too."""
    save_every: int = 400
    """Steps between checkpoints; the last step is saved in any case."""
    keep: int = 2
    """How many checkpoints to keep, the newest; older ones are removed."""
    tensorboard: bool = False
    """Also write the figures for TensorBoard, into the run's folder."""
    sample_tokens: int = 300
    """Length of the sample printed at the end, in tokens; 0 for none."""
    sample_prompt: str = "\n"
    """What that sample goes on from."""
    seed: int = 0
    """Seed of the initial weights, the data order and the sample."""
    device: str = "auto"
    """auto, cpu, cuda, mps, or a device such as cuda:1."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto: bfloat16 where this hardware is seen to multiply it faster. Parameters stay float32."""
    threads: int | None = None
    """CPU threads; left out: what torch chooses."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in (
            *("steps", "batch_size", "grad_accum", "lr", "muon_lr", "grad_clip", "max_skipped"),
            *("eval_every", "eval_tokens", "save_every", "keep"),
        ):
            value = getattr(self, name)
            require(value > 0, f"train.{name}={value} is not positive; use more than 0")
        for name in (
            *("weight_decay", "bias_speed", "balance_alpha", "mtp_weight", "mtp_weight_after"),
            *("sample_tokens", "seed"),
        ):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} is negative; use 0 or more")
        shares = ("warmup", "constant", "final", "last", "lr_final", "lr_last", "batch_ramp", "bias_until", "mtp_until")
        for name in shares:
            value = getattr(self, name)
            require(0 <= value <= 1, f"train.{name}={value} is not between 0 and 1; use a share of one")
        taken = self.warmup + self.constant + self.final + self.last
        require(
            taken <= 1 + 1e-9,
            f"train.warmup, constant, final and last are {taken:g} of the steps together; want 1 or less, "
            "what is left is the decay",
        )
        for name in ("beta1", "beta2", "muon_momentum", *(["ema_decay"] if self.ema_decay is not None else [])):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}={value} is not from 0 to below 1; use for example 0.9")
        require(self.steps <= 10**12, f"train.steps={self.steps} is too many; use 10^12 or fewer")
        require(self.seed < 2**63, f"train.seed={self.seed} is too large; use less than 2^63")
        require(
            self.threads is None or self.threads <= 1024, f"train.threads={self.threads} is too many; use 1024 or fewer"
        )
        for name in ("seq_len", "threads", "batch_start", "eval_context", "gate_lr"):
            value = getattr(self, name)
            least = "more than 0" if name == "gate_lr" else "1 or more"
            require(value is None or value > 0, f"train.{name}={value} is not positive; use {least}, or leave it out")
        require(
            self.sample_prompt != "" or self.sample_tokens == 0,
            "train.sample_prompt is empty; give it a character or more",
        )
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole training run: the model, the data, the recipe, and where it is kept."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: Path | None = None
    """Folder of the run; left out: the next free runs/NAME-NNN."""

    def __post_init__(self) -> None:
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

    @property
    def seq_len(self) -> int:
        """Tokens in a training sequence."""
        return self.train.seq_len or self.model.max_seq_len

    @classmethod
    def from_file(cls, path: str | Path, base: "RunConfig | None" = None) -> "RunConfig":
        """Read a TOML file with the sections model, data and train.

        Args:
            base: has the keys that the file leaves out; without it, the defaults.

        Raises: ValueError naming the unknown key and the nearest right one, or the wrong value.
        """
        path = Path(path)
        require(path.suffix == ".toml" or not path.is_file(), f"{path} is not TOML; name a file that ends in .toml")
        sections = read_toml(path)
        parts = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
        base = base or cls()
        built = {
            key: build(part, sections.get(key, {}), path.name, f"{key}.", getattr(base, key))
            for key, part in parts.items()
        }
        refuse_unknown(sections, SECTIONS, path.name, "")
        out = sections.get("out")
        require(out is None or isinstance(out, str), f"{path.name}: out={out!r} is not a path; use a text")
        try:
            return cls(**built, out=base.out if out is None else Path(out))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None

    def to_toml(self) -> str:
        """The whole config, defaults included, as the text of a TOML file that from_file reads back."""
        return tomli_w.dumps(plain(dataclasses.asdict(self)))


def layer_config(config: ModelConfig | None, arguments: dict[str, Any]) -> ModelConfig:
    """The config of a layer that stands alone: `config`, or the toy's, with plain arguments on top.

    Raises: ValueError for an unknown argument, with the nearest right one.
    """
    require(
        config is None or isinstance(config, ModelConfig),
        f"a layer is made from a ModelConfig or keyword arguments, got a {type(config).__name__}; use ModelConfig(...)",
    )
    refuse_unknown(arguments, [f.name for f in dataclasses.fields(ModelConfig)], "the arguments", "")
    return dataclasses.replace(config or ModelConfig(), **arguments)
