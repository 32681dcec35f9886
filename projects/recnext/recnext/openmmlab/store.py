"""Checkpoints at an address such as ``s3://bucket/runs``: fsspec as a backend of mmengine's file IO."""

import contextlib
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

from fsspec import url_to_fs  # torch brings it along
from mmengine.config import Config
from mmengine.fileio import BaseStorageBackend, FileClient, register_backend

from ..utils.errors import UserError, first_line
from ..utils.files import atomic_write
from .resume import ATOMIC, name_pattern

WITH_FOLDERS = {'file', 'local', 'sftp', 'ssh', 'smb', 'ftp', 'hdfs', 'webhdfs'}  # elsewhere files appear in full


class FsspecBackend(BaseStorageBackend):
    """What mmengine's CheckpointHook needs of files at an address. None that is written is ever seen in part."""

    join_path = staticmethod(posixpath.join)

    def get(self, filepath: str) -> bytes:
        return url_to_fs(filepath)[0].cat_file(filepath)

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        return self.get(filepath).decode(encoding)

    def put(self, obj: bytes, filepath: str) -> None:
        fs, path = url_to_fs(filepath)
        if WITH_FOLDERS.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            return fs.pipe_file(path, obj)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(partial := f'{path}.partial-{token_hex(4)}', obj)
        return fs.mv(partial, path)

    @contextlib.contextmanager
    def get_local_path(self, filepath: str) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, posixpath.basename(filepath))
            copy.write_bytes(self.get(filepath))
            yield str(copy)

    def isfile(self, filepath: str) -> bool:
        return url_to_fs(filepath)[0].isfile(filepath)

    def isdir(self, filepath: str) -> bool:
        return url_to_fs(filepath)[0].isdir(filepath)

    def remove(self, filepath: str) -> None:
        url_to_fs(filepath)[0].rm_file(filepath)


def use_store(cfg: Config, url: str | None, resume: str | None) -> str | None:
    """Have checkpoints written to ``url``, or to an address that the CheckpointHook's ``out_dir`` is; in place.

    Returns:
        ``resume`` or, if that is in a store, the path of a copy in the work dir; ``cfg.load_from`` becomes the same.

    Raises:
        UserError: a store cannot be read or written, with the reason.
    """
    hook = cfg.setdefault('default_hooks', {}).get('checkpoint') or dict(type='CheckpointHook', interval=1)
    # To mmengine, s3:// is Petrel's, whatever is registered; to fsspec, s3a:// is the same.
    address = re.sub('^s3://', 's3a://', url or hook.get('out_dir') or '')
    if address:
        others = {key: value for key, value in hook.items() if value != dict(backend=ATOMIC)}  # from a dumped config
        cfg.default_hooks.checkpoint = {**others, 'out_dir': address}
    try:
        if '://' in address:
            for register in (register_backend, FileClient.register_backend):
                register('fsspec', FsspecBackend, force=True, prefixes=address.partition('://')[0])
            folder = posixpath.join(address, os.path.basename(os.path.abspath(cfg.work_dir)))  # as the hook does
            FsspecBackend().put(b'', probe := f'{folder}/.writable-{token_hex(4)}')
            FsspecBackend().remove(probe)
            if resume == 'auto' or (resume is None and cfg.get('resume') and not cfg.get('load_from')):
                paths = [f'{folder}/{Path(path).name}' for path in url_to_fs(folder)[0].find(folder, maxdepth=1)]
                paths += map(str, Path(cfg.work_dir).glob('*'))  # these last: of the same, the one that is here
                numbered = {int(m[1]): path for path in paths if (m := name_pattern(hook).fullmatch(Path(path).name))}
                resume = numbered[max(numbered)] if numbered else resume
        cfg.load_from = _fetch(address := cfg.get('load_from'), cfg.work_dir)
        return _fetch(address := resume, cfg.work_dir)
    except Exception as error:  # each kind of store has its own
        raise UserError(f'{address} cannot be used: {type(error).__name__}: {first_line(error)}') from error


def _fetch(checkpoint: str | None, work_dir: str) -> str | None:
    if '://' not in (checkpoint or '') or checkpoint.startswith(('http://', 'https://', 'hf://')):
        return checkpoint
    fs, path = url_to_fs(checkpoint)
    copy = Path(work_dir, '.store', fs.ukey(path)[:16], posixpath.basename(path))
    if not copy.exists():
        shutil.rmtree(copy.parents[1], ignore_errors=True)  # of the starts before
        with atomic_write(copy) as partial:
            fs.get_file(path, str(partial))
    return str(copy)
