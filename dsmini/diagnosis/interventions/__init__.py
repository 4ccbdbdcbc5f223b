"""Things that are made free, one axis a file: each changes a running subject, and takes the change back."""
