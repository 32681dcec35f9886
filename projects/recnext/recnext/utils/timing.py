"""How long something takes: functions by name under a stopwatch, and repeated calls."""

import functools
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .devices import synchronize

if TYPE_CHECKING:
    import torch


class Stopwatch:
    """Seconds spent in functions, by name; on an accelerator measured by its own clock."""

    def __init__(self, device: 'torch.device') -> None:
        self.device = device
        self.spans: dict[str, list[tuple]] = {}

    def mark(self) -> Any:  # noqa: ANN401  (a number, or an event of the accelerator)
        """This moment."""
        if self.device.type == 'cpu':
            return perf_counter()
        import torch

        event = torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, counted under ``name``."""

        @functools.wraps(function)
        def run(*args: object, **kwargs: object) -> object:
            start = self.mark()
            result = function(*args, **kwargs)
            self.spans.setdefault(name, []).append((start, self.mark()))
            return result

        return run

    def read(self) -> dict[str, float]:
        """Seconds under each name since the last reading."""
        synchronize(self.device)
        seconds = {name: sum(self._between(*span) for span in spans) for name, spans in self.spans.items()}
        self.spans = {}
        return seconds

    def _between(self, start: Any, end: Any) -> float:  # noqa: ANN401
        return end - start if self.device.type == 'cpu' else start.elapsed_time(end) / 1e3


def time_calls(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of calls that alternate, by name, one for each round; those of the warm-up are not among them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            began = perf_counter()
            call()
            seconds[name].append(perf_counter() - began)
    return {name: measured[warmup:] for name, measured in seconds.items()}


def trimmed_mean(values: Sequence[float], share: float) -> float:
    """The mean without the ``share`` of the values that lies outermost, half of it on each side."""
    cut = int(len(values) * share / 2)
    return mean(sorted(values)[cut : len(values) - cut])
