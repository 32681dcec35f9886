"""What the checks before a run have built and read, the run does not build and read again."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.tiny import write_tiny_config

from projects.recnext.recnext.checkpoints import keys
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.openmmlab import deployable, pretrained
from projects.recnext.recnext.openmmlab.segmentor import RecNeXtEncoderDecoder
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.samples.scenes import write_dataset


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A config, and the work dir of its two iterations."""
    folder = tmp_path_factory.mktemp('trained')
    write_dataset(folder / 'scenes', training=4, validation=2)
    config = write_tiny_config(folder, folder / 'scenes', 'train_cfg = dict(max_iters=2)')
    run_train(str(config), TrainOptions(str(folder / 'work')))
    return config, folder / 'work'


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """How many networks are built, with values or without, which files are read, and how often weights are checked."""
    counts = Counter()
    build, load = RecNeXtEncoderDecoder.__init__, torch.load
    check = keys.check_weights_fit

    def counting_build(self, *args, **kwargs):
        counts['without values' if torch.empty(0).is_meta else 'with values'] += 1
        build(self, *args, **kwargs)

    def counting_load(file, *args, **kwargs):
        counts[Path(file).name] += 1
        return load(file, *args, **kwargs)

    def counting_check(*args):
        counts['checks'] += 1
        return check(*args)

    monkeypatch.setattr(RecNeXtEncoderDecoder, '__init__', counting_build)
    monkeypatch.setattr(torch, 'load', counting_load)
    for module in (deployable, pretrained):
        monkeypatch.setattr(module, 'check_weights_fit', counting_check)
    return counts


def test_one_network_on_meta_and_one_reading_a_test(trained, counted, tmp_path):
    config, work = trained
    run_test(str(config), str(work / 'iter_2.pth'), TestOptions(str(tmp_path)))
    assert counted == {'without values': 1, 'with values': 1, 'iter_2.pth': 1, 'checks': 1}


@pytest.mark.full
def test_one_network_on_meta_and_one_reading_a_resumed_training(trained, counted, tmp_path):
    config, work = trained
    options = {'train_cfg.max_iters': 3}
    run_train(str(config), TrainOptions(str(tmp_path), resume=str(work / 'iter_2.pth'), cfg_options=options))
    assert counted.pop('iter_3.pth') == 1
    assert counted == {'without values': 1, 'with values': 1, 'iter_2.pth': 1, 'checks': 1}
    assert read_checkpoint(tmp_path / 'iter_3.pth')['meta']['iter'] == 3


@pytest.mark.every(2)
@pytest.mark.parametrize('key', ['load_from', 'model.backbone.init_cfg'])
def test_one_reading_of_the_weights_that_training_starts_from(trained, counted, tmp_path, key):
    config, work = trained
    weights = work / 'iter_2.pth'
    value = str(weights) if key == 'load_from' else dict(type='Pretrained', checkpoint=str(weights))
    run_train(
        str(config),
        TrainOptions(
            str(tmp_path),
            cfg_options={key: value, 'train_cfg.max_iters': 1, 'optim_wrapper.optimizer.lr': 0.0},
        ),
    )
    assert counted.pop('iter_1.pth') == 1  # at the end, for the folder that recnext.load takes
    assert counted == {'without values': 1, 'with values': 1, 'iter_2.pth': 1, 'checks': 1}
    before, after = (read_checkpoint(path)['state_dict'] for path in (weights, tmp_path / 'iter_1.pth'))
    assert torch.equal(before['backbone.stem.0.conv.weight'], after['backbone.stem.0.conv.weight'])
