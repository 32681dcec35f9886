"""Segmentors pushed to a hub on localhost and pulled from it: the same label maps, and no stranger's program is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.hub_server import OWNER, READER, Hub, hub_server
from helpers.reference import ROOT, genuine_maps
from helpers.tiny import write_tiny_config
from helpers.tools import run_python
from huggingface_hub import constants

import recnext
from projects.recnext.recnext.checkpoints.files import read_checkpoint, write_checkpoint
from projects.recnext.recnext.checkpoints.releases import get_release
from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.predict import push as push_module
from projects.recnext.recnext.predict.push import push_model, read_figures
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

FILES = ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']

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


def push(config: object, checkpoint: object, repository: str, **options: object) -> str:
    return push_model(recnext.load(config, checkpoint, 'cpu', fuse='none'), repository, **options)


@pytest.fixture
def pushed(hub, tiny) -> Hub:
    """With a tiny segmentor as ``user/tiny``."""
    push(*tiny, 'user/tiny')
    return hub


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
    address = push(*tiny, 'user/tiny')
    assert f'{hub.url}/user/tiny/commit/' in address
    assert sorted(hub.files('user/tiny')) == FILES and hub.private == set()
    original = recnext.load(*tiny, 'cpu')
    pulled = recnext.load('hf://user/tiny', device='cpu')
    assert 'downloading model.safetensors, 0.' in capsys.readouterr().out
    assert cached(tmp_path) == ['config.json', 'model.safetensors']
    found, expected = pulled(an_image()), original(an_image())
    assert len(np.unique(expected.labels)) > 3
    assert np.array_equal(found.labels, expected.labels) and found.areas == expected.areas
    assert pulled.classes == original.classes and np.array_equal(pulled.palette, original.palette)


def test_what_is_in_a_repository(pushed, tiny):
    files = pushed.files('user/tiny')
    description = json.loads(files['config.json'])
    assert set(description) == {
        *('schema', 'version', 'network', 'preprocess', 'classes', 'palette', 'provenance', 'metrics'),
    }  # fmt: skip
    assert description['provenance'] == dict(
        file='tiny.pth', file_sha256=sha256_of(tiny[1]), sha256=description['provenance']['sha256']
    )
    _, front, text = files['README.md'].decode().split('---\n', 2)
    front = yaml.safe_load(front)
    assert front['library_name'] == 'recnext' and front['license'] == 'apache-2.0' and 'metrics' not in front
    assert 'recnext predict hf://user/tiny photo.jpg' in text and sha256_of(tiny[1]) in text
    assert "recnext.load('hf://user/tiny')" in text and 'without a record' in text


def test_the_command_line(hub, tiny, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(['push', *map(str, tiny), 'user/tiny', '--private'])
    assert 'uploading' in capsys.readouterr().out and hub.private == {'user/tiny'}
    photo = next(scenes.rglob('images/validation/*'))
    main(['predict', *map(str, tiny), str(photo), '--out-dir', 'here'])
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    predict = ['-m', 'projects.recnext.recnext', 'predict', 'hf://user/tiny', photo, '--out-dir', 'there']
    result = run_python(*predict, fresh=True, env=env)
    assert result.returncode == 0 and 'hf://user/tiny: downloading' in result.stdout, result.stderr
    labels = [next((tmp_path / name / 'labels').iterdir()).read_bytes() for name in ('here', 'there')]
    assert labels[0] == labels[1]
    main(['test', 'hf://user/tiny', '--data-root', str(scenes), '--work-dir', 'work'])
    assert list((tmp_path / 'work').rglob('evaluation.json'))


def test_figures_are_those_of_a_test_of_the_same_weights(hub, tiny, scenes, tmp_path):
    work = tmp_path / 'work'
    sha256 = sha256_of(tiny[1])
    with pytest.raises(UserError, match=r'No evaluation\.json'):
        read_figures(work, sha256)
    main(['test', *map(str, tiny), '--data-root', str(scenes), '--work-dir', str(work)])
    figures = read_figures(work, sha256)
    assert figures['images'] == 3
    push(*tiny, 'user/tiny', metrics=figures)
    assert json.loads(hub.files('user/tiny')['config.json'])['metrics'] == figures
    card = hub.files('user/tiny')['README.md'].decode()
    (results,) = yaml.safe_load(card.split('---\n')[1])['model-index']
    found = {metric['name']: metric['value'] for metric in results['results'][0]['metrics']}
    assert found == {key: figures[key] for key in ('aAcc', 'mIoU', 'mAcc')}
    # Scenes are no ADE20K, though their classes are of it.
    assert results['results'][0]['dataset']['name'] == '3 images' and 'scene_parse_150' not in card
    with pytest.raises(UserError, match='is of another checkpoint'):
        read_figures(work, '0' * 64)


def test_published_figures_are_those_of_a_release_by_its_sha256(hub, tiny, tmp_path, monkeypatch):
    release = get_release('recnext_m3_ade20k')
    (tmp_path / 'sha256.json').write_text(json.dumps({release['name']: sha256_of(tiny[1])}))
    monkeypatch.setattr(push_module, 'CHECKPOINTS', tmp_path)
    push(*tiny, 'user/tiny')
    description = json.loads(hub.files('user/tiny')['config.json'])
    assert description['provenance']['release'] == release['name'] and description['metrics'] == release['metrics']
    card = hub.files('user/tiny')['README.md'].decode()
    (results,) = yaml.safe_load(card.split('---\n')[1])['model-index']
    (found,) = results['results']
    assert {metric['name']: metric['value'] for metric in found['metrics']} == release['metrics']
    assert found['source']['name'] == 'training log' and found['dataset']['name'] == 'ADE20K'
    assert 'scene_parse_150' in card and '| as published | 40.98 |' in card


def test_a_file_that_was_tampered_with_is_refused(pushed, tmp_path):
    right = pushed.files('user/tiny')['model.safetensors']
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    pushed.swapped['model.safetensors'] = wrong
    with pytest.raises(UserError, match=r'hf://user/tiny: .*not what was saved: found sha256.*\n.*expected'):
        recnext.load('hf://user/tiny')
    pushed.swapped.clear()
    recnext.load('hf://user/tiny')  # nothing of it has stayed
    pushed.commit('user/tiny', {'model.safetensors': wrong})
    with pytest.raises(UserError, match='not what was saved'):
        recnext.load('hf://user/tiny')
    pushed.swapped['model.safetensors'] = right[:1000]
    shutil.rmtree(tmp_path / 'home')
    with pytest.raises(UserError) as error:
        recnext.load('hf://user/tiny')
    assert len(str(error.value).splitlines()) <= 3


def test_weights_of_the_right_sha256_that_do_not_fit(pushed):
    change(pushed, lambda description: description['network'].update(head_channels=32))
    with pytest.raises(UserError, match='do not fit'):
        recnext.load('hf://user/tiny')


def test_a_checkpoint_that_is_named_is_taken_and_the_hubs_is_not_downloaded(pushed, tiny, tmp_path):
    """Defect 11."""
    model = recnext.load('hf://user/tiny', checkpoint=tiny[1])
    assert model.provenance['checkpoint'] == 'tiny.pth' and cached(tmp_path) == ['config.json']


def test_a_refused_description_costs_no_download(pushed, tmp_path):
    change(pushed, lambda description: description.update(custom_imports=['os']))
    with pytest.raises(UserError, match='custom_imports is wrong'):
        recnext.load('hf://user/tiny')
    assert cached(tmp_path) == ['config.json']


def test_an_older_revision_will_do(pushed, tiny):
    first = list(pushed.commits['user/tiny'])[-1]
    pushed.commit('user/tiny', {'config.json': b'{}'})
    with pytest.raises(UserError, match=r'config\.json is refused'):
        recnext.load('hf://user/tiny')
    expected = recnext.load(*tiny)(an_image()).labels
    assert np.array_equal(recnext.load(f'hf://user/tiny@{first}')(an_image()).labels, expected)


def test_what_was_pulled_works_without_a_network(pushed, tiny, monkeypatch, tmp_path):
    before = recnext.load('hf://user/tiny').provenance
    nowhere = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(pushed.url, NOWHERE)
    monkeypatch.setattr(constants, 'ENDPOINT', NOWHERE)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', nowhere)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # between its attempts
    assert recnext.load('hf://user/tiny').provenance == before
    shutil.rmtree(tmp_path / 'home')
    with pytest.raises(UserError, match='cannot be reached, and is not in the cache'):
        recnext.load('hf://user/tiny')
    with pytest.raises(UserError, match='hf://user/tiny: ConnectError'):
        push(*tiny, 'user/tiny')


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('hf://user/nothing', 'no such repository'),
        ('hf://user/tiny@v9', 'no such revision'),
        ('hf://user', 'expected hf://user/name'),
        ('hf://user/a/b', 'expected hf://user/name'),
        ('hf://user/..', 'hf://user/..: '),
        ('hf://user/\x1b[2Jtiny', r'user/\x1b[2Jtiny is no repository'),
    ],
)
def test_names_that_are_wrong(pushed, name, words):
    with pytest.raises(UserError) as error:
        recnext.load(name)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize('missing', ['config.json', 'model.safetensors'])
def test_a_repository_that_lacks_files_is_said(pushed, missing):
    files = dict(pushed.files('user/tiny'))
    del files[missing]
    pushed.commits['user/bare'] = {}
    pushed.commit('user/bare', files)
    with pytest.raises(UserError, match=r'hf://user/bare lacks config\.json or model\.safetensors'):
        recnext.load('hf://user/bare')


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
        push(*tiny, repository)
    assert all(word in str(error.value) for word in words) and len(str(error.value).splitlines()) <= 3
    assert os.listdir(tmp_path / 'tmp') == [] and hub.commits == {} and hub.large == {}


def test_weights_that_do_not_fit_are_not_pushed(hub, tiny, tmp_path):
    content = read_checkpoint(tiny[1])
    content['state_dict'].popitem()
    write_checkpoint(content, tmp_path / 'less.pth')
    with pytest.raises(UserError, match='do not fit'):
        push(tiny[0], tmp_path / 'less.pth', 'user/tiny')
    config = write_tiny_config(
        tmp_path, tmp_path, "model['test_cfg'] = dict(mode='slide', crop_size=(64, 64), stride=(9, 9))"
    )
    with pytest.raises(UserError, match='Only RecNeXt with Semantic FPN'):
        push(config, tiny[1], 'user/tiny')
    assert hub.requests == []


def test_the_genuine_m3(hub, real_m3, ade20k_sample):
    push('recnext_m3_ade20k', real_m3, 'user/m3')
    pulled = recnext.load('hf://user/m3', device='cpu')
    for name, expected in genuine_maps().items():
        labels = pulled(ade20k_sample / 'images' / 'validation' / f'{name}.jpg').labels
        assert (labels != expected).sum() == 0
