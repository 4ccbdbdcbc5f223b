"""Save, check and load the state of the optimizers, parameter by parameter."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from dsmini.training.adamw import AdamWBF16
from dsmini.training.muon import Muon


def optimizer_state(optimizers: Iterable[Optimizer], named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the state of each parameter that was moved, as PARAMETER/KEY."""
    names = {p: name for name, p in named}
    return {
        f"{names[p]}/{key}": value
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def check_optimizer_state(
    tensors: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    named: Iterable[tuple[str, Tensor]],
    local: Callable[[Tensor], Tensor] = lambda p: p,
) -> None:
    """Refuse tensors that cannot be the state of these optimizers; ValueError names the first.

    Args:
        local: returns the part of a parameter that is here, which the tensors belong to.
    """
    names = {p: name for name, p in named}
    moved = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    elsewhere = {name for p, name in names.items() if p not in moved}  # moved in other processes
    unknown = {name for name in tensors if name.rpartition("/")[0] not in elsewhere}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            kinds = {f"{names[p]}/{key}": kind for key, kind in _kinds(optimizer, local(p)).items()}
            there = kinds.keys() & tensors.keys()
            unknown -= there
            if there and there != kinds.keys():
                raise ValueError(f"optimizer.safetensors lacks tensor {min(kinds.keys() - there)}")
            for name in sorted(there):
                got, want = (tensors[name].dtype, tensors[name].shape), kinds[name]
                if got != want:
                    raise ValueError(f"optimizer.safetensors: {name} is {_described(*got)}, want {_described(*want)}")
    if unknown:
        raise ValueError(f"optimizer.safetensors has an unknown tensor {min(unknown)}")


def load_optimizer_state(
    tensors: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    named: Iterable[tuple[str, Tensor]],
    divided_like: Callable[[Tensor, Tensor], Tensor] = lambda p, state: state,
) -> None:
    """Load what `optimizer_state` returned. Optimizer.load_state_dict would make FP32 of moments in BF16.

    Args:
        divided_like: makes of this rank's part of a state, given the parameter, what the optimizer holds.
    """
    names = {p: name for name, p in named}
    for optimizer in optimizers:
        optimizer.state.clear()
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            saved = {key: f"{names[p]}/{key}" for key in _kinds(optimizer, p)}
            state = {key: tensors[name] for key, name in saved.items() if name in tensors}
            # the number of steps is a tensor on the CPU, except in the fused AdamW
            fused = optimizer.defaults.get("fused", False)
            if state:
                optimizer.state[p] = {key: _placed(value, p, fused, divided_like) for key, value in state.items()}


def _placed(value: Tensor, p: Tensor, fused: bool, divided_like: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return a copy of a state on the device where the optimizer has it."""
    copied = value.to(p.device if value.dim() or fused else "cpu", copy=True)
    return divided_like(p, copied) if copied.dim() else copied


def _kinds(optimizer: Optimizer, p: Tensor) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return dtype and shape of all that an optimizer stores for a parameter it has moved."""
    if isinstance(optimizer, Muon):
        return {"momentum": (p.dtype, p.shape)}
    moments = torch.bfloat16 if isinstance(optimizer, AdamWBF16) else p.dtype
    return {
        "step": (torch.float32, torch.Size()),
        "exp_avg": (moments, p.shape),
        "exp_avg_sq": (moments, p.shape),
    }


def _described(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} {list(shape)}"
