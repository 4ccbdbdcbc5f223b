"""The speedruns' table of pairs: hashed rows of a token and the one before it, added to the input of every block.

"pairs" = ["pairs.py:pairs"] is an arm of python -m dsmini.compare. Rows are zero at first. Each block has a factor that
is learned, 0.1 at first; there is no gate and no product. The first token of a sequence has the last row.

Source: modded-nanogpt, pull request 201.
"""

import torch
import torch.nn.functional as F

import dsmini
from dsmini.nn.layers import Embedding

ROWS = 6058


def rows_of(tokens):
    """Return the row of each token and the one before it, [b, s]."""
    rows = ((36313 * tokens) ^ (27191 * tokens.roll(1, dims=1))) % (ROWS - 1)
    rows[:, 0] = ROWS - 1
    return rows


def pairs(config):
    model = dsmini.Transformer(config)
    tokens = model.embed
    model.embed = Embedding(config.vocab_size + ROWS, config.dim)  # one matrix: AdamW moves it as the embedding
    with torch.no_grad():
        model.embed.weight.zero_()[: config.vocab_size] = tokens.weight

    def add(block, inputs):
        x, context = inputs
        found = F.embedding(config.vocab_size + rows_of(context.tokens), model.embed.weight)
        return x + (block.of_pairs * found).to(x.dtype), context

    for block in model.layers:
        block.of_pairs = torch.nn.Parameter(torch.tensor(0.1))
        block.register_forward_pre_hook(add)
    return model
