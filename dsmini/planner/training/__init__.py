"""Training on many GPUs: layouts, memory, time, traffic, cost, and the search of layouts."""
