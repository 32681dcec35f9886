"""Hooks of MMEngine."""
