"""Files of weights: read safely, written whole, fetched; and the list of the released ones."""
