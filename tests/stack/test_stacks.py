"""The table of stacks: what is installed for each, what is read of its tests. The stacks run by `make stacks`."""

import subprocess
import sys

import pytest
from helpers.reference import ROOT
from stacks import CORE, STACKS, Stack, read_report, requirements, tables


@pytest.mark.parametrize('test', CORE)
def test_the_core_is_there(test):
    path, _, function = test.partition('[')[0].partition('::')
    assert f'\ndef {function or "test_"}' in (ROOT / path).read_text()


def test_a_stack_takes_the_place_of_what_it_names():
    plain = requirements(Stack())
    assert 'torch>=2.6' in plain and any(line.startswith('mmcv-lite') for line in plain)
    assert not any(line.startswith('-r') or '#' in line for line in plain)
    fork = requirements(STACKS['maintained fork'])
    assert [line for line in fork if 'mmengine' in line] == ['onedl-mmengine']
    assert not any(line.startswith('mmcv') for line in fork) and len(fork) == len(plain)
    assert [line for line in requirements(STACKS['torch 2.6']) if line.startswith('torch')] == [
        'torch==2.6.*',
        'torchvision==0.21.*',
    ]


def test_failures_are_counted_and_named(tmp_path):
    (tmp_path / 'test_four.py').write_text(
        'import pytest\n'
        'def test_good(): pass\n'
        'def test_bad(): assert 0\n'
        'def test_skipped(): pytest.skip("no")\n'
        'def test_broken(nothing): pass\n'
    )
    command = [sys.executable, '-m', 'pytest', '-q', '--junitxml=report.xml', '-p', 'no:cacheprovider']
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    names = ['test_four::test_bad', 'test_four::test_broken']
    assert read_report(tmp_path / 'report.xml') == dict(passed=1, skipped=1, bad=names)


def test_tables():
    result = dict(python='3.11.7', versions={'torch': '2.6.0', 'onedl-mmcv': '2.3.6'}, passed=5, skipped=1, bad=['x'])
    result |= dict(patches=['one', 'two'], needed=['two'], broken=None)
    broken = dict(result, broken='cannot be installed: no wheel', versions={}, patches=[], needed=[])
    versions, needed = tables({'maintained fork': broken, 'pinned': result})
    assert versions[1][:3] == ['pinned', '3.11.7', '2.6.0'] and versions[1][-3:] == ['5', '1', '1']
    assert '2.3.6 (onedl-mmcv)' in versions[1] and 'cannot be installed: no wheel' in versions[2]
    assert needed == [['patch', 'pinned', 'maintained fork'], ['one', '–', '–'], ['two', 'needed', '–']]
    assert all(len(row) == len(versions[0]) for row in versions)


def test_an_unknown_stack_is_named(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'stack' / 'stacks.py', 'torch 1', '--work-dir', tmp_path],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and 'no stack is called torch 1; there are pinned' in result.stderr
    assert not list(tmp_path.iterdir())
