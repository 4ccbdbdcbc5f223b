"""Claims that python -m dsmini.compare cannot try: training in stages, and next to another library's model.

A claim is a file: a study with its arms and metrics, and a function that trains an arm. study.py does the rest: cases
by seed, paired differences with their 95 % interval, the answer and the plots. Results are lines of results.jsonl.
"""
