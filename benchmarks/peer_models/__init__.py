"""Models of the same shapes from other projects."""
