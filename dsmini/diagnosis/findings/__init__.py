"""Findings that need no timing: each reads what a run reads, and says what is wrong with it."""
