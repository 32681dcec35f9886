"""Segmentors pushed to a hub on localhost and pulled from it: the same label maps, and no stranger's program is run."""

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.hub_server import OWNER, READER, Hub, hub_server
from helpers.reference import ADE20K_CONFIGS, ROOT, config_of, genuine_maps
from helpers.tools import assert_user_error, run_python
from huggingface_hub import constants
from mmcv.transforms import Compose
from mmengine.config import Config
from mmseg.models import FPNHead
from mmseg.registry import MODELS

from projects.recnext.recnext.checkpoints.files import read_checkpoint, write_checkpoint
from projects.recnext.recnext.checkpoints.releases import get_release
from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.openmmlab.builder import build_on_meta, build_without_weights
from projects.recnext.recnext.openmmlab.config import load_config, named_classes
from projects.recnext.recnext.openmmlab.convert import convert_file
from projects.recnext.recnext.openmmlab.loading import load_segmentor
from projects.recnext.recnext.openmmlab.stored_config import decode_config, encode_config
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import train
from projects.recnext.recnext.predict import download
from projects.recnext.recnext.predict.find import find_trained
from projects.recnext.recnext.predict.predictor import Predictor, make_pipeline
from projects.recnext.recnext.predict.push import push
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

FILES = ['.gitattributes', 'README.md', 'config.json', 'config.py', 'model.safetensors']


NOWHERE = 'http://127.0.0.1:9'
"""Where nobody listens."""


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    """An empty one, for this process and for those that it starts, with a token and a cache of their own."""
    with hub_server() as hub:
        home = tmp_path / 'home'
        settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_TOKEN=OWNER, HF_HUB_DISABLE_XET='1')
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # Read from the environment when huggingface_hub was imported.
        monkeypatch.setattr(constants, 'ENDPOINT', hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition('/{repo_id}')
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', hub.url + ''.join(template[1:]))
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(home / 'hub'))
        monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(home / 'token'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        yield hub


@pytest.fixture
def pushed(hub, tiny) -> Hub:
    """With a tiny segmentor as ``user/tiny``."""
    push(*map(str, tiny), 'user/tiny')
    return hub


def recnext(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess:
    """As a user starts it: huggingface_hub reads the environment as it is imported."""
    return run_python('-m', 'projects.recnext.recnext.cli', *arguments, fresh=True, **kwargs)


def an_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)


def change(hub: Hub, edit: Callable[[dict], object]) -> None:
    """Commit another ``config.json`` to ``user/tiny``."""
    description = json.loads(hub.files('user/tiny')['config.json'])
    edit(description)
    hub.commit('user/tiny', {'config.json': json.dumps(description).encode()})


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / 'home').rglob('snapshots/*/*'))


def test_what_is_pushed_and_pulled_is_the_same(hub, tiny, tmp_path, capsys):
    config, checkpoint = map(str, tiny)
    said = push(config, checkpoint, 'user/tiny')
    assert f'{hub.url}/user/tiny/commit/' in said and 'hf://user/tiny photo.jpg' in said
    assert sorted(hub.files('user/tiny')) == FILES and hub.private == set()
    pulled = load_segmentor(*find_trained('hf://user/tiny'))
    original = load_segmentor(config, checkpoint)
    assert 'downloading model.safetensors, 0.' in capsys.readouterr().out
    ours, theirs = pulled.network.state_dict(), original.network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert cached(tmp_path) == ['config.json', 'model.safetensors']

    image = an_image()
    expected = Predictor(config, checkpoint, device='cpu')(image)
    found = Predictor.from_pretrained('user/tiny', device='cpu')(image)
    assert len(np.unique(expected.labels)) > 3
    assert np.array_equal(found.labels, expected.labels) and found.areas == expected.areas
    assert found.classes == expected.classes and np.array_equal(found.palette, expected.palette)


