"""Bytes that a generation says its steps moved: those that the kernels' costs count, and those of accounting."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmini import accounting, ops
from dsmini.accounting import traffic
from dsmini.inference.generation import Generation
from dsmini.inference.stats import Stats
from dsmini.inference.writer import figures_in_words
from dsmini.measure.costs import Cost, cost_of
from dsmini.measure.counting import count
from dsmini.measure.workloads import random_model
from dsmini.nn.cache import CacheDtype
from dsmini.nn.fp8 import hold_all_fp8
from tests.conftest import require_cpu_kernels
from tests.helpers.configs import DSA
from tests.helpers.questions import TINY

PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]
DTYPES: dict[str, CacheDtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": "fp8"}


class Costs:
    """The costs of the kernels that ran, by the name of the operation."""

    def __init__(self) -> None:
        self.of: list[tuple[str, Cost]] = []

    def kernel_ran(self, call: ops.Call) -> None:
        self.of.append((call.name, cost_of(call.name, call.result, *call.args, **call.kwargs)))


def generation(weights: str, prompts: list[list[int]], speculative: bool = False, **changes: Any) -> Generation:
    """Return a generation whose prompts are read."""
    config = dataclasses.replace(TINY, vocab_size=1024, **changes)
    cpu = torch.device("cpu")
    model = random_model(config, cpu, torch.float32 if weights == "float32" else torch.bfloat16)
    if weights == "fp8":
        model = hold_all_fp8(model)
    made = Generation(model, prompts, 8, speculative=speculative, cache_dtype=DTYPES[weights])
    next(made)
    assert made.stats.moved_bytes == made.stats.moved_bytes_per_token == made.stats.moved_bytes_per_s == 0
    return made


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_moved_bytes_are_the_kernels_costs_without_activations(weights: str, rows: int) -> None:
    require_cpu_kernels()
    made = generation(weights, PROMPTS[:rows])
    costs = Costs()
    with ops.counting(costs):
        next(made)
    c = made.model.config
    assert [name for name, _ in costs.of] == ["attention_step", "feed_forward_step"] * c.n_layers + ["normed", "linear"]
    counted = sum(cost.read + cost.written for _, cost in costs.of)
    states, logits = 4 * rows * c.dim, 4 * rows * c.vocab_size
    # each call reads and writes its FP32 states: two a layer, the final norm, and the head, which writes logits
    activations = 2 * 2 * c.n_layers * states + 2 * states + states + logits
    # torch adds the embedding, and the cost leaves out the routing bias of one layer
    by_torch = rows * made.model.embed.weight[0].nbytes + 4 * c.n_routed_experts
    assert made.stats.moved_bytes == pytest.approx(counted - activations + by_torch, abs=c.n_layers)
    assert made.stats.batches == 1 and made.stats.moved_bytes_per_token == made.stats.moved_bytes / rows


@pytest.mark.parametrize("changes", [{}, {"attention": "mha", "q_lora_rank": None}, {"n_dense_layers": 2}, DSA])
def test_moved_bytes_are_a_lower_bound_of_what_pytorch_moves(changes: dict[str, Any]) -> None:
    made = generation("bfloat16", PROMPTS, **changes)
    with ops.use("eager"):
        counted = count(lambda: next(made)).bytes
    assert 0.3 * counted < made.stats.moved_bytes < counted


@pytest.mark.parametrize("changes", [{}, {**DSA, "index_topk": 4}], ids=["mla", "dsa"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_moved_bytes_are_those_of_accounting_without_activations(weights: Any, changes: dict[str, Any]) -> None:
    made = generation(weights, [PROMPTS[0]], **changes)
    routing: list[Tensor] = []
    decoder: Any = made.decoder
    states = decoder.states

    def watched(*arguments: Any) -> Any:
        got = states(*arguments)
        routing.extend(each.counts for each in got.routing)
        return got

    decoder.states = watched
    next(made)
    experts = sum(int((counts > 0).sum()) for counts in routing) / len(routing)
    said = accounting.decode_bytes_per_token(
        made.model.config, context=6, dtype=weights, cache_dtype=weights, experts=experts
    )
    parts = {name: n for name, n in said.by_part.items() if name not in ("activations", "logits", traffic.ATTENDED)}
    assert made.stats.moved_bytes == sum(parts.values())


def test_guesses_move_the_weights_of_their_blocks_and_the_head_again() -> None:
    plain, drafted = (generation("bfloat16", PROMPTS, guesses, n_mtp_layers=1) for guesses in (False, True))
    with ops.use("eager"):
        counted = count(lambda: next(drafted)).bytes
    next(plain)
    block = sum(w.nbytes for name, w in drafted.model.mtp.named_parameters() if ".experts." not in name)
    more = drafted.stats.moved_bytes - plain.stats.moved_bytes
    assert more > block + drafted.model.head.weight.nbytes > 0
    assert drafted.stats.moved_bytes < counted


FAST = Stats(
    prompt_tokens=123456, new_tokens=10**7, prefill_seconds=12345.67, seconds=1e5, steps=10**7, drafted=10**7,
    accepted=10**7 - 1, cache_bytes=10**12, cache_bytes_per_token=1234567.0, rows=16, moved_bytes=10**7 * 39.27e9,
    batches=10**6,
)  # fmt: skip


def test_figures_fit_80_columns_and_end_with_tokens_and_bytes() -> None:
    lines = figures_in_words(FAST, True, 3.35e12).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 3
    one = dataclasses.replace(FAST, new_tokens=1001, rows=1, seconds=10.0, moved_bytes=206e9, cache_bytes=73728)
    last = "1001 new tokens, 100 tokens/s, 206 MB a token"
    assert figures_in_words(one, False, 40e9).splitlines()[-1] == f"{last}, 52% of the roof (40.0 GB/s)"
    assert figures_in_words(one, False).splitlines()[-1] == last
    none = dataclasses.replace(FAST, new_tokens=0, seconds=0.0, moved_bytes=0.0, drafted=0)
    assert figures_in_words(none, True).splitlines()[-1] == "0 new tokens"
