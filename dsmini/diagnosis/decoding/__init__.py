"""Decoding as work that is diagnosed: its subject, its interventions, its predictions and its evidence."""
