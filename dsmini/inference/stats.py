"""The figures of a generation: tokens, seconds, steps, guesses and bytes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts and times of a generation, of all rows together."""

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    """Time of reading the prompts."""
    seconds: float
    """Time of decoding: all after the first new token of each row."""
    steps: int
    """Decoding steps, summed over the rows that took part in each."""
    drafted: int
    """Tokens that multi-token prediction guessed."""
    accepted: int
    """Guesses that were kept."""
    cache_bytes: int
    """Bytes of the whole cache, measured from its storage."""
    cache_bytes_per_token: float
    """Bytes of a token in all layers, measured from the storage; that of multi-token prediction is apart."""
    rows: int
    """Number of prompts."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second of decoding; the first of each row belongs to the prefill."""
        return max(0, self.new_tokens - self.rows) / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the guesses that were kept, from 0 to 1."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a row in a decoding step: 1 without speculation."""
        return max(0, self.new_tokens - self.rows) / self.steps if self.steps else 0.0
