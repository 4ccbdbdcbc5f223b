"""Models of the same shape from other projects."""
