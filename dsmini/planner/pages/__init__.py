"""A plan in words, as sections of a report."""
