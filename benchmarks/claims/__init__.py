"""Claims of the papers, each tried at a small size: arms that train with the same seeds, compared seed by seed.

A claim is a file: a study with its arms and metrics, and a function that trains an arm. study.py does the rest: cases
by seed, paired differences with their 95 % interval, the answer and the plots. Results are lines of results.jsonl.
"""
