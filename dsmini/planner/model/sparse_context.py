"""Keys that a query meets, and the products of DSA's indexer with them. Attention that is not DSA meets all keys.

    keys of a token at position t          min(t, k)
    mean over a sequence of T tokens       T / 2, or k - k^2 / (2 T) from T = k on
    scores of the indexer, a key           index_n_heads index_head_dim multiply-adds, for all keys
    loss of the indexer in training        3 times the scores of picked keys, and n_heads d_qk of all keys: the target

Worked example, V3.2 at 4096 tokens: a query attends to 2048 - 2048^2 / 8192 = 1536 keys on average and scores 2048.

Source: DeepSeek-V3.2 report (arXiv 2512.02556), section 2.1; dsmini.accounting.flops.
"""

from dsmini.planner.model.matrices import key_width
from dsmini.planner.quantities.inputs import ModelInputs
from dsmini.planner.quantities.quantity import TOKENS, Count, Tokens, number_of, smallest


def is_sparse(m: ModelInputs) -> bool:
    """Return True for a model with indexers."""
    return m.config.attention == "dsa"


def keys_met(m: ModelInputs, context: Tokens) -> Count:
    """Return the number of keys that a new token attends to, of those of its context."""
    seen = number_of(context)
    return smallest(seen, m.index_topk) if is_sparse(m) else seen


def mean_keys(m: ModelInputs, seq_len: Tokens) -> Count:
    """Return the number of keys that a token of a sequence attends to on average, causal."""
    if not is_sparse(m):
        return seq_len / TOKENS(2)
    met = keys_met(m, seq_len)
    return met - met * met / (2 * number_of(seq_len))


def score_products(m: ModelInputs) -> Count:
    """Return the multiply-adds of a query's scores with one key, all heads of the indexer."""
    return m.index_n_heads * m.index_head_dim


def indexer_training_products(m: ModelInputs, met: Count, seen: Count) -> Count:
    """Return the multiply-adds of a query with keys in a layer's scores and indexer's loss, in the sparse stage.

    Args:
        met: keys whose scores the loss compares.
        seen: keys that are scored.
    """
    score = score_products(m)
    return score * seen + 3 * score * met + m.n_heads * key_width(m) * seen
