"""From logits to a label map, without a network: mmseg's way and ours, over image sizes and numbers of classes."""

from statistics import median

import torch
from torch import Tensor, nn

from ..models.label_map import ResizeStep, label_map, resize_all
from ..utils.timing import Stopwatch
from .measurement import FAST, STOCK, WARMUP

SWEPT_SIZES = (256, 512, 1024, 2048)
SWEPT_CLASSES = (2, 19, 150, 500, 1000)


def sweep(rounds: int, device: torch.device) -> list[dict]:
    """Milliseconds from logits to a label map over image sizes and numbers of classes, without a network.

    Confident logits have large areas in which one class leads by far, as those of trained networks; random ones are
    the worst case.
    """
    points = [dict(size=size, classes=150) for size in SWEPT_SIZES]
    points += [dict(size=512, classes=classes) for classes in SWEPT_CLASSES if classes != 150]
    results = []
    for point in points:
        for kind, make in (('confident', confident_logits), ('random', random_logits)):
            logits = make(point['classes'], point['size'] // 4, device)
            # As in testing: up by four to the input of the network, then to the size of the original.
            original = point['size'] * 3 // 4
            steps = (ResizeStep((point['size'], point['size'])), ResizeStep((original, original)))
            results.append(dict(**point, kind=kind, **_time_labels(logits, steps, rounds, device)))
    return results


def _time_labels(logits: Tensor, steps: tuple[ResizeStep, ...], rounds: int, device: torch.device) -> dict:
    stopwatch = Stopwatch(device)
    stock = stopwatch.timed(STOCK, lambda: resize_all(logits, steps).argmax(0))
    ours = stopwatch.timed(FAST, lambda: label_map(logits, steps))
    readings = []
    for _ in range(WARMUP + rounds):
        different = int((stock() != ours()).sum())
        readings.append(stopwatch.read())
    times = {name: median(reading[name] for reading in readings[WARMUP:]) * 1e3 for name in (STOCK, FAST)}
    return dict(milliseconds=times, different_pixels=different)


def confident_logits(classes: int, size: int, device: torch.device) -> Tensor:
    """(classes, size, size): smooth areas, each led by a class, with noise."""
    generator = torch.Generator().manual_seed(0)
    areas = torch.randint(classes, (6, 6), generator=generator)
    scores = nn.functional.one_hot(areas, classes).permute(2, 0, 1)[None].float() * 12
    smooth = nn.functional.interpolate(scores, size=(size, size), mode='bilinear')[0]
    return (smooth + torch.randn(smooth.shape, generator=generator) * 0.3).to(device)


def random_logits(classes: int, size: int, device: torch.device) -> Tensor:
    """(classes, size, size): noise, in which no class can be ruled out."""
    return torch.randn(classes, size, size, generator=torch.Generator().manual_seed(0)).to(device)