def test_what_is_in_a_repository(pushed, tiny):
    files = pushed.files('user/tiny')
    description = json.loads(files['config.json'])
    cfg, weights = load_config(tiny[0]), read_checkpoint(tiny[1])['state_dict']
    assert decode_config(description['config']) == cfg.to_dict()
    classes, palette = named_classes(cfg)
    assert description['classes'] == [name.strip() for name in classes] and description['palette'] == palette
    assert description['source'] == dict(file='tiny.pth', sha256=sha256_of(tiny[1]), release=None)
    assert description['published'] is None and description['measured'] is None
    _, front, text = files['README.md'].decode().split('---\n', 2)
    front = yaml.safe_load(front)
    assert front['library_name'] == 'recnext' and front['license'] == 'apache-2.0' and 'metrics' not in front
    assert 'recnext predict hf://user/tiny photo.jpg' in text and description['source']['sha256'] in text
    assert "from_pretrained('user/tiny')" in text and 'no record' not in text and 'without a record' in text
    assert files['config.py'].decode().startswith('# For people to read')
    place = Path(find_trained('hf://user/tiny')[1])
    assert read_checkpoint(place).keys() == weights.keys()
    assert description['weights']['sha256'] == sha256_of(place)


def test_the_command_line(hub, tiny, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(['push', *map(str, tiny), 'user/tiny', '--private'])
    assert 'uploading' in capsys.readouterr().out and hub.private == {'user/tiny'}
    photo = next(scenes.rglob('images/validation/*'))
    main(['predict', *map(str, tiny), str(photo), '--out-dir', 'here'])
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = recnext('predict', 'hf://user/tiny', photo, '--out-dir', 'there', env=env)
    assert result.returncode == 0 and 'hf://user/tiny: downloading' in result.stdout, result.stderr
    labels = [next((tmp_path / name / 'labels').iterdir()).read_bytes() for name in ('here', 'there')]
    assert labels[0] == labels[1]
    main(['test', 'hf://user/tiny', '--data-root', str(scenes)])
    assert [path.name for path in (tmp_path / 'work_dirs').iterdir()] == ['tiny']


@pytest.mark.full
def test_a_private_repository_is_not_for_everybody(hub, tiny, tmp_path):
    push(*map(str, tiny), 'user/tiny', private=True)
    nobody = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_TOKEN': '', 'HF_HOME': str(tmp_path / 'other')}
    result = recnext('predict', 'hf://user/tiny', tmp_path, env=nobody, cwd=tmp_path)
    assert_user_error(result, 'no such repository, or a private one', 'hf auth login')


def test_figures_are_those_of_a_test_of_the_same_weights(hub, tiny, scenes, tmp_path):
    config, checkpoint = map(str, tiny)
    work = str(tmp_path / 'work')
    with pytest.raises(UserError, match=r'No evaluation\.json'):
        push(config, checkpoint, 'user/tiny', metrics=work)
    figures = run_test(config, checkpoint, TestOptions(work_dir=work, data_root=str(scenes)))
    push(config, checkpoint, 'user/tiny', metrics=work)
    measured = json.loads(hub.files('user/tiny')['config.json'])['measured']
    assert measured == dict({key: figures[key] for key in ('aAcc', 'mIoU', 'mAcc')}, images=3)
    card = hub.files('user/tiny')['README.md'].decode()
    (results,) = yaml.safe_load(card.split('---\n')[1])['model-index']
    found = {metric['name']: metric['value'] for metric in results['results'][0]['metrics']}
    assert found == {key: figures[key] for key in ('aAcc', 'mIoU', 'mAcc')}
    # Scenes are no ADE20K, though their classes are of it.
    assert results['results'][0]['dataset']['name'].endswith(', 3 images') and 'ADE20K' not in card
    assert f'{figures["mIoU"]:.2f}' in card and '3 images' in card
    other = shutil.copy(checkpoint, tmp_path / 'other.pth')
    with pytest.raises(UserError, match='is of another checkpoint'):
        push(config, str(other), 'user/tiny', metrics=work)


def test_a_segmentor_from_the_hub_is_not_trained_on_as_it_is(pushed):
    with pytest.raises(UserError, match=r'has no train_dataloader.*load_from'):
        train(find_trained('hf://user/tiny')[0])


def test_published_figures_are_those_of_a_release_by_its_sha256(hub, tiny, tmp_path):
    release = get_release('recnext_m3_ade20k')
    checkpoint = shutil.copy(tiny[1], tmp_path / 'tiny.pth')
    (tmp_path / 'sha256.json').write_text(json.dumps({release['name']: sha256_of(checkpoint)}))
    push(str(tiny[0]), str(checkpoint), 'user/tiny')
    description = json.loads(hub.files('user/tiny')['config.json'])
    assert description['source']['release'] == release['name'] and description['published'] == release['metrics']
    card = hub.files('user/tiny')['README.md'].decode()
    (results,) = yaml.safe_load(card.split('---\n')[1])['model-index']
    (found,) = results['results']
    assert {metric['name']: metric['value'] for metric in found['metrics']} == release['metrics']
    assert found['source']['name'] == 'training log' and found['dataset']['name'] == 'ADE20K'
    assert 'scene_parse_150' in card and '| as published | 40.98 |' in card


def test_an_export_names_where_it_is_from(pushed):
    origin = load_source(*find_trained('hf://user/tiny'), fuse='all').origin()
    assert origin['config'] == 'tiny' and origin['checkpoint'] == 'model.safetensors'


def test_a_file_that_was_tampered_with_is_refused(pushed, tmp_path):
    right = pushed.files('user/tiny')['model.safetensors']
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    pushed.swapped['model.safetensors'] = wrong
    with pytest.raises(UserError, match=r'hf://user/tiny: .*not what was pushed: found sha256.*\n.*expected'):
        find_trained('hf://user/tiny')
    pushed.swapped.clear()
    folder, weights = find_trained('hf://user/tiny')  # nothing of it has stayed
    assert Path(weights).read_bytes() == right
    # In a folder of one's own, and on the hub itself, without its description.
    copied = shutil.copytree(folder, tmp_path / 'copied')
    (copied / 'model.safetensors').write_bytes(wrong)
    pushed.commit('user/tiny', {'model.safetensors': wrong})
    for name in (str(copied), 'hf://user/tiny'):
        with pytest.raises(UserError, match='not what was pushed'):
            find_trained(name)
    pushed.swapped['model.safetensors'] = right[:1000]
    shutil.rmtree(tmp_path / 'home')
    with pytest.raises(UserError) as error:
        find_trained('hf://user/tiny')
    assert len(str(error.value).splitlines()) <= 3


def test_weights_are_safetensors_only(pushed, tiny):
    pickled = tiny[1].read_bytes()
    pushed.commit('user/tiny', {'model.safetensors': pickled})
    change(pushed, lambda description: description['weights'].update(sha256=sha256_of(tiny[1])))
    with pytest.raises(UserError, match='is no safetensors file'):
        find_trained('hf://user/tiny')


def test_other_weights_of_the_right_sha256_do_not_fit(pushed, tmp_path):
    folder = Path(find_trained('hf://user/tiny')[0])
    own = shutil.copytree(folder, tmp_path / 'own')

    def wider(description: dict) -> None:
        description['config']['model']['decode_head']['channels'] = 32

    description = json.loads((own / 'config.json').read_text())
    wider(description)
    (own / 'config.json').write_text(json.dumps(description))
    with pytest.raises(UserError, match='do not fit'):
        Predictor.from_pretrained(own)


def test_a_folder_and_an_older_revision_will_do(pushed, tiny, tmp_path):
    folder, _ = find_trained('hf://user/tiny')
    image = an_image()
    expected = Predictor(*tiny, device='cpu')(image).labels
    own = shutil.copytree(folder, tmp_path / 'own')
    assert np.array_equal(Predictor.from_pretrained(own, device='cpu')(image).labels, expected)
    first = list(pushed.commits['user/tiny'])[-1]
    pushed.commit('user/tiny', {'config.json': b'{}'})
    with pytest.raises(UserError, match=r'is no config\.json of a segmentor'):
        Predictor.from_pretrained('user/tiny')
    assert Predictor.from_pretrained('user/tiny', revision=first, device='cpu').classes
    assert find_trained(f'hf://user/tiny@{first}')[0].endswith(first)


def test_what_was_pulled_works_without_a_network(pushed, tiny, monkeypatch, tmp_path):
    before = find_trained('hf://user/tiny')
    nowhere = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(pushed.url, NOWHERE)
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nowhere)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # between its attempts
    assert find_trained('hf://user/tiny') == before
    shutil.rmtree(tmp_path / 'home')
    with pytest.raises(UserError, match='cannot be reached, and is not in the cache'):
        find_trained('hf://user/tiny')
    with pytest.raises(UserError, match='hf://user/tiny: ConnectError'):
        push(*map(str, tiny), 'user/tiny')


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('hf://user/nothing', 'no such repository'),
        ('hf://user/tiny@v9', 'no such revision'),
        ('hf://user', 'expected hf://user/name'),
        ('hf://user/a/b', 'expected hf://user/name'),
        ('hf://user/..', 'hf://user/..: '),
        ('hf://user/\x1b[2Jtiny', r'user/\x1b[2Jtiny is no repository'),
        ('no_such_name', 'is not the name of a released segmentor'),
    ],
)
def test_names_that_are_wrong(pushed, name, words):
    with pytest.raises(UserError) as error:
        find_trained(name)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize('missing', ['config.json', 'model.safetensors'])
