"""Hooks of MMEngine, one a file."""
