"""Which share of the inputs a process predicts, as its launcher or the user says."""

import argparse

import pytest

from projects.recnext.recnext.predict.shares import parse_share, share_of_process
from projects.recnext.recnext.utils.errors import UserError

TORCHRUN = dict(RANK='1', WORLD_SIZE='4')
BATCH_SCRIPT = dict(SLURM_PROCID='0', SLURM_NTASKS='8', SLURM_ARRAY_TASK_ID='3', SLURM_ARRAY_TASK_COUNT='64')
SRUN = dict(BATCH_SCRIPT, SLURM_PROCID='5', SLURM_STEP_NUM_TASKS='8')


@pytest.fixture
def variables(monkeypatch):
    for name in {**TORCHRUN, **SRUN}:
        monkeypatch.delenv(name, raising=False)
    return lambda given: [monkeypatch.setenv(name, value) for name, value in given.items()]


@pytest.mark.parametrize(
    ('given', 'share'),
    [
        ({}, (0, 1)),
        (TORCHRUN, (1, 4)),
        (SRUN, (5, 8)),
        (dict(SRUN, **TORCHRUN), (1, 4)),
        # Nothing is left out silently: the script of a job, also of an array, and a step of one task are alone.
        (BATCH_SCRIPT, (0, 1)),
        (dict(BATCH_SCRIPT, SLURM_STEP_NUM_TASKS='1'), (0, 1)),
    ],
)
def test_the_share_of_a_process(variables, given, share):
    variables(given)
    assert share_of_process() == share


@pytest.mark.parametrize(
    'given', [dict(TORCHRUN, RANK='4'), dict(TORCHRUN, WORLD_SIZE='four'), dict(SRUN, SLURM_PROCID='-1')]
)
def test_variables_that_contradict_each_other(variables, given):
    variables(given)
    with pytest.raises(UserError, match=r'expected 0 <= \w+ < \w+'):
        share_of_process()


def test_named_shares_cover_everything_once():
    shares = [parse_share(f'{number}/3') for number in (1, 2, 3)]
    assert sorted(i for rank, size in shares for i in range(10) if i % size == rank) == list(range(10))


@pytest.mark.parametrize('wrong', ['0/3', '4/3', '1/0', '-1/3', '1', '1/3/5', '1.0/3', ' 1/3', ''])
def test_a_share_that_is_none(wrong):
    with pytest.raises(argparse.ArgumentTypeError, match='expected I/N'):
        parse_share(wrong)