def test_a_repository_that_lacks_files_is_said(pushed, missing):
    files = dict(pushed.files('user/tiny'))
    del files[missing]
    pushed.commits['user/bare'] = {}
    pushed.commit('user/bare', files)
    with pytest.raises(UserError, match=r'hf://user/bare lacks config\.json or model\.safetensors'):
        find_trained('hf://user/bare')


@pytest.mark.parametrize(
    ('token', 'repository', 'words'),
    [
        ('', 'user/tiny', ('no valid token', 'HF_TOKEN')),
        ('hf_wrong', 'user/tiny', ('no valid token',)),
        (READER, 'user/tiny', ('no permission',)),
        (OWNER, 'somebody/tiny', ('no permission',)),
        (OWNER, 'tiny', ('expected hf://user/name',)),
    ],
)
def test_a_push_that_is_refused_leaves_nothing(hub, tiny, tmp_path, monkeypatch, token, repository, words):
    monkeypatch.setenv('HF_TOKEN', token)
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
    with pytest.raises(UserError) as error:
        push(*map(str, tiny), repository)
    assert all(word in str(error.value) for word in words) and len(str(error.value).splitlines()) <= 3
    assert os.listdir(tmp_path / 'tmp') == [] and hub.commits == {} and hub.large == {}


def test_what_nobody_could_pull_is_not_pushed(hub, tiny, tmp_path):
    (tmp_path / 'mine.py').write_text(f"_base_ = [{str(tiny[0])!r}]\nmodel = dict(decode_head=dict(type='MyHead'))\n")
    MODELS.register_module('MyHead', module=type('MyHead', (FPNHead,), {}))
    try:
        with pytest.raises(UserError, match=r'model\.decode_head\.type is MyHead'):
            push(str(tmp_path / 'mine.py'), str(tiny[1]), 'user/tiny')
    finally:
        MODELS.module_dict.pop('MyHead')
    assert hub.requests == []


