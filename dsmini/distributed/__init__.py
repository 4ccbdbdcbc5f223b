"""More than one process: layouts over ranks, and training that survives failures."""
