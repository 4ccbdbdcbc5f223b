"""The order of training: an endless stream of which sequence number n is computed when it is needed.

An epoch is a permutation of all windows of the text. Shuffling a list of them would take memory that grows with the
text and a state to save. Here the permutation is a function of the seed, so a position in the stream is one number, and
a run can continue anywhere.

The function is a Feistel network: it cuts an index into two halves and adds to each in turn a hash of the other. That
can be undone, so no two indices have the same image, whatever the hash. It permutes a power of four that is less than
four times too large. A result that is not a window is permuted again until it is one (cycle walking).

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002. Not a cipher here: a shuffle.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def window_starts(first: int, n: int, length: int, seq_len: int, seed: int) -> NDArray[np.int64]:
    """Return the places in a text, read as a circle, where sequences first .. first + n - 1 of the stream begin.

    Each epoch has its own random offset and order, and covers every token once, but for a remainder of less than
    seq_len tokens.
    """
    windows = length // seq_len
    numbers = np.arange(first, first + n)
    starts = np.empty(n, dtype=np.int64)
    for epoch in range(first // windows, (first + n - 1) // windows + 1):
        state = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS + 1, np.uint64).astype(np.uint64)
        here = numbers // windows == epoch
        places = permute(numbers[here] % windows, windows, state[:_ROUNDS])
        starts[here] = (int(state[_ROUNDS]) % length + places * seq_len) % length
    return starts


def permute(index: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Permute range(n), with one round for each key, and return the images of these indices."""
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    out = index.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], half, keys)
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _feistel(index: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = index >> half, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of SplitMix64: every bit of the input changes about half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
