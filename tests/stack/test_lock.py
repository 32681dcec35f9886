"""The lock: exact versions with hashes, of everything that the requirements name and within their ranges."""

import re

import pytest
from helpers.reference import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = (ROOT / 'requirements.lock').read_text()
ENTRIES = re.findall(r'^(\S+==.*?)((?: \\\n    --hash=\S+)*)$', LOCK, re.MULTILINE)
LINUX = dict(
    sys_platform='linux', platform_system='Linux', platform_machine='x86_64', os_name='posix',
    platform_python_implementation='CPython', implementation_name='cpython',
)  # fmt: skip


def requirements() -> list[Requirement]:
    texts = [(ROOT / name).read_text() for name in ('requirements.txt', 'requirements-dev.txt')]
    lines = [line.partition('#')[0].strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith('-r')]


def test_every_line_is_a_version_with_hashes():
    rest = LOCK
    for entry, hashes in ENTRIES:
        assert re.match(r'[\w.-]+==[\w.]+( ; .+)?$', entry), entry
        assert hashes and all(re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', word) for word in hashes.split()[1::2]), entry
        rest = rest.replace(f'{entry}{hashes}\n', '', 1)
    # Nothing else, least of all the address of an index.
    assert [line for line in rest.splitlines() if not line.startswith('#')] == []
    assert len(ENTRIES) > 100


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12'])
def test_the_requirements_are_met(python):
    surroundings = dict(LINUX, python_version=python, python_full_version=f'{python}.9')
    locked: dict[str, str] = {}
    for entry, _ in ENTRIES:
        pin = Requirement(entry)
        if pin.marker is None or pin.marker.evaluate(surroundings):
            name = canonicalize_name(pin.name)
            assert name not in locked, f'{name} twice'
            (specifier,) = pin.specifier
            locked[name] = specifier.version
    wanted = requirements()
    assert len(wanted) > 30
    for requirement in wanted:
        version = locked.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), (
            f'{requirement}, locked: {version}. Run `make lock`.'
        )
