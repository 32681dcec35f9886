"""Weights that training starts from: they fit, or are named; those of foreign parts are read by our tools first."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.malicious import Command
from helpers.reference import config_of
from helpers.tiny import write_tiny_config
from mmseg.registry import MODELS

from projects.recnext.recnext.checkpoints.files import CheckpointError
from projects.recnext.recnext.openmmlab.backbone import RecNeXt
from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.pretrained import read_foreign_weights
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[tuple[str, Path]]:
    """Address and folder of a server on this machine; what is fetched from it goes with the test."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{serving.server_port}', folder
        serving.shutdown()
        thread.join()


def init_cfg(checkpoint: str) -> dict:
    return dict(type='Pretrained', checkpoint=checkpoint)


def test_weights_of_other_backbones_reach_mmengine_as_files_that_were_read(server, tmp_path, monkeypatch):
    address, folder = server
    torch.save(dict(state_dict={'conv.weight': torch.ones(2)}), folder / 'weights.pth')
    (tmp_path / 'open_mmlab.json').write_text(f'{{"mine": "{address}/weights.pth"}}')
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    names = [f'{address}/weights.pth', 'open-mmlab://mine', 'openmmlab://mine', str(folder / 'weights.pth')]
    model = dict(
        type='EncoderDecoder',
        pretrained=names[0],
        backbone=dict(type='ResNetV1c', init_cfg=[dict(type='Kaiming', layer='Conv2d'), init_cfg(names[1])]),
        decode_head=[dict(type='FCNHead'), dict(type='PointHead', inside=dict(init_cfg=init_cfg(names[2])))],
        neck=dict(type='FPN', init_cfg=dict(type='Pretrained_Part', checkpoint=names[3])),
    )
    read_foreign_weights(model)
    backbone, head = model['backbone'], model['decode_head'][1]['inside']
    paths = [model['pretrained'], backbone['init_cfg'][1]['checkpoint'], head['init_cfg']['checkpoint']]
    assert all(torch.load(path)['state_dict']['conv.weight'].tolist() == [1, 1] for path in paths)
    assert model['neck']['init_cfg']['checkpoint'] == names[3] and backbone['init_cfg'][0] == dict(
        type='Kaiming', layer='Conv2d'
    )


def test_of_mmcls_the_backbone_alone_is_taken(server, monkeypatch):
    address, folder = server
    weights = {'backbone.conv.weight': torch.ones(2), 'head.fc.weight': torch.ones(3)}
    torch.save(dict(state_dict=weights), folder / 'classifier.pth')
    table = {'resnet': f'{address}/classifier.pth'}
    monkeypatch.setattr('mmengine.runner.checkpoint.get_mmcls_models', lambda: table)
    model = dict(backbone=dict(type='ResNet', init_cfg=init_cfg('mmcls://resnet')))
    read_foreign_weights(model)
    assert list(torch.load(model['backbone']['init_cfg']['checkpoint'])) == ['conv.weight']
    with pytest.raises(CheckpointError, match='mmcls://other is no name that mmengine knows an address for'):
        read_foreign_weights(dict(init_cfg=init_cfg('mmcls://other')))


@pytest.mark.parametrize('part', ['neck', 'decode_head'])
def test_a_file_that_wants_to_run_something_ends_training(scenes, tmp_path, monkeypatch, part):
    """Also where the variable is set with which torch unpickles anything."""
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    torch.save(dict(state_dict=Command(tmp_path / 'made')), tmp_path / 'attack.pth')
    extra = f"model[{part!r}]['init_cfg'] = {[init_cfg(str(tmp_path / 'attack.pth'))]}"
    with pytest.raises(UserError, match=r'attack\.pth is refused: it wants to run'):
        run_train(str(write_tiny_config(tmp_path, scenes, extra)), TrainOptions(str(tmp_path / 'work')))
    assert not (tmp_path / 'made').exists() and not (tmp_path / 'work').exists()


def test_a_failed_start_leaves_nothing_for_the_next(released, tmp_path):
    """The config of the initialisation is what it was, and the next file is read anew."""
    good, bad = released('recnext_m0_distill_300e'), tmp_path / 'bad.pth'
    torch.save({'stem.0.conv.weight': torch.ones(1)}, bad)
    backbone = RecNeXt('m0', init_cfg=init_cfg(str(bad)))
    with pytest.raises(UserError, match='do not fit'):
        backbone.init_weights()
    assert backbone.init_cfg == init_cfg(str(bad))
    bad.write_bytes(good.read_bytes())
    again = RecNeXt('m0', init_cfg=init_cfg(str(bad)))
    again.init_weights()
    reference = RecNeXt('m0', init_cfg=init_cfg(str(good)))
    reference.init_weights()
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), reference.parameters()))


@pytest.mark.parametrize(('arch', 'digest'), [('m3', '6009ab753515b25d'), ('a3', 'ed8efff782f2cfd3')])
def test_parameters_come_in_the_order_that_older_checkpoints_have(arch, digest):
    """The state of an optimizer goes by their index; the digests are of the commit before the rooms of today."""
    names = '\n'.join(name for name, _ in build_on_meta(load_config(config_of(arch)).model).named_parameters())
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == digest


def test_the_model_of_a_config_is_that_of_mmseg(tmp_path):
    cfg = load_config(write_tiny_config(tmp_path, tmp_path))
    built, on_meta = MODELS.build(cfg.model), build_on_meta(cfg.model)
    assert [(name, one.shape) for name, one in built.state_dict().items()] == [
        (name, one.shape) for name, one in on_meta.state_dict().items()
    ]
