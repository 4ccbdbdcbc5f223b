"""Cases of the model's operations, and the error of an implementation next to the reference in FP64."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmini import ops
from dsmini.nn.attention import cached_attention, causal_attention
from dsmini.nn.fp8 import quantized_experts, quantized_linear
from dsmini.nn.hyper_connections import read_streams, sinkhorn, stream_mixes, write_streams
from dsmini.nn.layers import linear, rms_norm
from dsmini.nn.mla import absorbed_attention
from dsmini.nn.moe import experts
from dsmini.nn.transformer import IGNORE, linear_cross_entropy
from dsmini.numerics import QuantizedTensor
from tests.helpers.tolerances import BF16_UNIT, FP32_UNIT, rounding

DTYPES = (torch.float32, torch.bfloat16)
Routing = tuple[Tensor, Tensor]


class Case(NamedTuple):
    operation: ops.Operation[Any, Tensor]
    arguments: tuple[Any, ...]
    terms: int
    """Terms of the longest sum, which FP32 adds."""
    chained: int = 4
    """Results that are rounded to the operands' dtype, one after the other."""

    @property
    def floats(self) -> list[int]:
        """Places of the floating-point tensors."""
        return [i for i, a in enumerate(self.arguments) if isinstance(a, Tensor) and a.is_floating_point()]

    @property
    def tolerance(self) -> float:
        sums = rounding(FP32_UNIT, terms=self.terms, chained=self.chained)
        in_fp32 = self.arguments[self.floats[0]].dtype == torch.float32
        return sums if in_fp32 else sums + rounding(BF16_UNIT, chained=self.chained)

    def changed(self, changes: dict[int, Any]) -> "Case":
        """Return the case with other arguments at these places."""
        return self._replace(arguments=tuple(changes.get(i, a) for i, a in enumerate(self.arguments)))


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def routed(n: int, k: int, e: int, empty: tuple[int, ...] = ()) -> Routing:
    """Return indices and weights of tokens that choose k random experts outside the empty ones."""
    open_to_all = torch.tensor([i for i in range(e) if i not in empty])
    indices = open_to_all[torch.rand(n, len(open_to_all)).argsort()[:, :k]]
    return indices, torch.rand(n, k) + 0.5


def tied(n: int, k: int) -> Routing:
    """Return the same for tied scores: every token chooses the first k experts with equal weights."""
    return torch.arange(k).expand(n, k).contiguous(), torch.full((n, k), 1 / k)


def expert_case(
    n: int, dtype: torch.dtype, m: int = 24, f: int = 16, e: int = 6, k: int = 2, routing: Routing | None = None
) -> Case:
    torch.manual_seed(n)  # the gradient of a routing weight is one product, whose terms may cancel
    indices, weights = routing or routed(n, k, e, empty=(0, 3) if e > 4 else ())
    w1, w2, w3 = (normal(e, *size, scale=size[1] ** -0.5) for size in ((f, m), (m, f), (f, m)))
    return Case(experts, (normal(n, m, dtype=dtype), indices, weights, w1, w2, w3), terms=m, chained=8)


