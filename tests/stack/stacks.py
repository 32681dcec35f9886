"""Run a core of the tests with other versions of Python, PyTorch, mmseg and the rest: an environment for each.

The environments are made with uv, one after the other, and removed again. Results of earlier runs stay in the table
until their stack is run anew. Everything is written to --work-dir: stacks.json, the tables of docs/trust.md as
stacks.md, and what pip and pytest said of each stack.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / 'requirements.lock'
REQUIREMENTS = (ROOT / 'requirements.txt', ROOT / 'requirements-dev.txt')

CORE = (
    'tests/stack/test_compat.py',
    'tests/checkpoints/test_checkpoint.py',
    'tests/models/test_state_dict.py',
    'tests/models/test_preprocess.py',
    'tests/models/test_semantic_fpn.py',
    'tests/models/test_recnext.py::test_golden_logits',
    'tests/models/test_classifier.py::test_golden_logits',
    'tests/openmmlab/test_strict_weights.py',
    'tests/configs/test_configs.py',
    'tests/openmmlab/test_running.py::test_our_tool_gives_the_genuine_numbers_from_any_directory[raw]',
    'tests/openmmlab/test_running.py::test_inferencer_gives_them_too[raw]',
    'tests/openmmlab/test_running.py::test_tensorboard_files',
    'tests/openmmlab/test_running.py::test_options_of_the_network',
)
"""Importing, patches, reading, the core against mmseg, the golden outputs, and the tools for training and testing."""

SHOWN = ('torch', 'numpy', 'mmsegmentation', 'mmengine', 'mmcv', 'opencv-python', 'setuptools')
"""Columns of the table."""

ALSO_CALLED = {
    'mmsegmentation': ('onedl-mmsegmentation',),
    'mmengine': ('onedl-mmengine',),
    'mmcv': ('mmcv-lite', 'onedl-mmcv'),
}


@dataclass
class Stack:
    """What an environment is made from.

    Attributes:
        python: Version.
        lock: Exactly what the lock says; otherwise the newest that the ranges of the requirements allow.
        instead: Requirements in the place of those of the same name, or of those in ``without``.
        without: Names of requirements that are left out.
        build: Requirements that are compiled, with what is installed already.
    """

    python: str = '3.11'
    lock: bool = False
    instead: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    build: tuple[str, ...] = ()


STACKS = {
    'pinned': Stack(lock=True),
    'pinned, Python 3.10': Stack('3.10', lock=True),
    'pinned, Python 3.12': Stack('3.12', lock=True),
    'pinned, Python 3.13': Stack('3.13', lock=True),
    'pinned, Python 3.14': Stack('3.14', lock=True),
    'newest in range': Stack(),
    'torch 2.6': Stack(instead=('torch==2.6.*', 'torchvision==0.21.*')),
    'torch 2.13': Stack(instead=('torch==2.13.*', 'torchvision==0.28.*')),
    'mmseg 1.0': Stack(instead=('mmsegmentation==1.0.0', 'mmcv-lite==2.0.0')),
    'mmseg 1.1': Stack(instead=('mmsegmentation==1.1.2', 'mmcv-lite==2.0.1')),
    'oldest in range': Stack(
        '3.10',
        instead=(
            'torch==2.6.0',
            'torchvision==0.21.0',
            'mmengine==0.10.4',
            'mmcv-lite==2.0.0',
            'mmsegmentation==1.0.0',
            'mmpretrain==1.2.0',
            'timm==1.0.3',
            'coremltools==8.0',
            'numpy==1.26.4',
            'opencv-python==4.9.0.80',
            'pillow==10.1.0',
        ),
    ),
    'maintained fork': Stack(
        instead=('onedl-mmsegmentation', 'onedl-mmengine', 'onedl-mmcv'),
        without=('mmsegmentation', 'mmengine', 'mmcv-lite'),
    ),
    'compiled mmcv': Stack(instead=('setuptools<81', 'wheel'), without=('mmcv-lite',), build=('mmcv==2.1.0',)),
}

PROBE = """
import json, platform
from importlib import metadata
from projects.recnext.recnext.openmmlab.compat import PATCHES
versions = {distribution.name: distribution.version for distribution in metadata.distributions()}
print(json.dumps(dict(python=platform.python_version(), versions=versions, patches=list(PATCHES))))
"""
DEFECTS = Path(__file__).with_name('defects.py')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stacks', nargs='*', metavar='STACK', help=f'all unless named: {"; ".join(STACKS)}')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'stacks', metavar='DIR')
    parser.add_argument('--keep', action='store_true', help='leave the environments in the work dir')
    args = parser.parse_args()
    for name in args.stacks:
        if name not in STACKS:
            parser.error(f'no stack is called {name}; there are {", ".join(STACKS)}')
    return args


def main() -> int:
    args = parse_args()
    from rich.console import Console
    from rich.table import Table

    args.work_dir.mkdir(parents=True, exist_ok=True)
    record = args.work_dir / 'stacks.json'
    results = json.loads(record.read_text()) if record.exists() else {}
    console = Console()
    for name in args.stacks or STACKS:
        with console.status(f'{name}: installing and testing'):
            results[name] = run_stack(STACKS[name], args.work_dir / _slug(name), args.keep)
        record.write_text(json.dumps(results, indent=2) + '\n')
        (args.work_dir / 'stacks.md').write_text('\n\n'.join(map(_markdown, tables(results))) + '\n')
        console.print(f'{name}: {_outcome(results[name])}, {results[name]["seconds"]:.0f} s')
    for header, *rows in tables(results):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    print(f'written: {record} and stacks.md; what pip and pytest said: {args.work_dir}/*.log')
    return int(any(results[name]['bad'] or results[name]['broken'] for name in args.stacks or STACKS))


def run_stack(stack: Stack, place: Path, keep: bool) -> dict:
    """Make the environment ``place``, run the core of the tests in it, remove it.

    Returns:
        ``python``, ``versions``, ``patches`` and those ``needed``, the numbers of tests ``passed`` and ``skipped``,
        ``bad`` (the names of those that failed), ``broken`` (why there was nothing to test, or None) and ``seconds``.
    """
    started, log = time.monotonic(), place.with_suffix('.log')
    result = dict(python=stack.python, versions={}, patches=[], needed=[], passed=0, skipped=0, bad=[], broken=None)
    python = place / 'bin' / 'python'
    with log.open('w') as file:

        def call(*command: object, **settings: str) -> subprocess.CompletedProcess:
            environment = {**os.environ, **settings}
            command = [str(word) for word in command]
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT, env=environment)

        for command, settings in install(stack, place):
            done = call(*command, **settings)
            if done.returncode:
                result['broken'] = f'cannot be installed: {_last_line(log)}'
                break
        else:
            probed, needed = call(python, '-c', PROBE), call(python, DEFECTS)
            if probed.returncode or needed.returncode:
                result['broken'] = f'cannot be imported: {_last_line(log)}'
            else:
                result.update(json.loads(probed.stdout.splitlines()[-1]))
                result['needed'] = json.loads(needed.stdout.splitlines()[-1])
                report = place.with_suffix('.xml')
                tested = call(python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', *CORE)
                file.write(tested.stdout)
                result.update(read_report(report))
    if not keep:
        shutil.rmtree(place, ignore_errors=True)
    return dict(result, seconds=time.monotonic() - started)


def install(stack: Stack, place: Path) -> Iterator[tuple[tuple, dict]]:
    """Commands, and the variables that they need."""
    uv = (sys.executable, '-m', 'uv')
    yield (*uv, 'venv', '--clear', '--python', stack.python, place), {}
    pip = (*uv, 'pip', 'install', '--python', place / 'bin' / 'python')
    if stack.lock:
        yield (*pip, '--require-hashes', '-r', LOCK), {}
        return
    listed = place.with_suffix('.txt')
    listed.write_text('\n'.join(requirements(stack)) + '\n')
    yield (*pip, '-r', listed), {}
    if stack.build:
        yield (*pip, '--no-build-isolation', *stack.build), dict(MMCV_WITH_OPS='1', MAX_JOBS='1')


def requirements(stack: Stack) -> list[str]:
    """The ranges of the project, with what the stack has in their place."""
    replaced = {_name(line) for line in stack.instead} | set(stack.without)
    lines = [line.partition('#')[0].strip() for path in REQUIREMENTS for line in path.read_text().splitlines()]
    ours = [line for line in lines if line and not line.startswith('-r') and _name(line) not in replaced]
    return [*ours, *stack.instead]


def read_report(path: Path) -> dict:
    """Numbers and names out of pytest's report."""
    counts, bad = dict(passed=0, skipped=0), []
    for case in ElementTree.parse(path).iter('testcase'):
        outcomes = {child.tag for child in case}
        if outcomes & {'failure', 'error'}:
            bad.append(f'{case.get("classname")}::{case.get("name")}')
        else:
            counts['skipped' if 'skipped' in outcomes else 'passed'] += 1
    return dict(counts, bad=bad)


