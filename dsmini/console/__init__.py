"""Shared by all commands: lines for people, the progress bar, the command line, and the exit status."""
