"""Which samples a dataset has, and the cheap part of its check, before every run.

The whole check, of ``recnext check-dataset``, lists the samples as well and applies :mod:`sample_rules` to all of them;
the cheap part does so to a few, and stops at the first error.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from ..utils.errors import printable
from ..utils.images import IMAGE_SUFFIXES
from ..utils.paths import command
from .sample_rules import Finding, SampleRules, raise_first

LOOKED_AT = 20
"""How many samples of a dataset are read before a run: enough to see that they are made for other classes."""


def to_all() -> str:
    """Return how to see all that is wrong with a dataset."""
    return f'\n  To see all that is wrong: {command("check-dataset", "CONFIG")}'


@dataclass
class Listing:
    """The samples of a dataset, before any of them is read."""

    split: str
    dataset: dict
    segmentation: bool
    folder: str
    """Of the annotations, or of the images if they have none."""
    classes: list[str] = field(default_factory=list)
    palette: list[list[int]] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    """What the dataset knows of each whose files are there."""
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, path: object, message: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(kind, str(path), message))


def leaves(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inside = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
    for part in inside:
        yield from leaves(part)
    if not inside:
        yield dataset


def check_before_run(dataset: dict, split: str, num_classes: int, segmentation: bool) -> None:
    """The cheap part: every sample is there, and some of them can be trained on.

    Args:
        dataset: Config of one that is no wrapper.
        split: What it is called in messages.
        num_classes: Of the network.
        segmentation: Whether it is in mmseg's form, or in mmpretrain's.

    Raises:
        UserError: naming the folder, the file or the labels at fault.
    """
    listing = list_samples(dataset, split, num_classes, segmentation)
    raise_first(listing.findings)
    rules = SampleRules(dataset, num_classes, segmentation)
    for index in spread(len(listing.samples), LOOKED_AT):
        raise_first(rules(listing.samples[index]).findings, to_all())


def spread(total: int, number: int) -> list[int]:
    """At most ``number`` indices below ``total``, evenly spread."""
    return np.unique(np.linspace(0, total - 1, min(total, number)).astype(int)).tolist() if total else []


def list_samples(dataset: dict, split: str, num_classes: int, segmentation: bool) -> Listing:
    """List the samples of a dataset and see that it is laid out as its config says; arguments as above."""
    return (_list_pairs if segmentation else _list_folders)(dataset, split, num_classes)


def _list_pairs(dataset: dict, split: str, num_classes: int) -> Listing:
    """Images with annotations, in mmseg's form."""
    init_default_scope('mmseg')
    plan = DATASETS.build({**dataset, '_scope_': 'mmseg', 'pipeline': [], 'lazy_init': True})
    images, annotations = (plan.data_prefix.get(key) or '' for key in ('img_path', 'seg_map_path'))
    classes = list(plan.metainfo.get('classes') or ())
    listing = Listing(split, dataset, True, annotations, classes, list(map(list, plan.metainfo.get('palette') or ())))
    advice = '\n  Name the folder that holds images/ and annotations/ with --data-root.'
    for folder in (images, annotations):
        if folder and not os.path.isdir(folder):
            why = 'is no folder' if os.path.lexists(folder) else 'does not exist'
            listing.add('layout', folder, f'The {split} set is not at {printable(folder)}, which {why}.{advice}')
            return listing
    files = {folder: _files_in(folder, listing) for folder in {images, annotations}}
    if listing.findings:
        return listing  # mmseg would list the files of a loop many times over, or for ever
    try:
        plan.full_init()
        samples = [plan.get_data_info(index) for index in range(len(plan))]
    except (OSError, AssertionError) as error:  # the list of names cannot be read
        where = getattr(error, 'filename', None) or plan.ann_file
        listing.add('layout', where, f'The {split} set cannot be listed: {printable(where)}: {error}.{advice}')
        return listing
    except ValueError:  # numpy's, from mmengine: a list of nothing
        samples = []
    if not samples:
        where = f'nothing in {printable(images)} that the config looks for (names that end in {plan.img_suffix})'
        listing.add('layout', images, f'The {split} set has no images: {where}.{advice}')
    if len(classes) != num_classes:
        listing.add(
            'classes',
            annotations,
            f'The {split} set has {len(classes)} classes, the network {num_classes}. Name the classes in '
            f'{split}_dataloader.dataset.metainfo, and set model.decode_head.num_classes to their number.',
        )
    known = files[images] | files[annotations]
    wanted = any(str(step.get('type')).endswith('LoadAnnotations') for step in dataset.get('pipeline') or ())
    for info in samples:
        path = info.get('seg_map_path')
        if (path is None and not wanted) or path in known or os.path.exists(path or ''):
            listing.samples.append(info)
    there = {info['img_path'] for info in listing.samples}
    missing = [info for info in samples if info['img_path'] not in there]
    for info in missing:
        message = (
            f'The {split} set lacks {len(missing)} of {len(samples)} annotations, such as '
            f'{printable(info.get("seg_map_path"))} of {printable(info["img_path"])}'
        )
        listing.add('no annotation', info.get('seg_map_path') or info['img_path'], message)
    _find_strays(listing, samples, files[images], files[annotations], plan)
    return listing


