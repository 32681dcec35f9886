"""How long a saved file takes for an image, beside PyTorch on this machine."""

from statistics import median

import numpy as np
import torch

from ..utils.timing import time_calls
from .capture import Wrapper
from .verification import Model

ROUNDS = 9


def compare_latency(runtime: str, predict: Model, wrapper: Wrapper, size: tuple[int, int]) -> str:
    """The same network in another runtime and in PyTorch, alternating, for one image (height, width)."""
    image = np.zeros((1, 3, *size), np.float32)
    tensor = torch.from_numpy(image)
    with torch.no_grad():
        seconds = time_calls({runtime: lambda: predict(image), 'PyTorch': lambda: wrapper(tensor)}, ROUNDS)
    times = {name: 1e3 * median(measured) for name, measured in seconds.items()}
    said = ', '.join(f'{name} {time:.0f} ms' for name, time in times.items())
    ratio = times['PyTorch'] / times[runtime]
    return f'{said} ({ratio:.2f} x), {torch.get_num_threads()} threads, median of {ROUNDS}'
