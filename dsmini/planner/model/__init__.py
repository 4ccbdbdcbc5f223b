"""Sizes of a model as formulas: parameters, weights in memory, cache, sparse and compressed attention."""
