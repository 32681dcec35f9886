"""The page that predicts in the browser, from a plain file server in a real one: its labels are onnxruntime's."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from helpers.exports import SIZE, export_to, left_behind, picture, pixels, write_tiny
from helpers.sites import served
from helpers.tools import assert_user_error, run_tool
from helpers.visitor import Visitor
from PIL import Image

from projects.recnext.recnext.export.onnx import open_session
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.web import runtime
from projects.recnext.recnext.web.static_page import WebBackend

if TYPE_CHECKING:
    pass


@pytest.fixture(scope='module')
def package() -> Path:
    """onnxruntime-web's npm package; the tests are skipped where it cannot be had."""
    try:
        return runtime.find_package()
    except UserError as error:
        pytest.skip(f'needs {runtime.PACKAGE} {runtime.VERSION}, from the cache or by npm: {error}')


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> tuple[str, str]:
    return write_tiny(tmp_path_factory.mktemp('tiny'), 'conv')


@pytest.fixture(scope='module')
def site_of(package, tiny, tmp_path_factory) -> Callable[[str], Path]:
    """A page with the small segmentor in some precision; in 8 bits of three classes, whose labels these can keep."""
    made = {}

    def make(precision: str) -> Path:
        if precision not in made:
            source = write_tiny(tmp_path_factory.mktemp('few'), 'conv', classes=3) if precision == 'int8' else tiny
            made[precision] = tmp_path_factory.mktemp('made') / 'site.v1'
            export_to(made[precision], WebBackend(precision), source, size=[SIZE])
        return made[precision]

    return make


@pytest.fixture(scope='module')
def ready() -> str:
    return '.camera'


@pytest.fixture(scope='module')
def site(site_of) -> Path:
    return site_of('fp32')


@pytest.fixture(scope='module')
def address(site) -> Iterator[str]:
    with served(site) as address:
        yield address


def png(image: np.ndarray) -> bytes:
    """Of (H, W, 3) in BGR."""
    return cv2.imencode('.png', image)[1].tobytes()


def wait_until_ready(visitor: Visitor) -> str:
    """Where it computes."""
    visitor.page.locator('.made').filter(has_text='onnxruntime-web').wait_for()
    return visitor.page.locator('.made').inner_text()


def mask_of(visitor: Visitor) -> tuple[str, Image.Image]:
    name, content = visitor.mask()
    return name, Image.open(io.BytesIO(content))


def layer_of(visitor: Visitor) -> np.ndarray:
    """(H, W, 3)"""
    return visitor.layer()[..., :3]


def labels_of(site: Path, image: np.ndarray) -> np.ndarray:
    """The label map (H, W) that onnxruntime makes of an image (H, W, 3) in BGR with the page's own file."""
    return open_session(site / 'model.onnx')(pixels(image))['labels'][0]


def adapter_of(visitor: Visitor) -> bool:
    return visitor.page.evaluate('async () => Boolean(navigator.gpu && await navigator.gpu.requestAdapter())')


# A visit


@pytest.mark.parametrize(
    ('query', 'isolated', 'where', 'precision'),
    [
        ('', True, 'threads', 'fp32'),
        pytest.param('', False, '1 thread ', 'fp32', marks=pytest.mark.full),
        pytest.param('', True, 'threads', 'fp16', marks=pytest.mark.full),
        pytest.param('', True, 'threads', 'int8', marks=pytest.mark.full),
        pytest.param('?run=webgpu', True, 'WebGPU', 'fp32', marks=pytest.mark.full),
    ],
    ids=['threads', 'without isolation', 'fp16', 'int8', 'WebGPU'],
)
def test_labels_are_those_of_onnxruntime(site_of, visit, tmp_path, query, isolated, where, precision):
    site = site_of(precision)
    about = json.loads((site / 'model.json').read_text())
    if not isolated:
        site = shutil.copytree(site, tmp_path / 'copy')
        (site / 'service_worker.js').unlink()
    with served(site) as address:
        visitor = visit(address + query)
        if 'webgpu' in query and not adapter_of(visitor):
            pytest.skip('needs a browser with WebGPU in software')
        assert where in wait_until_ready(visitor)
        assert visitor.page.evaluate('crossOriginIsolated') == isolated
        for seed in (5, 6):
            image = picture(SIZE, seed)
            visitor.upload(png(image), f'photo{seed}.png')
            assert visitor.wait_for_result(f'photo{seed}.png') == f'photo{seed}.png · 128 × 64 pixels'
            expected = labels_of(site, image)
            assert len(np.unique(expected)) > 1
            name, mask = mask_of(visitor)
            assert name == f'photo{seed}.png' and np.array_equal(np.array(mask), expected)
            palette = np.ravel(about['palette']).tolist()
            assert mask.mode == 'P' and mask.getpalette()[: len(palette)] == palette
            assert np.array_equal(layer_of(visitor), np.array(mask.convert('RGB')))
            order = sorted(np.unique(expected), key=lambda label: (-(expected == label).sum(), label))
            legend = visitor.page.locator('.legend span').all_inner_texts()
            assert legend == [about['classes'][label] for label in order]
    timings = dict(zip(*(visitor.page.locator(f'.timings td:nth-child({n})').all_inner_texts() for n in (1, 2))))
    assert list(timings) == ['prepare', 'network and labels', 'total']
    if not isolated:  # of its absence the browser itself tells
        assert all('404' in said for said in visitor.complaints)
        visitor.complaints.clear()


