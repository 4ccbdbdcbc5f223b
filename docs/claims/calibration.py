"""Show on real runs that a comparison names what differs, and little else.

    python -m dsmini.compare docs/claims/calibration.toml --seeds 40
    cd docs/claims; python calibration.py calibration.jsonl attention.jsonl moe_or_dense.jsonl

Runs of the first file's base are cut at random into two halves, which are paired. Nothing differs, so at most 5 of 40
cuts may be named (they share runs, so no exact level follows). A verdict of equal hides that an interval leaves 0 out,
so intervals are counted too.

Of the first 20 pairs of each arm of each file 10 are drawn, 40 times. An arm that differs by more than the margin must
be named in at least 38 draws. Half of Muon's rate was to be one, but 40 pairs find it equal, so few draws may name it.
"""

import random
import sys
from pathlib import Path

from dsmini.comparison.results import Results, read_results
from dsmini.comparison.verdict import verdicts
from dsmini.measure.turns import mean_of

TIMES, PAIRS, DRAWN = 40, 20, 10


def named(differences: list[list[float]], margin: float) -> int:
    """Return how many lists of paired differences have a verdict of better or worse."""
    return sum(verdicts({"other": found}, margin, {})["other"].word in ("better", "worse") for found in differences)


def cuts_of(losses: list[float], chance: random.Random) -> list[list[float]]:
    """Return the differences of one half of the runs to the other, cut at random."""
    mixed = [chance.sample(losses, 2 * PAIRS) for _ in range(TIMES)]
    return [[a - b for a, b in zip(each[:PAIRS], each[PAIRS:], strict=True)] for each in mixed]


def show_cuts(results: Results, chance: random.Random) -> None:
    """Print how many cuts of the base are named."""
    base = results.names[0]
    by_seed = results.values(base)
    if len(by_seed) < 2 * PAIRS:
        sys.exit(f"the first file has {len(by_seed)} runs of {base}; want {2 * PAIRS}")
    cuts = cuts_of([by_seed[seed] for seed in sorted(by_seed)], chance)  # in the file they are as they finished
    intervals = [mean_of(found) for found in cuts]
    apart = sum(each.low > 0 or each.high < 0 for each in intervals)
    print(f"{named(cuts, results.head['margin'])} of {TIMES} cuts of {base} into halves are named (at most 5)")
    print(f"{apart} of their intervals leave 0 out (at most 5)")


def show_draws(results: Results, chance: random.Random) -> None:
    """Print how many draws of each arm's pairs are named."""
    for other in results.names[1:]:
        pairs = results.differences(other)
        if len(pairs) < PAIRS:
            sys.exit(f"{other} has {len(pairs)} pairs; want {PAIRS}")
        draws = [chance.sample(pairs[:PAIRS], DRAWN) for _ in range(TIMES)]
        mean, times = mean_of(pairs), named(draws, results.head["margin"])
        print(f"{other}: {mean.value:+.4f}, {mean.low:+.4f} to {mean.high:+.4f}: {times} of {TIMES} draws are named")


def main(*paths: Path) -> None:
    """Print how many cuts and draws are named."""
    chance = random.Random(0)
    for i, path in enumerate(paths):
        results = read_results(path)
        if results is None or len(results.names) < 2:
            sys.exit(f"{path} has no comparison of two arms; see the top of this file")
        if i == 0:
            show_cuts(results, chance)
        show_draws(results, chance)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("want python docs/claims/calibration.py FILE.jsonl [MORE.jsonl ...]")
    main(*map(Path, sys.argv[1:]))
