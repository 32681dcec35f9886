"""The check of a dataset: a cheap part before every run, and the whole of it for tools/check_dataset.py.

Both list the samples and apply :mod:`dataset_rules`; the cheap part to a few samples, and it stops at the first error.
"""

import copy
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from .dataset_rules import IGNORED, SHOWN, Finding, Sample, SampleRules, raise_first
from .errors import first_line, printable
from .image_reading import IMAGE_SUFFIXES
from .resume import seed_generators

LOOKED_AT = 20
"""How many samples of a dataset are read before a run: enough to see that they are made for other classes."""

PREPARED = 24
"""How many samples the whole check puts through the pipeline: one of each size, the strangest first."""

TO_ALL = '\n  To see all that is wrong: python tools/check_dataset.py CONFIG'


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
        raise_first(rules(listing.samples[index]).findings, TO_ALL)


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
    listing: Listing, samples: Sequence[dict], images: set[str], annotations: set[str], plan: object
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
    if not any(finding.kind in ('layout', 'loop') for finding in listing.findings):
        built.full_init()
        listing.samples = [built.get_data_info(index) for index in range(len(built))]
        # ImageNet has synonyms: the first will do.
        listing.classes = [str(name).split(',')[0] for name in built.metainfo.get('classes') or range(num_classes)]
    return listing


def _check_class_folders(listing: Listing, built: object, folder: Path, num_classes: int, advice: str) -> None:
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


def check_together(listing: Listing, samples: Sequence[Sample]) -> Iterator[Finding]:
    """What is wrong with a dataset as a whole: how its labels are numbered, and which classes it lacks.

    Args:
        listing: Of the dataset.
        samples: All of them that could be looked at.
    """
    pixels = Counter()
    for sample in samples:
        pixels.update(sample.counts)
    if not pixels:
        return
    if listing.segmentation:
        yield from _check_numbering(listing, pixels)
    absent = [name.strip() for index, name in enumerate(listing.classes) if not pixels[index]]
    if absent:
        named = ', '.join(absent[:SHOWN]) + (', ...' if len(absent) > SHOWN else '')
        says = f'{len(absent)} of {len(listing.classes)} classes never occur in the {listing.split} set: {named}'
        yield Finding('absent', listing.folder, says)


def _check_numbering(listing: Listing, pixels: Counter) -> Iterator[Finding]:
    """The usual mistakes with ``reduce_zero_label``, ``num_classes`` and masks of 0 and 255, by the labels seen."""
    number, split = len(listing.classes), f'{listing.split}_dataloader.dataset'
    seen = sorted(label for label, count in pixels.items() if count and label != IGNORED)
    where = f'{printable(listing.folder)}: '
    reduced = bool(listing.dataset.get('reduce_zero_label')) or any(
        info.get('reduce_zero_label') for info in listing.samples[:1]
    )
    largest = seen[-1] if seen else -1
    more = f'name {largest + 1} classes in {split}.metainfo and in model.decode_head.num_classes'
    if largest == number and not reduced:
        if 0 not in seen:
            says = f'label 0 never occurs and label {number} does: the classes are counted from 1. '
            says += f'Set {split}.reduce_zero_label=True, which also makes 0 the label of what does not count.'
        else:
            says = f'label {number} occurs. Either 0 means unlabelled and the classes are counted from 1: set '
            says += f'{split}.reduce_zero_label=True. Or there is a class more: {more}.'
        yield Finding('numbering', listing.folder, where + says)
    elif largest >= number:
        after = ', one less than in the files because of reduce_zero_label' if reduced else ''
        says = f'labels up to {largest} occur{after}, and there are {number} classes: {more}, or give these labels '
        yield Finding('numbering', listing.folder, f'{where}{says}the number of a class or {IGNORED}.')
    elif not reduced and number > 1 and seen == [0] and pixels[IGNORED]:
        says = f'all labels are 0 or {IGNORED}, and {IGNORED} does not count: with masks of black and white only black '
        yield Finding('numbering', listing.folder, f'{where}{says}is learnt. Write 1 for {IGNORED}.')
    elif reduced and number > 1 and largest == number - 2 and pixels[IGNORED]:
        share = pixels[IGNORED] / sum(pixels.values())
        says = f'the last class never occurs, and {share:.0%} of the pixels have the label 0 or {IGNORED}, which do '
        says += f'not count: the classes are probably counted from 0. Then set {split}.reduce_zero_label=False.'
        yield Finding('shifted', listing.folder, where + says)


