"""Training and inference in more than one process, on torch.distributed. A single process imports none of it."""
