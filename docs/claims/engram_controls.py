"""Two controls of Engram, as arms of python -m dsmini.compare next to a base with engram_layer_ids.

"one row" = ["engram_controls.py:one_row"]          as good as Engram: then its tables tell n-grams apart for nothing
"random ids" = ["engram_controls.py:random_ids"]    as good as Engram: then its parameters help, not what they look up
"another hash" = ["model.engram_seed=1"]            n-grams share rows with others than before: should change nothing
"""

import dataclasses
import zlib

import torch

import dsmini
from dsmini.nn.engram import Engram


class OneRow(Engram):
    """An Engram whose tables have one row for each order and head: every n-gram reads the same numbers.

    What it adds differs between tokens by the gate alone.
    """

    def make_hash(self, compressed=None):
        super().make_hash(compressed)
        self.primes.fill_(1)


class RandomIds(Engram):
    """An Engram that looks up n-grams of tokens drawn at random, others for every batch, also where it is validated.

    Its rows say nothing of the text. Tokens of the text in another order would tell a position what comes after it.
    A batch as a whole is the seed. So torch's own generator, which may draw batches, does not move, and a layer that
    is computed again for its gradients draws the same.
    """

    def hashed(self, context, stored=None):
        tokens = context.tokens
        assert tokens is not None, "the model has them"
        generator = torch.Generator(tokens.device)
        generator.manual_seed(zlib.crc32(tokens.cpu().numpy().tobytes(), self.layer))
        drawn = torch.randint(len(self.compressed), tokens.shape, generator=generator, device=tokens.device)
        return super().hashed(dataclasses.replace(context, tokens=drawn), stored)


def with_engrams_of(kind, config):
    """Return a model and its Engrams, which have become of this class."""
    model = dsmini.Transformer(config)
    engrams = [module for module in model.modules() if isinstance(module, Engram)]
    if not engrams:
        raise ValueError("engram_layer_ids is none, and controls of Engram need a model with one; use toy-engram")
    for engram in engrams:
        engram.__class__ = kind
    return model, engrams


def one_row(config):
    model, engrams = with_engrams_of(OneRow, config)
    for engram in engrams:  # the first row of each head stays
        sizes = engram.primes.flatten()
        engram.embed.weight = torch.nn.Parameter(engram.embed.weight.detach()[sizes.cumsum(0) - sizes])
        engram.make_hash()
    return model


def random_ids(config):
    return with_engrams_of(RandomIds, config)[0]
