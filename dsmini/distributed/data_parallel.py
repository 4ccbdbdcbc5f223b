"""Data parallel with divided state: FSDP2 divides each parameter's rows among the ranks that would hold the same one.

    zero    divided                 sent in a step, in sizes of the model
    0       nothing                 gradients once, all-reduce: 2
    1       + optimizer state       gradients once, parameters once: 1 + 1
    2       + gradients             gradients once a part of the batch, parameters once: n + 1
    3       + parameters            gradients once a part, parameters twice a part (forward, backward): n + 2 n

Parameters stay FP32 masters, and are gathered in FP32. The layers cast them to the compute dtype themselves. FSDP2's
own mixed precision would round the FP32 gates and norms too, and send tokens to other experts.

Gradients are summed, never averaged: the loss is divided once by the targets of the whole step. So every module gets
the divisor 1 and the plain sum (gloo knows no other). Another divisor for experts alone would be applied twice where
one rank holds an expert.

Source: Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054; Zhao et al. 2023 (FSDP), arXiv 2304.11277.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dsmini.nn.moe import Experts


def shard(model: nn.Module, blocks: list[nn.Module], zero: int, parts: DeviceMesh, dp: DeviceMesh | None) -> None:
    """Divide a model's parameters by FSDP2: each block is gathered as one, and the rest as another.

    Args:
        parts: mesh of the ranks that hold the same parameters, experts apart.
        dp: mesh of the ranks that hold the same experts; None: the experts are as all else.
    """
    reshard = zero == 3
    apart: set[nn.Parameter] = set()
    for experts in (module for module in model.modules() if isinstance(module, Experts) and dp is not None):
        if dp is not None and dp.size() > 1:
            fully_shard(experts, mesh=dp, reshard_after_forward=reshard)
        else:  # no other rank has them
            apart |= set(experts.parameters())
    for block in blocks:
        fully_shard(block, mesh=parts, reshard_after_forward=reshard, ignored_params=apart)
    fully_shard(model, mesh=parts, reshard_after_forward=False, ignored_params=apart)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ("losses", "states"):
        register_fsdp_forward_method(model, name)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules that FSDP2 divides."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def set_last_part(model: nn.Module, zero: int, last: bool) -> None:
    """Choose what is sent after the next backward: gradients and memory of the last part of a step, or less before."""
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(last or zero >= 2, recurse=False)
        module.set_reshard_after_backward(last or zero == 3, recurse=False)


def reshard(model: nn.Module) -> None:
    """Forget gathered parameters, after the divided ones were changed."""
    for module in sharded_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a divided tensor that are here, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided_like(parameter: Tensor, rows: Tensor) -> Tensor:
    """Return this rank's rows as a tensor divided as a parameter is."""
    if not isinstance(parameter, DTensor):
        return rows
    of: Any = parameter
    return cast(
        Tensor,
        DTensor.from_local(rows, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()),
    )


def first_row(parameter: Tensor) -> tuple[int, int]:
    """Return the first row of a divided parameter that is here, and the number of rows on all ranks."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0] if parameter.dim() else 1
    size, rank = parameter.device_mesh.size(), parameter.device_mesh.get_local_rank()
    rows = parameter.shape[0]
    each = -(-rows // size)
    return min(rows, rank * each), rows
