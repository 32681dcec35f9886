"""Which part of the inputs a process predicts."""

import os
import re
from collections.abc import Mapping

import torch

from ..utils.devices import find_device
from ..utils.errors import UserError


def share_of_process(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return (i, n) of this process: torchrun's, or that of a real step of srun, else (0, 1).

    The batch step of a Slurm job has SLURM_NTASKS without srun, and array tasks often have folders of their own: there
    nothing is shared unless ``--share`` says so.
    """
    if 'RANK' in environment and 'WORLD_SIZE' in environment:
        return int(environment['RANK']), int(environment['WORLD_SIZE'])
    if int(environment.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
        return int(environment['SLURM_PROCID']), int(environment['SLURM_STEP_NUM_TASKS'])
    return 0, 1


def parse_share(text: str) -> tuple[int, int]:
    """Read ``I/N``, counted from 1, and return it counted from 0.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f'--share takes I/N with I from 1 to N, such as 3/8; found {text!r}.')
    return int(match[1]) - 1, int(match[2])


def choose_share(text: str | None) -> tuple[int, int]:
    """Return the share that is named, else that of the process."""
    return share_of_process() if text is None else parse_share(text)


def device_of_share(word: str) -> torch.device:
    """Return the device of this process: those of one machine share its accelerators."""
    return find_device(word, int(os.environ.get('LOCAL_RANK', os.environ.get('SLURM_LOCALID', 0))))
