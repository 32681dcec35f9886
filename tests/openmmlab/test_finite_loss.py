"""A run whose loss is no number ends in that iteration, and says where to go on from."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from mmengine.config import Config

from projects.recnext.recnext.checkpoints.files import write_checkpoint
from projects.recnext.recnext.openmmlab.hooks import FiniteLossHook, last_good_checkpoint
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.paths import CONFIGS


def test_a_real_run_that_diverges(scenes, tmp_path):
    """The learning rate explodes before the third step: what is saved after it is spoiled."""
    explosion = "param_scheduler = [dict(type='MultiStepLR', milestones=[2], gamma=1e40, by_epoch=False)]"
    config, work = write_tiny_config(tmp_path, scenes, explosion), tmp_path / 'work'
    result = run_tool('train', config, '--work-dir', work)
    assert_user_error(result, 'Training stopped in iteration 4: loss is nan', str(work / 'iter_2.pth'))
    named = re.findall(r'^  (\S+\.jpg)$', result.stderr, re.M)
    assert len(named) == 2 and all(Path(path).parent == scenes / 'images' / 'training' for path in named)
    # Nothing of that iteration was logged or saved.
    assert 'Iter(train) [4/8]' not in result.stdout and 'Iter(train) [3/8]' in result.stdout
    assert not (work / 'iter_4.pth').exists() and (work / 'iter_3.pth').exists()
    # And the advice works.
    advice = re.search(r'load_from=(\S+)', result.stderr)[0]
    options = ['param_scheduler=[]', 'train_cfg.max_iters=2', advice]
    again = run_tool('train', config, '--work-dir', tmp_path / 'again', '--cfg-options', *options)
    assert again.returncode == 0, again.stderr


def runner(work_dir: Path, world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(iter=6, rank=0, world_size=world_size, work_dir=str(work_dir), cfg=run_in(work_dir))


def run_in(work_dir: Path) -> Config:
    checkpoint = dict(type='CheckpointHook', by_epoch=False)
    return Config(dict(work_dir=str(work_dir), default_hooks=dict(checkpoint=checkpoint)))


def batch(number: int) -> dict:
    return dict(data_samples=[SimpleNamespace(metainfo=dict(img_path=f'{index}.jpg')) for index in range(number)])


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('world_size', [1, 2])
def test_the_message(tmp_path, value, world_size):
    outputs = {'loss': torch.tensor(value), 'decode.loss_ce': torch.tensor(0.5), 'aux.loss_ce': torch.tensor(value)}
    with pytest.raises(UserError) as error:
        FiniteLossHook().after_train_iter(runner(tmp_path, world_size), 6, batch(10), outputs)
    said = str(error.value)
    assert f'in iteration 7: loss is {value}, aux.loss_ce is {value}. The images' in said
    assert ('of process 1' in said) == (world_size == 2)
    assert '7.jpg\n  and 2 more' in said and '8.jpg' not in said and 'no good checkpoint' in said


def test_a_finite_loss_and_other_figures_go_on(tmp_path):
    outputs = {'loss': torch.tensor(3e38), 'decode.acc_seg': torch.tensor(float('nan'))}
    FiniteLossHook().after_train_iter(runner(tmp_path), 6, batch(1), outputs)


def test_spoiled_and_unreadable_checkpoints_are_passed_over(tmp_path):
    assert last_good_checkpoint(run_in(tmp_path), 20) is None
    for number, value in ((2, 1.0), (10, 2.0), (11, float('nan')), (12, float('inf')), (20, 3.0)):
        weights = dict(a=torch.tensor([0.0, value]), count=torch.tensor(number))
        write_checkpoint(dict(state_dict=weights, meta=dict(iter=number)), tmp_path / f'iter_{number}.pth')
    (tmp_path / 'iter_13.pth').write_bytes(b'PK\x03\x04 and no more')
    shutil.copy(tmp_path / 'iter_2.pth', tmp_path / 'best_mIoU_iter_14.pth')
    for iteration, number in ((21, 20), (20, 10), (11, 10), (10, 2)):
        assert last_good_checkpoint(run_in(tmp_path), iteration) == tmp_path / f'iter_{number}.pth'
    assert last_good_checkpoint(run_in(tmp_path), 2) is None


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_every_config_has_it(path):
    assert Config.fromfile(path).default_hooks.finite_loss.type == 'FiniteLossHook'
