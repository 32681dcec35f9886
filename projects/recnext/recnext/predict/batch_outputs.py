"""The folder of the outputs of a prediction: what is in it, what is finished, and what it adds up to.

- ``labels/``, ``overlays/``: what was predicted, by the folders and names of the inputs.
- ``areas/``: a JSON for each input, written last. Where it is, the input is finished.
- ``failed/``: a JSON for each input that could not be read. It is tried again the next time.
- ``run.json``: what the outputs were made with. With anything else nothing is added to them.
- ``summary.json``: all inputs together, once all are done.

Files are written in :data:`STAGING` and renamed, so that there is no half of one under its name.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from ..utils.errors import UserError
from ..utils.files import atomic_write, make_folder
from ..utils.parallel import completed
from .batch_inputs import Input, Inputs
from .predictor import Prediction, Predictor, list_areas
from .video import predict_video

STAGING = '.partial'
"""Folder for what is being written, in one of its own for each process."""

LOCK = '.lock'


class Outputs:
    """The folder of the outputs; processes and threads may share it.

    Args:
        root: Made if it is missing.
        overlay: Whether to draw overlays.
    """

    def __init__(self, root: str | Path, overlay: bool) -> None:
        self.root = Path(root)
        self.overlay = overlay
        self.staging = self.root / STAGING / secrets.token_hex(8)

    @contextlib.contextmanager
    def opened(self, made_with: dict) -> Iterator[None]:
        """Make ready to write.

        Args:
            made_with: What decides the outputs.

        Raises:
            UserError: there are outputs that were made with anything else, or nothing can be written.
        """
        make_folder(self.staging.parent)
        self._remove_partial_files()
        with _held(self.staging):
            run = self.root / 'run.json'
            if not run.exists():
                self._write_json(run, made_with)
            check_made_with(self.root, json.loads(run.read_text()), made_with)
            yield

    def _remove_partial_files(self) -> None:
        """Remove what processes left when they were killed: nobody holds their locks any more."""
        for lock in self.staging.parent.glob(f'*{LOCK}'):
            with contextlib.suppress(Timeout), _held(lock.with_suffix('')):
                pass

    def save(self, item: Input, prediction: Prediction) -> None:
        """Write what was predicted for an image."""
        with self._written('labels', item, '.png') as beside:
            beside.write_bytes(prediction.labels_png())
        if self.overlay:
            with self._written('overlays', item, '.jpg') as beside:
                beside.write_bytes(prediction.overlay_jpeg())
        self._finish(item, prediction.report())

    def save_video(self, item: Input, predictor: Predictor, on_frame: Callable[[], None]) -> None:
        """Predict a video, and write what comes of it: see :func:`video.predict_video`."""
        with self._written('overlays', item, '.mp4') if self.overlay else contextlib.nullcontext() as beside:
            report = predict_video(predictor, item.path, beside, on_frame)
        self._finish(item, report)

    def fail(self, item: Input, reason: str) -> None:
        """Note why an input could not be predicted."""
        self._write_json(self._place('failed', item, '.json'), dict(input=item.name, error=reason))

    def is_finished(self, key: str) -> bool:
        """Whether all outputs of the input with this key are there."""
        return Path(self.root, 'areas', f'{key}.json').exists()

    def not_finished(self, inputs: Inputs | Sequence[Input]) -> Iterator[tuple[int, Input]]:
        """The inputs whose outputs are not there, with their places among all; reads every folder once."""
        finished = _Listing(self.root / 'areas')
        return ((place, item) for place, item in enumerate(inputs) if item not in finished)

    def failures(self, inputs: Inputs | Sequence[Input]) -> dict[Input, str]:
        """Why inputs could not be predicted; of those that are not finished."""
        failed = _Listing(self.root / 'failed')
        return {
            item: json.loads(self._place('failed', item, '.json').read_text())['error']
            for _, item in self.not_finished(inputs)
            if item in failed
        }

    def summarise(self, inputs: Inputs | Sequence[Input], classes: Sequence[str], threads: int) -> dict:
        """Add up all inputs in ``summary.json``.

        Returns:
            See :func:`add_up`.
        """
        finished = _Listing(self.root / 'areas')
        with ThreadPoolExecutor(threads) as pool:
            reading = completed(pool, self._read_areas, (i for i in inputs if i in finished), 8 * threads)
            failures = {item.name: reason for item, reason in self.failures(inputs).items()}
            summary = add_up(len(inputs), (read.result() for _, read in reading), failures, classes)
        self.put('summary.json', json.dumps(summary, indent=1).encode())
        return summary

    def put(self, name: str, content: bytes) -> None:
        """Write a file about all inputs."""
        with atomic_write(self.root / name) as beside:
            beside.write_bytes(content)

    def _read_areas(self, item: Input) -> list[dict]:
        return json.loads(self._place('areas', item, '.json').read_text())['areas']

    def _finish(self, item: Input, report: dict) -> None:
        self._place('failed', item, '.json').unlink(missing_ok=True)
        self._write_json(self._place('areas', item, '.json'), dict(input=item.name, **report))

    def _place(self, part: str, item: Input, suffix: str) -> Path:
        return self.root / part / (item.key + suffix)

    def _written(self, part: str, item: Input, suffix: str) -> contextlib.AbstractContextManager[Path]:
        return atomic_write(self._place(part, item, suffix), self.staging)

    def _write_json(self, path: Path, content: dict) -> None:
        with atomic_write(path, self.staging) as beside:
            beside.write_text(json.dumps(content, indent=1))


def check_made_with(root: str | Path, before: dict, now: dict) -> None:
    """Make sure that outputs that are there, and those to come, are made alike.

    Raises:
        UserError: they are not.
    """
    different = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if different:
        changes = '\n'.join(f'  {key}: {before.get(key)}, now {now.get(key)}' for key in different)
        raise UserError(f'{root} holds outputs that were made otherwise.\n{changes}\n  Choose another folder.')


def add_up(inputs: int, areas: Iterable[list[dict]], failed: dict[str, str], classes: Sequence[str]) -> dict:
    """All inputs together.

    Args:
        inputs: How many there are.
        areas: Of each that is finished.
        failed: Why others could not be predicted, by name.
        classes: Names of all classes.

    Returns:
        ``inputs``, ``finished``, ``failed``, ``pixels``, and ``classes``, the largest first, each with the number of
        inputs that it is in.
    """
    pixels, among = np.zeros((2, len(classes)), np.int64)
    finished = 0
    for of_one in areas:
        finished += 1
        for area in of_one:
            pixels[area['label']] += area['pixels']
            among[area['label']] += 1
    return dict(
        inputs=inputs,
        finished=finished,
        failed=failed,
        pixels=int(pixels.sum()),
        classes=[{**area._asdict(), 'inputs': int(among[area.label])} for area in list_areas(pixels, classes)],
    )


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Have a folder as long as a lock beside it is held, which ends with the process, however that ends.

    Raises:
        Timeout: another process has it.
    """
    lock = folder.with_name(folder.name + LOCK)
    with FileLock(lock, timeout=0):
        make_folder(folder)
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                lock.unlink()
                folder.parent.rmdir()  # the last one out


class _Listing:
    """Which inputs have a JSON below a folder; asked for in their order, each folder is read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder, self.names = None, frozenset()

    def __contains__(self, item: Input) -> bool:
        folder, name = os.path.split(item.key)
        if folder != self.folder:
            self.folder, self.names = folder, frozenset()
            with contextlib.suppress(FileNotFoundError):
                self.names = frozenset(os.listdir(self.root / folder))
        return f'{name}.json' in self.names
