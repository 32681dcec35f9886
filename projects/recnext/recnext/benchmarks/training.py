"""Milliseconds and memory of a training iteration, for the ways in which ``recnext train`` can run it."""

import copy
from statistics import median

import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import distributed, nn

from ..openmmlab.builder import build_without_weights
from ..openmmlab.config import load_segmentor_config
from ..openmmlab.distributed import backend_of
from ..openmmlab.hooks import compile_for_training
from ..openmmlab.loops import use_bfloat16
from ..utils.devices import AUTO, find_device
from ..utils.memory import can_tell_peak, peak_memory, reset_peak
from ..utils.timing import Stopwatch

WARMUP = 2

WAYS = {
    'fp32': {},
    'fp32, channels last': dict(channels_last=True),
    'bf16': dict(amp=True),
    'bf16, channels last': dict(amp=True, channels_last=True),
    'the same, in DDP': dict(amp=True, channels_last=True, wrapped=True),
}
COMPILED_WAYS = {
    'fp32, compiled': dict(compiled=True),
    'bf16, channels last, compiled': dict(amp=True, channels_last=True, compiled=True),
}


def benchmark_training(
    config: str,
    rounds: int = 5,
    batch_size: int | None = None,
    compile: bool = False,
    device: str = AUTO,
    cfg_options: dict | None = None,
) -> dict[str, dict[str, float]]:
    """Train on random images in every way in turn and print a table; see ``recnext benchmark-training --help``.

    Returns:
        For each way: ``milliseconds`` of an iteration, median; ``megabytes`` that it needs beside weights and
        optimiser, None on a CPU and where the device does not tell.

    Raises:
        UserError: no such config, or no such device.
    """
    where = find_device(device)
    cfg = load_segmentor_config(config, cfg_options)
    init_default_scope('mmseg')
    batch_size = batch_size or cfg.train_dataloader.batch_size
    results = measure_training(cfg, {**WAYS, **(COMPILED_WAYS if compile else {})}, batch_size, rounds, where)
    print(f'{batch_size} images of {tuple(cfg.crop_size)} an iteration, {where}, median of {rounds}')
    print(format_training(results))
    return results


def format_training(results: dict[str, dict[str, float]]) -> str:
    """A line for each way; the ratios are to the first."""
    first, lines = next(iter(results.values())), []
    for name, result in results.items():
        memory = f'{result["megabytes"]:8.0f} MB' if result['megabytes'] else ''
        ratio = first['milliseconds'] / result['milliseconds']
        lines.append(f'{name:<32}{result["milliseconds"]:10.1f} ms {ratio:6.2f} x {memory}')
    return '\n'.join(lines)


def measure_training(
    cfg: Config, ways: dict[str, dict[str, bool]], batch_size: int, rounds: int, where: torch.device
) -> dict[str, dict[str, float]]:
    """Iterations in turn in some of :data:`WAYS` and :data:`COMPILED_WAYS`; returns as :func:`benchmark_training`."""
    tells_memory = where.type != 'cpu' and can_tell_peak(where)
    # One process that talks to itself: NCCL on a GPU of NVIDIA's.
    distributed.init_process_group(backend_of(where), store=distributed.HashStore(), rank=0, world_size=1)
    try:
        batch = random_batch(cfg, batch_size)
        trained = {name: _build(cfg, where, **way) for name, way in ways.items()}
        stopwatch = Stopwatch(where)
        seconds = {name: [] for name in ways}
        megabytes = dict.fromkeys(ways)
        for _ in range(WARMUP + rounds):
            for name, (model, optim_wrapper) in trained.items():
                before = reset_peak(where) if tells_memory else None
                stopwatch.timed('step', model.train_step)(copy.deepcopy(batch), optim_wrapper)
                seconds[name].append(stopwatch.read()['step'])
                if tells_memory:
                    megabytes[name] = peak_memory(where) - before
    finally:
        distributed.destroy_process_group()
    return {name: dict(milliseconds=median(seconds[name][WARMUP:]) * 1e3, megabytes=megabytes[name]) for name in ways}


def random_batch(cfg: Config, batch_size: int) -> dict:
    """A batch of random images and annotations in the crop size of the config, as the data loader gives them."""
    generator = torch.Generator().manual_seed(0)
    inputs, samples = [], []
    for _ in range(batch_size):
        inputs.append(torch.randint(256, (3, *cfg.crop_size), generator=generator, dtype=torch.uint8))
        labels = torch.randint(cfg.model.decode_head.num_classes, (1, *cfg.crop_size), generator=generator)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=tuple(cfg.crop_size))))
    return dict(inputs=inputs, data_samples=samples)


def _build(
    cfg: Config,
    device: torch.device,
    amp: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
    wrapped: bool = False,
) -> tuple[nn.Module, OptimWrapper]:
    torch.manual_seed(0)
    model = build_without_weights(cfg.model).to(device).train()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        compile_for_training(model)
    if wrapped:
        model = MMDistributedDataParallel(model)
    if amp:
        cfg = copy.deepcopy(cfg)
        use_bfloat16(cfg)
    return model, build_optim_wrapper(model, cfg.optim_wrapper)
