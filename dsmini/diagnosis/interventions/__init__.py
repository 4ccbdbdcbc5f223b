"""Interventions, one axis a file: each makes one thing free, changes a running subject, and takes the change back."""
