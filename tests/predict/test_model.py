"""A model is one thing, wherever it comes from: the same label maps from a release, a folder and a config."""

import dataclasses
import io
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.malicious import Command
from helpers.reference import ROOT, genuine_maps
from helpers.scenes import HEIGHT, WIDTH, save, scene
from helpers.tiny import write_tiny_config
from PIL import Image

import recnext
from projects.recnext.recnext.checkpoints.files import write_checkpoint
from projects.recnext.recnext.checkpoints.folder import parse_description, read_folder, write_folder
from projects.recnext.recnext.models.semantic_fpn import RecNeXtSegmentor
from projects.recnext.recnext.predict.model import Model
from projects.recnext.recnext.predict.prediction import Prediction
from projects.recnext.recnext.predict.predictor import Predictor
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.images import ImageError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model(tiny) -> Model:
    """Of a config."""
    return recnext.load(tiny[0], checkpoint=tiny[1])


@pytest.fixture(scope='module')
def folder(tiny, tmp_path_factory):
    """The same as a folder."""
    path = tmp_path_factory.mktemp('saved') / 'model'
    recnext.load(tiny[0], checkpoint=tiny[1], fuse='none').save(path)
    return path


WITHOUT = """
import sys
for name in ('mmengine', 'mmcv', 'mmseg', 'mmpretrain', 'timm'):
    sys.modules[name] = None  # cannot be imported from here on
import numpy as np, recnext
model = recnext.load('recnext_m3_ade20k', checkpoint=sys.argv[1])
np.savez(sys.argv[2], *[prediction.labels for prediction in model(sys.argv[3:])])
"""


def test_the_genuine_label_maps_without_openmmlab(real_m3, ade20k_sample, tmp_path):
    """Three real images through the call from Python, in a process in which OpenMMLab and timm cannot be imported."""
    maps = genuine_maps()
    images = [ade20k_sample / 'images' / 'validation' / f'{name}.jpg' for name in maps]
    command = [sys.executable, '-c', WITHOUT, real_m3, tmp_path / 'maps.npz', *images]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for ours, expected in zip(np.load(tmp_path / 'maps.npz').values(), maps.values()):
        assert (ours != expected).sum() == 0


def test_a_folder_predicts_as_its_config_does(model, folder):
    saved = recnext.load(folder)
    assert saved.classes == model.classes and np.array_equal(saved.palette, model.palette)
    assert isinstance(saved.network, RecNeXtSegmentor) and not isinstance(model.network, RecNeXtSegmentor)
    for seed, size in enumerate(((48, 64), (33, 70), (1, 1), (3, 200))):
        image = scene(seed, *size)
        assert np.array_equal(saved(image).labels, model(image).labels)


