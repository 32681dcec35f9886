"""The share of the inputs that one of several processes predicts. They need never meet."""

import argparse
import os
import re

from ..utils.errors import UserError


def share_of_process() -> tuple[int, int]:
    """Return the share that whatever started this process gives to it.

    torchrun's variables count, or else a step of ``srun`` with several tasks. The batch script of a Slurm job has
    ``SLURM_NTASKS`` without being one of several processes, so that variable does not count.

    Returns:
        rank and world size: of inputs in order, those whose index modulo world size is rank; (0, 1) for a process
        alone.

    Raises:
        UserError: the variables contradict each other.
    """
    names = ()
    if os.environ.get('RANK') and os.environ.get('WORLD_SIZE'):
        names = ('RANK', 'WORLD_SIZE')
    elif os.environ.get('SLURM_STEP_NUM_TASKS', '1') != '1':
        names = ('SLURM_PROCID', 'SLURM_STEP_NUM_TASKS')
    found = [os.environ.get(name, '') for name in names] or ['0', '1']
    if not all(re.fullmatch(r'\d+', text) for text in found) or not 0 <= int(found[0]) < int(found[1]):
        raise UserError(
            f'{names[0]}={found[0]!r} and {names[1]}={found[1]!r} do not say which of several processes this is: '
            f'expected 0 <= {names[0]} < {names[1]}. Unset them, or name the share with --share I/N.'
        )
    return int(found[0]), int(found[1])


def parse_share(text: str) -> tuple[int, int]:
    """Parse the argument of ``--share``, such as ``3/8``, the third of eight jobs of an array.

    Returns:
        As :func:`share_of_process`: (2, 8).

    Raises:
        argparse.ArgumentTypeError: it is no such thing.
    """
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f'expected I/N, such as 1/8 to 8/8, found {text!r}')
    return int(match[1]) - 1, int(match[2])


def local_rank() -> int:
    """Return which of the processes of this machine this one is: they are dealt out among its accelerators.

    Raises:
        UserError: the variables are not such as torchrun or Slurm set.
    """
    rank = os.environ.get('LOCAL_RANK') or os.environ.get('SLURM_LOCALID') or '0'
    if not rank.isdecimal():
        raise UserError(f'LOCAL_RANK or SLURM_LOCALID is {rank!r}; expected a number, as torchrun and Slurm set it.')
    return int(rank)
