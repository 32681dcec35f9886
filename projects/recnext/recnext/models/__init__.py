"""The networks, and what is computed from their outputs."""
