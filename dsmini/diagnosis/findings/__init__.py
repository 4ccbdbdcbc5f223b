"""Findings: what was seen of a run besides its gains, each with its interval, and whether it is a fault."""
