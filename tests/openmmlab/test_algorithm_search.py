"""cuDNN searches for its algorithms in training and not in validation or testing, where images have many sizes."""

import pytest
import torch
from helpers.tiny import write_tiny_config

from projects.recnext.recnext.openmmlab.segmentor import FastEncoderDecoder
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import TrainOptions, train


@pytest.fixture
def searching(monkeypatch) -> dict[str, set[bool]]:
    """Whether it searches while the network is trained, and while it predicts."""
    found = dict(loss=set(), predict=set())
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    for name, seen in found.items():
        method = getattr(FastEncoderDecoder, name)

        def watched(*args, method=method, seen=seen):
            seen.add(torch.backends.cudnn.benchmark)
            return method(*args)

        monkeypatch.setattr(FastEncoderDecoder, name, watched)
    return found


def test_only_training_searches(searching, scenes, tmp_path):
    extra = 'train_cfg = dict(max_iters=4, val_interval=2)'
    train(str(write_tiny_config(tmp_path, scenes, extra)), TrainOptions(work_dir=str(tmp_path / 'work')))
    assert searching == dict(loss={True}, predict={False})
    assert torch.backends.cudnn.benchmark


def test_testing_does_not_search(searching, tiny, scenes, tmp_path):
    run_test(*map(str, tiny), TestOptions(work_dir=str(tmp_path), data_root=str(scenes)))
    assert searching['predict'] == {False}
