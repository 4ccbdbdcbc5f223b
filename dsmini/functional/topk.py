"""Top-k that is the same on every device."""

from jaxtyping import Float, Int
from torch import Tensor


def stable_topk(x: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """Return the indices of the k largest in each row, largest first, the lowest index first among equals.

    torch.topk promises neither order.
    """
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
