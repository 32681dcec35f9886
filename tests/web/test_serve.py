"""The service as other programs have it: every way to ask, what is refused, many clients at once, and the end."""

import contextlib
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest
from helpers.predicting import infer
from helpers.reference import ROOT
from helpers.tools import wait_until
from PIL import Image

from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.serving.service import serve
from projects.recnext.recnext.utils.errors import UserError

for module in ('fastapi', 'uvicorn', 'python_multipart', 'prometheus_client'):
    pytest.importorskip(module)

SECONDS = 120


class Server:
    """The tool in a process of its own."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.process = process
        self.port = urlsplit(address).port

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=SECONDS)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers

    def predict(self, image: bytes, query: str = '', **headers: str) -> tuple[int, bytes, http.client.HTTPMessage]:
        return self.request('POST', f'/predict{query}', image, **headers)

    def metric(self, name: str) -> float:
        text = self.request('GET', '/metrics')[1].decode()
        found = re.search(rf'^{re.escape(name)} (\S+)$', text, re.MULTILINE)
        return float(found[1]) if found else 0


@contextlib.contextmanager
def served(folder: Path, *args: object) -> Iterator[Server]:
    """Start the tool; in the end it has to go in peace, and to have written nothing."""
    temporary = folder / 'temporary'
    temporary.mkdir(parents=True)
    command = [sys.executable, ROOT / 'tools' / 'serve.py', *args, '--port', '0']
    with (folder / 'errors').open('w') as errors:
        process = subprocess.Popen(
            list(map(str, command)), env={**os.environ, 'TMPDIR': str(temporary)}, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r'Serving at (http://127\.0\.0\.1:\d+)\. SIGTERM or Ctrl-C stops\.\n', line)
        assert found, line + (folder / 'errors').read_text()
        yield Server(process, found[1])
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
        assert (folder / 'errors').read_text() == ''
        assert [path for path in temporary.rglob('*') if path.is_file()] == []
    finally:
        process.kill()
        process.stdout.close()


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('photos')
    for k in range(4):
        Image.fromarray(cv2.resize(make_scene(k)[0], (64, 48))).save(root / f'{k}.png')
    return root


@pytest.fixture(scope='module')
def plain(tiny, photos, tmp_path_factory) -> Path:
    """What a plain run writes for the same images."""
    out = tmp_path_factory.mktemp('plain') / 'out'
    infer(*tiny, [photos], out)
    return out


@pytest.fixture(scope='module')
def server(tiny, tmp_path_factory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp('server'), *tiny, '--max-upload', 1, '--max-pixels', 1) as server:
        yield server


def form_of(image: bytes) -> tuple[bytes, dict[str, str]]:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head + image + b'\r\n--x--\r\n', {'Content-Type': 'multipart/form-data; boundary=x'}


def test_every_way_to_ask_gives_the_files_of_a_plain_run(server, photos, plain):
    for k in range(4):
        image = (photos / f'{k}.png').read_bytes()
        labels, overlay = (plain / 'labels' / f'{k}.png').read_bytes(), (plain / 'overlays' / f'{k}.jpg').read_bytes()
        assert server.predict(image)[:2] == (200, labels)
        assert server.predict(image, Accept='text/html, image/jpeg;q=0.9')[:2] == (200, overlay)
        body, headers = form_of(image)
        assert server.predict(body, '?output=overlay', **headers)[:2] == (200, overlay)
        status, areas, answered = server.predict(image, '?output=areas', Accept='image/png')
        expected = json.loads((plain / 'areas' / f'{k}.json').read_text())
        assert status == 200 and dict(json.loads(areas), input=f'{k}.png') == expected
        assert answered['content-type'] == 'application/json'


def test_what_is_refused_is_said_why(server, tmp_path):
    large = tmp_path / 'large.png'
    Image.new('L', (2000, 1000)).save(large)
    body, headers = form_of(b'')
    for image, query, asked, status, word in (
        (b'no image', '', {}, 422, 'not an image'),
        (b'', '', {}, 422, 'empty'),
        (large.read_bytes(), '', {}, 413, 'million pixels'),
        (b'x' * 1_005_000, '', {}, 413, 'MB; expected at most 1'),
        (b'x' * 3_000_000, '', {}, 413, 'More than 1 MB'),
        (b'x', '?output=mask', {}, 400, 'expected one of labels, areas, overlay'),
        (b'x', '', {'Accept': 'text/html'}, 406, 'Accept names none'),
        (b'--x--\r\n', '', headers, 400, 'no file'),
        (b'--y', '', headers, 400, 'cannot be read'),
        (body, '', {'Content-Type': 'multipart/form-data'}, 400, 'cannot be read'),
        (body, '', headers, 422, 'a.png is empty'),
    ):
        found, said, _ = server.predict(image, query, **asked)
        assert found == status and word in json.loads(said)['detail'], (word, found, said)
    assert server.request('GET', '/predict')[0] in (404, 405)
    assert server.request('POST', '/other', b'x')[0] == 404
    assert server.request('GET', '/redoc')[0] == 404


def test_health_metrics_and_openapi(server, photos):
    status, said, _ = server.request('GET', '/health')
    assert status == 200 and json.loads(said)['status'] == 'ok'
    before = server.metric('recnext_requests_total{status="200"}')
    server.predict((photos / '0.png').read_bytes())
    assert server.metric('recnext_requests_total{status="200"}') == before + 1
    assert server.metric('recnext_batch_images_count') > 0 and server.metric('recnext_requests_taken') == 0
    description = json.loads(server.request('GET', '/openapi.json')[1])
    predict = description['paths']['/predict']['post']
    assert set(predict['requestBody']['content']) == {'image/*', 'multipart/form-data'}
    assert {'200', '413', '503'} <= set(predict['responses'])
    assert [parameter['name'] for parameter in predict['parameters']] == ['output']
    assert b'openapi.json' in server.request('GET', '/docs')[1]


def load(server: Server, clients: int, number: int, image: bytes) -> tuple[Counter, list[float], set[bytes], float]:
    """Ask so many times with so many clients: statuses, seconds of the answers, the answers, and seconds in all."""
    statuses, seconds, answers, lock, left = Counter(), [], set(), threading.Lock(), iter(range(number))

    def client() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            began = time.perf_counter()
            status, answer, headers = server.predict(image)
            took = time.perf_counter() - began
            with lock:
                statuses[status] += 1
                if status == 200:
                    seconds.append(took)
                    answers.add(answer)
                else:
                    assert status == 503 and headers['retry-after'] == '1'

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses, seconds, answers, time.perf_counter() - began


def test_many_clients_are_all_answered(full, server, photos, plain):
    image, expected = (photos / '0.png').read_bytes(), (plain / 'labels' / '0.png').read_bytes()
    for clients in (1, 8, 64):
        number = 1000 if full else clients
        statuses, seconds, answers, took = load(server, clients, number, image)
        assert statuses == {200: number} and answers == {expected}
        last = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
        median = statistics.median(seconds)
        print(
            f'{clients} clients: {number / took:.1f} a second, median {1e3 * median:.0f} ms, 99 % {1e3 * last:.0f} ms'
        )


def test_beyond_the_bound_it_says_when_to_come_again_and_loses_nothing(full, tiny, photos, plain, tmp_path):
    image, expected = (photos / '0.png').read_bytes(), (plain / 'labels' / '0.png').read_bytes()
    with served(tmp_path, *tiny, '--queue', 2) as server:
        number = 500 if full else 100
        statuses, _, answers, _ = load(server, 32, number, image)
        assert statuses[200] + statuses[503] == number and min(statuses[200], statuses[503]) > 0
        assert answers == {expected}
        for status, count in statuses.items():
            assert server.metric(f'recnext_requests_total{{status="{status}"}}') == count
        assert server.predict(image)[0] == 200


def test_what_was_taken_is_answered_before_it_ends(tiny, photos, tmp_path):
    rng = np.random.default_rng(0)
    image = cv2.imencode('.png', rng.integers(0, 255, (600, 800, 3), np.uint8))[1].tobytes()  # some time of work
    with served(tmp_path, *tiny) as server:
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(server.predict(image)[0])) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.metric('recnext_requests_taken') + len(statuses) == 6)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert statuses == [200] * 6
        with pytest.raises(OSError):
            server.request('GET', '/health')


def test_a_port_that_is_taken_is_said(tiny, server):
    with pytest.raises(UserError, match=f'port {server.port}, cannot be listened on'):
        serve(*tiny, port=server.port)
