"""V4's attention of few queries in C++ agrees with its equation in FP64, over rows as a cache stores them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import ModelConfig, Transformer, ops
from dsmini.nn.cache import Rows
from dsmini.nn.codec import Codec, FP4Row, Numbers, index_row, key_row
from dsmini.nn.compressed_attention import entry_attention
from dsmini_kernels import Unserved, cpu
from tests.conftest import MODELS, SMALL, randomise
from tests.helpers.operations import Case
from tests.helpers.tolerances import BF16_CACHE, FP32_MODEL, moved_codes, relative_error
from tests.kernels.conftest import assert_threads_change_no_bit
from tests.kernels.test_cpu_operations import Kernels

pytestmark = pytest.mark.usefixtures("library", "serves_all")
EVERY_TYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
V4 = MODELS["v4"]
STORED = ("tensor", "fp32", "bf16", "fp8", "fp4")
SHAPES = (
    (1, 1, 64, 512, 128, 250, 0),
    (1, 2, 130, 96, 17, 133, 20),  # more heads than a panel has
    (2, 3, 5, 40, 17, 333, 0),
    (2, 3, 5, 64, 131, 90, 90),
    (1, 1, 3, 32, 1, 0, 0),
    (4, 8, 4, 16, 9, 3, 1),
)
"""b, s, heads, width, rows of the window, entries, and how many are chosen, 0 for all."""


def codec_of(kind: str, width: int) -> Codec:
    rotated = width // 8 + 1
    numbers = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if kind in numbers:
        return Numbers(width, numbers[kind])
    return key_row(width - rotated, rotated) if kind == "fp8" else FP4Row(width)


def entry_case(dtype: torch.dtype, kind: str, shape: tuple[int, ...], scale: float = 1.0) -> Case:
    """Return attention to entries stored in a longer cache. Scores are moderate, whatever the scale of all rows is."""
    b, s, heads, width, near, n, k = shape
    rows: Any = torch.randn(b, n + 3, width) * scale
    if kind == "tensor":
        rows = rows.to(dtype)
    else:
        cache = Rows(b, n + 3, codec_of(kind, width), rows.device)
        cache.data[:] = cache.codec.encode(rows)
        rows = cache
    q, window = torch.randn(b, s, heads, width) / max(scale, 1e-37), torch.randn(b, near, width) * scale
    chosen = torch.rand(b, s, n).topk(k).indices if k else None
    if chosen is not None:
        chosen[torch.rand(chosen.shape) < 0.2] = -1
    masked, hidden = torch.rand(b, s, near) < 0.2, torch.rand(b if k else 1, s, n) < 0.3
    hidden[..., n // 2 : 2 * n // 3] = True  # rows that no query sees
    arguments = (q.to(dtype), window.to(dtype), masked, rows, hidden, chosen, torch.randn(heads), width**-0.5)
    return Case(entry_attention, arguments, terms=width + near + n)


def exact(case: Case) -> Tensor:
    q, near, masked, rows, hidden, chosen, sink, scale = case.arguments
    read = rows if isinstance(rows, Tensor) else rows.read(hidden.shape[2], q.dtype)
    wide = q.double(), near.double(), masked, read.double(), hidden, chosen, sink.double(), scale
    return entry_attention.reference(*wide)


def served(case: Case) -> Tensor:
    with ops.use("cpu"):
        return entry_attention(*case.arguments)


@EVERY_TYPE
@pytest.mark.parametrize("kind", STORED)
def test_attention_agrees_and_threads_change_no_bit(isa: str, kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if kind == "fp4" and shape[3] % 32:
            continue
        case = entry_case(dtype, kind, shape)
        (got,) = assert_threads_change_no_bit(lambda case=case: [served(case)], most=4)
        want = exact(case)
        assert got.dtype == dtype and got.shape == want.shape
        for a, b in zip(got.flatten(0, 1), want.flatten(0, 1), strict=True):  # a wrong query would not show in all
            assert relative_error(a, b) <= case.tolerance, shape


@EVERY_TYPE
@pytest.mark.parametrize("kind", STORED)
def test_plain_versions_agree(kind: str, dtype: torch.dtype) -> None:
    case = entry_case(dtype, kind, (2, 3, 5, 64, 13, 90, 20))
    for backend in ("reference", "eager"):
        with ops.use(backend):
            assert relative_error(entry_attention(*case.arguments), exact(case)) <= case.tolerance


@pytest.mark.parametrize("scale", [1e15, 1e-30, 1e-39])
@pytest.mark.parametrize("kind", ["tensor", "bf16"])
def test_rows_of_any_magnitude_agree(isa: str, kind: str, scale: float) -> None:
    """The smallest are subnormal, whose step is 2^-149."""
    for dtype in (torch.float32, torch.bfloat16) if scale > 1e-30 else (torch.float32,):
        case = entry_case(dtype, kind, SHAPES[2], scale)
        got, want = served(case).double(), exact(case)
        assert got.isfinite().all()
        assert (got - want).norm() <= case.tolerance * want.norm() + want.numel() ** 0.5 * case.terms * 2.0**-149


@EVERY_TYPE
def test_large_logits_choose_one_row_or_the_sink(isa: str, dtype: torch.dtype) -> None:
    case = entry_case(dtype, "tensor", (1, 2, 6, 64, 20, 90, 0))
    q, near, masked, rows, _, _, sink, _ = case.arguments
    nothing = torch.zeros(1, 2, 90, dtype=torch.bool)
    # products of whole numbers are exact, so that the largest logit is the same one
    q, near, rows = ((4 * t.float()).round().to(dtype) for t in (q, near, rows))
    large = case.changed({0: q * 2.0**40, 1: near, 3: rows, 4: nothing})
    assert relative_error(served(large), exact(large)) <= case.tolerance
    assert not served(case.changed({6: sink + 1e15})).any(), "the sink has no value"
    masks = {2: torch.ones_like(masked), 4: ~nothing}
    assert not served(case.changed(masks)).any(), "a query that sees no row"


@EVERY_TYPE
def test_bad_numbers_reach_the_queries_that_see_them(isa: str, dtype: torch.dtype) -> None:
    for kind in ("tensor", "fp8"):
        case = entry_case(dtype, kind, (1, 3, 5, 64, 20, 90, 30))
        chosen, rows, masked = case.arguments[5], case.arguments[3], case.arguments[2]
        masked.zero_()
        place = int(chosen[0, 1].max())
        chosen[0, 0, chosen[0, 0] == place] = -1
        if kind == "tensor":
            rows[0, place, 3] = torch.nan
        else:
            row = torch.randn(1, 64).index_fill(1, torch.tensor(3), torch.nan)
            rows.data[0, place] = rows.codec.encode(row)[0]
        bad = served(case)[0].isnan()
        assert not bad[0].any() and bad[1].any(-1).all()
        case.arguments[1][0, 7] = torch.inf
        assert not served(case).isfinite().any(-1).all()


def test_what_is_not_served_says_why() -> None:
    case = entry_case(torch.float32, "fp8", (1, 2, 5, 64, 20, 90, 30))
    q, chosen, sink = (case.arguments[i] for i in (0, 5, 6))
    other = Rows(1, 93, index_row(64), q.device)
    wide = entry_case(torch.float32, "tensor", (1, 1, 1, 1056, 3, 3, 0))
    for changed, reason in (
        (case.changed({0: q.bfloat16()}), "bfloat16"),
        (case.changed({6: sink.double()}), "a sink of torch.float64"),
        (case.changed({3: other}), "scales in torch.float32"),
        (case.changed({3: torch.zeros(1, 93, 64, dtype=torch.float16)}), "rows of torch.float16"),
        (wide, "rows of 1056 numbers"),
    ):
        with pytest.raises(Unserved, match=reason):
            cpu.entry_attention(*changed.arguments)
    many = entry_case(torch.float32, "tensor", (1, 40, 1, 8, 40, 3, 0))
    with pytest.raises(Unserved, match=r"^$"):
        cpu.entry_attention(*many.arguments)
    for place in (90, -2, 1 << 40):
        chosen[0, 1, 2] = place
        with pytest.raises(RuntimeError, match="beyond their memory"):
            cpu.entry_attention(*case.arguments)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, "fp8"], ids=str)
def test_a_model_decodes_unequal_and_speculative_rows_by_the_kernel(cache_dtype: Any) -> None:
    c = ModelConfig(**SMALL | V4 | {"n_mtp_layers": 0, "max_seq_len": 64})
    model = randomise(Transformer(c, compute_dtype=torch.float32)).eval()
    prompt, steps = torch.randint(0, 60, (2, 24)), torch.randint(0, 60, (3, 2, 3))
    logits, kernels = list[Tensor](), Kernels()
    for backend in (None, "eager"):
        cache = model.new_cache(2, 64, dtype=cache_dtype)
        with ops.use(backend), ops.counting(kernels):
            model(prompt, cache=cache, lengths=torch.tensor([24, 13]))
            logits.append(torch.cat([model(tokens, cache=cache) for tokens in steps]))
    stored = {torch.float32: FP32_MODEL, torch.bfloat16: BF16_CACHE, "fp8": moved_codes(FP32_MODEL)}
    assert relative_error(*logits) < stored[cache_dtype]
    assert kernels.count("entry_attention") >= 3 * model.config.n_layers