def test_weights_that_do_not_fit_are_not_pushed(hub, tiny, tmp_path):
    content = read_checkpoint(tiny[1])
    content['state_dict'].popitem()
    write_checkpoint(content, tmp_path / 'less.pth')
    with pytest.raises(UserError, match='do not fit'):
        push(str(tiny[0]), str(tmp_path / 'less.pth'), 'user/tiny')
    assert hub.requests == []


def set_at(path: str, value: object) -> Callable[[dict], None]:
    """An edit of a description's config."""

    def edit(description: dict) -> None:
        *parents, last = path.split('.')
        node = description['config']
        for parent in parents:
            node = node[int(parent) if isinstance(node, list) else parent]
        node[last] = value

    return edit


MALICIOUS = {
    'an import': (set_at('custom_imports', dict(imports=['evil'])), 'custom_imports wants evil'),
    'an import in a text': (set_at('custom_imports', dict(imports='evil')), 'custom_imports wants evil'),
    'an import of the standard library': (set_at('custom_imports', dict(imports=['os'])), 'custom_imports wants os'),
    'an import like ours': (set_at('custom_imports', dict(imports=['mmseg_evil'])), 'wants mmseg_evil'),
    'an import that runs': (
        set_at('custom_imports', dict(imports=['projects.recnext.recnext.cli.__main__'])),
        'wants projects.recnext.recnext.cli.__main__',
    ),
    'a list of imports of something else': (set_at('custom_imports', ['evil']), 'custom_imports wants'),
    'a model that is a function': (set_at('model', dict(type='evil.run', decode_head={})), 'model.type is evil.run'),
    'a module in the place of a model': (set_at('model.neck', dict(type='evil')), 'model.neck.type is evil'),
    'a function in a known library': (
        set_at('model.neck', dict(type='mmengine.fileio.load', file='x')),
        'model.neck.type is mmengine.fileio.load',
    ),
    'a norm': (set_at('model.backbone.norm_cfg', dict(type='evil.run')), 'model.backbone.norm_cfg.type is evil.run'),
    'a transform': (
        lambda description: description['config']['test_pipeline'].insert(1, dict(type='evil.run')),
        'test_pipeline.1.type is evil.run',
    ),
    'a scope': (set_at('model._scope_', 'evil'), 'model._scope_ is evil'),
    'a metric that writes pickles': (
        set_at('test_evaluator', dict(type='DumpResults', out_file_path='x.pkl')),
        'test_evaluator.type is DumpResults',
    ),
    'a function for the workers': (
        set_at('test_dataloader.worker_init_fn', 'evil.run'),
        'test_dataloader.worker_init_fn is evil.run',
    ),
    'imports without end': (set_at('custom_imports', dict(imports=5)), 'custom_imports wants 5'),
    'a tuple that is none': (set_at('test_pipeline', {'__tuple__': 5}), 'test_pipeline is a dict'),
    'classes with colours for a terminal': (
        lambda description: description['classes'].__setitem__(0, '\x1b[31m'),
        'classes, palette or name',
    ),
    'a network of the hub': (
        set_at('model.backbone', dict(type='mmpretrain.TIMMBackbone', model_name='hf-hub:evil/evil')),
        'wants to read hf-hub:evil/evil',
    ),
    'a pickle to read': (
        set_at('model.decode_head.loss_decode', dict(type='CrossEntropyLoss', class_weight='evil.pkl')),
        'wants to read evil.pkl',
    ),
    'an address': (
        set_at('test_dataloader.dataset.ann_file', 'http://127.0.0.1/evil.txt'),
        'wants to read http://127.0.0.1/evil.txt',
    ),
    'a network that fetches others': (set_at('model.backbone', dict(type='VPD')), 'model.backbone.type is VPD'),
    'something that is no config': (lambda description: description.update(config=[]), 'should be dicts'),
    'a model that is none': (set_at('model', 'evil'), 'model is a str'),
    'a name that is a path': (lambda description: description.update(name='../evil'), 'name are not what they should'),
    'a digest that is none': (lambda description: description.update(weights={'sha256': 1}), 'SHA-256'),
    'classes that are none': (lambda description: description.update(classes='evil'), 'no config.json of a segmentor'),
    'nesting': (set_at('model', json.loads('{"a":' * 600 + '1' + '}' * 600)), 'nests without end'),
}


