"""Plans: memory, time, traffic, cost and failures of a model on hardware, from first principles.

Start with figure.py: a figure is a number that remembers how it was computed, and a sheet names it. The formulas are in
model, exchange, training and serving; all counts of a model come from dsmini.accounting's list of tensors.
"""