def test_a_folder_of_a_folder_is_the_same(folder, tmp_path):
    recnext.load(folder, fuse='none').save(tmp_path / 'again')
    assert (tmp_path / 'again' / 'model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()
    again, before = (json.loads((path / 'config.json').read_text()) for path in (tmp_path / 'again', folder))
    del again['provenance'], before['provenance']
    assert again == before


def test_every_form_of_an_image_is_the_same(folder, tmp_path):
    model, image = recnext.load(folder), scene(3)
    path = save(tmp_path / 'a.png', image)
    forms = [path, str(path), path.read_bytes(), Image.open(path), image]
    predictions = model(forms)
    for prediction in predictions:
        assert np.array_equal(prediction.image, image) and np.array_equal(prediction.labels, predictions[0].labels)
        assert prediction.labels.shape == (HEIGHT, WIDTH) and prediction.labels.dtype == np.uint8
    one = predictions[0]
    assert [area.pixels for area in one.areas] == sorted((area.pixels for area in one.areas), reverse=True)
    for area in one.areas:
        assert area.pixels == (one.labels == area.label).sum() and area.name == model.classes[area.label]
        assert area.share == pytest.approx(area.pixels / (HEIGHT * WIDTH), abs=1e-6)
    assert not np.array_equal(model(image[..., ::-1].copy()).labels, one.labels)  # the order of channels counts
    picture = Image.open(io.BytesIO(one.overlay_jpeg()))
    assert picture.width >= 320 and picture.height > HEIGHT


@pytest.mark.parametrize('image', [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_arrays_that_are_no_image_are_refused(folder, image):
    with pytest.raises(ImageError, match=r'expected uint8 \(height, width, 3\), RGB'):
        recnext.load(folder)(image)


def test_extreme_sizes(model, folder):
    for one in (model, recnext.load(folder)):
        for height, width in ((1, 1), (3, 500), (500, 2)):
            assert one(scene(0, height, width)).labels.shape == (height, width)
        with pytest.raises(ImageError, match='reaches the network as 8192 × 4096 pixels; expected at most 17 million'):
            one(np.zeros((4096, 8192, 3), np.uint8))


def test_an_image_that_the_pipeline_cannot_take(tiny, tmp_path):
    resize = dict(type='Resize', scale=(64, 16), keep_ratio=True)
    pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackSegInputs')]
    config = write_tiny_config(tmp_path, tmp_path, f"test_dataloader['dataset']['pipeline'] = {pipeline}")
    with pytest.raises(ImageError, match=r'thin\.png does not go through the test pipeline'):
        recnext.load(config, checkpoint=tiny[1])(save(tmp_path / 'thin.png', scene(0, 1, 5000)))


def test_classes_of_the_checkpoint_before_those_of_the_config(tiny, model, tmp_path):
    config, checkpoint = tiny
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    names, colours = [f'class {i} ' for i in range(150)], [[i, 0, 0] for i in range(150)]
    meta = dict(dataset_meta=dict(classes=names, palette=colours))
    write_checkpoint(dict(state_dict=weights, meta=meta), tmp_path / 'named.pth')
    named = recnext.load(config, checkpoint=tmp_path / 'named.pth')
    assert named.classes[3] == 'class 3' and named.palette[3].tolist() == [3, 0, 0]
    assert model.classes[:2] == ['wall', 'building']


@pytest.mark.parametrize('palette', [None, np.arange(450).reshape(150, 3) % 256])
def test_names_count_without_colours_and_colours_may_be_an_array(tiny, folder, tmp_path, palette):
    weights = torch.load(tiny[1], weights_only=True)['state_dict']
    names = [f'class\n{i}' for i in range(150)]
    write_checkpoint(dict(state_dict=weights, meta=dict(CLASSES=names, PALETTE=palette)), tmp_path / 'named.pth')
    for name in (tiny[0], folder):
        named = recnext.load(name, tmp_path / 'named.pth', fuse='none')
        assert named.classes[3] == r'class\n3'
        assert named.palette[1].tolist() == ([120, 120, 120] if palette is None else [3, 4, 5]) or palette is None
        if named.description:
            named.save(tmp_path / 'saved')
            assert recnext.load(tmp_path / 'saved').classes == named.classes


def test_more_than_256_classes_are_16_bits():
    labels = np.array([[0, 299], [255, 256]], np.uint16)
    prediction = Prediction(np.zeros((2, 2, 3), np.uint8), labels, [str(i) for i in range(300)], np.zeros((300, 3)))
    image = prediction.label_image()
    assert image.mode == 'I;16' and np.array_equal(np.array(image), labels)


def test_the_old_name_has_the_old_order_of_channels_and_warns(tiny, model):
    with pytest.warns(FutureWarning, match='recnext.load'):
        old = Predictor(*tiny)
    image = scene(2)
    before, now = old(image[..., ::-1].copy()), model(image)
    assert np.array_equal(before.labels, now.labels) and np.array_equal(before.image, image[..., ::-1])
    assert np.array_equal(before.overlay(), now.overlay())


def test_a_model_moves_between_devices(folder):
    model = recnext.load(folder)
    assert model.to('cpu') is model
    with pytest.raises(UserError, match=r'finds no|expected auto'):
        model.to('cuda:99')


def test_names(tmp_path):
    assert 'recnext_m3_ade20k' in recnext.list_models() and len(recnext.list_models()) == 6
    with pytest.raises(UserError, match='is an ImageNet classifier, not a segmentor'):
        recnext.load('recnext_m3_distill_300e')
    with pytest.raises(UserError, match='--cfg-options change a config, and recnext_m3_ade20k is none'):
        recnext.load('recnext_m3_ade20k', cfg_options={'a': 1})
    with pytest.raises(UserError, match=r'No such config|no release'):
        recnext.load('recnext_m9_ade20k')
    with pytest.raises(AttributeError):
        recnext.nothing  # noqa: B018
    assert set(recnext.__all__) <= set(dir(recnext)) and recnext.__version__


def test_weights_of_another_variant_are_refused(released):
    with pytest.raises(UserError, match='do not fit recnext_m3_ade20k; they are of arch m4'):
        recnext.load('recnext_m3_ade20k', checkpoint=released('recnext_m4_ade20k'))


# config.json


def described(folder) -> dict:
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda d: d.update(custom_imports=['os']), 'config.json.custom_imports is wrong: expected one of the keys'),
        (lambda d: d['network'].update(type='os.system'), 'network.type is wrong'),
        (lambda d: d['network'].update(arch='m9'), "Unknown RecNeXt arch 'm9'"),
        (lambda d: d['network'].update(arch=dict(d['network']['arch'], depths=[1, 1, 1])), 'expected 4 depths'),
        (lambda d: d['network'].update(fpn_channels=10**9), 'between 1 and 65536'),
        (lambda d: d['network'].update(threshold=0.5), 'A threshold tells two classes apart'),
        (lambda d: d['preprocess'].update(std=[0, 1, 1]), 'preprocess.std is wrong'),
        (lambda d: d['network']['arch'].update(depths=[10**9, 3, 13, 2]), 'network.arch.depths is wrong'),
        (lambda d: d['network']['arch'].update(channels=[2**40, 2**41, 2**42, 2**43]), 'arch.channels is wrong'),
        (lambda d: d['network']['arch'].update(mlp_ratio=math.nan), 'mlp_ratio is wrong'),
        (lambda d: d['network']['arch'].update(mlp_ratio=1e300), 'mlp_ratio is wrong'),
        (lambda d: d['network']['arch'].update(token_mixer='eval'), 'token_mixer is one of'),
        (lambda d: d['network'].update(threshold=math.inf), 'network.threshold is wrong'),
        (lambda d: d['preprocess'].update(mean=[10**400, 1, 1]), 'preprocess.mean is wrong'),
        (lambda d: d['preprocess'].update(scale=[10**9, 512]), 'preprocess.scale is wrong'),
        (lambda d: d.update(metrics=dict(mIoU=math.nan)), 'metrics is wrong'),
        (lambda d: d['preprocess'].update(scale=[10]), 'preprocess.scale is wrong'),
        (lambda d: d['preprocess'].update(multiple='evil.yml'), 'preprocess.multiple is wrong'),
        (lambda d: d.pop('palette'), 'palette is wrong: expected a value, and it is missing'),
        (lambda d: d['classes'].append('one too many'), 'palette is wrong'),
        (lambda d: d['classes'].__setitem__(0, '\x1b[31m'), 'classes is wrong'),
        (lambda d: d.update(version=2), 'has schema recnext-segmentor 2; expected recnext-segmentor 1'),
        (lambda d: d.update(architecture='RecNeXtEncoderDecoder', config={}), 'recnext push FOLDER/config.py'),
    ],
)
def test_a_description_that_is_more_or_less_than_the_schema_is_refused(folder, tmp_path, change, words):
    content = described(folder)
    change(content)
    (tmp_path / 'config.json').write_text(json.dumps(content))
    (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    with pytest.raises(UserError) as caught:
        recnext.load(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize('text', ['', '[]', '{', '"a"', '[' * 100000, '{"schema": NaN}', 'x' * (1 << 23)])
def test_what_is_no_description_is_refused(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(UserError, match=r'config\.json'):
        recnext.load(tmp_path)


def test_weights_that_were_changed_or_are_pickles_are_refused(folder, tmp_path):
    for name, content in (('changed', None), ('pickle', Command(tmp_path / 'touched'))):
        place = tmp_path / name
        place.mkdir()
        (place / 'config.json').write_bytes((folder / 'config.json').read_bytes())
        weights = bytearray((folder / 'model.safetensors').read_bytes())
        weights[-1] ^= 1
        (place / 'model.safetensors').write_bytes(weights)
        if content is not None:
            torch.save(content, place / 'model.safetensors')
        with pytest.raises(UserError, match=r'is not what was saved|is no safetensors file'):
            read_folder(place)
    assert not (tmp_path / 'touched').exists()


def test_a_description_goes_through_json_unchanged(folder):
    description, _ = read_folder(folder)
    assert parse_description(json.loads(json.dumps(description.to_dict()))) == description


def test_one_channel_and_threshold(tmp_path):
    """Two classes told apart by one map, in a channel count of its own."""
    content = dict(
        schema='recnext-segmentor',
        version=1,
        network=dict(arch='m0', in_channels=1, fpn_channels=16, head_channels=8, threshold=0.3),
        preprocess=dict(scale=None, multiple=32, mean=[100.0], std=[50.0]),
        classes=['background', 'road'],
        palette=[[0, 0, 0], [255, 255, 255]],
        provenance={},
        metrics={},
    )
    torch.manual_seed(0)
    description = parse_description(content)
    network = RecNeXtSegmentor(num_classes=2, preprocess=description.preprocess, **description.network).eval()
    Model(
        network, network, description.classes, description.palette, dict(fuse='none', precision='fp32'), description
    ).save(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 1), np.uint8)
    labels = recnext.load(tmp_path)(image).labels
    with torch.no_grad():
        logits = network(description.preprocess.normalise(description.preprocess.prepare(image).inputs[None]))
        for size in ((64, 64), (40, 50)):
            logits = torch.nn.functional.interpolate(logits, size, mode='bilinear')
    assert np.array_equal(labels, (logits[0, 0].sigmoid() > 0.3).numpy())
    model = recnext.load(tmp_path)
    assert model(image).overlay().mode == 'RGB'
    with pytest.raises(ImageError, match='has three channels, and this network takes 1: give it arrays'):
        model(Image.new('RGB', (40, 50)))


def test_a_huge_resize_is_refused_before_it_takes_the_memory(folder, tmp_path):
    content = described(folder)
    content['preprocess']['scale'] = [65536, 65536]
    (tmp_path / 'config.json').write_text(json.dumps(content))
    (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    with pytest.raises(ImageError, match='reaches the network as 65536 × 65536 pixels'):
        recnext.load(tmp_path)(np.zeros((40, 40, 3), np.uint8))


def test_an_interrupted_save_leaves_the_model_that_was_there(folder, tmp_path):
    model = recnext.load(folder, fuse='none')
    shutil.copytree(folder, place := tmp_path / 'place')
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    wrong = dataclasses.replace(model.description, classes=('a\n', *model.classes[1:]))
    with pytest.raises(UserError, match='classes is wrong'):
        write_folder(place, wrong, {key: value + 1 for key, value in model.network.state_dict().items()})
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be made a folder'):
        model.save(tmp_path / 'file')


def test_other_networks_are_not_saved(tiny, tmp_path):
    config = write_tiny_config(
        tmp_path, tmp_path, "model['test_cfg'] = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))"
    )
    with pytest.raises(UserError, match='Only RecNeXt with Semantic FPN'):
        recnext.load(config, checkpoint=tiny[1], fuse='none').save(tmp_path / 'model')
    with pytest.raises(UserError, match="load it with fuse='none'"):
        recnext.load(*tiny).save(tmp_path / 'model')
    assert not (tmp_path / 'model').exists()
