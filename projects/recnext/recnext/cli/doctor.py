"""Say what a report of a bug should: versions, accelerators, and what is missing for which feature."""

import argparse
import importlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata, util

from ..utils.devices import describe_device, find_device
from ..utils.paths import CHECKPOINTS, CONFIGS, ENGINES, IN_CLONE, PACKAGE, list_configs

STACK = (
    ('torch',),
    ('torchvision',),
    ('mmengine', 'onedl-mmengine'),
    ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    ('mmsegmentation', 'onedl-mmsegmentation'),
    ('mmpretrain', 'onedl-mmpretrain'),
    ('timm',),
    ('coremltools',),
    ('numpy',),
    ('opencv-python', 'opencv-python-headless'),
)
"""Packages by the names under which they are distributed."""

ROOMS = {
    'predict': 'runtimes.network',
    'train, test': 'openmmlab',
    'train, test of ImageNet classifiers': 'openmmlab.classifier',
    'models of timm': 'timm',
}
"""Modules of this package that import a part of the stack, by what they are for."""

FEATURES = {
    'export --to executorch': ('executorch',),
    'export --to litert': ('litert_torch',),
    'export --to onnx': ('onnx', 'onnxruntime', 'onnxscript'),
    'export --to coreml --compress palettize': ('sklearn',),
    'web': ('gradio',),
    '--engine openvino': ('openvino', 'onnx', 'onnxscript'),
    '--engine onnxruntime': ('onnxruntime', 'onnx', 'onnxscript'),
    'serve': ('fastapi', 'prometheus_client', 'python_multipart', 'uvicorn'),
    'predict --ray': ('ray', 'pyarrow', 'pandas', 'fsspec'),
    'train --tensorboard': ('tensorboard',),
    'train --wandb': ('wandb',),
    'train --mlflow': ('mlflow',),
    'train --store': ('fsspec',),
}
"""What takes modules that are not always there."""

DISTRIBUTIONS = {
    'litert_torch': 'litert-torch',
    'prometheus_client': 'prometheus-client',
    'python_multipart': 'python-multipart',
    'ray': 'ray[data]',
    'sklearn': 'scikit-learn',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> None:
    for line in describe_environment():
        print(line, flush=True)


def describe_environment() -> Iterator[str]:
    """Lines for a person, and for a report of a bug."""
    yield f'Python {platform.python_version()}, {platform.platform()}'
    for names in STACK:
        yield f'  {_version(names)}'
    yield 'Can be imported'
    for purpose, module in ROOMS.items():
        yield f'  {purpose}: {_import(module)}'
    yield 'Accelerators'
    for line in list_accelerators():
        yield f'  {line}'
    yield 'Features'
    for feature, modules in FEATURES.items():
        missing = [DISTRIBUTIONS.get(name, name) for name in modules if util.find_spec(name) is None]
        yield f'  {feature}: {"pip install " + " ".join(missing) if missing else "ready"}'
    yield 'Places'
    yield f'  package: {PACKAGE} ({"a clone" if IN_CLONE else "installed"})'
    yield f'  configs: {CONFIGS} ({len(list_configs())})'
    yield f'  converted networks: {ENGINES} ({len(list(ENGINES.glob("*/")))})'
    yield f'  checkpoints: {CHECKPOINTS} ({len(list(CHECKPOINTS.glob("*.pth")))})'


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f'{name} {metadata.version(name)}'
        except metadata.PackageNotFoundError:
            continue
    return f'{names[0]} is not installed'


def _import(module: str) -> str:
    try:
        importlib.import_module(f'..{module}', __package__)
    except Exception as error:  # whatever a broken installation raises: it is what is asked for
        return f'no: {type(error).__name__}: {error}'
    return 'yes'


def list_accelerators() -> Iterator[str]:
    """Each with its maker's name and its memory, as far as PyTorch tells; and the CPU."""
    import torch

    if torch.cuda.is_available():
        yield f'CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
    device = find_device()
    for index in range(torch.accelerator.device_count()):
        place = torch.device(device.type, index)
        properties = getattr(torch.get_device_module(place), 'get_device_properties', None)
        memory = f', {properties(place).total_memory / 2**30:.0f} GiB' if properties else ''
        yield f'{place}: {describe_device(place)}{memory}'
    if device.type == 'cpu':
        yield 'none'
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    yield f'cpu: {cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'
