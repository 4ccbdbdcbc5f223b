"""The questions of a training step to the other ranks: its part of the batch, sums, norms, and agreement.

The ranks form a mesh pp x dp x ep. Each pp has its own layers. Each (dp, ep) is a part of the batch. A parameter of a
layer is the same on all parts, but the experts, which are divided over ep and the same on all dp:

    gradient of              is summed over
    an expert                dp: over ep it is a sum already, since the tokens of all ep ranks came to the expert
    all else                 dp x ep

No mean is taken anywhere. The loss is divided once, by what the whole step has of targets.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dsmini.distributed.passes import Passes
from dsmini.distributed.pieces import HeldRows, whole
from dsmini.functional.muon import muon_update
from dsmini.nn import Transformer

if TYPE_CHECKING:
    from dsmini.distributed.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a rank in the mesh."""

    pp: int = 0
    part: int = 0
    """Number of its part of the batch, dp * (number of ep ranks) + ep."""
    parts: int = 1
    ep: int = 0


class Ranks:
    """One process, which has no others to ask."""

    place = Place()
    elsewhere: Collection[str] = ()
    """Names of the tensors of the whole model that other ranks have, and this one has nothing of."""

    def divide(self, model: Transformer) -> None:
        """Leave of a whole model what this rank holds. It may be on the meta device."""

    def note(self, model: Transformer) -> None:
        """Note which parameters of a divided model other ranks do not hold alike: again if others took their place."""

    def passes(self, model: Transformer, compiled: bool) -> "Passes | Pipeline":
        """Return what runs forwards and backwards through the model."""
        return Passes(model, compiled, self.begin_part)

    def share(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return this rank's sequences of a step as (first, number), from those of all parts as (first, end)."""
        each = sum(end - first for first, end in ranges) // self.place.parts
        skip, left = self.place.part * each, each
        out = []
        for first, end in ranges:
            start = min(end, first + skip)
            taken = min(left, end - start)
            skip, left = skip - (start - first), left - taken
            out += [(start, taken)] if taken else []
        return out

    def sum_parts(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over the parts of the batch."""

    def sum_stages(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the stages of a pipeline."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over the ranks that hold the same parameter."""

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradients of the whole model, of which each parameter counts once."""
        return get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)

    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that this rank holds, sharing its memory."""
        return tensor

    def divided_like(self, parameter: Tensor, part: Tensor) -> Tensor:
        """Return this rank's part of a tensor that belongs to a parameter, as its optimizer wants it."""
        return part

    def owned(self, matrices: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """Return the matrices that Muon moves on this rank; `exchange_moved` gives it those that others have moved."""
        return list(matrices)

    def exchange_moved(self) -> None:
        """Get the matrices that Muon has moved on other ranks."""

    def muon_update(self, *args: Any, **kwargs: Any) -> None:
        """Compute `muon_update`."""
        muon_update(*args, **kwargs)

    def begin_part(self, model: nn.Module, last: bool) -> None:
        """Prepare the forward and backward of a part of the step's batch."""

    def release(self, model: nn.Module) -> None:
        """Free gathered parameters, which no backward frees, or which were changed outside of a step."""

    def holders(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the ranks that hold the same values as this one in a parameter or a buffer."""
        return (0,)

    def piece(self, parameter: Tensor) -> HeldRows:
        """Return which piece of the whole model's parameter this rank holds."""
        return whole(parameter)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scale gradients so that the whole model's norm is at most max_norm; return the norm before."""
        with_gradient = [p for p in parameters if p.grad is not None]
        norm = self.gradient_norm(with_gradient)
        clip_grads_with_norm_(with_gradient, max_norm, norm, foreach=True)
        return norm
