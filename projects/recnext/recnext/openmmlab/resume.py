"""Checkpoints of a run: where its CheckpointHook writes them, whole or not at all, and which one to go on from."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer

from ..checkpoints.files import CheckpointError, read_checkpoint
from ..utils.errors import UserError
from ..utils.files import atomic_write
from .config import is_kind

ATOMIC = 'recnext.atomic'
"""Name of :class:`AtomicBackend` in configs."""


BEST = 'best_ckpt'
"""How the keys begin under which CheckpointHook notes the paths of its best files."""


class NotWritten(UserError, OSError):
    """A checkpoint that could not be written; what was there before stays."""


@register_backend(ATOMIC)
class AtomicBackend(LocalBackend):
    """mmengine's backend of local files, which shows a regular file in full or not at all.

    What is no regular file, such as a device, a pipe or a link, is written through as mmengine does.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file.

        Raises:
            OSError: it cannot be; what was there before stays.
        """
        path = Path(filepath)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            super().put(obj, filepath)
            return
        try:
            with atomic_write(path) as beside:
                beside.write_bytes(obj)
        except UserError as error:
            raise NotWritten(str(error)) from error.__cause__


def write_atomically(cfg: Config) -> None:
    """Have checkpoints on this machine written whole or not at all, unless the config names a backend; in place."""
    for hook in _checkpoint_hooks(cfg):
        if not (hook.get('backend_args') or hook.get('file_client_args') or '://' in str(hook.get('out_dir'))):
            hook.backend_args = dict(backend=ATOMIC)


def _checkpoint_hooks(cfg: Config) -> Iterator[ConfigDict]:
    """Yield the configs of a run's CheckpointHooks; that of mmengine's default is written into the config."""
    defaults = cfg.setdefault('default_hooks', ConfigDict())
    defaults.setdefault('checkpoint', ConfigDict(type='CheckpointHook'))
    for name, hook in (*defaults.items(), *enumerate(cfg.get('custom_hooks') or ())):
        if hook and (name == 'checkpoint' or is_kind(hook, CheckpointHook)):
            yield hook


def name_pattern(hook: ConfigDict) -> re.Pattern:
    """Return how a CheckpointHook names its files, with the number as the one group."""
    name = hook.get('filename_tmpl') or ('epoch_{}.pth' if hook.get('by_epoch', True) else 'iter_{}.pth')
    before, *after = map(re.escape, re.split(r'\{[^}]*\}', name, maxsplit=1))
    return re.compile(rf'{before}(\d+){after[0]}' if after else r'(?!)()')  # a name without a number is none


def _numbered(hook: ConfigDict, work_dir: str) -> list[Path]:
    """Return the files that a CheckpointHook has numbered, the highest number first."""
    pattern = name_pattern(hook)
    found = [
        (int(match[1]), path)
        for path in Path(_folder(hook, work_dir)).glob('*')
        if (match := pattern.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _folder(hook: ConfigDict, work_dir: str) -> str:
    """Return where a CheckpointHook writes, by its own rule."""
    out_dir = hook.get('out_dir')
    return f'{out_dir}/{os.path.basename(work_dir.rstrip("/"))}' if out_dir and out_dir != work_dir else work_dir


def list_checkpoints(cfg: Config) -> list[Path]:
    """Return the numbered checkpoints of a run, the newest of each CheckpointHook first."""
    return [path for hook in _checkpoint_hooks(cfg) for path in _numbered(hook, cfg.work_dir)]


def read_newest(cfg: Config) -> tuple[Path, dict, list[CheckpointError]] | None:
    """Read the checkpoint of a run with the most iterations, or the next that is whole.

    Returns:
        Its path, what it holds, and what is wrong with newer ones; None where there is none yet.

    Raises:
        CheckpointError: there are some, and none can be read.
    """
    whole, damaged = [], []
    for hook in _checkpoint_hooks(cfg):
        for path in _numbered(hook, cfg.work_dir):
            try:
                whole.append((path, read_checkpoint(path, history=HistoryBuffer)))
                break
            except CheckpointError as error:
                damaged.append(error)
    if damaged and not whole:
        raise CheckpointError(
            f'No checkpoint in {cfg.work_dir} can be read:\n  '
            + '\n  '.join(map(str, damaged))
            + '\n  Copy a whole one there, '
            'or name one (--resume CHECKPOINT), or move these away to start from the beginning.'
        )
    if not whole:
        return None
    path, content = max(whole, key=lambda found: (found[1].get('meta') or {}).get('iter', 0))
    return path, content, damaged


def only_data(content: dict, cfg: Config) -> dict:
    """Return of a checkpoint what mmengine takes for data alone, whoever wrote it.

    Left out are the texts of configs, which ``Runner.resume`` and the inferencers run as Python: ``meta['config']``,
    ``meta['cfg']``, and ``cfg`` in the message hub, which would go on into the checkpoints of this run. The message hub
    also says which file is the best one, and is removed when there is a better: only one where this run writes. Where
    there is none, its score is left out as well, and the next measured is the best.

    Args:
        content: What a file holds.
        cfg: Of the run.
    """
    if 'state_dict' not in content:  # bare
        return content
    meta = content.get('meta') if isinstance(content.get('meta'), dict) else {}
    kept = {**content, 'meta': {key: value for key, value in meta.items() if key not in ('config', 'cfg')}}
    hub = kept.get('message_hub')
    if isinstance(hub, dict) and isinstance(hub.get('runtime_info'), dict):
        folders = [_folder(hook, cfg.work_dir) for hook in _checkpoint_hooks(cfg)]
        info = _runtime_info(hub['runtime_info'], folders)
        gone = hub['runtime_info'].keys() - info.keys()
        resumed = {key: value for key, value in (hub.get('resumed_keys') or {}).items() if key not in gone}
        kept['message_hub'] = {**hub, 'runtime_info': info, 'resumed_keys': resumed}
    return kept


def _runtime_info(info: dict, folders: list[str]) -> dict:
    info = {key: value for key, value in info.items() if key != 'cfg'}
    numbers = info.get('keep_ckpt_ids', [])
    if not (isinstance(numbers, list) and all(isinstance(number, int) for number in numbers)):
        del info['keep_ckpt_ids']
    for key in [key for key in info if key.startswith(BEST)]:
        info[key] = _best_of_run(str(info[key]), folders)
        if info[key] is None:
            del info[key]
            info.pop(key.replace(BEST, 'best_score', 1), None)
    return info


def _best_of_run(path: str, folders: list[str]) -> str | None:
    """Where the best checkpoint is for this run, whose folders may have moved; None if it is not there."""
    folder, name = os.path.split(path)
    if not name.startswith('best_'):
        return None
    if folder in folders:
        return path
    return next((str(there) for own in folders if (there := Path(own, name)).is_file()), None)
