"""What can be wrong with a dataset as a whole, and with what its pipeline makes of the samples."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..utils.errors import first_line, printable
from .listing import Listing
from .sample_rules import IGNORED, MAX_LABELS_NAMED, Finding, Sample
from .seeded import seed_generators

PREPARED = 24
"""How many samples the whole check puts through the pipeline: one of each size, the strangest first."""


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
        named = ', '.join(absent[:MAX_LABELS_NAMED]) + (', ...' if len(absent) > MAX_LABELS_NAMED else '')
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


class PreparedSample(NamedTuple):
    """A sample on its way into the network."""

    sample: Sample
    data: dict
    """What the pipeline makes of it: ``inputs`` (3, H, W) and ``data_samples``."""
    batch: dict
    """What the preprocessor makes of it alone: ``inputs`` (1, 3, H, W), normalised and padded."""


def prepare_samples(
    listing: Listing, samples: Sequence[Sample], preprocessor: nn.Module
) -> tuple[list[PreparedSample], list[Finding]]:
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
            prepared.append(PreparedSample(sample, data, batch))
    return prepared, findings


def build_preprocessor(cfg: Config, segmentation: bool) -> nn.Module:
    """What stands between the batches of the dataloader and the network of a config."""
    scope, kind = ('mmseg', 'SegDataPreProcessor') if segmentation else ('mmpretrain', 'ClsDataPreprocessor')
    init_default_scope(scope)
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return MODELS.build({'type': kind, '_scope_': scope, **settings})


def _collate(preprocessor: nn.Module, data: Sequence[dict], training: bool) -> dict:
    return preprocessor({key: [one[key] for one in data] for key in ('inputs', 'data_samples')}, training)


def check_batch(listing: Listing, prepared: Sequence[PreparedSample], preprocessor: nn.Module) -> Iterator[Finding]:
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