def test_after_the_first_visit_it_works_without_its_server(site, visit):
    with served(site) as address:
        visitor = visit(address)
        wait_until_ready(visitor)
    visitor.context.set_offline(True)
    visitor.page.reload()
    assert 'threads' in wait_until_ready(visitor)
    image = picture(SIZE)
    visitor.upload(png(image), 'photo.png')
    visitor.wait_for_result('photo.png')
    assert np.array_equal(np.array(mask_of(visitor)[1]), labels_of(site, image))


@pytest.mark.full
def test_a_new_export_replaces_the_old_one(site, visit, tmp_path):
    copy = shutil.copytree(site, tmp_path / 'copy')
    old = json.loads((copy / 'model.json').read_text())
    with served(copy) as address:
        visitor = visit(address)
        wait_until_ready(visitor)
        for name in ('model.json', 'service_worker.js'):
            text = (copy / name).read_text().replace(old['version'], '0' * 16)
            (copy / name).write_text(text.replace(json.dumps(old['origin']['config']), '"another"'))
        visitor.page.reload()  # still the old one, beside which the new one is fetched
        while not all(name.endswith('0' * 16) for name in visitor.page.evaluate('caches.keys()')):
            visitor.page.wait_for_timeout(100)
        visitor.page.reload()
        visitor.page.locator('.model').filter(has_text='another').wait_for()
        assert 'threads' in wait_until_ready(visitor)


def test_a_picture_of_another_size_is_scaled_and_so_are_its_labels(address, visit):
    visitor = visit(address, viewport=dict(width=390, height=844))
    wait_until_ready(visitor)
    assert '128 × 64 pixels' in visitor.page.locator('.limits').inner_text()
    assert visitor.page.evaluate('document.documentElement.scrollWidth') == 390
    visitor.upload(png(picture((1203, 1801))), '<img src=x onerror=alert(1)>.png')
    assert '1801 × 1203' in visitor.wait_for_result('<img src=x onerror=alert(1)>.png')
    layer, mask = layer_of(visitor), np.array(mask_of(visitor)[1].convert('RGB'))
    rows, columns = (np.arange(1203) + 0.5) * 64 / 1203, (np.arange(1801) + 0.5) * 128 / 1801
    assert np.array_equal(mask, layer[rows.astype(int)][:, columns.astype(int)])
    for width in (390, 320):
        visitor.page.set_viewport_size(dict(width=width, height=844))
        assert visitor.page.evaluate('document.documentElement.scrollWidth') == width


def test_opacity_and_a_class_by_itself(site, address, visit):
    visitor = visit(address)
    image = picture(SIZE)
    visitor.upload(png(image), 'photo.png')
    visitor.wait_for_result('photo.png')
    labels, layer = labels_of(site, image), layer_of(visitor)
    visitor.page.get_by_role('slider').fill('80')
    assert visitor.page.locator('.overlay').evaluate('canvas => getComputedStyle(canvas).opacity') == '0.8'
    visitor.page.locator('.legend button').first.click()
    chosen = labels == np.bincount(labels.ravel()).argmax()
    assert np.array_equal(layer_of(visitor)[chosen], layer[chosen]) and (layer_of(visitor)[~chosen] == 0x18).all()
    visitor.page.locator('.legend button').first.click()
    assert np.array_equal(layer_of(visitor), layer)


def test_the_camera(address, visit):
    visitor = visit(address)
    page = visitor.page
    wait_until_ready(visitor)
    page.get_by_text('Use the camera').click()
    visitor.wait_for_result('camera')
    rate = page.locator('.timings tr', has_text='frames a second').locator('td').last
    rate.filter(has_text='.').wait_for()
    assert float(rate.inner_text()) > 0
    page.locator('.legend button').first.click()
    page.get_by_text('Stop').click()
    page.locator('.stop').wait_for(state='hidden')
    assert page.locator('[aria-pressed=true]').count() <= 1
    assert mask_of(visitor)[0] == 'camera.png'
    # An image takes its place.
    page.get_by_text('Use the camera').click()
    page.locator('.stop').wait_for()
    visitor.upload(png(picture(SIZE)), 'after.png')
    visitor.wait_for_result('after.png')
    page.locator('.stop').wait_for(state='hidden')


def test_a_video(address, visit, tmp_path):
    path = tmp_path / 'clip.webm'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'VP80'), 10, SIZE[::-1])
    if not writer.isOpened():
        pytest.skip('needs an OpenCV that writes VP8')
    for seed in range(10):
        writer.write(picture(SIZE, seed))
    writer.release()
    visitor = visit(address)
    visitor.upload(path)
    assert visitor.wait_for_result('clip.webm') == 'clip.webm · 128 × 64 pixels'
    visitor.page.locator('.stop').wait_for(state='hidden')  # at its end
    assert visitor.page.locator('.timings').get_by_text('frames a second').count() == 1


