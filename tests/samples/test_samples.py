"""The small dataset: reproducible to the byte, in ADE20K's layout and numbering, and nothing half made."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.tools import assert_user_error, run_tool
from mmseg.datasets import ADE20KDataset

from projects.recnext.recnext.samples import scenes as sample_scenes
from projects.recnext.recnext.samples.scenes import (
    HEIGHT,
    LABELS,
    WIDTH,
    best_constant,
    make_scene,
    write_dataset,
)
from projects.recnext.recnext.utils.errors import UserError


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


def test_labels_are_those_of_ade20k():
    classes = [name.strip() for name in ADE20KDataset.METAINFO['classes']]
    assert len(LABELS) >= 20
    for name, label in LABELS.items():
        assert classes[label - 1] == name


def test_same_seed_same_bytes_and_another_seed_others(tmp_path):
    write_dataset(tmp_path / 'a', training=6, validation=3, seed=1)
    write_dataset(tmp_path / 'b', training=6, validation=3, seed=1)
    write_dataset(tmp_path / 'c', training=4, validation=3, seed=1)
    write_dataset(tmp_path / 'd', training=6, validation=3, seed=2)
    a, b, c, d = (digests(tmp_path / name) for name in 'abcd')
    assert a == b and len(a) == 18 and len(set(a.values())) == 18
    assert all(a[name] == digest for name, digest in c.items())
    assert not set(a.values()) & set(d.values())


def test_layout_and_dataset_class(tmp_path):
    write_dataset(tmp_path / 'scenes', training=2, validation=1)
    dataset = ADE20KDataset(
        data_root=str(tmp_path / 'scenes'),
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    )
    assert len(dataset) == 1
    image = cv2.imread(dataset[0]['img_path'])
    labels = cv2.imread(dataset[0]['seg_map_path'], cv2.IMREAD_UNCHANGED)
    assert image.shape == (HEIGHT, WIDTH, 3) and labels.shape == (HEIGHT, WIDTH) and labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, *LABELS.values()}


def test_best_constant_prediction():
    pixels = np.zeros(max(LABELS.values()) + 1, int)
    pixels[[0, LABELS['sky'], LABELS['wall'], LABELS['car']]] = [1000, 50, 30, 20]
    name, miou = best_constant(pixels)
    assert name == 'sky' and miou == pytest.approx(100 * 0.5 / 3)


def test_scenes_show_every_class_and_differ():
    scenes = [make_scene(seed) for seed in range(60)]
    shown = set(np.concatenate([np.unique(labels) for _, labels in scenes]))
    assert shown == {0, *LABELS.values()}
    assert len({image.tobytes() for image, _ in scenes}) == 60


def test_colour_alone_does_not_tell_the_class():
    """The best guess from a pixel's colour, learnt on 40 scenes, is far from right on 20 others."""
    counts = np.zeros((16**3, 256))

    def bins(image: np.ndarray) -> np.ndarray:
        return (image // 16).astype(int) @ [1, 16, 256]

    for seed in range(40):
        image, labels = make_scene(seed)
        np.add.at(counts, (bins(image), labels), 1)
    guess = counts.argmax(1)
    held_out = [make_scene(seed) for seed in range(1000, 1020)]
    accuracy = np.mean([(guess[bins(image)] == labels).mean() for image, labels in held_out])
    assert accuracy < 0.7


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / 'mine').mkdir()
    assert_user_error(run_tool('make_sample_dataset', tmp_path / 'mine'), 'there already')
    assert not list((tmp_path / 'mine').iterdir())


def no_space(job: tuple) -> None:
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('args', [['--seed', '-1'], ['--training', '0'], ['--validation', 'many']])
def test_wrong_numbers_exit_with_2(tmp_path, args):
    result = run_tool('make_sample_dataset', tmp_path / 'scenes', *args)
    assert result.returncode == 2 and 'whole number' in result.stderr and not list(tmp_path.iterdir())


def test_nothing_half_made_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_scenes, '_write_scene', no_space)
    with pytest.raises(UserError, match=r'cannot be written: the disk is full'):
        write_dataset(tmp_path / 'scenes', training=1, validation=1)
    assert not list(tmp_path.iterdir())
