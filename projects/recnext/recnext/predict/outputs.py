"""The folder of the outputs of a prediction: what is in it, what is finished, and what it adds up to.

- ``labels/``, ``overlays/``: what was predicted, by the folders and names of the inputs.
- ``areas/``: a JSON for each input, written last. Where it is, the input is finished.
- ``failed/``: a JSON for each input that could not be read. It is tried again the next time.
- ``run.json``: what the outputs were made with. With anything else nothing is added to them.
- ``summary.json``: all inputs together, once all are done.

Several processes may write at once, each with a share of the inputs. Each file is renamed into its place when it is
whole; what a killed process left of one lies in the hidden folder of its share, until that share is through.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..utils.errors import UserError
from ..utils.files import atomic_write, make_folder
from ..utils.parallel import completed
from .inputs import Input, Inputs
from .model import Model
from .prediction import Prediction, list_areas


class Outputs:
    """The folder of the outputs; processes and threads may share it.

    Args:
        root: Made if it is missing.
        overlay: Whether to draw overlays.
        share: Number of the share that this process predicts; no two that write at once have the same.
    """

    def __init__(self, root: str | Path, overlay: bool, share: int = 0) -> None:
        self.root = Path(root)
        self.overlay = overlay
        self.staging = self.root / f'.partial.{share}'

    def open(self, provenance: dict) -> None:
        """Make ready to write.

        Args:
            provenance: What decides the outputs.

        Raises:
            UserError: there are outputs that were made with anything else, or nothing can be written.
        """
        run = self.root / 'run.json'
        if not run.exists():
            self._write_json(run, provenance)
        try:
            before = dict(json.loads(run.read_text()))
        except (ValueError, TypeError):
            raise UserError(f'{run} is damaged. Choose another folder: --out-dir.') from None
        check_same_run(self.root, before, provenance)

    def save(self, item: Input, prediction: Prediction) -> None:
        """Write what was predicted for an image."""
        with self._writing('labels', item, '.png') as temporary:
            temporary.write_bytes(prediction.labels_png())
        if self.overlay:
            with self._writing('overlays', item, '.jpg') as temporary:
                temporary.write_bytes(prediction.overlay_jpeg())
        self._finish(item, prediction.to_dict())

    def save_video(self, item: Input, model: Model, on_frame: Callable[[], None]) -> None:
        """Predict a video, and write what comes of it: see :func:`.video.predict_video`."""
        from .video import predict_video

        with self._writing('overlays', item, '.mp4') if self.overlay else contextlib.nullcontext() as temporary:
            report = predict_video(model, item.path, temporary, on_frame)
        self._finish(item, report)

    def forget_failures(self, items: Iterable[Input]) -> None:
        """Remove what earlier runs noted of inputs that are tried again: nobody should take it for final."""
        failed = self._list('failed')
        for item in items:
            if item.key in failed:
                self._path('failed', item, '.json').unlink(missing_ok=True)

    def fail(self, item: Input, reason: str) -> None:
        """Note why an input could not be predicted."""
        self._write_json(self._path('failed', item, '.json'), dict(input=item.name, error=reason))

    def not_finished(self, inputs: Iterable[Input]) -> Iterator[tuple[int, Input]]:
        """Yield the inputs whose outputs are not there, with their indices among all."""
        finished = self._list('areas')
        return ((index, item) for index, item in enumerate(inputs) if item.key not in finished)

    def failures(self, unfinished: Iterable[Input]) -> dict[Input, str]:
        """Return why inputs could not be predicted, of those for which it is noted."""
        failed = self._list('failed')
        reasons = {}
        for item in unfinished:
            if item.key in failed:
                with contextlib.suppress(FileNotFoundError):  # another process tries it again
                    reasons[item] = json.loads(self._path('failed', item, '.json').read_text())['error']
        return reasons

    def summarise(self, inputs: Inputs | Sequence[Input], classes: Sequence[str], threads: int) -> dict:
        """Add up all inputs in ``summary.json`` and return it: see :func:`add_up`."""
        finished = self._list('areas')
        with ThreadPoolExecutor(threads) as pool:
            reading = completed(pool, self._read_areas, (i for i in inputs if i.key in finished), 8 * threads)
            failures = self.failures(i for i in inputs if i.key not in finished)
            failures = {item.name: reason for item, reason in failures.items()}
            summary = add_up(len(inputs), (read.result() for _, read in reading), failures, classes)
        self._write_json(self.root / 'summary.json', summary)
        return summary

    def close(self) -> None:
        """Remove what is left of files that were being written."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _list(self, part: str) -> set[str]:
        """The keys of the inputs that have a JSON in ``areas`` or ``failed``."""
        top = self.root / part
        found = set()
        for folder, _, names in os.walk(top):
            prefix = os.path.relpath(folder, top)
            prefix = '' if prefix == '.' else prefix + os.sep
            found.update(prefix + name.removesuffix('.json') for name in names)
        return found

    def _read_areas(self, item: Input) -> list[dict]:
        return json.loads(self._path('areas', item, '.json').read_text())['areas']

    def _finish(self, item: Input, report: dict) -> None:
        self._path('failed', item, '.json').unlink(missing_ok=True)
        self._write_json(self._path('areas', item, '.json'), dict(input=item.name, **report))

    def _path(self, part: str, item: Input, suffix: str) -> Path:
        return self.root / part / (item.key + suffix)

    def _writing(self, part: str, item: Input, suffix: str) -> contextlib.AbstractContextManager[Path]:
        return self._atomic_write(self._path(part, item, suffix))

    def _atomic_write(self, path: Path) -> contextlib.AbstractContextManager[Path]:
        make_folder(self.staging)
        return atomic_write(path, self.staging)

    def _write_json(self, path: Path, content: dict) -> None:
        with self._atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


def check_same_run(root: str | Path, before: dict, now: dict) -> None:
    """Make sure that outputs that are there, and those to come, are made alike.

    Raises:
        UserError: they are not.
    """
    different = [key for key in {**now, **before} if now.get(key) != before.get(key)]
    if different:
        changes = '\n'.join(f'  {key}: {before.get(key)}, now {now.get(key)}' for key in different)
        raise UserError(
            f'{root} contains outputs produced with different settings:\n{changes}\n  Choose another folder: --out-dir.'
        )


def add_up(inputs: int, areas: Iterable[list[dict]], failed: dict[str, str], classes: Sequence[str]) -> dict:
    """Return all inputs together.

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