@pytest.mark.every(3)
@pytest.mark.parametrize('kind', MALICIOUS)
def test_nothing_of_a_strangers_config_is_run(pushed, tmp_path, monkeypatch, kind):
    for module in ('evil', 'mmseg_evil'):
        (tmp_path / f'{module}.py').write_text(
            f'open({str(tmp_path / "ran")!r}, "w")\n\ndef run(*args, **kw):\n    pass\n'
        )
    monkeypatch.syspath_prepend(tmp_path)
    edit, words = MALICIOUS[kind]
    change(pushed, edit)
    pushed.requests.clear()
    with pytest.raises(UserError) as error:
        find_trained('hf://user/tiny')
    assert words in str(error.value), error.value
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / 'ran').exists()
    assert not any('model.safetensors' in request for request in pushed.requests)


def test_config_py_is_never_run(pushed, tmp_path):
    program = f'open({str(tmp_path / "ran")!r}, "w")\n{pushed.files("user/tiny")["config.py"].decode()}'
    pushed.commit('user/tiny', {'config.py': program.encode()})
    folder, weights = find_trained('hf://user/tiny')
    own = shutil.copytree(folder, tmp_path / 'own')
    (own / 'config.py').write_text(program)
    for name in (own, folder):
        Predictor(name, weights, device='cpu')(an_image())
    assert not (tmp_path / 'ran').exists()


