"""Engram: the hash to the last bit, its read written down a second time, gradients, bad input."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsmini import ModelConfig, Transformer, generate
from dsmini.config.model import SLACK
from dsmini.nn import Context
from dsmini.nn.engram import Engram, multipliers
from dsmini.training.optim import Muon
from tests.conftest import SMALL, randomise
from tests.helpers.configs import DSA, ENGRAM, V4_MODEL
from tests.helpers.models import decoded
from tests.helpers.tolerances import FP32_MODEL, relative_error
from tests.training.test_optim import movers

CONFIGS: dict[str, dict[str, Any]] = {
    "V3": ENGRAM,
    "V3, a large order": ENGRAM | {"engram_max_ngram_size": 5, "engram_conv_size": 2},
    "V4": V4_MODEL | ENGRAM | {"engram_conv_size": None, "engram_max_ngram_size": 4},
    "V4 with a convolution": V4_MODEL | ENGRAM,
    "GLM-5.2": DSA | ENGRAM | {"indexer_types": ("full", "shared"), "engram_layer_ids": (1,)},
}
CASES = pytest.mark.parametrize("case", CONFIGS)


def model_of(case: str, **changes: Any) -> Transformer:
    """Make a model with random weights and compressed ids: tables and convolutions of size, to show an error."""
    model: Any = randomise(Transformer(ModelConfig(**SMALL | CONFIGS[case] | changes))).eval()
    for engram in (module for module in model.modules() if isinstance(module, Engram)):
        engram.make_hash(torch.arange(model.config.vocab_size) * 2 // 3)
        engram.embed.weight.data.normal_()
        if engram.conv is not None:
            engram.conv.weight.data.normal_()
    return model


def tokens_of(model: Transformer, b: int, s: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (b, s))


# --- the hash


def test_primes_and_multipliers_are_those_of_v4_1() -> None:
    """With 99,092 compressed ids, four tokens, and 16 million rows or more of each of eight heads."""
    sizes: dict[str, Any] = {"engram_max_ngram_size": 4, "engram_n_heads": 8, "engram_vocab_size": 16_000_000}
    c = ModelConfig(n_layers=16, engram_layer_ids=(1, 14), **sizes)
    published = {
        1: (16_000_057, 16_000_463, 384_006_168, [76632096046245, 4839876093313, 35959672319349, 73987337458391]),
        14: (16_000_477, 16_000_889, 384_016_682, [67716810739261, 51510806800915, 30921347202721, 82619226485591]),
    }
    for layer, (first, last, rows, odd) in published.items():
        primes = c.engram_primes(layer)
        assert (primes[0][0], primes[-1][-1], sum(map(sum, primes))) == (first, last, rows)
        assert multipliers(0, layer, 99_092, 4).tolist() == odd


def second_definition(engram: Engram, x: Tensor, tokens: Tensor) -> Tensor:
    """Return streams [s, n, m] after Engram of one sequence, position by position, with Python's whole numbers."""
    c, (s, n, m) = engram.config, x.shape
    ids, odd = engram.compressed.tolist(), engram.multipliers.tolist()
    found, pad = [], ids[c.engram_pad_token_id]
    for t in range(s):
        mix, row, start = 0, [], 0
        for k in range(c.engram_max_ngram_size):
            mix ^= (ids[int(tokens[t - k])] if t >= k else pad) * odd[k]
            for prime in engram.primes[k - 1].tolist() if k else []:
                row.append(engram.embed.weight[start + mix % prime])
                start += prime
        found.append(torch.cat(row))
    e = torch.stack(found)

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()

    u = torch.empty_like(x)
    for i in range(n):
        k = F.linear(e, engram.wk.weight[i * m : (i + 1) * m])
        dot = (rms(x[:, i]) * engram.q_norm.weight[i] * engram.k_norm.weight[i] * rms(k)).sum(-1, keepdim=True) / m**0.5
        u[:, i] = torch.sigmoid(dot.sign() * dot.abs().clamp(min=1e-6).sqrt()) * F.linear(e, engram.wv.weight)
    if engram.conv is None or engram.conv_norm is None:
        return x + u
    normed, dilation = rms(u) * engram.conv_norm.weight, c.engram_max_ngram_size
    mixed = torch.zeros_like(u)
    for t in range(s):
        for k, weight in enumerate(engram.conv.weight.flip(0)):
            if t >= k * dilation:
                mixed[t] += weight * normed[t - k * dilation]
    return x + u + mixed * torch.sigmoid(mixed)


@CASES
def test_read_is_what_the_equations_say(case: str) -> None:
    model = model_of(case).double()
    engram: Any = model.layers[1].engram
    tokens, n, m = tokens_of(model, 2, 23), model.config.hc_mult, model.config.dim
    x = torch.randn(2, 23, n, m, dtype=torch.float64)
    context = Context(positions=torch.arange(23)[None], tokens=tokens)
    got = engram(x if n > 1 else x[:, :, 0], context)[0].view_as(x)
    for row, want in enumerate(second_definition(engram, x[row], tokens[row]) for row in range(2)):
        assert relative_error(got[row], want) < 1e-12


