"""Serving: deployments, prefill, decoding, speculation, and the memory that they take."""
