"""Models and training runs on disk."""
