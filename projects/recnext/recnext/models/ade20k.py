"""The 150 classes of ADE20K's scene parsing benchmark, in the order of its annotations, with mmseg's colours.

Source of names and order: https://github.com/CSAILVision/sceneparsing, objectInfo150; of colours: mmsegmentation.
"""

import functools
import json
from pathlib import Path


@functools.cache
def ade20k_classes() -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...]]:
    """Return the names of the classes and their RGB colours."""
    names, palette = zip(*json.loads(Path(__file__).with_suffix('.json').read_text()))
    return names, tuple(map(tuple, palette))