BAD_FILES = {
    'text': (b'Not an image.', 'image/jpeg', 'photo.jpg is not an image or a video that this browser can read.'),
    'empty': (b'', 'image/jpeg', 'photo.jpg is empty: 0 bytes.'),
    'vector': (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'image/svg+xml', 'photo.jpg is not an image or a video'),
    'film': (b'Not a video.', 'video/mp4', 'photo.jpg is not a video that this browser can play.'),
}


@pytest.mark.full
def test_a_bad_file_gets_an_answer_and_the_next_is_predicted(address, visit):
    visitor = visit(address)
    for content, kind, message in BAD_FILES.values():
        visitor.upload(png(picture(SIZE)), 'good.png')
        visitor.wait_for_result('good.png')
        visitor.upload(content, 'photo.jpg', kind)
        assert visitor.message().startswith(message)
        assert not visitor.page.locator('figure').is_visible()


@pytest.mark.full
def test_names_of_classes_are_shown_as_text(site, visit, tmp_path):
    copy = shutil.copytree(site, tmp_path / 'copy')
    about = json.loads((copy / 'model.json').read_text())
    about['classes'] = [f'<img src=x onerror=alert(1)>{number}' for number in range(150)]
    (copy / 'model.json').write_text(json.dumps(about))
    with served(copy) as address:
        visitor = visit(address)
        visitor.upload(png(picture(SIZE)), 'photo.png')
        visitor.wait_for_result('photo.png')
        names = visitor.page.locator('.legend span').all_inner_texts()
    assert names and all(name.startswith('<img src=x') for name in names)
    assert visitor.page.locator('.legend img').count() == 0


@pytest.mark.full
def test_the_browser_forbids_the_page_to_talk_to_others(address, visit):
    visitor = visit(address)
    wait_until_ready(visitor)
    refused = visitor.page.evaluate("fetch('http://localhost:9/').then(() => false, () => true)")
    assert refused and visitor.complaints and all('Content Security Policy' in said for said in visitor.complaints)
    visitor.complaints.clear()


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda content: content[:-1000], 'model.onnx did not arrive whole.'),
        (
            lambda content: content[:-1] + bytes([content[-1] ^ 1]),
            'model.onnx is not the one that belongs to this page.',
        ),
    ],
    ids=['short', 'another'],
)
def test_a_wrong_model_is_refused(site, visit, tmp_path, spoil, said):
    copy = shutil.copytree(site, tmp_path / 'copy')
    (copy / 'model.onnx').write_bytes(spoil((copy / 'model.onnx').read_bytes()))
    with served(copy) as address:
        visitor = visit(address)
        assert said in visitor.message()


# Without a browser


@pytest.mark.full
def test_half_the_weights_are_half_the_size(site_of):
    whole, half = ((site_of(precision) / 'model.onnx').stat().st_size for precision in ('fp32', 'fp16'))
    assert half < 0.75 * whole  # much of so small a network is its graph


def test_another_package_is_refused(tiny, tmp_path):
    wrong = tmp_path / 'onnxruntime-web.tgz'
    wrong.write_bytes(b'Something else.')
    for path, said in ((wrong, 'expected sha512-'), (tmp_path / 'none.tgz', 'No such file')):
        with pytest.raises(UserError, match=said):
            export_to(tmp_path / 'site', WebBackend(runtime=str(path)), tiny)
    assert left_behind(tmp_path) == ['onnxruntime-web.tgz']


def test_where_there_is_no_npm_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, 'user_cache_path', lambda name: tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UserError, match=r'npm pack onnxruntime-web@(?s:.*)--runtime'):
        runtime.find_package()
    npm = tmp_path / 'npm'
    npm.write_text('#!/bin/sh\necho no registry >&2\nexit 1\n')
    npm.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/bin')
    with pytest.raises(UserError, match=r'no registry(?s:.*)--runtime'):
        runtime.find_package()
    npm.write_text(f'#!/bin/sh\necho another > {runtime.ARCHIVE}\n')
    with pytest.raises(UserError, match='is not onnxruntime-web'):
        runtime.find_package()
    assert left_behind(tmp_path) == ['npm']


def test_wrong_use(package, tiny, tmp_path):
    for options, said in ((dict(part='backbone'), 'shows labels'), (dict(output='both'), 'shows labels')):
        with pytest.raises(UserError, match=said):
            export_to(tmp_path / 'site', WebBackend(), tiny, **options)
    (tmp_path / 'there').mkdir()
    assert_user_error(run_tool('export_web', *tiny, '--out', tmp_path / 'there'), 'is there already')
    assert run_tool('export_onnx', *tiny, '--out', tmp_path / 'a.onnx', '--runtime', 'x').returncode == 2
    assert left_behind(tmp_path) == ['there']