def tables(results: dict) -> list[list[list[str]]]:
    """Return what was installed and how its tests went, and which patches are needed; a header and rows each."""
    names = [name for name in STACKS if name in results]
    versions = [['stack', 'Python', *SHOWN, 'passed', 'failed', 'skipped']]
    for name in names:
        result = results[name]
        outcome = [str(result['passed']), str(len(result['bad'])), str(result['skipped'])]
        outcome = [result['broken'], '', ''] if result['broken'] else outcome
        versions.append([name, result['python'], *(_version(result['versions'], column) for column in SHOWN), *outcome])
    patches = list(dict.fromkeys(patch for name in names for patch in results[name]['patches']))
    needed = [['patch', *names]]
    needed += [[patch, *('needed' if patch in results[name]['needed'] else '–' for name in names)] for patch in patches]
    return [versions, needed]


def _version(versions: dict[str, str], column: str) -> str:
    for name in (column, *ALSO_CALLED.get(column, ())):
        if name in versions:
            return versions[name] + (f' ({name})' if name != column else '')
    return '–'


def _markdown(table: list[list[str]]) -> str:
    header, *rows = table
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, ['---'] * len(header), *rows))


def _outcome(result: dict) -> str:
    if result['broken']:
        return result['broken']
    failed = ''.join(f'\n  {name}' for name in result['bad'])
    return f'{result["passed"]} passed, {len(result["bad"])} failed, {result["skipped"]} skipped{failed}'


def _name(requirement: str) -> str:
    return re.match(r'[\w.-]+', requirement)[0].lower()


def _slug(name: str) -> str:
    return re.sub(r'\W+', '-', name.lower())


def _last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1][:200]


if __name__ == '__main__':
    sys.exit(main())
