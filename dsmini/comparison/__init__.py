"""Is an idea better? Runs that are paired by seed, the interval of their differences, and a verdict.

    arms       what is compared: configs, flags, or functions that make a model
    trial      one run of an arm with a seed, in a process of its own
    scoring    the bytes that all arms are scored on
    results    the file with a line for each finished run, which more seeds continue
    verdict    better, worse, equal within the margin, or undecided
    answer     a table, a forest plot, JSON
    trend      comparisons of one question at several sizes: does a difference hold as models grow?

Two runs of one model with other seeds differ by more than most ideas change. Two runs with the same seed see the same
data in the same order and start from the same weights, so their difference varies less, and it alone is looked at.
"""
