"""Diagnosis: which of data, algorithm and machine binds a training run."""
