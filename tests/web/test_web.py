"""The page as visitors have it, in a real browser against the real server; and as those who mean harm."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from helpers.predicting import infer
from helpers.reference import ROOT, shared
from helpers.tools import assert_user_error, run_tool
from helpers.visitor import SECONDS
from PIL import Image

from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.web import app as web_demo

if TYPE_CHECKING:
    pass

pytest.importorskip('gradio')

CHECKPOINT = 'legacy/real_m3/recnext_m3_ade20k_sample3.pth'
IMAGES = [f'ade20k_sample/ADEChallengeData2016/images/validation/ADE_val_0000000{number}.jpg' for number in (1, 2, 3)]

TELL_CONNECTIONS = """
import os, sys
def tell(event, args):
    if event == 'socket.connect':
        with open(os.environ['CONNECTIONS'], 'a') as file:
            print(args[1], file=file)
sys.addaudithook(tell)
"""
"""As sitecustomize.py, it writes down whom a program talks to."""


@dataclass
class Server:
    """A web demo in a process of its own."""

    process: subprocess.Popen
    address: str
    temporary: Path
    """Its temporary folder."""
    errors: Path
    """What it writes to the standard error stream."""

    @property
    def port(self) -> int:
        return urlsplit(self.address).port

    def files(self) -> list[Path]:
        """What it has written in its temporary folder."""
        return [path for path in self.temporary.rglob('*') if path.is_file()]

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and content of an answer to a request that is sent as it is."""
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def join(self, **body: object) -> tuple[int, str]:
        """Hand a question in without a browser: status, and the visit in which it will be answered."""
        visit = uuid.uuid4().hex
        body = dict(dict(data=[], fn_index=0, session_hash=visit), **body)
        content = json.dumps(body).encode()
        return self.request('POST', '/gradio_api/queue/join', content, **{'Content-Type': 'application/json'})[0], visit

    def ask(self, **question: object) -> dict | int:
        """The answer to a question, or the status with which it was refused."""
        status, visit = self.join(event_data=question)
        if status != 200:
            return status
        _, events = self.request('GET', f'/gradio_api/queue/data?session_hash={visit}')
        messages = [json.loads(line.removeprefix('data: ')) for line in events.decode().split('\n\n') if line]
        (end,) = (message for message in messages if message['msg'] == 'process_completed')
        return end['output']['data'][0] if end['success'] else end


