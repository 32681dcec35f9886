"""Checkpoint files: found, fetched, read, written, and the names of the tensors in them."""
