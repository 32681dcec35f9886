"""A command line forked from the warm interpreter (helpers/tools.py) is what one in a new interpreter is."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.reference import ROOT
from helpers.tiny import write_tiny
from helpers.tools import WarmInterpreter, is_running, run_tool, wait_until, warm_interpreter

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='command lines are forked on Linux alone')


def run_warm(script: Path, *args: object, timeout: float = 60, **kwargs: object) -> subprocess.CompletedProcess:
    return warm_interpreter().run([str(script), *map(str, args)], timeout, **kwargs)


def run_fresh(script: Path, *args: object, **kwargs: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


@pytest.fixture
def script(tmp_path):
    def write(code: str) -> Path:
        path = tmp_path / 'script.py'
        path.write_text(code)
        return path

    return write


@pytest.mark.parametrize(
    ('code', 'expected'),
    [
        ('pass', 0),
        ('raise SystemExit', 0),
        ('import sys; sys.exit(2)', 2),
        ('import sys; sys.exit(-1)', 255),
        ('import sys; sys.exit("error: so it is")', 1),
        ('import os; os._exit(7)', 7),
        ('raise KeyboardInterrupt', -signal.SIGINT),
        ('import os; os.kill(os.getpid(), 9)', -signal.SIGKILL),
        ('import os; os.abort()', -signal.SIGABRT),
        ('import atexit; atexit.register(print, "at exit"); print("before")', 0),
        ('import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print("later"))).start()', 0),
    ],
)
def test_ends_as_in_a_new_interpreter(script, code, expected):
    warm, fresh = run_warm(script(code)), run_fresh(script(code))
    assert warm.returncode == fresh.returncode == expected
    assert warm.stdout == fresh.stdout
    # Tracebacks begin further out.
    assert warm.stderr.splitlines()[-2:] == fresh.stderr.splitlines()[-2:]


def test_a_traceback_goes_to_stderr(script):
    result = run_warm(script('print("so far")\n1 / 0'))
    assert result.returncode == 1 and result.stdout == 'so far\n'
    assert result.stderr.startswith('Traceback') and result.stderr.endswith('ZeroDivisionError: division by zero\n')


ENVIRONMENT = """
import os, sys, __main__
print(os.getcwd(), sys.argv, sys.path[0], __name__, __main__.__file__, sorted(os.environ.items()))
print(sys.stdin.read(), sys.stdin.isatty(), sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.line_buffering)
print(os.umask(0), sys.flags, [name for name in sys.path if 'tests' in name], sys.stderr.encoding)
"""


def test_starts_as_in_a_new_interpreter(script, tmp_path):
    (tmp_path / 'elsewhere').mkdir()
    kwargs = dict(cwd=tmp_path / 'elsewhere', env={**os.environ, 'OF_OURS': '1'}, input='typed in\nwith ö')
    path = script(ENVIRONMENT)
    warm, fresh = run_warm(path, 'a', 'b c', **kwargs), run_fresh(path, 'a', 'b c', **kwargs)
    assert warm.stdout == fresh.stdout and "'b c'" in warm.stdout
    assert warm.returncode == fresh.returncode == 0 and warm.stderr == fresh.stderr == ''


def test_what_an_interpreter_reads_at_its_start_is_refused(script):
    with pytest.raises(AssertionError, match=r'PYTHONPATH.*fresh=True'):
        run_warm(script('pass'), env={**os.environ, 'PYTHONPATH': '/elsewhere'})


CHANGES = """
import os, signal, sys, torch, projects.recnext.recnext.utils.errors as errors
print(hasattr(errors, 'left_behind'), 'LEFT' in os.environ, signal.getsignal(signal.SIGTERM), torch.get_default_dtype())
errors.left_behind, os.environ['LEFT'] = 1, '1'
signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.set_default_dtype(torch.float64)
os.chdir('/')
"""


def test_runs_share_nothing(script):
    first, second = run_warm(script(CHANGES)), run_warm(script(CHANGES))
    assert first.returncode == 0 and first.stdout == second.stdout
    assert first.stdout.startswith('False False')


INHERITED = """
import os, random, tempfile
import numpy, torch
from mmengine.utils import ManagerMixin
def below(kind):
    return [kind, *(found for child in kind.__subclasses__() for found in below(child))]
