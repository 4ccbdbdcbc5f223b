"""Measurement and prediction: this machine's rates, counted operations, times, bytes that are held."""
