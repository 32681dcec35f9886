"""The device that a command line names."""

import torch

from .errors import UserError


def find_device(name: str) -> torch.device:
    """The device of a command line, ``'cpu'`` or ``'cuda'``.

    Raises:
        UserError: there is no GPU.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError(f'--device {name}: torch {torch.__version__} finds no GPU here.')
    return torch.device(name)