print([kind for kind in below(ManagerMixin) if kind._instance_dict], tempfile.tempdir)
print(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized())
print(random.random(), numpy.random.rand(), torch.rand(1).item())
"""


def test_nothing_is_there_that_a_run_would_make(script):
    """Instances that MMEngine keeps by name, a temporary folder, threads, random numbers."""
    first, second = (run_warm(script(INHERITED)).stdout.splitlines() for _ in range(2))
    assert first[:2] == second[:2] == ['[] None', '1 False']
    assert not set(first[2].split()) & set(second[2].split())


WORKERS = """
import multiprocessing, torch
from concurrent.futures import ProcessPoolExecutor
from torch.utils.data import DataLoader
def double(number):
    return 2 * number
if __name__ == '__main__':
    print([batch.tolist() for batch in DataLoader(range(6), 2, num_workers=2)])
    for method in ('fork', 'spawn'):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
            print(list(pool.map(double, range(4))))
    torch.set_num_threads(2)
    large = torch.ones(512, 512)
    print((large @ large).exp().sum() > 0, torch.get_num_threads())
"""


def test_processes_and_threads_can_be_started(script):
    result = run_warm(script(WORKERS))
    assert result.returncode == 0, result.stderr
    assert result.stdout == '[[0, 1], [2, 3], [4, 5]]\n[0, 2, 4, 6]\n[0, 2, 4, 6]\ntensor(True) 2\n'


def test_a_timeout_ends_the_process(script):
    with pytest.raises(subprocess.TimeoutExpired):
        run_warm(script('import time; time.sleep(3600)'), timeout=0.1)
    # It would not begin before the other has ended.
    assert run_warm(script('print(1)')).stdout == '1\n'


def test_the_interpreter_and_its_runs_end_with_the_client(script, tmp_path):
    code = """
import sys; sys.path[:0] = sys.argv[1:3]
from helpers.tools import warm_interpreter
print(warm_interpreter().process.pid, flush=True)
warm_interpreter().run([sys.argv[3], sys.argv[4]], 600)
"""
    endless = tmp_path / 'endless.py'
    endless.write_text('import os, sys, time; open(sys.argv[1], "w").write(str(os.getpid())); time.sleep(600)')
    command = [sys.executable, script(code), ROOT / 'tests', ROOT, endless, tmp_path / 'pid']
    client = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    interpreter = int(client.stdout.readline())
    wait_until(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text())
    client.kill()
    client.communicate()
    wait_until(lambda: not is_running(interpreter) and not is_running(int((tmp_path / 'pid').read_text())))


def test_an_interpreter_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr('helpers.tools.WARM_INTERPRETER', Path('no_such_file.py'))
    interpreter = WarmInterpreter()
    with pytest.raises(RuntimeError, match=r'has ended.*\n?.*no_such_file\.py'):
        interpreter.run(['x.py'], 60)
    interpreter.end()


def plain(said: str) -> str:
    """Without times."""
    return re.sub(r'\d\d/\d\d \d\d:\d\d:\d\d|(?<=time: )[\d.]+|(?<=eta: )[\d:]+|\d:\d\d:\d\d', 'TIME', said)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.*') if path.is_file()}


def test_both_ways_say_and_write_the_same(tmp_path):
    config, checkpoint = write_tiny(tmp_path)
    options = ['--data-root', 'scenes', '--work-dir', 'work', '--out', 'maps']
    said = {}
    for fresh in (False, True):
        (folder := tmp_path / f'{fresh}').mkdir()
        runs = [
            run_tool('make_sample_dataset', 'scenes', '--training', 2, '--validation', 2, cwd=folder, fresh=fresh),
            run_tool('test', config, checkpoint, *options, cwd=folder, fresh=fresh),
        ]
        assert [run.returncode for run in runs] == [0, 0], runs
        said[fresh] = [(plain(run.stdout), run.stderr) for run in runs]
    assert said[False] == said[True]
    for part in ('scenes', 'maps'):
        ours, theirs = (contents(tmp_path / f'{fresh}' / part) for fresh in (False, True))
        assert ours == theirs and ours
