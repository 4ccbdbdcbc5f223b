"""Top-k that is the same on every device."""

from jaxtyping import Float, Int
from torch import Tensor


def stable_topk(x: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """Indices of the k largest in each row, largest first; among equals the lowest first; topk promises neither."""
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
