"""One page about one run or several: curves, classes, confusion, images, environment and config, in a single HTML file.

The page is made from :mod:`report.html`, with everything in it: it asks for nothing, neither a server nor a network.
The first run is what the page is about; the others are what it is compared with.
"""

import base64
import difflib
import itertools
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import cv2
import jinja2
import numpy as np
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import DiffLexer, PythonLexer

from ..checkpoints.files import find_newest_checkpoint
from ..drawing.overlay import paint
from ..utils.errors import UserError
from ..utils.evaluation import Evaluation, Example
from ..utils.files import atomic_write
from ..utils.images import read_image
from ..utils.paths import command
from .run_logs import CURVES, ClassFigures, Curve, Run, read_run

COLOURS = ('#1c6dd0', '#e4572e', '#2a9d4b', '#8e44ad', '#0f8b8d', '#c9184a', '#b8860b', '#5c6770')
"""Of the runs; from the ninth on they begin again, with dashes."""

CHARTS = {
    'loss': 'Loss',
    'lr': 'Learning rate',
    'mIoU': 'mIoU in validation, %',
    'accuracy/top1': 'Top-1 in validation, %',
}
"""The curves that are drawn, with their titles."""

POINTS = 1000
"""The most points of a curve that are drawn."""

WORST_CLASSES = 10
"""Of how many classes the confusion is shown."""

SEGMENTS, LEAST_SHARE = 4, 0.01
"""Of a class the most others it is confused with, and the least share of its pixels."""

PANEL_SIDE = 448
"""The longest side of the pictures in the page, in pixels."""

JPEG_QUALITIES, PICTURE_BYTES = (82, 60, 35), 60_000
"""The first of them at which a picture takes no more than this; the last for what is all noise."""

DIFF_LINES = 60
"""Up to so many lines a difference of configs is shown from the start."""


