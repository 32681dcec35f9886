"""How long the backbone takes, as trained and as deployed, measured alternately in one run."""

from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from .backbone import RecNeXt

WARMUP = 2


def benchmark_backbone(arch: str, size: tuple[int, int], rounds: int) -> str:
    """Time a backbone plain, folded, and folded with channels last, one after the other in every round.

    Args:
        arch: Name of the variant; the weights do not matter to the time, and stay random.
        size: Height and width of the image.
        rounds: Measurements of each; the median counts.

    Returns:
        A table: milliseconds an image, and how many times as fast as the plain network.
    """
    networks = {name: RecNeXt(arch).eval() for name in ('plain', 'folded', 'folded, channels_last')}
    networks['folded'].switch_to_deploy()
    networks['folded, channels_last'].switch_to_deploy()
    networks['folded, channels_last'].to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, *size)
    times = {name: [] for name in networks}
    for _ in range(WARMUP + rounds):
        for name, network in networks.items():
            times[name].append(_seconds(network, image))
    medians = {name: median(values[WARMUP:]) for name, values in times.items()}
    title = f'RecNeXt-{arch.upper()}, {size[0]} x {size[1]}, {torch.get_num_threads()} CPU threads, median of {rounds}'
    rows = [f'  {name:<22} {m * 1e3:8.1f} ms  {medians["plain"] / m:5.2f} x' for name, m in medians.items()]
    return '\n'.join([title, *rows])


@torch.inference_mode()
def _seconds(network: nn.Module, image: Tensor) -> float:
    if network.stem[0].conv.weight.is_contiguous(memory_format=torch.channels_last):
        image = image.contiguous(memory_format=torch.channels_last)
    start = perf_counter()
    network(image)
    return perf_counter() - start
