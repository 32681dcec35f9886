"""The whole check of the datasets of a config, and what it shows: a table, a plot of the classes, sheets of samples."""

import functools
import json
import multiprocessing
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config

from .ahead import completed
from .checkpoint import write_atomically
from .config_check import check_keys
from .dataset_check import (
    Listing,
    Prepared,
    build_preprocessor,
    check_batch,
    check_leaks,
    check_together,
    choose_strange,
    leaves,
    list_samples,
    prepare,
    spread,
)
from .dataset_rules import ERROR, IGNORED, KINDS, LEVELS, WARNING, Finding, Sample, SampleRules
from .errors import UserError, printable
from .launch import SPLITS, is_segmentor, load_config, point_at_data, set_work_dir
from .models import build_skeleton
from .overlay import mix
from .progress import image_progress
from .writing import make_folder

EXAMPLES = 3
"""Findings of a sort that are printed; the JSON file has all."""

ON_SHEET = 12
"""Samples on the sheet of each dataset."""

COLUMNS = 3
COLOURS = ('#2b6cb0', '#dd6b20', '#718096')

Checked = list[tuple[Listing, list[Sample]]]


def check_dataset(
    config: str,
    splits: Sequence[str] | None = None,
    work_dir: str | None = None,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict:
    """Look at every file of the datasets of a config; see ``python tools/check_dataset.py --help``.

    Args:
        config: Path of the config.
        splits: Which to check, of ``'train'``, ``'val'`` and ``'test'``; all that the config has if None.
        work_dir: Where the results go; ``work_dirs/<config>`` if None.
        data_root: Of the datasets, in place of the config's.
        cfg_options: Merged into the config.

    Returns:
        What was found, as in ``check_dataset.json``.

    Raises:
        UserError: the config has no such split; or, in the end, that training would go wrong.
    """
    cfg = load_config(config, cfg_options)
    check_keys(cfg)
    set_work_dir(cfg, config, work_dir)
    segmentation, num_classes = is_segmentor(cfg), build_skeleton(cfg.model).num_classes
    listings = [
        list_samples(dataset, split, num_classes, segmentation) for split, dataset in _datasets(cfg, splits, data_root)
    ]
    make_folder(cfg.work_dir)
    began = time.monotonic()
    checked = _read_all(listings, num_classes, segmentation)
    seconds = time.monotonic() - began
    findings = [(listing, finding) for listing, samples in checked for finding in _found_in(listing, samples)]
    findings += [(_named(checked, finding), finding) for finding in check_leaks(checked)]
    preprocessor = build_preprocessor(cfg, segmentation)
    out = Path(cfg.work_dir)
    pictures = []
    for listing, samples in checked:
        findings += [(listing, finding) for finding in _try_preparing(cfg, listing, samples, preprocessor)]
        pictures += _write_sheet(listing, samples, preprocessor, out)
    if any(listing.classes for listing, _ in checked):
        pictures.append(out / 'check_dataset_classes.png')
        write_atomically(pictures[-1], lambda file: draw_classes(checked, file))
    report = _as_json(config, checked, findings, seconds)
    write_atomically(out / 'check_dataset.json', lambda file: file.write(json.dumps(report, indent=1).encode()))
    _show(report, [out / 'check_dataset.json', *pictures])
    return report


def _datasets(cfg: Config, splits: Sequence[str] | None, data_root: str | None) -> list[tuple[str, dict]]:
    """The datasets to check with the names of their splits; one that several splits share comes once.

    Raises:
        UserError: a split that the config lacks.
    """
    has = [split for split in SPLITS if cfg.get(f'{split}_dataloader')]
    lacks = [split for split in splits or () if split not in has]
    if lacks or not has:
        raise UserError(
            f'The config has no {lacks[0] if lacks else "train"}_dataloader; it has {", ".join(has) or "none"}.'
        )
    found = []
    for split in splits or has:
        for dataset in leaves(cfg[f'{split}_dataloader'].dataset):
            point_at_data(dataset, data_root)
            if all(dataset != other for _, other in found):
                found.append((split, dataset))
    return found


def _read_all(listings: Sequence[Listing], num_classes: int, segmentation: bool) -> Checked:
    """Look at every sample, in as many processes as there are cores.

    Raises:
        UserError: a process was ended from outside, as for want of memory.
    """
    checked: Checked = [(listing, []) for listing in listings]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    # As mmengine's configs start the workers of dataloaders; a new interpreter would first import everything again.
    context = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else None)
    total = sum(len(listing.samples) for listing in listings)
    with (
        ProcessPoolExecutor(workers, context, initializer=_quieten) as pool,
        image_progress('Checking', total, quiet=not total) as advance,
    ):
        for listing, samples in checked:
            rules = SampleRules(listing.dataset, num_classes, segmentation)
            for info, looking in completed(pool, rules, listing.samples, 4 * workers):
                try:
                    samples.append(looking.result())
                except BrokenProcessPool:
                    raise UserError(
                        'A process that looked at images was ended, perhaps for want of memory; among those in work '
                        f'was {printable(info["img_path"])}'
                    ) from None
                advance(1, 1)
            samples.sort(key=lambda sample: sample.info['img_path'])
    return checked


