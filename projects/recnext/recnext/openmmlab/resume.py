"""Checkpoints of a run: where its CheckpointHook writes them, whole or not at all, and which one to go on from."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer

from ..checkpoints.files import CheckpointError, read_checkpoint
from ..utils.errors import UserError
from ..utils.files import atomic_write

ATOMIC = 'recnext.atomic'
"""Name of :class:`AtomicBackend` in configs."""


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
    for hook in (*defaults.values(), *(cfg.get('custom_hooks') or ())):
        if hook and str(hook.get('type')).endswith('CheckpointHook'):
            yield hook


def name_pattern(hook: ConfigDict) -> re.Pattern:
    """Return how a CheckpointHook names its files, with the number as the one group."""
    name = hook.get('filename_tmpl') or ('epoch_{}.pth' if hook.get('by_epoch', True) else 'iter_{}.pth')
    before, after = map(re.escape, re.split(r'\{[^}]*\}', name, maxsplit=1))
    return re.compile(rf'{before}(\d+){after}')


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


LOADED = ('state_dict', 'ema_state_dict', 'message_hub', 'optimizer', 'param_schedulers')
META = ('epoch', 'iter', 'seed', 'dataset_meta', 'experiment_name', 'time', 'mmengine_version')


def only_data(content: dict, cfg: Config) -> dict:
    """Return of a checkpoint what mmengine takes for data alone, whoever wrote it.

    Left out are the texts of configs, which ``Runner.resume`` and the inferencers run as Python: ``meta['config']``,
    ``meta['cfg']``, and ``cfg`` in the message hub, which would go on into the checkpoints of this run. The message hub
    also says which file CheckpointHook removes when there is a better one: only files that this run writes.

    Args:
        content: What a file holds.
        cfg: Of the run.
    """
    if 'state_dict' not in content:  # bare
        return content
    kept = {key: content[key] for key in LOADED if key in content}
    kept['meta'] = {key: value for key, value in (content.get('meta') or {}).items() if key in META}
    hub = kept.get('message_hub')
    if isinstance(hub, dict) and isinstance(hub.get('runtime_info'), dict):
        folders = {os.path.abspath(_folder(hook, cfg.work_dir)) for hook in _checkpoint_hooks(cfg)}
        info = {key: value for key, value in hub['runtime_info'].items() if _is_harmless(key, value, folders)}
        kept['message_hub'] = {**hub, 'runtime_info': info}
    return kept


def _is_harmless(key: str, value: object, folders: set[str]) -> bool:
    if key.startswith('best_ckpt'):
        folder, name = os.path.split(os.path.abspath(str(value)))
        return folder in folders and name.startswith('best_')
    if key == 'keep_ckpt_ids':
        return isinstance(value, list) and all(isinstance(number, int) for number in value)
    return key != 'cfg'
