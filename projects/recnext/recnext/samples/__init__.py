"""Drawn scenes and objects, for a demo and for tests without a download."""
