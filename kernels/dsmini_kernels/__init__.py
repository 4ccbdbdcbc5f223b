"""Fast versions of dsmini's operations. Imports torch, never dsmini. Empty so far: plain torch runs everything."""