def _find_strays(
    listing: Listing, samples: Sequence[dict], images: set[str], annotations: set[str], plan: BaseDataset
) -> None:
    """Files that belong to no sample, and samples that share a name."""
    used = {info['img_path'] for info in samples} | {info.get('seg_map_path') for info in samples}
    if not plan.ann_file:  # a list of names leaves files out on purpose
        for path in sorted(images - used - annotations):
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
                why = f'the config takes names that end in {plan.img_suffix}'
                listing.add('not used', path, f'{printable(path)} is not used: {why}.')
        for path in sorted(annotations - used - images):
            if path.endswith(plan.seg_map_suffix):
                listing.add('no image', path, f'{printable(path)} has no image.')
    names = defaultdict(list)
    for info in samples:
        names[os.path.basename(info['img_path'])].append(info['img_path'])
    for paths in names.values():
        for path in paths[1:]:
            listing.add('same name', path, f'{printable(path)} is called like {printable(paths[0])}.')


def _files_in(top: str, listing: Listing) -> set[str]:
    """All files in a folder and those in it, links followed; a link in a circle is a finding."""
    found, inside = set(), {}
    if not top:
        return found
    for folder, folders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        above = inside.get(os.path.dirname(folder), ())
        if real in above:
            message = f'{printable(folder)} leads back to {printable(real)}, which it is in. Remove the link.'
            listing.add('loop', folder, message)
            folders.clear()
            continue
        inside[folder] = (*above, real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        found.update(os.path.join(folder, name) for name in names if not name.startswith('.'))
    return found


def _list_folders(dataset: dict, split: str, num_classes: int) -> Listing:
    """Images in one folder a class, ImageNet's layout in mmpretrain's form."""
    built = DATASETS.build({**dataset, '_scope_': 'mmpretrain', 'pipeline': [], 'lazy_init': True})
    folder = Path(built.img_prefix)
    listing = Listing(split, dataset, False, str(folder))
    advice = '\n  Name the folder that holds train/ and val/ with --data-root.'
    if not folder.is_dir():
        message = f'The {split} set is not at {printable(folder)}, which does not exist.{advice}'
        listing.add('layout', folder, message)
        return listing
    if not built.ann_file:  # otherwise a list of files and classes, which mmpretrain reads
        _check_class_folders(listing, built, folder, num_classes, advice)
    if not any(finding.kind in ('layout', 'loop', 'classes') for finding in listing.findings):
        built.full_init()
        listing.samples = [built.get_data_info(index) for index in range(len(built))]
        # ImageNet has synonyms: the first will do.
        listing.classes = [str(name).split(',')[0] for name in built.metainfo.get('classes') or range(num_classes)]
    return listing


def _check_class_folders(listing: Listing, built: BaseDataset, folder: Path, num_classes: int, advice: str) -> None:
    files = _files_in(str(folder), listing)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(classes) != num_classes:
        found = f'{printable(folder)} has {len(classes)} folders, and the network {num_classes} classes'
        message = f'{found}: expected one folder each. For other classes set model.head.num_classes.{advice}'
        listing.add('classes', folder, message)
    images = [path for path in files if built.is_valid_file(path)]
    filled = {Path(path).relative_to(folder).parts[0] for path in images}
    empty = [path for path in classes if path.name not in filled]
    for path in empty:
        message = f'{len(empty)} folders of the {listing.split} set have no images, such as {printable(path)}'
        listing.add('layout', path, message)
    for path in sorted(files - set(images)):
        if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES:
            listing.add(
                'not used', path, f'{printable(path)} is not used: its ending is not one that mmpretrain takes.'
            )