def write_report(work_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one run or several.

    Args:
        work_dirs: Work dirs, of mmengine or mmseg 0.x, or JSON logs. The first is compared with each of the others.
        out: The file to write; ``report.html`` in the first work dir if None.

    Returns:
        The file.

    Raises:
        UserError: a work dir has nothing of a run, one is named twice, or the file cannot be written.
    """
    paths = [Path(path) for path in work_dirs]
    names = short_names(paths)
    runs = [read_run(path) for path in paths]
    if out is None:
        out = (paths[0] if paths[0].is_dir() else paths[0].parent) / 'report.html'
    out = Path(out)
    if out.is_dir():
        raise UserError(f'{out} is a folder; expected the name of a file to write.')
    page = render(names, runs)
    with atomic_write(out) as beside:
        beside.write_text(page, encoding='utf-8')
    return out


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart; of a log its folder at least.

    Raises:
        UserError: one is there twice.
    """
    parts = [path.resolve().parts for path in paths]
    twice = next((path for path, part in zip(paths, parts) if parts.count(part) > 1), None)
    if twice is not None:
        raise UserError(f'{twice} is named twice; expected different runs to compare.')
    least = [2 if path.is_file() else 1 for path in paths]
    for more in itertools.count():
        names = ['/'.join(part[-number - more :]) for part, number in zip(parts, least)]
        if len(set(names)) == len(names):
            return names


def render(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The page as HTML; what comes from files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, percent=_percent, change=_change, data=_data)
    subject = next((index for index, run in enumerate(runs) if run.classes), None)
    pictured = next((index for index, run in enumerate(runs) if run.evaluation), None)
    evaluation = None if pictured is None else runs[pictured].evaluation
    return environment.get_template('report.html').render(
        made=datetime.now().strftime('%Y-%m-%d %H:%M'),
        runs=[_describe(index, name, run) for index, (name, run) in enumerate(zip(names, runs))],
        metrics=[name for name in CURVES[2:] if any(name in run.curves for run in runs)],
        charts={key: title for key, title in CHARTS.items() if any(key in run.curves for run in runs)},
        curves=[{key: _points(run.curves[key]) for key in CHARTS if key in run.curves} for run in runs],
        points=POINTS,
        subject=subject,
        compared=[] if subject is None else [i for i, run in enumerate(runs) if run.classes and i != subject],
        classes=[] if subject is None else list_classes(runs, subject),
        pictured=pictured,
        confusions=[] if evaluation is None else list_confusions(evaluation),
        groups=[] if evaluation is None else _picture_groups(evaluation),
        settings=_list_environment(runs),
        configs=_compare_configs(names, runs),
        code_style=Markup(HtmlFormatter(style='default').get_style_defs('.code')),
    )


def _describe(index: int, name: str, run: Run) -> dict:
    """A run as the page's summary has it."""
    metrics = {}
    for key in CURVES[2:]:
        if key in run.curves and np.isfinite(run.curves[key].values).any():
            curve = run.curves[key]
            best = int(np.nanargmax(np.where(np.isfinite(curve.values), curve.values, np.nan)))
            metrics[key] = dict(best=float(curve.values[best]), at=int(curve.iterations[best]), last=curve.values[-1])
    loss = run.curves.get('loss')
    return dict(
        name=name,
        path=str(run.path),
        colour=COLOURS[index % len(COLOURS)],
        dashed=index >= len(COLOURS),
        iterations=max((int(curve.iterations[-1]) for curve in run.curves.values()), default=None),
        loss=None if loss is None else float(loss.values[-1]),
        metrics=metrics,
        validations=_list_validations(run),
        evaluated=None if run.evaluation is None else run.evaluation.means,
        classes_of=run.classes_of,
        notes=[*run.notes, *_list_gaps(run)],
        command=None if run.evaluation else _testing_command(run),
    )


def _list_validations(run: Run) -> list[tuple[int, dict[str, float]]]:
    """What every validation measured, by iteration."""
    rows: dict[int, dict[str, float]] = {}
    for key in CURVES[2:]:
        for iteration, value in zip(*run.curves.get(key, ((), ()))):
            rows.setdefault(int(iteration), {})[key] = float(value)
    return sorted(rows.items())


def _list_gaps(run: Run) -> list[str]:
    """Where the loss was not finite."""
    loss = run.curves.get('loss')
    wrong = [] if loss is None else loss.iterations[~np.isfinite(loss.values)]
    if not len(wrong):
        return []
    times = 'once' if len(wrong) == 1 else f'{len(wrong)} times'
    return [f'The loss was not a finite number {times}, first at iteration {wrong[0]}; such points are not drawn.']


def _testing_command(run: Run) -> str:
    """What to run for a record of the run's evaluation; its parts as far as the work dir tells them."""
    folder = run.path if run.path.is_dir() else run.path.parent
    configs = list(folder.glob('*.py'))
    config = str(configs[0]) if len(configs) == 1 else 'CONFIG'
    checkpoint = find_newest_checkpoint(folder) or 'CHECKPOINT'
    return command('test', config, checkpoint, '--work-dir', str(folder))


def thin_out(curve: Curve, most: int = POINTS) -> Curve:
    """At most so many points that look like the whole curve: the least and greatest of each stretch, and its ends."""
    if len(curve.values) <= most:
        return curve
    finite = np.isfinite(curve.values)
    low, high = np.where(finite, curve.values, np.inf), np.where(finite, curve.values, -np.inf)
    edges = np.linspace(0, len(curve.values), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(curve.values) - 1}
    for first, end in itertools.pairwise(edges):
        chosen |= {first + int(low[first:end].argmin()), first + int(high[first:end].argmax())}
    places = sorted(chosen)
    return Curve(curve.iterations[places], curve.values[places])


def _points(curve: Curve) -> dict[str, list]:
    """Of a curve as the page's script takes it; None for what is missing or not finite."""
    thin = thin_out(curve)
    values = [value if math.isfinite(value) else None for value in thin.values.tolist()]
    return dict(iterations=thin.iterations.tolist(), values=values)


def list_classes(runs: Sequence[Run], subject: int) -> list[dict]:
    """The classes of one run, the best first, with what other runs have for those of the same names."""
    run = runs[subject]
    others = [other.classes for index, other in enumerate(runs) if other.classes and index != subject]
    colours = _colours_by_name(run.evaluation)
    unknown = ClassFigures(math.nan, math.nan, None)
    rows = [
        dict(
            name=name,
            colour=colours.get(name),
            figures=figures,
            others=[
                dict(iou=classes.get(name, unknown).iou, change=figures.iou - classes.get(name, unknown).iou)
                for classes in others
            ],
        )
        for name, figures in run.classes.items()
    ]
    return sorted(rows, key=lambda row: math.inf if math.isnan(row['figures'].iou) else -row['figures'].iou)


def _colours_by_name(evaluation: Evaluation | None) -> dict[str, str]:
    if evaluation is None:
        return {}
    return {name.strip(): _css(colour) for name, colour in zip(evaluation.classes, evaluation.palette)}


def _css(colour: Sequence[int]) -> str:
    return '#{:02x}{:02x}{:02x}'.format(*(value & 255 for value in colour))


def list_confusions(evaluation: Evaluation) -> list[dict]:
    """The classes with the lowest IoU among those in the truth: what their pixels were taken for, and the reverse."""
    iou, confusion = evaluation.iou, evaluation.confusion
    there = [label for label in np.argsort(iou, kind='stable') if confusion[label].any()]
    return [
        dict(
            name=evaluation.classes[label].strip(),
            colour=_css(evaluation.palette[label]),
            iou=float(iou[label]),
            pixels=int(confusion[label].sum()),
            predicted_pixels=int(confusion[:, label].sum()),
            taken_for=_segments(evaluation, confusion[label], label),
            taken_from=_segments(evaluation, confusion[:, label], label),
        )
        for label in there[:WORST_CLASSES]
    ]


def _segments(evaluation: Evaluation, pixels: np.ndarray, right: int) -> list[dict]:
    """The largest shares of some pixels by their labels: what is right first, all the small ones together last."""
    shares = pixels / max(pixels.sum(), 1)
    largest = [label for label in np.argsort(-shares, kind='stable') if shares[label] >= LEAST_SHARE and label != right]
    segments = [
        dict(
            name=evaluation.classes[label].strip() if label < len(evaluation.classes) else 'no class',
            colour=_css(evaluation.palette[label]) if label < len(evaluation.classes) else '#ffffff',
            share=float(shares[label]),
            right=label == right,
        )
        for label in [right, *largest[:SEGMENTS]]
    ]
    rest = float(shares.sum()) - sum(segment['share'] for segment in segments)
    if rest > LEAST_SHARE / 2:
        segments.append(dict(name='others', colour='#d7dce1', share=rest, right=False))
    return segments


def _picture_groups(evaluation: Evaluation) -> list[tuple[str, list[dict]]]:
    groups = (('Worst images', evaluation.worst), ('Best images', evaluation.best))
    return [(title, [_picture(evaluation, example) for example in group]) for title, group in groups if group]


def _picture(evaluation: Evaluation, example: Example) -> dict:
    """Image, truth and prediction of an example as pictures, or in words why not."""
    shown = dict(name=Path(example.path).name, path=example.path, iou=example.iou)
    try:
        maps = example.label_maps()
        panels = draw_comparison(read_image(example.path)[..., ::-1], *maps, np.array(evaluation.palette, np.uint8))
    except UserError as error:
        return dict(shown, missing=str(error))
    names = ('image', 'truth', 'prediction')
    present = sorted(set(np.unique(maps[0])) | set(np.unique(maps[1])))
    legend = [
        (evaluation.classes[label].strip(), _css(evaluation.palette[label]))
        for label in present
        if label < len(evaluation.classes)
    ]
    return dict(shown, missing=None, panels=list(zip(names, map(_data_uri, panels))), legend=legend)


def draw_comparison(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, palette: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The image alone, and under the colours of truth and prediction.

    Args:
        image: (H, W, 3), BGR, uint8.
        truth: (h, w), class of every pixel; what is no class is left as it is.
        prediction: (h, w), class of every pixel.
        palette: (classes, 3), RGB, uint8.

    Returns:
        BGR, uint8, at most 448 pixels wide and high.

    Raises:
        UserError: the image has another shape than the maps.
    """
    height, width = truth.shape
    if abs(image.shape[0] * width - image.shape[1] * height) > 2 * max(image.shape) or prediction.shape != truth.shape:
        raise UserError('The image has another shape than its annotation: it is not the one that was evaluated.')
    factor = min(1, PANEL_SIDE / max(truth.shape))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(palette[:, ::-1])
    maps = (cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST) for labels in (truth, prediction))
    return image, *(paint(image, labels, bgr) for labels in maps)


def _data_uri(picture: np.ndarray) -> str:
    for quality in JPEG_QUALITIES:
        content = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(content) <= PICTURE_BYTES:
            break
    return 'data:image/jpeg;base64,' + base64.b64encode(content).decode()


def _list_environment(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Name, value for each run, and whether these differ."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    rows = [(name, [run.environment.get(name, '') for run in runs]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def _compare_configs(names: Sequence[str], runs: Sequence[Run]) -> list[dict]:
    """The config of every run, and how that of the first differs from it."""
    compared = []
    for name, run in zip(names, runs):
        lines = list(
            difflib.unified_diff(run.config.splitlines(), runs[0].config.splitlines(), name, names[0], lineterm='', n=2)
        )
        compared.append(
            dict(
                text=_highlighted(run.config, PythonLexer()),
                lines=run.config.count('\n') + 1 if run.config else 0,
                difference=_highlighted('\n'.join(lines), DiffLexer()) if run.config and runs[0].config else None,
                changed=sum(line[0] in '+-' for line in lines[2:]),
                short=len(lines) <= DIFF_LINES,
            )
        )
    return compared


def _highlighted(text: str, lexer: Lexer) -> Markup:
    return Markup(highlight(text, lexer, HtmlFormatter(nowrap=True))) if text else Markup('')


def _figure(value: float | None) -> str:
    """A loss, a learning rate or an accuracy to read."""
    if value is None:
        return '–'
    if not math.isfinite(value):
        return str(float(value))
    return f'{value:.4g}' if abs(value) < 10 else f'{value:.2f}'


def _percent(value: float) -> str:
    """A share in per cent, without the sign."""
    return '–' if math.isnan(value) else f'{100 * value:.2f}'


def _change(value: float) -> str:
    """A difference of shares in points."""
    shown = f'{100 * value:+.2f}'
    return '–' if math.isnan(value) else shown if float(shown) else '0.00'


def _data(value: float) -> str:
    """A number for the page's script; nothing for one that is missing or not finite."""
    return '' if value is None or not math.isfinite(value) else repr(float(value))
