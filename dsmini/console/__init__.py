"""The room of what every command shares: lines for people, the progress bar, the command line, and the exit status."""