def _quieten() -> None:
    """One thread a process, and no word of OpenCV's about files whose failure is reported."""
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def _found_in(listing: Listing, samples: Sequence[Sample]) -> Iterable[Finding]:
    yield from listing.findings
    for sample in samples:
        yield from sample.findings
    yield from check_together(listing, samples)


def _named(checked: Checked, finding: Finding) -> Listing:
    """The dataset that a file is of."""
    return next(
        listing
        for listing, samples in checked
        if listing.split != 'train' and any(sample.info['img_path'] == finding.path for sample in samples)
    )


def _try_preparing(
    cfg: Config, listing: Listing, samples: Sequence[Sample], preprocessor: torch.nn.Module
) -> Iterable[Finding]:
    """What the strangest of the images do to the pipeline, and in training to a batch."""
    prepared, findings = prepare(listing, choose_strange(samples), preprocessor)
    yield from findings
    if listing.split == 'train' and cfg.train_dataloader.get('batch_size', 1) > 1:
        yield from check_batch(listing, prepared, preprocessor)


def _as_json(config: str, checked: Checked, findings: Sequence[tuple[Listing, Finding]], seconds: float) -> dict:
    images = sum(len(samples) for _, samples in checked)
    order = {kind: index for index, kind in enumerate(KINDS)}
    return dict(
        config=str(config),
        images=images,
        seconds=round(seconds, 2),
        images_per_second=round(images / seconds, 1),
        datasets=[
            dict(split=listing.split, folder=listing.folder, images=len(samples), classes=_class_rows(listing, samples))
            for listing, samples in checked
        ],
        findings=[
            dict(
                level=finding.level, kind=finding.kind, split=listing.split, path=finding.path, message=finding.message
            )
            for listing, finding in sorted(findings, key=lambda pair: order[pair[1].kind])
        ],
    )


def _class_rows(listing: Listing, samples: Sequence[Sample]) -> list[dict]:
    pixels, images = _count(samples)
    return [
        dict(name=name.strip(), pixels=pixels[index], images=images[index])
        for index, name in enumerate(listing.classes)
    ]


def _count(samples: Sequence[Sample]) -> tuple[Counter, Counter]:
    """Pixels and images of each label."""
    pixels, images = Counter(), Counter()
    for sample in samples:
        pixels.update(sample.counts)
        images.update(sample.counts.keys())
    return pixels, images


