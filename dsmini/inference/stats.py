"""Counts and times of a generation: tokens, seconds, steps, guesses and bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts and times of a generation, over all rows."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Time of reading the prompts, in seconds."""
    seconds: float
    """Time of decoding, in seconds: everything after the first new token of each row."""
    steps: int
    """Number of decoding steps, summed over the rows that took part in each."""
    drafted: int
    """Number of tokens that multi-token prediction guessed."""
    accepted: int
    """Number of accepted guesses."""
    cache_bytes: int
    """Size of the whole cache in bytes, measured from its storage."""
    cache_bytes_per_token: float
    """Size of one token in all layers in bytes, measured from the storage, without multi-token prediction."""
    rows: int
    """Number of prompts."""
    moved_bytes: float = 0.0
    """Bytes that the decoding steps had to move, as StepTraffic counts them."""
    batches: int = 0
    """Number of decoding steps, each for all rows together."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second of decoding. The first token of each row belongs to the prefill."""
        return max(0, self.new_tokens - self.rows) / self.seconds if self.seconds else 0.0

    @property
    def moved_bytes_per_token(self) -> float:
        """Bytes that decoding had to move for each new token."""
        decoded = self.new_tokens - self.rows
        return self.moved_bytes / decoded if decoded > 0 else 0.0

    @property
    def moved_bytes_per_s(self) -> float:
        """Rate at which decoding moved these bytes, in bytes per second."""
        return self.moved_bytes / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of accepted guesses, from 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens per row and decoding step: 1 without speculation."""
        return max(0, self.new_tokens - self.rows) / self.steps if self.steps else 0.0
