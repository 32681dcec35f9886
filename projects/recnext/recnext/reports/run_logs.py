"""What a run has written, read back: curves, environment, config, evaluation; of mmengine's runs and of mmseg 0.x."""

import contextlib
import json
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.errors import UserError
from ..utils.evaluation import RECORD, Evaluation, read_evaluation

PERCENT = ('mIoU', 'aAcc', 'mAcc')
"""Means that mmengine logs in per cent, and mmseg 0.x as parts of one."""

CURVES = ('loss', 'lr', *PERCENT, 'accuracy/top1', 'accuracy/top5')
"""What is read of a log, by mmengine's names."""

LOG_START = 1 << 18
"""Bytes of a text log in which the environment stands."""


class Curve(NamedTuple):
    """Values over the iterations of a run.

    Args:
        iterations: (N,), ascending.
        values: (N,); not all of them need be finite.
    """

    iterations: np.ndarray
    values: np.ndarray


class ClassFigures(NamedTuple):
    """Of one class.

    Args:
        iou: 0 to 1, or not a number.
        accuracy: 0 to 1, or not a number.
        share: Of all pixels, 0 to 1; None where it is not known.
    """

    iou: float
    accuracy: float
    share: float | None


@dataclass
class Run:
    """All that is known of a run.

    Args:
        path: Its work dir, or its log.
        curves: By the names of :data:`CURVES`; those that were logged.
        classes: By name; empty where there is neither a record of an evaluation nor a 0.x log.
        classes_of: Where they come from, in words.
        evaluation: The newest that was recorded.
        environment: By name.
        config: As Python.
        notes: What could not be read.
    """

    path: Path
    curves: dict[str, Curve]
    classes: dict[str, ClassFigures] = field(default_factory=dict)
    classes_of: str = ''
    evaluation: Evaluation | None = None
    environment: dict[str, str] = field(default_factory=dict)
    config: str = ''
    notes: list[str] = field(default_factory=list)


class Scalars:
    """The lines of one JSON log, of one start of a run.

    Args:
        path: ``scalars.json`` of mmengine, or ``*.log.json`` of mmseg 0.x.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict = {}
        self.class_line: dict = {}
        self.unreadable = 0
        columns = defaultdict(lambda: (array('d'), array('d')))
        for iteration, line in self._lines():
            legacy = 'mode' in line
            if legacy and 'mIoU' in line:
                self.class_line = line
            for name in CURVES:
                value = line.get(name)
                # 0.x repeats the learning rate in the lines of its validations.
                if _is_number(value) and not (legacy and name == 'lr' and line['mode'] != 'train'):
                    iterations, values = columns[name]
                    iterations.append(iteration)
                    values.append(100 * value if legacy and name in PERCENT else value)
        self.curves = {name: _ascending(*column) for name, column in columns.items()}

    @property
    def start(self) -> float:
        """The first iteration that was logged; infinite if none was."""
        return min((curve.iterations[0] for curve in self.curves.values()), default=math.inf)

    def _lines(self) -> Iterator[tuple[int, dict]]:
        """The lines that can be read, with their iterations.

        A line of training says its iteration. One of validation says it too, or else an epoch (mmengine) or the
        number of images (0.x): then the last line of training before it counts.
        """
        reached = 0
        try:
            file = self.path.open(encoding='utf-8', errors='replace')
        except OSError as error:
            raise UserError(f'{self.path} cannot be read: {error.strerror}') from None
        with file:
            for text in file:
                line = _parse(text)
                if 'env_info' in line or 'exp_name' in line:
                    self.meta = line
                    continue
                step = line.get('iter' if line.get('mode') == 'train' else 'step', reached)
                if not line or not isinstance(step, int) or not _is_number(step):
                    self.unreadable += bool(text.strip())
                    continue
                reached = max(reached, step) if 'loss' in line else reached
                yield max(reached, step), line


def _parse(text: str) -> dict:
    """A line of a log; empty if it is something else."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _is_number(value: object) -> bool:
    """Whether it is one that fits in a double; JSON knows larger ones."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**53)


def _ascending(iterations: array, values: array) -> Curve:
    """A curve of what was logged; of several values at an iteration the last."""
    iterations, values = np.array(iterations, np.int64), np.array(values)
    order = np.argsort(iterations, kind='stable')
    iterations, values = iterations[order], values[order]
    last = np.append(iterations[1:] != iterations[:-1], True)
    return Curve(iterations[last], values[last])


def read_run(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: A work dir, of mmengine or mmseg 0.x, or a JSON log.

    Raises:
        UserError: there is nothing of a run.
    """
    path = Path(path)
    if path.is_file():
        logs, starts = [path], []
    elif path.is_dir():
        logs = sorted([*path.glob('*/vis_data/scalars.json'), *path.glob('*.log.json')], key=_when_started(path))
        starts = sorted({file.parent for pattern in (f'*/{RECORD}', '*/*.log') for file in path.glob(pattern)})
    else:
        raise UserError(f'No such work dir: {path}')
    scalars = [Scalars(log) for log in logs]
    run = Run(path, join_curves(scalars))
    for log in scalars:
        if log.unreadable:
            lines = 'line' if log.unreadable == 1 else 'lines'
            run.notes.append(f'{log.unreadable} {lines} of {log.path} cannot be read: cut off when the run was killed?')
    for log in reversed(scalars):
        if log.meta or log.class_line:
            _take_legacy(run, log)
            break
    _take_records(run, starts)
    trained = [log.path.parents[1] for log in scalars if log.path.name == 'scalars.json' and log.curves]
    _take_surroundings(run, trained or starts)
    if not run.curves and not run.classes:
        raise UserError(_nothing_in(path))
    return run


