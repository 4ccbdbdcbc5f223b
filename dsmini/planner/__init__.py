"""Plans: memory, time, traffic, cost and failures of a model on hardware, from first principles.

Start with figure.py: a figure is a method, and its formula is the expression that it returns. Figures are in model,
exchange, training, run and serving; all counts of a model come from dsmini.accounting's list of tensors.
"""
