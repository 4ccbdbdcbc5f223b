"""The part of a model that a rank trains, made without ever holding the whole.

    1. the whole model on the meta device, which has shapes and no memory
    2. divided there: layers of a pipeline, experts, rows of FSDP2
    3. memory for what is left
    4. one tensor after the other, in the order of a single process: draw it whole, copy the own rows, free it

Every rank draws every tensor. So the generators agree afterwards, and the bits are those of a single process. The peak
is the own part and one tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsmini.config import ModelConfig
from dsmini.distributed.data_parallel import local
from dsmini.distributed.mesh import Mesh
from dsmini.distributed.pieces import HeldRows
from dsmini.nn import Transformer

Rows = Callable[[str, slice], Tensor]
"""Returns rows of a tensor of a whole model, by its name in the state dict."""


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """A model, or a rank's part of it, on the meta device until it is filled."""

    model: Transformer
    mesh: Mesh

    @classmethod
    def divided(cls, config: ModelConfig, mesh: Mesh) -> "ModelPart":
        """Divide a new model. All ranks call it together."""
        model = meta_model(config)
        mesh.divide(model)
        return cls(model=model, mesh=mesh)

    @torch.no_grad()
    def fill(self, device: torch.device, rows: Rows | None = None) -> None:
        """Allocate the part's memory on a device and give it values.

        Args:
            rows: reads them, and only the own. None: they are drawn from torch's own generator, as a single process
                draws the whole model.
        """
        self.model.to_empty(device=device)
        self.mesh.note(self.model)
        held = {name: (local(t), self.mesh.piece(t)) for name, t in _tensors(self.model, recurse=True)}
        if rows is not None:
            for name, (tensor, piece) in ((name, of) for name, of in held.items() if of[1].rows):
                tensor.copy_(rows(name, slice(piece.first, piece.first + piece.rows)))
            return
        for path, module in meta_model(self.model.config).named_modules():
            for name, _ in _tensors(module):
                _keep(held.get(f"{path}.{name}"), _drawn(module, name))


def meta_model(config: ModelConfig) -> Transformer:
    """Return a model that has shapes and no memory."""
    with torch.device("meta"):
        return Transformer(config)


def _tensors(module: nn.Module, recurse: bool = False) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]


def _drawn(module: nn.Module, name: str) -> Tensor:
    """Return the first value of a tensor of a module on the meta device."""
    meta = dict(_tensors(module))[name]
    tensor = torch.empty_like(meta, device="cpu")
    module.load_state_dict({name: tensor}, strict=False, assign=True)
    module.reset_parameters()  # pyright: ignore[reportCallIssue] # nothing is drawn for the others, which are on meta
    module.load_state_dict({name: meta}, strict=False, assign=True)
    return tensor


def _keep(held: tuple[Tensor, HeldRows] | None, whole: Tensor) -> None:
    if held is not None:
        tensor, piece = held
        tensor.copy_(piece.of(whole))