@CASES
def test_attention_reads_what_was_looked_up(case: str) -> None:
    """A block is its Engram, then the block without one."""
    model = model_of(case)
    block: Any = model.layers[1]
    tokens = tokens_of(model, 2, 23)
    context = Context(positions=torch.arange(23)[None], tokens=tokens)
    x, _ = model.layers[0](model.hc_head.expand(model.embedded(tokens)), context)
    got, engram = block(x, context)[0], block.engram
    block.engram = None
    assert torch.equal(block(engram(x, context)[0], context)[0], got)


def test_a_state_has_the_hash() -> None:
    """A model that gets it has other compressed ids before."""
    model = model_of("V3")
    again = Transformer(model.config)
    again.load_state_dict(model.state_dict())
    tokens = tokens_of(model, 2, 23)
    assert torch.equal(again.eval()(tokens), model(tokens))


# --- caches


def test_cache_takes_back_no_more_than_it_remembers() -> None:
    model = model_of("V3", max_seq_len=64)
    cache = model.new_cache(1, 64)
    model(tokens_of(model, 1, SLACK + 9), cache)
    with pytest.raises(ValueError, match=f"can take back {SLACK}"):
        cache.truncate(8)


@CASES
def test_what_it_takes_back_is_read_again_as_in_one_pass(case: str) -> None:
    """It takes back all that it can. Its rings then hold no more than the next token looks back to."""
    model = model_of(case, max_seq_len=96)
    tokens, cache = tokens_of(model, 2, 80), model.new_cache(2, 96)
    model(tokens, cache)
    cache.truncate(80 - SLACK)
    assert relative_error(model(tokens[:, -SLACK:], cache), model(tokens)[:, -SLACK:]) < FP32_MODEL


@pytest.mark.parametrize("dtype", [torch.bfloat16, "fp8"])
def test_a_cache_of_low_precision_has_every_id(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """BF16 cannot hold 257."""
    model, rows = model_of("V3", vocab_size=3000), list[Tensor]()
    real = Engram.hashed
    monkeypatch.setattr(Engram, "hashed", lambda *args: (rows.append(real(*args)), rows[-1])[1])
    tokens = tokens_of(model, 2, 12)
    model(tokens)
    decoded(model, tokens, 3, 12, dtype)
    whole, *parts = rows[::2]  # of the first of two layers
    assert torch.equal(torch.cat(parts, 1), whole)


@CASES
def test_guesses_change_no_token(case: str) -> None:
    model = model_of(case, n_mtp_layers=2)
    prompts = [tokens_of(model, 1, n)[0] for n in (3, 9, 1)]
    plain, guessed = (generate(model, prompts, 15, speculative=speculative) for speculative in (False, True))
    assert torch.equal(plain.tokens, guessed.tokens) and guessed.stats.drafted


# --- training


def test_gradients_of_repeated_rows_are_summed_in_a_fixed_order() -> None:
    """A thousand equal tokens give one row of each head the same bits, however often, and with one thread too."""
    engram = Engram(**SMALL | ENGRAM | {"engram_conv_size": None, "max_seq_len": 1000})
    context = Context(positions=torch.arange(1000)[None], tokens=torch.full((1, 1000), 7))
    x, grads = torch.randn(1, 1000, engram.config.dim), []
    for threads in (torch.get_num_threads(), 1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        engram.zero_grad()
        engram(x, context)[0].square().sum().backward()
        torch.set_num_threads(before)
        assert engram.embed.weight.grad is not None
        grads.append(engram.embed.weight.grad)
    assert all(torch.equal(grads[0], grad) for grad in grads)
    assert int(grads[0].any(-1).sum()) == 2 * (2 + 3), (
        "two heads: a pair, a triple, and those that begin before the start"
    )


def test_tables_have_adam_five_times_its_rate_and_no_decay() -> None:
    model = Transformer(**SMALL | ENGRAM)
    rates = movers(model, optimizer="muon", lr=1e-3, weight_decay=0.1)
    kind, lr, decay = rates["layers.1.engram.embed.weight"]
    assert (kind is not Muon, lr, decay) == (True, 5e-3, 0.0)
    assert rates["layers.1.engram.wk.weight"][0] is Muon
    for name in ("q_norm", "k_norm", "conv", "conv_norm"):
        assert rates[f"layers.1.engram.{name}.weight"] == (torch.optim.AdamW, 1e-3, 0.0)


def test_starts_without_a_convolution() -> None:
    """So that a table first adds its own rows alone."""
    with_it, without = (
        Transformer(ModelConfig(**SMALL | ENGRAM | {"n_layers": 3, "engram_conv_size": size})) for size in (4, None)
    )
    assert not without.load_state_dict(with_it.state_dict(), strict=False).missing_keys
    tokens = tokens_of(with_it, 2, 9)
    assert torch.equal(with_it(tokens), without(tokens))


# --- bad input


def test_ids_and_layers_that_are_missing_are_refused() -> None:
    engram = Engram(**SMALL | ENGRAM)
    with pytest.raises(ValueError, match=r"ids of tokens and got none; give Context\(tokens"):
        engram(torch.randn(1, 3, engram.config.dim), None)
    with pytest.raises(ValueError, match=r"block 1 has no Engram; name it in engram_layer_ids=\[0\]"):
        Engram(dataclasses.replace(engram.config, engram_layer_ids=(0,)), layer=1)
