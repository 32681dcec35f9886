"""The whole check of the datasets of a config, and what it shows: a table, a plot of the classes, sheets of samples."""

import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import torch
from mmengine.config import Config

from ..utils.errors import UserError, printable
from ..utils.files import atomic_write, make_folder
from ..utils.parallel import completed
from ..utils.progress import image_progress
from .builder import build_on_meta
from .config import SPLITS, is_segmentor, load_config, point_at_data, set_work_dir
from .config_check import check_keys
from .dataset_pictures import Checked, count_labels, draw_classes, write_sheet
from .dataset_rules import (
    build_preprocessor,
    check_batch,
    check_leaks,
    check_together,
    choose_strange,
    prepare_samples,
)
from .listing import Listing, leaves, list_samples
from .sample_rules import ERROR, KINDS, LEVELS, WARNING, Finding, Sample, SampleRules

EXAMPLES = 3
"""Findings of a sort that are printed; the JSON file has all."""


def check_dataset(
    config: str,
    splits: Sequence[str] | None = None,
    work_dir: str | None = None,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict:
    """Look at every file of the datasets of a config; see ``recnext check-dataset --help``.

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
    segmentation, num_classes = is_segmentor(cfg), build_on_meta(cfg.model).num_classes
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
        pictures += write_sheet(listing, samples, preprocessor, out)
    if any(listing.classes for listing, _ in checked):
        pictures.append(out / 'check_dataset_classes.png')
        with atomic_write(pictures[-1]) as beside:
            draw_classes(checked, beside)
    report = _as_json(config, checked, findings, seconds)
    with atomic_write(out / 'check_dataset.json') as beside:
        beside.write_text(json.dumps(report, indent=1))
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
    # A new interpreter would first import everything again; but only Linux forks safely once torch is loaded.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
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
    prepared, findings = prepare_samples(listing, choose_strange(samples), preprocessor)
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
    pixels, images = count_labels(samples)
    return [
        dict(name=name.strip(), pixels=pixels[index], images=images[index])
        for index, name in enumerate(listing.classes)
    ]


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
