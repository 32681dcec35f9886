"""This project beside mmseg, measured in one run."""
