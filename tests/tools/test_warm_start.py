"""A command line forked from the warm interpreter (helpers/tools.py) is what one in a new interpreter is."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.reference import ROOT
from helpers.tiny import write_tiny
from helpers.tools import is_running, run_python, run_tool, start_warm_python, wait_until, warm_python

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='command lines are forked on Linux alone')


def run_fresh(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    return run_python(*args, fresh=True, **kwargs)


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
    warm, fresh = run_python(script(code)), run_fresh(script(code))
    assert warm.returncode == fresh.returncode == expected
    assert warm.stdout == fresh.stdout
    # Tracebacks begin further out.
    assert warm.stderr.splitlines()[-2:] == fresh.stderr.splitlines()[-2:]


def test_a_traceback_goes_to_stderr(script):
    result = run_python(script('print("so far")\n1 / 0'))
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
    warm, fresh = run_python(path, 'a', 'b c', **kwargs), run_fresh(path, 'a', 'b c', **kwargs)
    assert warm.stdout == fresh.stdout and "'b c'" in warm.stdout
    assert warm.returncode == fresh.returncode == 0 and warm.stderr == fresh.stderr == ''


def test_what_an_interpreter_reads_at_its_start_is_refused(script):
    result = run_python(script('pass'), env={**os.environ, 'PYTHONPATH': '/elsewhere'})
    assert result.returncode == 1
    assert re.search(r'PYTHONPATH.*fresh=True', result.stderr)


@pytest.mark.parametrize('fresh', [False, True])
@pytest.mark.parametrize('unbuffered', [[], ['-u']])
def test_a_module_is_run_as_well(tmp_path, fresh, unbuffered):
    (tmp_path / 'what_is_there.py').write_text('import sys; print(sys.argv, sys.path[0], __name__)')
    result = run_python(*unbuffered, '-m', 'what_is_there', 'a', 'b c', cwd=tmp_path, fresh=fresh)
    assert result.stdout == f"['{tmp_path}/what_is_there.py', 'a', 'b c'] {tmp_path} __main__\n", result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize(('number', 'end'), [(signal.SIGTERM, (1, 'told by 15\n')), (signal.SIGKILL, (-9, ''))])
def test_signals_reach_it_and_a_kill_takes_along_what_it_started(script, number, end):
    code = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f'told by {number}'))
child = os.fork()
if child:
    print(os.getpid(), child, flush=True)
time.sleep(600)
"""
    command = [warm_python(), script(code)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process, child = map(int, program.stdout.readline().split())
    program.send_signal(number)
    if number == signal.SIGTERM:
        wait_until(lambda: not is_running(process))
        os.kill(child, signal.SIGKILL)
    assert (program.communicate()[1], program.returncode) == end[::-1]
    wait_until(lambda: not is_running(process) and not is_running(child))


def test_several_at_once(script):
    """Each waits for the other."""
    code = 'import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n'
    code += 'while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)'
    path, names = script(code), ['a', 'b']
    programs = [subprocess.Popen([warm_python(), path, *pair], cwd=path.parent) for pair in (names, names[::-1])]
    assert [program.wait(60) for program in programs] == [0, 0]


CHANGES = """
import os, signal, sys, torch, projects.recnext.recnext.utils.errors as errors
print(hasattr(errors, 'left_behind'), 'LEFT' in os.environ, signal.getsignal(signal.SIGTERM), torch.get_default_dtype())
errors.left_behind, os.environ['LEFT'] = 1, '1'
signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.set_default_dtype(torch.float64)
os.chdir('/')
"""


def test_runs_share_nothing(script):
    first, second = run_python(script(CHANGES)), run_python(script(CHANGES))
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
    first, second = (run_python(script(INHERITED)).stdout.splitlines() for _ in range(2))
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


@pytest.mark.full
def test_processes_and_threads_can_be_started(script):
    result = run_python(script(WORKERS))
    assert result.returncode == 0, result.stderr
    assert result.stdout == '[[0, 1], [2, 3], [4, 5]]\n[0, 2, 4, 6]\n[0, 2, 4, 6]\ntensor(True) 2\n'


def test_a_timeout_ends_the_process(script, tmp_path):
    code = 'import os, pathlib, time; pathlib.Path("process").write_text(str(os.getpid())); time.sleep(3600)'
    run_python(script('pass'))  # that it does not wait for the imports
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(script(code), timeout=2, cwd=tmp_path)
    process = tmp_path / 'process'
    wait_until(lambda: not process.exists() or not is_running(int(process.read_text())))
    assert run_python(script('print(1)')).stdout == '1\n'


def test_a_client_killed_at_any_moment_does_no_harm(script):
    """Before its request is read, while it is answered, after it."""
    path = script('import time; time.sleep(3600)')
    for moment in range(20):
        program = subprocess.Popen([warm_python(), path])
        time.sleep(moment / 200)
        program.kill()
        program.wait()
    assert run_python(script('print(1)')).stdout == '1\n'


@pytest.mark.full
def test_the_interpreter_and_its_runs_end_with_the_client(script, tmp_path):
    code = """
import subprocess, sys; sys.path[:0] = sys.argv[1:3]
from helpers.tools import warm_python
subprocess.run([warm_python(), *sys.argv[3:]])
"""
    endless = tmp_path / 'endless.py'
    endless.write_text(
        'import os, pathlib, sys, time\n'
        'pathlib.Path("part").write_text(f"{os.getppid()} {os.getpid()}")\n'
        'os.rename("part", sys.argv[1]); time.sleep(600)'
    )
    command = [sys.executable, script(code), ROOT / 'tests', ROOT, endless, 'processes']
    client = subprocess.Popen(list(map(str, command)), cwd=tmp_path)
    wait_until((tmp_path / 'processes').exists)
    client.kill()
    client.wait()
    processes = [int(process) for process in (tmp_path / 'processes').read_text().split()]
    wait_until(lambda: not any(map(is_running, processes)))


def test_an_interpreter_that_cannot_start_says_why():
    program = start_warm_python(Path('no_such_file.py'))
    result = subprocess.run([program, 'x.py'], capture_output=True, text=True)
    assert result.returncode == 1 and 'has ended' in result.stderr and 'no_such_file.py' in result.stderr


def plain(said: str) -> str:
    """Without times."""
    return re.sub(r'\d\d/\d\d \d\d:\d\d:\d\d|(?<=time: )[\d.]+|(?<=eta: )[\d:]+|\d:\d\d:\d\d', 'TIME', said)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*.*') if path.is_file()}


@pytest.mark.full
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
