r"""Show on real runs that a comparison names what differs, and little else.

    python -m dsmini.compare shakespeare --idea train.muon_lr=0.02 --set train.steps=1000 model.n_dense_layers=0 \
        --seeds 40 --out docs/claims/calibration.jsonl
    python docs/claims/calibration.py docs/claims/calibration.jsonl

Runs of the base are cut at random into two halves, which are paired. Nothing differs, so at most 5 of 40 cuts may be
named (they share runs, so no exact level follows). A verdict of equal hides that an interval leaves 0 out, so intervals
are counted too. Half of Muon's rate is worse: of 40 draws of 10 pairs out of 20 at least 38 must be named.
"""

import random
import sys
from pathlib import Path

from dsmini.comparison.results import read_results
from dsmini.comparison.verdict import verdicts
from dsmini.measure.turns import mean_of

TIMES, PAIRS, DRAWN = 40, 20, 10


def words_of(differences: list[list[float]], margin: float) -> list[str]:
    """Return the verdict on each list of paired differences."""
    return [verdicts({"other": found}, margin, {})["other"].word for found in differences]


def main(path: Path) -> None:
    """Print how many cuts and draws are named."""
    results, chance = read_results(path), random.Random(0)
    if results is None or len(results.names) < 2:
        sys.exit(f"{path} has no comparison of two arms; see the top of this file")
    base, other = results.names[:2]
    by_seed, pairs = results.values(base), results.differences(other)
    losses = [by_seed[seed] for seed in sorted(by_seed)]  # in the file they are as they finished
    if len(losses) < 2 * PAIRS or len(pairs) < PAIRS:
        sys.exit(f"{path} has {len(losses)} runs and {len(pairs)} pairs; want {2 * PAIRS} and {PAIRS}")
    cuts, draws = [], []
    for _ in range(TIMES):
        mixed = chance.sample(losses, 2 * PAIRS)
        cuts.append([a - b for a, b in zip(mixed[:PAIRS], mixed[PAIRS:], strict=True)])
        draws.append(chance.sample(pairs[:PAIRS], DRAWN))
    margin, intervals = results.head["margin"], [mean_of(found) for found in cuts]
    apart = sum(each.low > 0 or each.high < 0 for each in intervals)
    named = [sum(word in ("better", "worse") for word in words_of(found, margin)) for found in (cuts, draws)]
    print(f"{named[0]} of {TIMES} cuts of {base} into halves are named (at most 5)")
    print(f"{apart} of their intervals leave 0 out (at most 5)")
    print(f"{named[1]} of {TIMES} draws of {DRAWN} pairs of {other} are named (at least 38)")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("want python docs/claims/calibration.py FILE.jsonl")
    main(Path(sys.argv[1]))
