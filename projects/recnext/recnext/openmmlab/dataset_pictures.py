"""Pictures of a dataset: a plot of its classes, a sheet of samples as the network gets them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from ..drawing.overlay import paint
from ..utils.errors import printable
from ..utils.files import atomic_write
from .dataset_rules import PreparedSample, prepare_samples
from .listing import Listing, spread
from .sample_rules import IGNORED, Sample
from .segmentor import takes_rgb

ON_SHEET = 12
"""Samples on the sheet of each dataset."""

COLUMNS = 3
SPLIT_COLOURS = ('#2b6cb0', '#dd6b20', '#718096')

Checked = list[tuple[Listing, list[Sample]]]


def count_labels(samples: Sequence[Sample]) -> tuple[Counter, Counter]:
    """Pixels and images of each label."""
    pixels, images = Counter(), Counter()
    for sample in samples:
        pixels.update(sample.counts)
        images.update(sample.counts.keys())
    return pixels, images


def draw_classes(checked: Checked, file: str | Path) -> None:
    """Bars of the classes that occur, the most frequent first: share of the pixels, and of the images; a PNG."""
    from matplotlib.figure import Figure

    known = [(listing, samples) for listing, samples in checked if listing.classes]
    names = max((listing.classes for listing, _ in known), key=len)
    tables = []
    for listing, samples in known:
        pixels, images = count_labels(samples)
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
            colour = SPLIT_COLOURS[place % len(SPLIT_COLOURS)]
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


def write_sheet(listing: Listing, samples: Sequence[Sample], preprocessor: torch.nn.Module, out: Path) -> list[Path]:
    """A picture of samples as the network gets them; none where there are none."""
    sound = [sample for sample in samples if sample.sound]
    prepared, _ = prepare_samples(listing, [sound[index] for index in spread(len(sound), ON_SHEET)], preprocessor)
    cells = [_cell(listing, one, preprocessor) for one in prepared]
    if not cells:
        return []
    path = out / f'check_dataset_{listing.split}.png'
    with atomic_write(path) as beside:
        _draw_sheet(listing, cells, beside)
    return [path]


def _cell(
    listing: Listing, prepared: PreparedSample, preprocessor: torch.nn.Module
) -> tuple[str, np.ndarray, set[int]]:
    """Caption, picture and labels of a sample: what leaves the preprocessor, with normalisation undone.

    With an annotation, the image stands beside the image under its classes; ignored pixels are left as they are.
    """
    sample, batch = prepared.sample, prepared.batch
    image = batch['inputs'][0]
    if getattr(preprocessor, '_enable_normalize', False):
        image = image * preprocessor.std + preprocessor.mean
    elif listing.segmentation and not takes_rgb(preprocessor):
        image = image.flip(0)  # as loaded: BGR
    picture = image.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    name = Path(printable(sample.info['img_path'])).name
    if not listing.segmentation:
        label = int(sample.info['gt_label'])
        return f'{name}\n{listing.classes[label] if label < len(listing.classes) else label}', picture, set()
    if 'gt_sem_seg' not in batch['data_samples'][0]:
        return name, picture, set()
    labels = batch['data_samples'][0].gt_sem_seg.data[0].numpy()
    if labels.shape != picture.shape[:2]:  # in testing they keep their own size
        labels = cv2.resize(labels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    # Black for a label that is no class; none for the one that is ignored, which is the last of all.
    palette = np.zeros((IGNORED, 3), np.uint8)
    palette[: len(listing.palette)] = listing.palette
    under = paint(picture, labels, palette)
    gap = np.full((picture.shape[0], max(2, picture.shape[1] // 40), 3), 255, np.uint8)
    return name, np.concatenate((picture, gap, under), axis=1), set(np.unique(labels).tolist()) - {IGNORED}


def _draw_sheet(listing: Listing, cells: Sequence[tuple[str, np.ndarray, set[int]]], file: str | Path) -> None:
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
