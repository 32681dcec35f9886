"""The table of one checkpoint in every format and precision: its figures are those of the files."""

import pytest
from helpers.exports import SIZE

from projects.recnext.recnext.export import study as study_module
from projects.recnext.recnext.export.backend import ExportOptions
from projects.recnext.recnext.export.study import NAMES, PARTS, TARGETS, study
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module')
def lines(few, photos, scenes) -> list[str]:
    options = ExportOptions(size=[SIZE], calibrate=str(photos))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, 'ROUNDS', 2)
        data = {'test_dataloader.dataset.data_root': str(scenes)}
        return list(study(*few, options, parts=True, cfg_options=data))


def rows_of(lines: list[str], kind: str) -> dict[str, str]:
    """Lines of a kind, by the name that they begin with."""
    return {line[:NAMES].strip(): line[NAMES:] for line in lines if kind in line}


@pytest.mark.full
def test_every_target_has_its_row(lines):
    measured = rows_of(lines, ' %')
    missing = rows_of(lines, 'is not installed')
    assert all(name.startswith(('executorch', 'litert')) for name in missing)
    assert measured.keys() | missing.keys() >= TARGETS.keys()
    assert '100.00 %' in measured['onnx fp32'] and '+0.00' in measured['onnx fp32']
    size, share, _, miou, change = measured['onnx int8'].split()
    assert float(size) < 0.7 * float(measured['onnx fp32'].split()[0])
    assert 90 < float(share) < 100 and float(miou) > 0 and abs(float(change)) < 10
    assert '4 of 4 images' in lines[0] and '3 images' in lines[0]


@pytest.mark.full
def test_times_and_the_slowest_operations(lines):
    timed = rows_of(lines, ' ms, ')
    assert '1.00 x' in timed['onnx fp32'] and 'Conv ' in timed['onnx fp32']
    assert not any(name.startswith('coreml') for name in timed)
    assert all('XNNPACK ' in said for name, said in timed.items() if name.startswith('executorch'))


@pytest.mark.full
def test_parts_one_by_one(lines):
    rows = rows_of(lines, ' %')
    sizes, shares = ({name: float(row.split()[k]) for name, row in rows.items()} for k in (0, 1))
    for part in PARTS:
        assert 90 < shares[f'onnx int8, all but {part}'] <= 100
        assert sizes['onnx int8'] <= sizes[f'onnx int8, all but {part}'] <= sizes['onnx fp32']


def test_without_onnx_there_is_nothing_to_compare_with(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *_: None)
    with pytest.raises(UserError, match='pip install'):
        next(study('a.py', 'a.pth', ExportOptions(), parts=False))
