"""What a converted network was made of, in words that are the same whenever the result would be."""

import hashlib
import inspect
import json
import platform
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ..utils.files import sha256_of
from .calibration import Calibration

CPU_INFO = Path('/proc/cpuinfo')
"""Where Linux says what a processor can do."""

NO_MATTER = ('init_cfg', 'train_cfg', 'training')
"""Settings of a module that change nothing of a trained network: among them where its weights were read."""


ROOM = ('calibration.py', 'capture.py', 'inductor.py', 'onnx.py', 'openvino.py')
"""Files of this room that decide how a network is converted."""


def identify(module: nn.Module, **more: str) -> dict[str, str]:
    """What decides how a network is converted: its weights, its settings, its code, PyTorch and the processor.

    Args:
        module: In the form in which it is converted.
        more: What else does, such as the engine.
    """
    return dict(
        more,
        weights=_digest_weights(module),
        settings=_digest_settings(module),
        code=_digest_code(module),
        torch=torch.__version__,
        processor=_processor(),
    )


def identify_images(calibration: Calibration) -> str:
    """The content of the images in their order, and what is kept in floating point."""
    found = hashlib.sha256(repr(list(calibration.keep_float)).encode())
    for image in calibration.images:
        found.update(sha256_of(image).encode())
    return found.hexdigest()


def digest(made_of: dict[str, str]) -> str:
    """All of it as 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def version_of(*packages: str) -> str:
    """The versions of distributions that are installed, in one line."""
    return ', '.join(f'{name} {metadata.version(name)}' for name in packages)


def _digest_weights(module: nn.Module) -> str:
    """Of parameters and buffers with names, types and shapes; the order in memory does not count."""
    found = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _digest_settings(module: nn.Module) -> str:
    """Of the classes and the plain attributes of every module: strides, flags, sizes."""
    settings = {
        name: (
            _name(type(part)),
            {key: value for key, value in vars(part).items() if key[0] != '_' and key not in NO_MATTER},
        )
        for name, part in module.named_modules()
    }
    # Whatever else stands in an attribute, such as a function, counts by its kind.
    text = json.dumps(settings, sort_keys=True, default=lambda value: _name(type(value)), skipkeys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_code(module: nn.Module) -> str:
    """Of the files in which the classes of all modules and their parents are defined, and of this room."""
    classes = {parent for part in module.modules() for parent in type(part).__mro__ if parent is not object}
    files = {Path(__file__).parent / name for name in ROOM}
    for kind in classes:
        try:
            files.add(Path(inspect.getfile(kind)))
        except (TypeError, OSError):  # built in, or typed at a prompt
            continue
    digests = sorted(sha256_of(file) for file in files if file.is_file())
    return hashlib.sha256(' '.join(digests).encode()).hexdigest()


def _processor() -> str:
    """What code for this processor may use. A home folder can be that of several machines."""
    if CPU_INFO.exists():
        lines = set(CPU_INFO.read_text().splitlines())
        abilities = sorted(line for line in lines if line.startswith(('model name', 'flags', 'Features')))
        return f'{platform.machine()} {hashlib.sha256(repr(abilities).encode()).hexdigest()[:16]}'
    return f'{platform.machine()} {platform.processor()}'


def _name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'
