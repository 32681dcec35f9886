"""This project beside mmseg, measured in one run."""

from .. import openmmlab  # noqa: F401  (first: with it mmseg can be imported beside mmcv-lite)