def heed_ctrl_c() -> None:
    """As in a terminal; what a shell starts in the background, as CI may be, ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def served(folder: Path, *args: object, stop: int = signal.SIGTERM) -> Iterator[Server]:
    """Start the tool. In the end it is stopped, and has to go in peace: nothing said, nothing kept, nobody asked."""
    temporary = folder / 'temporary'
    temporary.mkdir()
    (folder / 'sitecustomize.py').write_text(TELL_CONNECTIONS)
    connections = folder / 'connections'
    connections.touch()
    environment = {**os.environ, 'TMPDIR': str(temporary), 'CONNECTIONS': str(connections), 'PYTHONPATH': str(folder)}
    command = [sys.executable, ROOT / 'tools' / 'web_demo.py', *args, '--port', '0']
    with (folder / 'errors').open('a') as errors:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            preexec_fn=heed_ctrl_c,
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r'Open (http://127\.0\.0\.1:\d+) in a browser\. Ctrl-C stops\.\n', line)
        assert found, line + (folder / 'errors').read_text()
        server = Server(process, found[1], temporary, folder / 'errors')
        yield server
        assert server.files() == []
        process.send_signal(stop)
        assert process.wait(SECONDS) == (130 if stop == signal.SIGINT else 0)
        assert server.errors.read_text() == ''
        assert server.files() == [] and not list(temporary.glob('*web-demo*'))
        assert connections.read_text() == '', 'it talked to others'
        with socket.create_server(('127.0.0.1', server.port)):  # which is free again
            pass
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def tiny_server(tmp_path_factory, tiny) -> Iterator[Server]:
    args = *tiny, '--max-upload', '1', '--max-pixels', '1'
    with served(tmp_path_factory.mktemp('tiny-server'), *args, stop=signal.SIGINT) as server:  # Ctrl-C
        yield server


@pytest.fixture(scope='module')
def real_server(tmp_path_factory) -> Iterator[Server]:
    images = [shared(image) for image in IMAGES]
    args = 'recnext_m3_ade20k', shared(CHECKPOINT), '--images', images[2]
    with served(tmp_path_factory.mktemp('real-server'), *args) as server:
        yield server


@pytest.fixture(scope='module')
def inferred(tmp_path_factory) -> Path:
    """What tools/infer.py writes for the three images."""
    folder = tmp_path_factory.mktemp('inferred')
    images = [shared(image) for image in IMAGES]
    infer('recnext_m3_ade20k', shared(CHECKPOINT), images, folder, overlay=False)
    return folder


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()


def scene(seed: int) -> np.ndarray:
    """(48, 64, 3), RGB."""
    return cv2.resize(make_scene(seed)[0], (64, 48))


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many pixels a side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(bytes(10**6))) + chunk(b'IEND', b'')


# A visit


@pytest.mark.parametrize('place', [0, *(pytest.param(place, marks=pytest.mark.full) for place in (1, 2))])
def test_an_image_is_predicted_looked_at_and_its_mask_downloaded(real_server, inferred, visit, place):
    image = shared(IMAGES[place])
    visitor = visit(real_server.address)
    page = visitor.page
    if place == 2:
        page.get_by_title(image.name).click()  # the one to choose
    else:
        visitor.upload(image)
    visitor.wait_for_result(image.name)
    labels = Image.open(inferred / 'labels' / f'{image.stem}.png')
    areas = json.loads((inferred / 'areas' / f'{image.stem}.json').read_text())['areas']

    assert page.locator('.facts').inner_text() == f'{image.name} · {labels.width} × {labels.height} pixels'
    assert page.locator('.legend span').all_inner_texts() == [area['name'] for area in areas]
    shares = page.locator('.legend b').all_inner_texts()
    assert [share == '< 0.1 %' or float(share[:-2]) for share in shares] == [
        area['share'] < 0.001 or round(100 * area['share'], 1) for area in areas
    ]
    swatch = page.locator('.legend i').first.evaluate('swatch => getComputedStyle(swatch).backgroundColor')
    palette = np.array(labels.getpalette()).reshape(-1, 3)
    assert swatch == 'rgb({}, {}, {})'.format(*palette[areas[0]['label']])
    stages = dict(zip(*(page.locator(f'.timings td:nth-child({n})').all_inner_texts() for n in (1, 2))))
    assert list(stages) == ['read', 'prepare', 'network', 'labels', 'total']
    assert all(re.fullmatch(r'\d+(\.\d)? ms', time) and float(time[:-3]) > 0 for time in stages.values())

    coloured = np.array(labels.convert('RGB'))
    assert np.array_equal(visitor.layer()[..., :3], coloured) and visitor.layer()[..., 3].min() == 255
    assert visitor.mask() == (f'{image.stem}.png', (inferred / 'labels' / f'{image.stem}.png').read_bytes())

    # From here on the browser does everything alone.
    requests = len(visitor.requests)
    opacity = page.locator('.overlay').evaluate_handle('canvas => () => getComputedStyle(canvas).opacity')
    assert opacity.evaluate('opacity => opacity()') == '0.5'
    for value in (0, 80, 100):
        page.get_by_role('slider').fill(str(value))
        assert float(opacity.evaluate('opacity => opacity()')) == value / 100
        assert page.locator('.opacity output').inner_text() == f'{value} %'
    second = page.locator('.legend button').nth(1)
    second.click()
    chosen = np.array(labels) == areas[1]['label']
    layer = visitor.layer()[..., :3]
    assert np.array_equal(layer[chosen], coloured[chosen]) and (layer[~chosen] == 0x18).all()
    assert page.locator('[aria-pressed=true]').count() == 1
    second.click()
    assert np.array_equal(visitor.layer()[..., :3], coloured)
    row, column = np.argwhere(np.array(labels) == areas[0]['label'])[areas[0]['pixels'] // 2].tolist()
    box = page.locator('.overlay').bounding_box()
    at = dict(x=(column + 0.5) * box['width'] / labels.width, y=(row + 0.5) * box['height'] / labels.height)
    page.locator('.overlay').click(position=at)
    assert page.locator('.pointed').inner_text() == areas[0]['name']
    assert page.locator('[aria-pressed=true] span').inner_text() == areas[0]['name']
    assert [request.url for request in visitor.requests[requests:] if request.url[:4] == 'http'] == []


@pytest.mark.full
@pytest.mark.parametrize('size', [(4032, 3024), (8192, 6144)], ids=['12 megapixels', '50 megapixels'])
def test_the_photograph_of_a_phone_is_predicted(real_server, visit, size):
    photo = io.BytesIO()
    Image.open(shared(IMAGES[0])).resize(size).save(photo, 'JPEG')
    visitor = visit(real_server.address, viewport=dict(width=390, height=844))
    visitor.upload(photo.getvalue(), 'phone.jpg')
    visitor.wait_for_result('phone.jpg')
    assert '{} × {}'.format(*size) in visitor.page.locator('.facts').inner_text()
    assert visitor.layer().shape == (1200, 1600, 4)
    name, mask = visitor.mask()
    assert name == 'phone.png' and Image.open(io.BytesIO(mask)).size == size
    # No wider than the phone.
    assert visitor.page.evaluate('document.documentElement.scrollWidth') == 390


BAD_FILES = {
    'text': (b'Not an image.', 'photo.jpg is not an image of a known format.'),
    'empty': (b'', 'photo.jpg is empty: 0 bytes.'),
    'half': (png(scene(0))[:2000], 'photo.jpg cannot be read: '),
    'script': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'photo.jpg is not an image of a known format.'),
    'bomb': (bomb(60000), 'photo.jpg has more than 179 million pixels.'),
    'large': (bomb(1001), 'photo.jpg has 1.0 million pixels; expected at most 1.'),
    'heavy': (bytes(1_100_000), 'photo.jpg has 1.1 MB; expected at most 1.'),
}


def test_a_bad_file_gets_an_answer_and_the_next_is_predicted(tiny_server, visit):
    visitor = visit(tiny_server.address)
    for content, message in BAD_FILES.values():
        visitor.upload(png(scene(0)), 'good.png')
        visitor.wait_for_result('good.png')
        visitor.upload(content)
        assert visitor.message().startswith(message)
        assert not visitor.page.locator('figure').is_visible()
        assert 'Traceback' not in visitor.page.content()


def test_names_are_shown_as_text(tiny_server, visit):
    visitor = visit(tiny_server.address)
    name = '<img src=x onerror=alert(1)> ${1} `{{é}}.png'
    visitor.upload(png(scene(0)), name)
    visitor.wait_for_result(name)
    assert visitor.mask()[0].endswith('.png')
    visitor.upload(b'?', name)
    assert visitor.message() == f'{name} is not an image of a known format.'


@pytest.mark.full
def test_visitors_at_once_see_each_their_own(tiny_server, tiny, visit):
    model, number = load_deployed(*tiny), 10
    visitors = [visit(tiny_server.address) for _ in range(number)]
    for seed, visitor in enumerate(visitors):
        visitor.upload(png(scene(seed)), 'same.png')
    masks = []
    for seed, visitor in enumerate(visitors):
        visitor.wait_for_result('same.png')
        masks.append(visitor.mask()[1])
        expected = model(np.ascontiguousarray(scene(seed)[..., ::-1])).labels
        assert np.array_equal(np.array(Image.open(io.BytesIO(masks[-1]))), expected)
    assert len(set(masks)) == number


def test_when_the_server_is_full_the_page_says_so(tiny_server, visit):
    visitor = visit(tiny_server.address)
    refusal = dict(status=503, json=dict(detail='Queue is full.'))
    visitor.page.route('**/queue/join*', lambda route: route.fulfill(**refusal))
    visitor.upload(png(scene(0)))
    visitor.page.get_by_text('This application is currently busy.').wait_for()
    visitor.page.unroute('**/queue/join*')
    visitor.upload(png(scene(0)), 'again.png')
    visitor.wait_for_result('again.png')
    (complaint,) = visitor.complaints
    assert '503' in complaint
    visitor.complaints.clear()


# Without a browser


def question(seed: int = 0) -> dict:
    return dict(number=1, name='a.png', content=base64.b64encode(png(scene(seed))).decode())


@pytest.mark.full
def test_a_hundred_uploads_at_once(tiny_server):
    endings = question()['content'], 'A' * 1_200_000
    questions = [dict(question(), content=endings[number % 2]) for number in range(100)]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda one: tiny_server.ask(**one), questions))
    refused = [answer for answer in answers if isinstance(answer, int)]
    assert set(refused) <= {503} and len(refused) < 100
    for one, answer in zip(questions, answers):
        if not isinstance(answer, int):
            assert ('mask' if len(one['content']) < 10**6 else 'error') in answer
    assert 'mask' in tiny_server.ask(**question())


@pytest.mark.parametrize('chunked', [True, False])
def test_an_endless_upload_is_cut_at_the_limit(tiny_server, chunked):
    length = 'Transfer-Encoding: chunked' if chunked else 'Content-Length: 1000000000000'
    head = f'POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n'
    piece = b'10000\r\n' + bytes(0x10000) + b'\r\n' if chunked else bytes(0x10000)
    sent = 0
    with socket.create_connection(('127.0.0.1', tiny_server.port), SECONDS) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                connection.sendall(piece)
                sent += len(piece)
    assert sent < 50_000_000  # the limit, and what the system holds for both ends
    assert 'mask' in tiny_server.ask(**question())


def test_a_request_beyond_the_limit_is_told_so(tiny_server):
    assert tiny_server.ask(content='A' * 1_400_000) == 413
    assert 'mask' in tiny_server.ask(**question())


@pytest.mark.parametrize(
    'given',
    [
        None,
        [],
        {},
        'a',
        dict(name='a.png'),
        dict(name=['a'], content='AAAA'),
        dict(name='a.png', content='no base64'),
        dict(name='a.png', content=dict(path='/etc/hostname')),
        dict(name='/etc/hostname', content=''),
        dict(choice=0),
        dict(choice=-1),
        dict(choice='/etc/hostname'),
    ],
    ids=str,
)
def test_a_question_that_no_page_asks_gets_an_error(tiny_server, given):
    status, visit = tiny_server.join(event_data=given)
    assert status == 200
    _, events = tiny_server.request('GET', f'/gradio_api/queue/data?session_hash={visit}')
    assert '"error":' in events.decode() and '"mask":' not in events.decode()
    assert Path('/etc/hostname').read_text().strip() not in events.decode()
    assert 'Traceback' not in events.decode()


FILE = {'path': '/etc/hostname', 'meta': {'_type': 'gradio.FileData'}}


@pytest.mark.parametrize(
    'method, path',
    [
        ('POST', '/gradio_api/upload'),
        ('GET', '/gradio_api/file=/etc/hostname'),
        ('GET', '/gradio_api/file=../../../../etc/hostname'),
        ('GET', '/gradio_api/file/etc/hostname'),
        ('GET', '/file=/etc/hostname'),
        ('GET', '/static/../../../../../../../../etc/hostname'),
        ('GET', '/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/hostname'),
        ('GET', '/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/hostname'),
        ('GET', '/static//etc/hostname'),
        ('GET', '/svelte//etc/hostname'),
        ('GET', '/gradio_api/proxy=http://127.0.0.1:1/'),
        ('GET', '/gradio_api/info'),
        ('GET', '/config'),
        ('GET', '/docs'),
        ('GET', '/openapi.json'),
        ('GET', '/monitoring/summary'),
        ('GET', '/gradio_api/vibe-code/'),
        ('POST', '/gradio_api/vibe-code/'),
        ('POST', '/gradio_api/run/predict'),
        ('POST', '/gradio_api/api/predict'),
        ('POST', '/gradio_api/call/predict'),
        ('POST', '/gradio_api/component_server'),
        ('POST', '/gradio_api/process_recording'),
        ('PUT', '/'),
    ],
)  # fmt: skip
def test_nothing_but_the_page_is_served(tiny_server, method, path):
    body = json.dumps(dict(data=[FILE], event_data=FILE)).encode() if method == 'POST' else None
    status, content = tiny_server.request(method, path, body, **{'Content-Type': 'application/json'})
    assert status in (403, 404) and Path('/etc/hostname').read_text().strip() not in content.decode()
    assert len(content) < 100


@pytest.mark.parametrize(
    'body', [dict(event_data=FILE), dict(event_data=dict(name='a.png', content=FILE)), dict(data=[FILE])], ids=str
)
def test_files_of_the_server_cannot_be_handed_in(tiny_server, body):
    _, visit = tiny_server.join(**body)
    _, events = tiny_server.request('GET', f'/gradio_api/queue/data?session_hash={visit}')
    assert Path('/etc/hostname').read_text().strip() not in events.decode()
    assert tiny_server.files() == []
    # Gradio tells whoever has the terminal, and nobody else.
    assert 'not in the cache folder' in tiny_server.errors.read_text() or 'data' in body
    os.truncate(tiny_server.errors, 0)


def test_the_page_tells_nothing_of_the_machine_and_forbids_the_browser_to_talk_to_others(tiny_server):
    connection = http.client.HTTPConnection('127.0.0.1', tiny_server.port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request('GET', '/')
        answer = connection.getresponse()
        content = answer.read().decode()
    assert "default-src 'self'" in answer.headers['Content-Security-Policy']
    assert str(ROOT) not in content and str(tiny_server.temporary) not in content


def test_it_listens_on_this_machine_only(tiny_server):
    """By the table of Linux: local address, remote address, state 0A for listening."""
    rows = [line.split() for table in ('tcp', 'tcp6') for line in Path('/proc/net', table).read_text().splitlines()]
    listening = [row[1] for row in rows if row[3] == '0A' and int(row[1].split(':')[1], 16) == tiny_server.port]
    assert listening == [f'0100007F:{tiny_server.port:04X}']


# The beginning and the end


@pytest.mark.full
def test_stopped_before_it_serves_it_leaves_nothing(tiny, tmp_path):
    """Between the making of its folder and the reading of its checkpoint, which is a pipe that says nothing."""
    pipe = tmp_path / 'pipe.pth'
    os.mkfifo(pipe)
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    command = [sys.executable, ROOT / 'tools' / 'web_demo.py', tiny[0], pipe, '--port', '0']
    process = subprocess.Popen(list(map(str, command)), env={**os.environ, 'TMPDIR': str(temporary)})
    try:
        while not list(temporary.glob('*web-demo*')):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
    assert not list(temporary.glob('*web-demo*'))


@pytest.mark.full
def test_a_port_that_is_taken(tiny):
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        assert_user_error(run_tool('web_demo', *tiny, '--port', port), f'port {port}', 'in use', '--port')


def test_wrong_use(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'no\.pth'):
        web_demo.serve(tiny[0], tmp_path / 'no.pth', port=0)
    with pytest.raises(UserError, match='not an image'):
        web_demo.serve(*tiny, images=[tiny[0]], port=0)
    with pytest.raises(UserError, match='--host'):
        web_demo.serve(*tiny, host='203.0.113.1', port=0)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install gradio'):
        web_demo.serve(*tiny)
