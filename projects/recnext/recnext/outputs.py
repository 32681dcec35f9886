"""The folder of the outputs of a prediction: what is in it, what is finished, and what it adds up to.

- ``labels/``, ``overlays/``: what was predicted, by the folders and names of the inputs.
- ``areas/``: a JSON for each input, written last. Where it is, the input is finished.
- ``failed/``: a JSON for each input that could not be read. It is tried again the next time.
- ``run.json``: what the outputs were made with. With anything else nothing is added to them.
- ``summary.json``: all inputs together, once all are done.

Files are written in ``.partial/`` and renamed, so that there is no half of one under its name.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .ahead import completed
from .checkpoint import write_atomically
from .errors import UserError
from .inference import Prediction, Predictor, list_areas
from .inputs import Input, Inputs
from .video import predict_video
from .writing import make_folder


class Outputs:
    """The folder of the outputs; processes and threads may share it.

    Args:
        root: Made if it is missing.
        overlay: Whether to draw overlays.
    """

    def __init__(self, root: str | Path, overlay: bool) -> None:
        self.root = Path(root)
        self.overlay = overlay
        self.partial = self.root / '.partial' / f'{socket.gethostname()}-{os.getpid()}'

    @contextlib.contextmanager
    def opened(self, made_with: dict) -> Iterator[None]:
        """Make ready to write.

        Args:
            made_with: What decides the outputs.

        Raises:
            UserError: there are outputs that were made with anything else, or nothing can be written.
        """
        make_folder(self.partial.parent)
        with _locked(self.partial.parent):
            self._remove_partial_files()
            make_folder(self.partial)
            alive = _lock(self.partial)
        try:
            run = self.root / 'run.json'
            if not run.exists():
                self._write_json(run, made_with)
            before = json.loads(run.read_text())
            different = [key for key in {**made_with, **before} if made_with.get(key) != before.get(key)]
            if different:
                changes = '\n'.join(f'  {key}: {before.get(key)}, now {made_with.get(key)}' for key in different)
                raise UserError(
                    f'{self.root} holds outputs that were made otherwise.\n{changes}\n  Choose another folder.'
                )
            yield
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            os.close(alive)
            with contextlib.suppress(OSError):
                self.partial.parent.rmdir()  # the last one out

    def _remove_partial_files(self) -> None:
        """Remove what processes of this machine left when they were killed: nobody holds its lock any more."""
        for folder in self.root.glob(f'.partial/{socket.gethostname()}-*'):
            with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_NB):
                shutil.rmtree(folder, ignore_errors=True)

    def save(self, item: Input, prediction: Prediction) -> None:
        """Write what was predicted for an image."""
        label_image = prediction.label_image()
        self._write(self._place('labels', item, '.png'), lambda file: label_image.save(file, 'PNG'))
        if self.overlay:
            overlay = prediction.overlay()
            self._write(self._place('overlays', item, '.jpg'), lambda file: overlay.save(file, 'JPEG', quality=90))
        height, width = prediction.labels.shape
        self._finish(item, dict(width=width, height=height, areas=prediction.areas))

    def save_video(self, item: Input, predictor: Predictor, on_frame: Callable[[], None]) -> None:
        """Predict a video, and write what comes of it: see :func:`video.predict_video`."""
        beside = self.partial / 'overlay.mp4' if self.overlay else None
        report = predict_video(predictor, item.path, beside, on_frame)
        if beside is not None:
            place = self._place('overlays', item, '.mp4')
            make_folder(place.parent)
            os.replace(beside, place)
        self._finish(item, report)

    def fail(self, item: Input, reason: str) -> None:
        """Note why an input could not be predicted."""
        self._write_json(self._place('failed', item, '.json'), dict(input=item.name, error=reason))

    def is_finished(self, item: Input) -> bool:
        """Whether all outputs of an input are there."""
        return self._place('areas', item, '.json').exists()

    def not_finished(self, inputs: Inputs) -> Iterator[tuple[int, Input]]:
        """The inputs whose outputs are not there, with their places among all; reads every folder once."""
        finished = _Listing(self.root / 'areas')
        return ((place, item) for place, item in enumerate(inputs) if item not in finished)

    def failures(self, inputs: Inputs) -> dict[Input, str]:
        """Why inputs could not be predicted; of those that are not finished."""
        failed = _Listing(self.root / 'failed')
        return {
            item: json.loads(self._place('failed', item, '.json').read_text())['error']
            for _, item in self.not_finished(inputs)
            if item in failed
        }

    def summarise(self, inputs: Inputs, classes: Sequence[str], threads: int) -> dict:
        """Add up all inputs in ``summary.json``.

        Returns:
            ``inputs``, ``finished``, ``failed`` (reasons by input), ``pixels``, and ``classes``, the largest first,
            each with the number of inputs that it is in.
        """
        finished, failures = _Listing(self.root / 'areas'), self.failures(inputs)
        pixels, among = np.zeros((2, len(classes)), np.int64)
        done = 0
        with ThreadPoolExecutor(threads) as pool:
            for _, reading in completed(pool, self._read_areas, (i for i in inputs if i in finished), 8 * threads):
                done += 1
                for area in reading.result():
                    pixels[area['label']] += area['pixels']
                    among[area['label']] += 1
        summary = dict(
            inputs=len(inputs),
            finished=done,
            failed={item.name: reason for item, reason in failures.items()},
            pixels=int(pixels.sum()),
            classes=[{**area._asdict(), 'inputs': int(among[area.label])} for area in list_areas(pixels, classes)],
        )
        self._write_json(self.root / 'summary.json', summary)
        return summary

    def _read_areas(self, item: Input) -> list[dict]:
        return json.loads(self._place('areas', item, '.json').read_text())['areas']

    def _finish(self, item: Input, report: dict) -> None:
        self._place('failed', item, '.json').unlink(missing_ok=True)
        areas = [area._asdict() for area in report.pop('areas')]
        self._write_json(self._place('areas', item, '.json'), dict(input=item.name, **report, areas=areas))

    def _place(self, part: str, item: Input, suffix: str) -> Path:
        return self.root / part / (item.key + suffix)

    def _write_json(self, path: Path, content: dict) -> None:
        self._write(path, lambda file: file.write(json.dumps(content, indent=1).encode()))

    def _write(self, path: Path, write: Callable) -> None:
        make_folder(path.parent)
        write_atomically(path, write, self.partial / str(threading.get_ident()))


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


def _lock(folder: Path, flags: int = 0) -> int:
    """Lock a folder as long as the descriptor that is returned is open, or until this process is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # a file system without locks
    return descriptor


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    descriptor = _lock(folder, flags)
    try:
        yield
    finally:
        os.close(descriptor)
