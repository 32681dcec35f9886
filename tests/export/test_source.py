"""Published figures go into an exported file only where the weights are shown to be the released ones."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.exports import SIZE, export_to

from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.checkpoints.download import (
    DIGESTS,
    read_digests,
    sha256_of_weights,
    weights_of,
    write_digests,
)
from projects.recnext.recnext.checkpoints.keys import convert_state_dict
from projects.recnext.recnext.checkpoints.releases import get_release
from projects.recnext.recnext.export.onnx import OnnxBackend
from projects.recnext.recnext.export.source import Source, load_source

onnx = pytest.importorskip('onnx')

NAME = 'recnext_m3_ade20k'
RELEASE = get_release(NAME)
FIGURES = {f'{metric} (released)': str(value) for metric, value in RELEASE['metrics'].items()}


class Download(NamedTuple):
    """What the tool leaves when it downloads a release, here of a small network."""

    config: str
    released: Path  # as it was before the download: mmseg 0.x
    place: Path  # as it is after: mmseg 1.x, beside the record


@pytest.fixture
def download(tiny, tmp_path) -> Download:
    config, checkpoint = tiny
    weights = torch.load(checkpoint)['state_dict']
    released = tmp_path / 'mirror' / f'{NAME}.pth'
    released.parent.mkdir()
    torch.save(dict(state_dict=convert_state_dict(weights, 'legacy').state_dict, meta={}), released)
    place = tmp_path / 'here' / f'{NAME}.pth'
    place.parent.mkdir()
    sha256 = convert_file(released, place, expected=weights).sha256
    write_digests(place.parent, {NAME: sha256, weights_of(NAME): sha256_of_weights(weights)})
    return Download(config, released, place)


def figures(source: Source) -> dict[str, str]:
    return {key: value for key, value in source.origin().items() if '(released)' in key}


def load(config: str, checkpoint: Path) -> Source:
    return load_source(config, str(checkpoint), 'none')


def train_on(checkpoint: Path) -> None:
    """Change one weight of a file, and nothing of what it says of itself."""
    content = torch.load(checkpoint)
    content['state_dict']['backbone.stem.0.conv.weight'][0, 0, 0, 0] += 1e-3
    torch.save(content, checkpoint)


def test_what_was_downloaded_and_converted_has_its_figures(download):
    assert read_digests(download.place.parent).keys() == {NAME, weights_of(NAME)}
    source = load(download.config, download.place)
    assert figures(source) == FIGURES and source.without_figures is None


@pytest.mark.parametrize('name', ['best.pth', 'model.safetensors'])
def test_another_name_or_form_does_no_harm(download, name):
    again = download.place.with_name(name)
    convert_file(download.place, again, expected=torch.load(download.place)['state_dict'])
    assert figures(load(download.config, again)) == FIGURES


def test_the_released_file_itself_is_known_by_its_digest(download):
    # As in records from before there were digests of weights.
    record = download.place.with_name(DIGESTS)
    record.write_text(f'{{"{NAME}": "{read_digests(record.parent)[NAME]}"}}')
    assert figures(load(download.config, download.place)) == {}
    shutil.copy(download.released, download.place)
    assert figures(load(download.config, download.place)) == FIGURES


def test_a_file_that_was_trained_on_has_none_whatever_it_says(download):
    train_on(download.place)
    said = torch.load(download.place)['meta']['source']
    assert said['sha256'] == read_digests(download.place.parent)[NAME]
    source = load(download.config, download.place)
    assert figures(source) == {} and 'called like a release' in source.without_figures


def test_a_released_name_is_no_release(tiny, tmp_path):
    config, checkpoint = tiny
    assert load(config, Path(checkpoint)).without_figures is None
    called = tmp_path / f'{NAME}.pth'
    shutil.copy(checkpoint, called)
    out = tmp_path / 'a.onnx'
    table = export_to(out, OnnxBackend(), (config, str(called)), part='backbone', size=[SIZE], verify=False)
    (line,) = [line for line in table.splitlines() if line.startswith('figures')]
    assert line.split(maxsplit=1)[1] == ('called like a release, but its SHA-256 is not recorded: no published figures')
    said = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert said['checkpoint'] == called.name and not any('released' in key for key in said)


def test_a_released_file_has_its_figures_in_it(download, tmp_path):
    out = tmp_path / 'a.onnx'
    source = download.config, str(download.place)
    assert 'figures' not in export_to(out, OnnxBackend(), source, part='backbone', size=[SIZE], verify=False)
    assert FIGURES.items() <= {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}.items()
