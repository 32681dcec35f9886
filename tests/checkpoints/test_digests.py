"""What shows that a file is a release: SHA-256 of files and of weights, as recorded."""

import threading

import pytest
import torch

from projects.recnext.recnext.checkpoints import download
from projects.recnext.recnext.checkpoints.download import (
    DIGESTS,
    find_recorded_release,
    read_digests,
    sha256_of_weights,
    weights_of,
    write_digests,
)
from projects.recnext.recnext.utils.errors import UserError

NAME, OTHER = 'recnext_m3_ade20k', 'recnext_m4_ade20k'


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The project's own folder of checkpoints, with no record in it."""
    folder = tmp_path / 'project'
    folder.mkdir()
    monkeypatch.setattr(download, 'CHECKPOINTS', folder)
    return folder


def test_weights_are_the_same_in_any_order_and_memory():
    weights = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor(7), c=torch.zeros(0))
    again = dict(c=torch.zeros(0), b=torch.tensor(7), a=torch.arange(6.0).reshape(2, 3).T.contiguous().T)
    assert sha256_of_weights(weights) == sha256_of_weights(again)


@pytest.mark.parametrize(
    'other',
    [
        dict(a=torch.tensor([[0.0, 1.0]]), b=torch.tensor(3)),
        dict(a=torch.tensor([[0.0, 1.0], [2.0, 3.0]]), b=torch.tensor(4)),
        dict(a=torch.tensor([0.0, 1.0, 2.0, 3.0]), b=torch.tensor(3)),
        dict(a=torch.tensor([[0.0, 1.0], [2.0, 3.0]]), c=torch.tensor(3)),
        dict(a=torch.tensor([[0.0, 1.0], [2.0, 3.0]]), b=torch.tensor(3, dtype=torch.int32)),
        dict(a=torch.tensor([[0.0, 1.0], [2.0, 3.0]])),
    ],
)
def test_any_other_weights_are_others(other):
    weights = dict(a=torch.tensor([[0.0, 1.0], [2.0, 3.0]]), b=torch.tensor(3))
    assert sha256_of_weights(weights) != sha256_of_weights(other)


def test_a_release_is_found_by_its_file_or_its_weights(project, tmp_path):
    assert find_recorded_release(tmp_path, 'f', 'w') is None
    write_digests(tmp_path, {NAME: 'f', weights_of(NAME): 'w'})
    assert find_recorded_release(tmp_path, 'f', '-')['name'] == NAME
    assert find_recorded_release(tmp_path, '-', 'w')['name'] == NAME
    assert find_recorded_release(tmp_path, 'w', 'f') is None
    assert find_recorded_release(project, 'f', 'w') is None


def test_the_record_of_the_project_counts_before_any_other(project, tmp_path):
    write_digests(project, {NAME: 'f', weights_of(NAME): 'w'})
    write_digests(tmp_path, {NAME: 'f2', weights_of(NAME): 'w2'})
    assert find_recorded_release(tmp_path, 'f2', 'w2') is None
    assert find_recorded_release(tmp_path, 'f', 'w')['name'] == NAME


def test_what_is_recorded_stays_whoever_writes_at_the_same_time(tmp_path):
    names = [f'{NAME} {number}' for number in range(16)]
    writers = [threading.Thread(target=write_digests, args=(tmp_path, {name: 'f'})) for name in names]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    write_digests(tmp_path, {OTHER: 'g'})
    assert read_digests(tmp_path) == {**dict.fromkeys(names, 'f'), OTHER: 'g'}


@pytest.mark.parametrize(('text', 'words'), [('{', 'is no JSON'), ('[]', 'holds a list')])
def test_a_damaged_record_is_said(tmp_path, text, words):
    (tmp_path / DIGESTS).write_text(text)
    with pytest.raises(UserError, match=words):
        find_recorded_release(tmp_path, 'f', 'w')