def check_leaks(datasets: Sequence[tuple[Listing, Sequence[Sample]]]) -> Iterator[Finding]:
    """Files of the same content in training and in another split."""
    trained = {
        sample.digest: sample.info['img_path']
        for listing, samples in datasets
        if listing.split == 'train'
        for sample in samples
        if sample.digest
    }
    for listing, samples in datasets:
        for sample in samples if listing.split != 'train' else ():
            if sample.digest in trained:
                path = sample.info['img_path']
                message = (
                    f'{printable(path)} of the {listing.split} set is {printable(trained[sample.digest])} of train.'
                )
                yield Finding('leak', path, message)


def choose_strange(samples: Sequence[Sample], number: int = PREPARED) -> list[Sample]:
    """One sample of each size: first the lowest, narrowest, longest and largest images."""
    by_size = {sample.size: sample for sample in reversed(samples) if sample.sound and sample.size}
    orders = (lambda s: min(s), lambda s: -max(s) / min(s), lambda s: -s[0] * s[1])
    ranked = [sorted(by_size, key=order) for order in orders]
    return [by_size[size] for size in dict.fromkeys(size for group in zip(*ranked) for size in group)][:number]


class Prepared(NamedTuple):
    """A sample on its way into the network."""

    sample: Sample
    data: dict
    """What the pipeline makes of it: ``inputs`` (3, H, W) and ``data_samples``."""
    batch: dict
    """What the preprocessor makes of it alone: ``inputs`` (1, 3, H, W), normalised and padded."""


def prepare(
    listing: Listing, samples: Sequence[Sample], preprocessor: nn.Module
) -> tuple[list[Prepared], list[Finding]]:
    """Put samples through the pipeline of their dataset and what stands behind it, the preprocessor of the model.

    Returns:
        The samples with what the network gets of each, and those that fail.
    """
    init_default_scope('mmseg' if listing.segmentation else 'mmpretrain')
    pipeline = Compose(listing.dataset.get('pipeline') or ())
    prepared, findings = [], []
    for place, sample in enumerate(samples):
        seed_generators(place)  # the same samples look the same again
        path = sample.info['img_path']
        try:
            data = pipeline(copy.deepcopy(sample.info))
            batch = _collate(preprocessor, [copy.deepcopy(data)], listing.split == 'train')
        except Exception as error:  # transforms fail in any way
            message = f'{printable(path)} ({_cross(sample.size or ())}) cannot be prepared by the pipeline of '
            message += f'{listing.split}: {type(error).__name__}: {first_line(error)}'
            findings.append(Finding('pipeline', path, message))
        else:
            prepared.append(Prepared(sample, data, batch))
    return prepared, findings


def build_preprocessor(cfg: Config, segmentation: bool) -> nn.Module:
    """What stands between the batches of the dataloader and the network of a config."""
    scope, kind = ('mmseg', 'SegDataPreProcessor') if segmentation else ('mmpretrain', 'ClsDataPreprocessor')
    init_default_scope(scope)
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return MODELS.build({'type': kind, '_scope_': scope, **settings})


def _collate(preprocessor: nn.Module, data: Sequence[dict], training: bool) -> dict:
    return preprocessor({key: [one[key] for one in data] for key in ('inputs', 'data_samples')}, training)


def check_batch(listing: Listing, prepared: Sequence[Prepared], preprocessor: nn.Module) -> Iterator[Finding]:
    """Whether samples can be in one batch of training; they are used up."""
    if len(prepared) < 2:
        return
    try:
        _collate(preprocessor, [one.data for one in prepared], True)
    except Exception as error:
        sizes = {tuple(one.data['inputs'].shape[-2:]): one.sample.info['img_path'] for one in prepared}
        named = '\n  '.join(f'{_cross(size)}: {printable(path)}' for size, path in list(sizes.items())[:3])
        message = (
            f'Images of the {listing.split} set reach the batch in {len(sizes)} sizes, which cannot be stacked; crop '
            f'or resize them to one, or set model.data_preprocessor.size. ({first_line(error)})\n  {named}'
        )
        yield Finding('batch', next(iter(sizes.values())), message)


def _cross(size: tuple[int, ...]) -> str:
    return ' × '.join(map(str, size))