def _when_started(work_dir: Path) -> Callable[[Path], str]:
    """The time in the name of a log or of the folder that it is in, the first part below the work dir."""
    return lambda log: log.relative_to(work_dir).parts[0]


def _nothing_in(path: Path) -> str:
    if path.is_file():
        return f'{path} has no line of a training log. Expected the JSON log of mmseg 0.x, or scalars.json of mmengine.'
    names = sorted(entry.name for entry in path.iterdir())
    found = ', '.join(names[:8]) + (' ...' if len(names) > 8 else '') if names else 'nothing'
    return (
        f'{path} is no work dir of a run: found {found}.\n'
        '  Expected what tools/train.py or tools/test.py write with --work-dir: a folder named after the time, with '
        f'vis_data/scalars.json or {RECORD} in it; or *.log.json of mmseg 0.x.'
    )


def join_curves(scalars: list[Scalars]) -> dict[str, Curve]:
    """One curve of each kind, from the logs of a run that was started several times.

    A run that is resumed goes on from a checkpoint, before the end of its last log. From there on the later log
    counts, and what the earlier one has is of a branch that was given up.

    Args:
        scalars: The earliest first.
    """
    joined: dict[str, Curve] = {}
    for log in scalars:
        for name, curve in joined.items():
            kept = curve.iterations < log.start
            joined[name] = Curve(curve.iterations[kept], curve.values[kept])
        for name, curve in log.curves.items():
            before = joined.get(name, Curve(np.empty(0, np.int64), np.empty(0)))
            joined[name] = Curve(*map(np.concatenate, zip(before, curve)))
    return {name: curve for name, curve in joined.items() if len(curve.iterations)}


def _take_legacy(run: Run, log: Scalars) -> None:
    """What 0.x writes into its JSON log: environment and config first, then the figures of the classes."""
    run.environment = parse_environment(str(log.meta.get('env_info', '')))
    if 'seed' in log.meta:
        run.environment['seed'] = str(log.meta['seed'])
    run.config = str(log.meta.get('config', ''))
    figures = {key: value for key, value in log.class_line.items() if _is_number(value)}
    for key, iou in figures.items():
        if key.startswith('IoU.'):
            name = key.removeprefix('IoU.')
            run.classes[name.strip()] = ClassFigures(iou, figures.get(f'Acc.{name}', math.nan), None)
    if run.classes:
        run.classes_of = f'the last validation in {log.path.name}'


def _take_records(run: Run, starts: list[Path]) -> None:
    """The newest record of an evaluation."""
    for folder in reversed(starts):
        if (folder / RECORD).exists():
            try:
                run.evaluation = read_evaluation(folder / RECORD)
            except UserError as error:
                run.notes.append(str(error))
                continue
            rows = zip(run.evaluation.classes, run.evaluation.iou, run.evaluation.accuracy, run.evaluation.share)
            run.classes = {name.strip(): ClassFigures(*map(float, figures)) for name, *figures in rows}
            run.classes_of = f'{run.evaluation.of}, {run.evaluation.images} images'
            return


def _take_surroundings(run: Run, starts: list[Path]) -> None:
    """Environment and config of the newest start."""
    for folder in reversed(starts):
        for log in sorted(folder.glob('*.log')):
            with contextlib.suppress(OSError), log.open('rb') as file:
                text = file.read(LOG_START).decode(errors='replace')
                run.environment = run.environment or parse_environment(text.partition(' - Config:')[0])
        with contextlib.suppress(OSError):
            run.config = run.config or (folder / 'vis_data' / 'config.py').read_text(errors='replace')


def parse_environment(text: str) -> dict[str, str]:
    """Names and values of mmengine's or 0.x's description of the environment, without how PyTorch was compiled."""
    # Bullets are PyTorch's compiling details; a time begins a line of the log itself.
    rows = re.findall(r'^ *(?!\d{4}/|-)([A-Za-z][\w ,./-]*?): (\S.*)$', text, re.MULTILINE)
    return {name: value.strip() for name, value in rows if name != 'PyTorch compiling details'}
