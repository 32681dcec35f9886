"""What happens when the parts of this project are imported: nothing on the network, and nothing that Windows lacks."""

import json
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest
from helpers.isolation import LOCAL
from helpers.reference import ROOT

PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'
MODULES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for path in PACKAGE.rglob('*.py')
    if path.stem != 'classifier' or find_spec('mmpretrain')
)
ABSENT_FROM_GPU_MACHINES = 'gradio markdown_it onnxruntime onnxscript playwright shtab sklearn tensorboard wrapt xdist'
"""What the packages that `make wheels` brings are not, of those that this project asks for."""

TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('[a-z]*.py') if path.stem != 'test')
"""But for ``test``, which is also the name of a package of Python's."""

IMPORT_ALL = f"""
import importlib, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]
def import_all():
    for name in sys.argv[1:]:
        importlib.import_module(name)
"""

NOTE_CONNECTIONS = """
seen = []
def note(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.bind'):
        seen.append(f'{event} {arguments[1:]}')
sys.addaudithook(note)
import_all()
print(json.dumps(seen))
"""

LIKE_WINDOWS = """
import builtins, os, types
LACKING = dict(
    os='''O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown chroot confstr fchmod fchown fdatasync fork
        forkpty getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getuid getxattr initgroups
        killpg lchown listxattr mkfifo mknod nice openpty pidfd_open posix_fadvise posix_fallocate posix_spawn pread
        pwrite register_at_fork removexattr sched_getaffinity sched_setaffinity sendfile setegid seteuid setgid setpgid
        setpriority setsid setuid setxattr statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4'''.split(),
    signal='''SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2 SIGWINCH alarm
        getitimer pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigwait'''.split(),
    socket='AF_UNIX SO_REUSEPORT send_fds recv_fds sendmsg'.split(),
    select='epoll poll kqueue'.split(),
    time='clock_gettime tzset'.split(),
    sys=[],
)
NO_MODULES = {
    'crypt', 'curses', 'fcntl', 'grp', 'nis', 'posix', 'pty', 'pwd', 'readline', 'resource', 'spwd', 'syslog',
    'termios', 'tty',
}
OTHERWISE = dict(os=dict(name='nt'), sys=dict(platform='win32'))
OURS = ('projects.', 'importing.', '_cli', *(name for name in sys.argv[1:] if '.' not in name))
stand_ins, plain_import = {}, builtins.__import__

def as_on_windows(name):
    if name not in stand_ins:
        module = types.ModuleType(name)
        for key, value in vars(plain_import(name)).items():
            if key not in LACKING[name]:
                setattr(module, key, OTHERWISE.get(name, {}).get(key, value))
        stand_ins[name] = module
    return stand_ins[name]

def import_for_ours(name, globals=None, locals=None, fromlist=(), level=0):
    # Python, torch and all others are those of this system, and go on seeing it.
    importer = (globals or {}).get('__name__', '')
    if level == 0 and importer.startswith(OURS):
        if name.partition('.')[0] in NO_MODULES:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        if name in LACKING or name.partition('.')[0] in LACKING and not fromlist:
            return as_on_windows(name.partition('.')[0])
    return plain_import(name, globals, locals, fromlist, level)

builtins.__import__ = import_for_ours
"""

AT_WORK = """
import_all()
import tempfile
from pathlib import Path
from importlib import import_module
import torch
room = 'projects.recnext.recnext.'
memory, checkpoint = import_module(room + 'utils.memory'), import_module(room + 'checkpoints.files')
devices = import_module(room + 'utils.devices')
assert memory.sys.platform == 'win32' and checkpoint.os.name == 'nt'
devices.keep_freed_memory()
assert memory.peak_of_process() is None
with tempfile.TemporaryDirectory() as folder:
    for _ in range(2):
        checkpoint.write_checkpoint(dict(a=torch.ones(3)), Path(folder, 'a.pth'))
    assert checkpoint.read_checkpoint(Path(folder, 'a.pth'))['a'].tolist() == [1, 1, 1]
"""


def run(script: str, *names: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', IMPORT_ALL + script, *names], capture_output=True, text=True)


def test_importing_touches_no_network():
    result = run(NOTE_CONNECTIONS, *MODULES, *TOOLS)
    assert result.returncode == 0, result.stderr
    assert len(MODULES) > 60 and len(TOOLS) > 8 and json.loads(result.stdout.splitlines()[-1]) == []


def test_importing_and_writing_need_nothing_that_windows_lacks():
    """The system's own modules are disguised for this project alone: of its dependencies this says nothing, nor of
    what Windows does otherwise, such as with open files."""
    result = run(LIKE_WINDOWS + AT_WORK, *MODULES, *TOOLS)
    assert result.returncode == 0, result.stderr


def test_the_disguise_is_noticed(tmp_path):
    """What the test before stands on: the package of the name ``importing`` is ours too."""
    (tmp_path / 'importing').mkdir()
    (tmp_path / 'importing' / '__init__.py').touch()
    for index, (line, word) in enumerate(
        {
            'import fcntl': 'fcntl',
            'from resource import getrusage': 'resource',
            'import os; os.fork': 'fork',
            'from signal import SIGKILL': 'SIGKILL',
            'import os.path; os.getuid()': 'getuid',
            'import sys; assert sys.platform != "win32", "as on Windows"': 'as on Windows',
        }.items()
    ):
        (tmp_path / 'importing' / f'm{index}.py').write_text(line)
        result = run(f'sys.path.insert(0, {str(tmp_path)!r})' + LIKE_WINDOWS + 'import_all()', f'importing.m{index}')
        assert result.returncode == 1 and word in result.stderr.splitlines()[-1], (line, result.stderr)


def test_the_tests_reach_no_further_than_this_machine():
    with socket.socket() as outside, pytest.raises(PermissionError, match='tests connect to this machine'):
        outside.connect(('192.0.2.1', 80))  # reserved for examples (RFC 5737)
    with pytest.raises(PermissionError, match='tests connect to this machine'):
        socket.getaddrinfo('example.com', 443)
    with socket.socket() as server, socket.socket() as client:
        server.bind((LOCAL[0], 0))
        server.listen()
        client.connect(server.getsockname())


WITHOUT_PACKAGES = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split())  # not to be found, from here on
sys.path[:0] = ['.', 'tests', 'tools', 'tests/stack', 'tests/checkpoints']
import projects.recnext.recnext
import conftest, projects.recnext.recnext.benchmarks.gpu, projects.recnext.recnext.openmmlab.train
sys.path.insert(0, 'tests/gpu')
import test_device
import projects.recnext.recnext.timm, timm
from mmengine.registry import HOOKS
assert timm.is_model('recnext_m3') and HOOKS.get('DeployHook')
from projects.recnext.recnext.cli.main import build_parser
build_parser().parse_args(['benchmark-gpu', 'a'])
"""


def test_a_gpu_machine_needs_no_more_packages_than_it_is_brought():
    command = [sys.executable, '-c', WITHOUT_PACKAGES, ABSENT_FROM_GPU_MACHINES]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
