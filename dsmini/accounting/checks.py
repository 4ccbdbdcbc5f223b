"""Arguments that several counts refuse, each with one sentence."""

from dsmini.config import ModelConfig


def check_dtype(dtype: str, known: tuple[str, ...]) -> None:
    """Refuse a dtype that is not among the known ones."""
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def check_sizes(**sizes: int) -> None:
    """Refuse a size below 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} is not positive; use 1 or more")


def check_context(c: ModelConfig, context: int) -> None:
    """Refuse a context that the model cannot have."""
    if not 1 <= context <= c.max_seq_len:
        raise ValueError(f"context={context} is not from 1 to max_seq_len={c.max_seq_len}; use such a number")


def check_depths(c: ModelConfig, seq_len: int) -> None:
    """Refuse training sequences that leave a depth of multi-token prediction without a position."""
    if seq_len <= c.n_mtp_layers:
        raise ValueError(f"seq_len={seq_len} is too short for n_mtp_layers={c.n_mtp_layers}; use more tokens")
