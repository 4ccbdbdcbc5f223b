"""Workload of a training run: sequences, steps and tokens, as inputs of a plan."""

from dataclasses import dataclass

from dsmini.planner.quantities.figures import Figures
from dsmini.planner.quantities.quantity import COUNT, TOKENS, Count, Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload(Figures):
    """Text that a model is trained on. DeepSeek-V3: 14.8T tokens in steps of 15360 sequences of 4096 tokens."""

    seq_len: Tokens
    """Length of a sequence."""
    batch: Count
    """Number of sequences in an optimizer step."""
    tokens: Tokens
    """Tokens of the whole run."""

    @classmethod
    def of(cls, *, seq_len: int, batch: int, tokens: float, source: str) -> "Workload":
        """Return a workload as inputs. Raises: ValueError for numbers that are not positive."""
        for name, value in (("seq_len", seq_len), ("batch", batch), ("tokens", tokens)):
            if value <= 0:
                raise ValueError(f"{name}={value} is not positive; use 1 or more")
        return cls(
            seq_len=TOKENS(seq_len, "seq_len", "Tokens of a training sequence", source),
            batch=COUNT(batch, "batch", "Sequences of an optimizer step", source),
            tokens=TOKENS(tokens, "tokens", "Tokens of the whole run", source),
        )