def test_where_a_stranger_would_write_is_left_out(pushed, tmp_path):
    def edit(description: dict) -> None:
        config = description['config']
        config['work_dir'] = config['test_evaluator']['output_dir'] = str(tmp_path / 'theirs')
        config['custom_hooks'] = [dict(type='evil.Hook')]
        config['visualizer'] = dict(type='Visualizer', save_dir=str(tmp_path / 'theirs'))

    change(pushed, edit)
    cfg = load_config(find_trained('hf://user/tiny')[0])
    assert 'theirs' not in str(cfg.to_dict()) and 'evil' not in str(cfg.to_dict())


@pytest.mark.parametrize('config', ADE20K_CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_the_same_as_data(config, tmp_path):
    cfg = load_config(config)
    classes, palette = named_classes(cfg)
    stored = json.loads(json.dumps(encode_config(cfg)))
    assert Config(decode_config(stored)).to_dict() == cfg.to_dict()
    description = dict(name='x', classes=classes, palette=palette, source={}, weights=dict(sha256=''), config=stored)
    (tmp_path / 'config.json').write_text(json.dumps(description))
    read = load_config(tmp_path)
    assert str(build_on_meta(read.model)) == str(build_without_weights(cfg.model))
    # An object of a transform shows its arguments.
    for ours, theirs in ((read, cfg), (read, load_config(config))):
        assert str(Compose(make_pipeline(ours))) == str(Compose(make_pipeline(theirs)))
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg', 'tta_pipeline', 'crop_size', 'test_pipeline'):
        assert read[key] == cfg[key] and type(read[key]) is type(cfg[key])
    assert named_classes(read) == (classes, palette)


def test_a_config_that_is_more_than_data_is_not_stored():
    for value in ({1: 'a'}, float('inf'), {'a': print}, b'bytes'):
        cfg = Config(dict(model=dict(value=copy.copy(value))), cfg_text=' ', filename='mine.py')
        with pytest.raises(UserError, match=r'mine\.py holds more than'):
            encode_config(cfg)


@pytest.mark.full
def test_the_genuine_m3(hub, real_m3, ade20k_sample, tmp_path, monkeypatch):
    push(str(config_of('m3')), str(real_m3), 'user/m3')
    predictor = Predictor.from_pretrained('user/m3', device='cpu')
    for photo in sorted((ade20k_sample / 'images' / 'validation').glob('*.jpg')):
        assert (predictor(photo).labels != genuine_maps()[photo.stem]).sum() == 0
    description = json.loads(hub.files('user/m3')['config.json'])
    monkeypatch.setattr(download, 'CHECKPOINTS', tmp_path)
    convert_file(real_m3, tmp_path / 'recnext_m3_ade20k.pth')
    released = Predictor.from_pretrained('recnext_m3_ade20k', device='cpu')
    assert np.array_equal(released(photo).labels, predictor(photo).labels)
    # Made by the genuine stack, called like a release, and none by its SHA-256.
    assert description['source']['release'] is None and description['published'] is None
