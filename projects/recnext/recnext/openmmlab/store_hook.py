"""The work dir of a training copied to a store as it grows, beside training."""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoints.files import NUMBERED
from ..utils.errors import UserError
from .store import Store


@HOOKS.register_module()
class StoreHook(Hook):
    """Copies what is new in the work dir to a store: at each checkpoint, after each validation and in the end.

    What a run removes, such as the best checkpoint before a better one, goes from the store too. A copy that fails is
    said and tried again at the next occasion; it does not end training.

    Args:
        url: See :class:`Store`.

    Raises:
        UserError: at the start, if the store is not there or may not be written.
    """

    # After CheckpointHook.
    priority = 'LOWEST'

    def __init__(self, url: str) -> None:
        self.store = Store(url)
        self._copied: dict[str, tuple[int, int]] = {}
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._copying: Future | None = None
        self._last: str | None = None

    def before_train(self, runner: Runner) -> None:
        """Copy config and log, so that a store that cannot be written is known before the first iteration."""
        if is_main_process():
            there = self.store.list_names()
            # Of an earlier start: a checkpoint that is in the store need not go there again.
            files = _files(Path(runner.work_dir)).items()
            self._copied = {name: stamp for name, stamp in files if name in there and NUMBERED.fullmatch(name)}
            try:
                self._copy(runner)
            except UserError as error:
                if error.final:
                    raise
                _warn(runner, error)
            self._last = runner.message_hub.get_info('last_ckpt')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Begin to copy, if there is a new checkpoint."""
        newest = runner.message_hub.get_info('last_ckpt')
        if newest != self._last:
            self._last = newest
            self._begin(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Begin to copy the best checkpoint and what validation has found."""
        self._begin(runner)

    def after_train(self, runner: Runner) -> None:
        """Copy what is left, and wait for it."""
        if is_main_process():
            self._threads.shutdown()
            self._copy_or_warn(runner)

    def _begin(self, runner: Runner) -> None:
        # One at a time: what is new meanwhile goes with the next.
        if is_main_process() and (self._copying is None or self._copying.done()):
            self._copying = self._threads.submit(self._copy_or_warn, runner)

    def _copy_or_warn(self, runner: Runner) -> None:
        try:
            self._copy(runner)
        except UserError as error:
            _warn(runner, error)

    def _copy(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        files = _files(folder)
        for name, stamp in files.items():
            if self._copied.get(name) == stamp:
                continue
            try:
                self.store.put(folder / name, name)
            except UserError:
                if (folder / name).exists():  # else training has removed it meanwhile
                    raise
                continue
            self._copied[name] = stamp
        for name in self._copied.keys() - files.keys():
            self.store.remove(name)
            del self._copied[name]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of a work dir by name, with the time of the last change and the size; none that is being written."""
    found = {}
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder)
        if any(part.startswith('.') for part in name.parts):
            continue
        with contextlib.suppress(FileNotFoundError):  # training removes checkpoints meanwhile
            if path.is_file():
                stat = path.stat()
                found[name.as_posix()] = (stat.st_mtime_ns, stat.st_size)
    return found


def _warn(runner: Runner, error: UserError) -> None:
    runner.logger.warning(f'{error} Training goes on, and the next checkpoint tries again.')