def _show(report: dict, files: Sequence[Path]) -> None:
    """Print the findings by sort, with the first of each.

    Raises:
        UserError: there are errors.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    groups = defaultdict(list)
    for finding in report['findings']:
        groups[finding['kind'], finding['split']].append(finding)
    table = Table('', 'found', 'set', 'number')
    for (kind, split), found in groups.items():
        colour = dict(zip(LEVELS, ('red', 'yellow', 'dim')))[found[0]['level']]
        table.add_row(Text(found[0]['level'], colour), KINDS[kind].title, split, str(len(found)))
    if groups:
        Console().print(table)
    for (kind, split), found in groups.items():
        print(f'{found[0]["level"]}, {split}: {KINDS[kind].title}')
        for finding in found[:EXAMPLES]:
            print(f'  {finding["message"]}')
        if len(found) > EXAMPLES:
            print(f'  and {len(found) - EXAMPLES} more')
    for dataset in report['datasets']:
        seen = sum(row['images'] > 0 for row in dataset['classes'])
        print(f'{dataset["split"]}: {dataset["images"]} images, {seen} of {len(dataset["classes"])} classes occur')
    print(f'{report["images"]} images in {report["seconds"]:.1f} s, {report["images_per_second"]:.0f} images/s')
    print('Written: ' + ', '.join(map(str, files)))
    errors, warnings = (sum(finding['level'] == level for finding in report['findings']) for level in (ERROR, WARNING))
    if errors:
        raise UserError(
            f'Training or testing would go wrong: {_number(errors, ERROR)}, {_number(warnings, WARNING)}. '
            f'All are in {files[0]}'
        )
    print(f'No errors, {_number(warnings, WARNING)}.')


def _number(count: int, word: str) -> str:
    return f'{count} {word}' if count == 1 else f'{count} {word}s'


def draw_classes(checked: Checked, file: object) -> None:
    """Bars of the classes that occur, the most frequent first: share of the pixels, and of the images; a PNG."""
    from matplotlib.figure import Figure

    known = [(listing, samples) for listing, samples in checked if listing.classes]
    names = max((listing.classes for listing, _ in known), key=len)
    tables = []
    for listing, samples in known:
        pixels, images = _count(samples)
        total = sum(count for label, count in pixels.items() if label != IGNORED) or 1
        tables.append((listing, [(pixels[i] / total, images[i] / max(len(samples), 1)) for i in range(len(names))]))
    occurring = [index for index in range(len(names)) if any(rows[index][1] for _, rows in tables)]
    order = sorted(occurring, key=lambda index: tables[0][1][index])
    panels = (0, 1) if known[0][0].segmentation else (0,)
    thickness = 0.8 / len(tables)
    figure = Figure(figsize=(6 * len(panels) + 1, 1.4 + 0.22 * max(len(order), 4)), layout='constrained')
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]):
        for place, (listing, rows) in enumerate(tables):
            heights = np.arange(len(order)) + 0.4 - (place + 0.5) * thickness
            shares = [100 * rows[index][panel] for index in order]
            colour = COLOURS[place % len(COLOURS)]
            axes.barh(
                heights, shares, thickness, color=colour, label=f'{listing.split} ({len(listing.samples)} images)'
            )
        axes.set_yticks(range(len(order)), [names[index].strip()[:28] for index in order], fontsize=8)
        for label, index in zip(axes.get_yticklabels(), order):
            label.set_color('black' if all(rows[index][1] for _, rows in tables) else 'red')
        axes.set_ylim(-0.6, len(order) - 0.4)
        what = '% of the pixels that count' if len(panels) > 1 else '% of the images'
        axes.set_xlabel('% of the images that it is in' if panel else what)
        if not panel and len(panels) > 1:
            axes.set_xscale('symlog', linthresh=0.1)
            axes.set_xticks([0, 0.1, 1, 10, 100], ['0', '0.1', '1', '10', '100'])
        axes.set_xlim(left=0)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), fontsize=8, frameon=False)
    figure.suptitle(f'{len(order)} of {len(names)} classes occur; those in red not in every set', fontsize=10)
    figure.savefig(file, dpi=90, format='png')


def _write_sheet(listing: Listing, samples: Sequence[Sample], preprocessor: torch.nn.Module, out: Path) -> list[Path]:
    """A picture of samples as the network gets them; none where there are none."""
    sound = [sample for sample in samples if sample.sound]
    prepared, _ = prepare(listing, [sound[index] for index in spread(len(sound), ON_SHEET)], preprocessor)
    cells = [_cell(listing, one, preprocessor) for one in prepared]
    if not cells:
        return []
    path = out / f'check_dataset_{listing.split}.png'
    write_atomically(path, functools.partial(_draw_sheet, listing, cells))
    return [path]


def _cell(listing: Listing, prepared: Prepared, preprocessor: torch.nn.Module) -> tuple[str, np.ndarray, set[int]]:
    """Caption, picture and labels of a sample: what leaves the preprocessor, with normalisation undone.

    With an annotation, the image stands beside the image under its classes; ignored pixels are left as they are.
    """
    sample, batch = prepared.sample, prepared.batch
    image = batch['inputs'][0]
    if getattr(preprocessor, '_enable_normalize', False):
        image = image * preprocessor.std + preprocessor.mean
    elif preprocessor.__dict__.get('channel_conversion') is False:
        image = image.flip(0)  # as loaded: BGR
    picture = image.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    name = Path(printable(sample.info['img_path'])).name
    if not listing.segmentation:
        label = int(sample.info['gt_label'])
        return f'{name}\n{listing.classes[label] if label < len(listing.classes) else label}', picture, set()
    if 'gt_sem_seg' not in batch['data_samples'][0]:
        return name, picture, set()
    labels = batch['data_samples'][0].gt_sem_seg.data[0].numpy()
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(listing.palette)] = listing.palette
    under = picture.copy()
    if labels.shape != picture.shape[:2]:  # in testing they keep their own size
        labels = cv2.resize(labels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    counts = labels != IGNORED
    mixed = mix(picture, palette[labels])
    under[counts] = mixed[counts]
    gap = np.full((picture.shape[0], max(2, picture.shape[1] // 40), 3), 255, np.uint8)
    return name, np.concatenate((picture, gap, under), axis=1), set(np.unique(labels).tolist()) - {IGNORED}


def _draw_sheet(listing: Listing, cells: Sequence[tuple[str, np.ndarray, set[int]]], file: object) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = COLUMNS if listing.segmentation else 2 * COLUMNS
    rows = -(-len(cells) // columns)
    ratio = max(picture.shape[0] / picture.shape[1] for _, picture, _ in cells)
    wide = 13 / columns
    legend = sorted({label for _, _, labels in cells for label in labels if label < len(listing.classes)})
    below = 0.25 * -(-len(legend) // 6) + 0.2
    height = rows * (wide * min(ratio, 2) + 0.3) + 0.5
    figure = Figure(figsize=(13, height + below), dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False)
    bottom, top = (below / (height + below), 1 - 0.55 / (height + below))
    figure.subplots_adjust(left=0.01, right=0.99, bottom=bottom, top=top, wspace=0.03, hspace=0.12)
    for axes in grid.flat:
        axes.axis('off')
    for axes, (caption, picture, _) in zip(grid.flat, cells):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=8, parse_math=False)
    figure.suptitle(f'The {listing.split} set as the network gets it', fontsize=11)
    if legend:
        patches = [Patch(color=np.array(listing.palette[i]) / 255, label=listing.classes[i].strip()) for i in legend]
        figure.legend(handles=patches, loc='lower center', ncols=6, fontsize=9, frameon=False)
    figure.savefig(file, format='png')