def mask_of(s: int, t: int, batch: int) -> Tensor:
    """Hide a later key from each query, and some of the middle from the first row."""
    mask = torch.arange(t) > torch.arange(t - s, t)[:, None]
    mask = mask.expand(batch, s, t).clone()
    mask[0, :, t // 3 : t // 2] = True
    return mask


def cases(n: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield every operation at n tokens, odd widths and a batch of two where there is one."""

    def x(*shape: int, scale: float = 1.0) -> Tensor:
        return normal(*shape, dtype=dtype, scale=scale)

    yield Case(linear, (x(2, n, 23), normal(31, 23)), terms=23)
    yield Case(rms_norm, (x(2, n, 23), torch.rand(23) + 0.5, 1e-6), terms=23)
    documents = (torch.arange(n) // 20).expand(2, n)
    for given in (None, documents):
        yield Case(causal_attention, (x(2, 3, n, 12), x(2, 3, n, 12), x(2, 3, n, 7), 0.3, given), terms=n)
    t = n + 40
    for s in {1, n}:
        for mask in (None, mask_of(s, t, 1), mask_of(s, t, 2)):
            yield Case(cached_attention, (x(2, 6, s, 8), x(2, 3, t, 8), x(2, 3, t, 5), 0.3, mask), terms=t)
            latent = (x(2, s, 3, 7), x(2, s, 3, 4), x(2, t, 14), x(3, 7, 10, scale=0.4), x(3, 10, 5, scale=0.4))
            yield Case(absorbed_attention, (*latent, 0.3, mask), terms=t, chained=6)
    yield expert_case(n, dtype)
    yield expert_case(n, dtype, m=23, f=11)
    yield expert_case(n, dtype, routing=routed(n, 1, 6, empty=(0, 1, 2, 3, 5)))  # all tokens to one expert
    yield expert_case(n, dtype, routing=tied(n, 2))
    yield expert_case(n, dtype, e=40, k=3)  # of one token, without gradients: fewer than half are asked, in turn
    streams, post, comb = x(2, n, 3, 37), normal(2, n, 3), normal(2, n, 3, 3)
    yield Case(stream_mixes, (streams, normal(9, 111), 1e-6), terms=111)
    yield Case(read_streams, (streams, post), terms=37)
    yield Case(write_streams, (streams, x(2, n, 37), post, comb), terms=37)
    if dtype == torch.float32:
        for width, iterations in ((4, 20), (3, 1), (1, 2), (7, 5)):
            logits = normal(2, n, width, width, scale=3.0)
            yield Case(sinkhorn, (logits, iterations, 1e-6), terms=width, chained=4 * iterations)
    targets = torch.randint(0, 61, (n,)).masked_fill(torch.rand(n) < 0.3, IGNORE)
    yield Case(linear_cross_entropy, (x(n, 24), normal(61, 24), targets), terms=max(n, 61))


def run(case: Case, implementation: Callable[..., Tensor]) -> list[Tensor]:
    """Return the result, and the gradient of a fixed random projection for every floating-point operand."""
    leaves = {i: case.arguments[i].detach().requires_grad_() for i in case.floats}
    with torch.enable_grad():
        y = implementation(*case.changed(leaves).arguments)
    direction = torch.randn(y.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(7)).bfloat16()
    return [y.detach(), *torch.autograd.grad(y, [*leaves.values()], direction.to(y.dtype))]


def exact(case: Case) -> list[Tensor]:
    """Run the reference on the same numbers in FP64."""
    first = case.arguments[case.floats[0]]
    rounds = case.operation in (linear, experts, linear_cross_entropy) and first.dtype == torch.bfloat16

    def wide(a: Any) -> Any:
        if isinstance(a, QuantizedTensor):
            return a.dequantize().double()
        if not isinstance(a, Tensor) or not a.is_floating_point():
            return a
        return a.bfloat16().double() if rounds else a.double()  # products round weights to the operands' dtype

    plain = {quantized_experts: experts, quantized_linear: linear}.get(case.operation, case.operation)
    return run(case._replace(arguments=tuple(map(wide, case.arguments))), plain.reference)


def assert_agrees(case: Case, got: Sequence[Tensor], want: Sequence[Tensor], rows: bool = False) -> None:
    """Check the error of a result and of its gradients, or of each row: a wrong row would not show in the norm of all.

    The size of a row is that of the largest, since the gradient of a query that sees one key is zero.
    """
    for part, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        scale = max(b.norm().item(), 1e-3 * want[0].norm().item()) or 1.0  # all targets ignored
        error = (a.cpu().double() - b).norm().item() / scale
        if rows:
            error = max(error, ((a.double() - b).norm(dim=-1).max() / (b.norm(dim=-1).max() or 1.0)).item())
        name, most = case.operation.name, case.tolerance
        assert error <= most, f"{name}, part {part}: {error:.1e} > {most:.1e}"
