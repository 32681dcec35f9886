"""onnxruntime-web: its package as npm has it, of one version and one hash, and the files of it that a page needs."""

import base64
import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_path

from ..utils.errors import UserError, printable
from ..utils.files import atomic_write, make_folder

PACKAGE, VERSION = 'onnxruntime-web', '1.30.0'

INTEGRITY = 'sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=='
"""Of the package, as npm writes it into a package-lock.json."""

ARCHIVE = f'{PACKAGE}-{VERSION}.tgz'

FLAVOURS: Mapping[str, Mapping[str, str]] = {
    'wasm': dict(script='ort.wasm.min.mjs', glue='ort-wasm-simd-threaded.mjs', binary='ort-wasm-simd-threaded.wasm'),
    'webgpu': dict(
        script='ort.webgpu.min.mjs',
        glue='ort-wasm-simd-threaded.asyncify.mjs',
        binary='ort-wasm-simd-threaded.asyncify.wasm',
    ),
}
"""Files in its ``dist``; a browser loads those of one."""

PATIENCE = 600
"""Seconds that npm may take."""


def find_package(given: Path | None = None) -> Path:
    """The package, from where it is said to be, from the user's cache, or from npm, in this order.

    Args:
        given: A file that was fetched otherwise.

    Raises:
        UserError: it cannot be had, or is not the one that is expected.
    """
    if given is not None:
        _check(given)
        return given
    cached = user_cache_path('recnext') / ARCHIVE
    if not cached.is_file():
        make_folder(cached.parent)
        with atomic_write(cached) as beside:
            _fetch(beside.parent)
            _check(beside)
    _check(cached)
    return cached


def extract(package: Path, folder: Path) -> None:
    """Write the files that a page needs into a folder."""
    folder.mkdir()
    with tarfile.open(package) as archive:
        for flavour in FLAVOURS.values():
            for name in flavour.values():
                source = archive.extractfile(f'package/dist/{name}')
                if source is None:
                    raise UserError(f'{package} has no {name}.')
                with source, (folder / name).open('wb') as file:
                    shutil.copyfileobj(source, file)


def _check(package: Path) -> None:
    try:
        with package.open('rb') as file:
            digest = hashlib.sha512()
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f'{package} cannot be read: {error.strerror}') from None
    found = 'sha512-' + base64.b64encode(digest.digest()).decode()
    if found != INTEGRITY:
        raise UserError(
            f'{package} is not {PACKAGE} {VERSION} as it was published; it is not used.\n'
            f'  found    {found}\n  expected {INTEGRITY}\n'
            f'  Remove it, or name the package with --runtime {ARCHIVE}.'
        )


def _fetch(folder: Path) -> None:
    """Have npm bring the package into a folder, from the registry that it is configured for."""
    npm = shutil.which('npm')
    if npm is None:
        raise UserError(
            f'The page needs {PACKAGE} {VERSION}, and there is no npm to fetch it with. Install npm, or run\n'
            f'    npm pack {PACKAGE}@{VERSION}\n'
            f'  elsewhere, and name the file with --runtime {ARCHIVE}.'
        )
    command = [npm, 'pack', f'{PACKAGE}@{VERSION}', '--silent', '--ignore-scripts']
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(f'npm did not bring {PACKAGE} {VERSION} in {PATIENCE} seconds.') from None
    if result.returncode or not (folder / ARCHIVE).is_file():
        said = printable(result.stderr.strip() or result.stdout.strip(), 300)
        raise UserError(
            f'npm cannot bring {PACKAGE} {VERSION}: {said or f"it ended with {result.returncode}"}\n'
            f'  Where npm has no registry, fetch it elsewhere and name it with --runtime {ARCHIVE}.'
        )
