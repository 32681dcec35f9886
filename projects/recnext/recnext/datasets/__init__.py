"""Samples, procedural ones among them, and what can be wrong with them."""
