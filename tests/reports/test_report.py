"""The page about runs shows what their logs hold; the record of an evaluation has mmseg's own figures."""

import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.reference import ROOT, shared
from helpers.scripts import metrics as printed_metrics
from helpers.scripts import run as run_script
from helpers.strength import examples
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from hypothesis import given
from hypothesis import strategies as st
from mmengine.logging import MMLogger
from mmseg.evaluation import IoUMetric

from projects.recnext.recnext.openmmlab.record import (
    EXAMPLES,
    Evaluation,
    EvaluationRecord,
    Example,
    read_evaluation,
    write_evaluation,
)
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.reports import html_report as report
from projects.recnext.recnext.reports.html_report import write_report
from projects.recnext.recnext.reports.run_logs import Curve, parse_environment, read_run
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError

OLD_LOG = 'legacy/real_m3/train.log.json'
HOSTILE = (
    '<img src=x onerror="document.title=\'taken\'">&amp;</script><script>document.title="taken"</script>{{ 7 * 7 }}'
)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=6, validation=5)
    return root


@pytest.fixture(scope='module')
def runs(scenes, tmp_path_factory) -> dict[str, str]:
    """Two trainings of four iterations, validated after the second and the last: what they said, by work dir."""
    folder = tmp_path_factory.mktemp('runs')
    config = write_tiny_config(folder, scenes, 'train_cfg = dict(max_iters=4, val_interval=2)')
    said = {}
    for name, rate in (('first', 1e-3), ('second', 2e-2)):
        work = folder / name
        options = [f'optim_wrapper.optimizer.lr={rate}', 'default_hooks.checkpoint.interval=4']
        result = run_tool('train', config, '--work-dir', work, '--cfg-options', *options)
        assert result.returncode == 0, result.stderr
        said[str(work)] = result.stdout
    return said


def test(runs: dict, work_dir: Path, **options: object) -> Path:
    """Test the first run here; the folder of the log."""
    trained = Path(next(iter(runs)))
    run_test(str(trained.parent / 'tiny.py'), str(trained / 'iter_4.pth'), TestOptions(str(work_dir), **options))
    return next(path for path in work_dir.iterdir() if path.is_dir())


test.__test__ = False


def lines_of(work_dir: str | Path) -> list[dict]:
    (log,) = Path(work_dir).glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in log.read_text().splitlines()]


def table_of(said: str) -> dict[str, list[float]]:
    """IoU and accuracy by class, of the last table that IoUMetric printed."""
    rows = re.findall(r'^\| +(\S.*?) +\| +(\S+) +\| +(\S+) +\|$', said.rpartition('per class results')[2], re.MULTILINE)
    return {name: [float(iou), float(accuracy)] for name, iou, accuracy in rows if name != 'Class'}


class Shown:
    """A page in the browser, without a network."""

    def __init__(self, browser: object, path: Path, width: int = 1200) -> None:
        self.context = browser.new_context(offline=True, viewport=dict(width=width, height=800))
        self.page = self.context.new_page()
        self.said, self.requests = [], []
        self.page.on('console', lambda message: self.said.append(message.text))
        self.page.on('pageerror', lambda error: self.said.append(str(error)))
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def __enter__(self) -> 'Shown':
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()
        if error == (None, None, None):
            assert self.said == []
            assert [url for url in self.requests if not url.startswith(('file:', 'data:'))] == []

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_text_contents()]

    def table(self, selector: str) -> list[list[str | None]]:
        """The exact numbers behind the cells of a table; None where there are none."""
        code = 'rows => rows.map(row => [...row.cells].map(cell => cell.dataset.value ?? null))'
        return self.page.locator(f'{selector} tbody tr').evaluate_all(code)

    @property
    def curves(self) -> list[dict]:
        return json.loads(self.page.locator('#curves').text_content())['curves']


def test_two_runs_and_a_0x_log_in_a_browser(runs, browser, tmp_path):
    """Every figure in the page is that of the logs; it moves, and it asks for nothing."""
    first, second = runs
    old = shared(OLD_LOG)
    result = run_tool('report', first, second, old, '--out', tmp_path / 'page' / 'report.html')
    assert result.returncode == 0, result.stderr
    path = tmp_path / 'page' / 'report.html'
    assert f'{path}: {path.stat().st_size / 1e6:.2f} MB' in result.stdout and path.stat().st_size < 1e6
    assert [file.name for file in path.parent.iterdir()] == ['report.html']
    legacy = [json.loads(line) for line in old.read_text().splitlines()][1:]
    with Shown(browser, path) as shown:
        names = ['first', 'second', 'real_m3/train.log.json']
        assert shown.texts('#runs button') == names
        logs = [lines_of(first), lines_of(second)]
        for curves, lines in zip(shown.curves, logs):
            for key in ('loss', 'lr'):
                assert curves[key]['values'] == [line[key] for line in lines if 'loss' in line]
                assert curves[key]['iterations'] == [1, 2, 3, 4]
            assert curves['mIoU'] == dict(iterations=[2, 4], values=[line['mIoU'] for line in lines if 'mIoU' in line])
        training = [line for line in legacy if line['mode'] == 'train']
        assert shown.curves[2]['loss']['values'] == [line['loss'] for line in training]
        assert shown.curves[2]['lr']['iterations'] == [line['iter'] for line in training]
        assert shown.curves[2]['mIoU'] == dict(iterations=[150, 300], values=[25.88, 38.6])
        summary = shown.texts('#summary tbody tr')
        for lines, row in zip([*logs, training], summary):
            assert f'{[line["loss"] for line in lines if "loss" in line][-1]:.4g}' in row
        assert '38.60 (300), 38.60' in summary[2] and '88.69' in summary[2]
        validations = shown.table('.validations:nth-of-type(2)')
        assert [[float(cell) for cell in row[1:]] for row in validations] == [
            [line[key] for key in ('mIoU', 'aAcc', 'mAcc')] for line in logs[1] if 'mIoU' in line
        ]
        check_classes(shown, runs, legacy)
        check_pictures(shown, runs)
        check_handling(shown)
        for word in ('PyTorch', torch.__version__, 'MMSegmentation', '0.30.0+HEAD'):
            assert word in shown.page.locator('#environment').inner_text()
        difference = shown.page.locator('#configs pre').nth(1).text_content()
        assert "-    optimizer=dict(lr=0.02, type='AdamW'" in difference and 'lr=0.001' in difference
    with Shown(browser, path, width=390) as shown:
        assert shown.page.evaluate('document.documentElement.scrollWidth') == 390


def check_classes(shown: Shown, runs: dict, legacy: list[dict]) -> None:
    """The table of classes is what IoUMetric printed, and the changes are differences of what it shows."""
    printed = [table_of(said) for said in runs.values()]
    old = {key[4:].strip(): 100 * value for key, value in legacy[-1].items() if key.startswith('IoU.')}
    names, cells = shown.texts('#classes tbody td:first-child'), shown.table('#classes')
    assert len(names) == 150 == len(printed[0])
    figures = [[math.nan if cell == '' else 100 * float(cell) for cell in row[1:]] for row in cells]
    for name, (iou, accuracy, _, second, change, third, far) in zip(names, figures):
        assert [iou, accuracy] == pytest.approx(printed[0][name], abs=0.005001, nan_ok=True)
        assert second == pytest.approx(printed[1][name][0], abs=0.005001, nan_ok=True)
        assert third == pytest.approx(old[name], nan_ok=True)
        assert [change, far] == pytest.approx([iou - second, iou - third], nan_ok=True)
    ious = [row[0] for row in figures]
    known = [iou for iou in ious if not math.isnan(iou)]
    assert known == sorted(known, reverse=True) and known == ious[: len(known)] and len(known) > 5


def check_pictures(shown: Shown, runs: dict) -> None:
    """All five images, each with truth and prediction, decoded; and the confusion of classes that are there."""
    images = shown.page.locator('.panels img')
    assert (
        images.evaluate_all('all => all.map(image => image.naturalWidth)')
        == [images.first.evaluate('image => image.naturalWidth')] * 15
    )
    record = read_evaluation(next(Path(next(iter(runs))).glob('*/evaluation.json')))
    assert [float(text.split()[-1]) for text in shown.texts('.picture > .quiet')] == [
        round(100 * example.iou, 2) for example in record.worst + record.best
    ]
    assert len(shown.texts('#confusion .confusion')) == 11


def check_handling(shown: Shown) -> None:
    """Pointing at a curve tells its value; runs are switched off and on; a heading sorts."""
    shown.page.locator('.chart[data-key=mIoU] svg').hover(position=dict(x=56, y=60))
    value = shown.curves[0]['mIoU']['values'][0]
    assert f'first, 2: {float(f"{value:.4g}"):g}' in shown.texts('.chart[data-key=mIoU] .tip')[0]
    drawn = shown.page.locator('.chart[data-key=loss] path')
    assert drawn.count() == 3
    shown.page.locator('#runs button').nth(1).click()
    assert drawn.evaluate_all('all => all.map(path => path.dataset.run)') == ['0', '2']
    shown.page.locator('.chart[data-key=loss] input').check()
    assert drawn.count() == 2
    shown.page.locator('#classes th button').first.click()
    names = shown.texts('#classes tbody td:first-child')
    assert [name[0] for name in names] == sorted(name[0] for name in names)


@pytest.mark.full
def test_the_record_is_the_same_from_two_processes_and_changes_nothing_printed(runs, tmp_path):
    """Five images among two processes: one of them is a repetition, which does not count."""
    trained = Path(next(iter(runs)))
    args = [trained.parent / 'tiny.py', trained / 'iter_4.pth', 2, '--work-dir', tmp_path]
    said = run_script('dist_test.sh', *args, '--fuse', 'none', '--no-channels-last', OMP_NUM_THREADS='1')
    (tested,) = tmp_path.glob('*/evaluation.json')
    (validated,) = trained.glob('*/evaluation.json')
    together, alone = json.loads(tested.read_text()), json.loads(validated.read_text())
    assert together.pop('of') == f'test of {trained / "iter_4.pth"}'
    assert alone.pop('of') == 'validation at iteration 4'
    assert together == alone
    record = read_evaluation(tested)
    assert record.images == 5 and len(record.worst) == 3 and len(record.best) == 2
    figures = [[round(100 * value, 2) for value in row] for row in (record.iou, record.accuracy)]
    for ours, theirs in zip(figures, zip(*table_of(said).values())):
        assert ours == pytest.approx(theirs, abs=0.011, nan_ok=True)
    assert '  '.join(f'{name}: {value:.4f}' for name, value in record.means.items()) == printed_metrics(said)[-1]
    assert 'EvaluationRecord' not in said
    assert 'EvaluationRecord' not in (tested.parent / 'vis_data' / 'config.py').read_text()


def test_augmented_testing_is_recorded(runs, tmp_path):
    one = {'test_dataloader.dataset.indices': 1}
    record = read_evaluation(test(runs, tmp_path, tta=True, cfg_options=one) / 'evaluation.json')
    assert record.images == 1 and record.worst[0].label_maps()[1].shape == (192, 256)


def test_label_maps_alone_are_not_recorded(runs, tmp_path):
    """``format_only`` is for test sets without annotations: the pipeline reads none."""
    options = {
        'test_dataloader.dataset.pipeline': [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')],
        'test_evaluator.format_only': True,
    }
    maps = tmp_path / 'maps'
    folder = test(runs, tmp_path / 'work', out=str(maps), cfg_options=options)
    assert len(list(maps.glob('*.png'))) == 5 and not (folder / 'evaluation.json').exists()


def samples(rng: np.random.Generator, number: int, classes: int) -> list[dict]:
    """Random label maps, half right, with ignored pixels and labels of no class."""
    made = []
    for index in range(number):
        size = tuple(rng.integers(1, 30, 2))
        truth = rng.choice([*range(classes), classes, 255], size)
        if index % 7 == 3:
            truth[:] = 255
        predicted = np.where((rng.random(size) < 0.5) & (truth < classes), truth, rng.integers(0, classes, size))
        made.append(
            dict(
                img_path=f'{index}.jpg',
                pred_sem_seg=dict(data=torch.from_numpy(predicted)[None]),
                gt_sem_seg=dict(data=torch.from_numpy(truth)[None]),
            )
        )
    return made


@examples(20)
@given(seed=st.integers(0, 2**32), classes=st.integers(2, 12), number=st.integers(1, 30))
def test_the_record_has_the_figures_of_mmsegs_metric(tmp_path_factory, seed, classes, number):
    made = samples(np.random.default_rng(seed), number, classes)
    path = tmp_path_factory.mktemp('record') / 'evaluation.json'
    MMLogger.get_instance('test_report')
    record, iou = EvaluationRecord(path, 'a test'), IoUMetric()
    for metric in (record, iou):
        metric.dataset_meta = dict(
            classes=[f'c{i}' for i in range(classes)], palette=[[i, 0, 0] for i in range(classes)]
        )
        metric.process({}, made)
    intersect, union, _, label = (torch.stack(areas).sum(0) for areas in zip(*iou.results))
    assert record.evaluate(number) == {} and record.results == []
    read = read_evaluation(path)
    assert read.iou == pytest.approx((intersect / union).numpy(), nan_ok=True)
    assert read.accuracy == pytest.approx((intersect / label).numpy(), nan_ok=True)
    expected = iou.evaluate(number)
    assert {f'{key}': value for key, value in read.means.items() if not math.isnan(expected[key])} == pytest.approx(
        {key: value for key, value in expected.items() if not math.isnan(value)}, abs=0.011
    )
    scores = [one_image(sample, classes) for sample in made]
    ranked = sorted((score, index) for index, score in enumerate(scores) if not math.isnan(score))
    worst = ranked[: min(EXAMPLES, -(-len(ranked) // 2))]
    assert [(example.iou, Path(example.path).stem) for example in read.worst] == [(s, str(i)) for s, i in worst]
    best = sorted(ranked[len(worst) :], key=lambda pair: (-pair[0], pair[1]))[:EXAMPLES]
    assert [example.iou for example in read.best] == [score for score, _ in best]
    for example in read.worst + read.best:
        sample = made[int(Path(example.path).stem)]
        for labels, key in zip(example.label_maps(), ('gt_sem_seg', 'pred_sem_seg')):
            assert np.array_equal(labels, sample[key]['data'][0].numpy())


def one_image(sample: dict, classes: int) -> float:
    """Mean IoU of the classes in an image's truth, one class after the other."""
    truth, predicted = (sample[key]['data'][0].numpy() for key in ('gt_sem_seg', 'pred_sem_seg'))
    counted = truth != 255
    values = [
        ((truth == c) & (predicted == c)).sum() / (((truth == c) | (predicted == c)) & counted).sum()
        for c in range(classes)
        if (truth == c).any()
    ]
    return float(np.mean(values)) if values else math.nan


def test_a_record_that_cannot_be_written_ends_no_training(tmp_path):
    (tmp_path / 'file').touch()
    record = EvaluationRecord(tmp_path / 'file' / 'evaluation.json', 'a test')
    record.dataset_meta = dict(classes=['a'], palette=[[0, 0, 0]])
    record.process({}, samples(np.random.default_rng(0), 2, 1))
    assert record.evaluate(2) == {} and [path.name for path in tmp_path.iterdir()] == ['file']


def write_log(work_dir: Path, lines: list[dict], start: str = '20260101_000000', end: str = '\n') -> Path:
    path = work_dir / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, lines)) + end)
    return path


def training(iterations: range, value: float) -> list[dict]:
    return [dict(loss=value, lr=0.1, iter=i, step=i) for i in iterations]


def test_a_resumed_run_is_one_curve_and_the_later_value_wins(tmp_path):
    write_log(tmp_path, [*training(range(10, 80, 10), 1.0), dict(mIoU=5.0, step=60)])
    write_log(tmp_path, [*training(range(50, 70, 10), 2.0), dict(mIoU=6.0, step=60)], '20260102_000000')
    write_log(tmp_path, training(range(60, 90, 10), 3.0), '20260103_000000')
    (tmp_path / '20260104_000000' / 'vis_data').mkdir(parents=True)  # started and killed
    curves = read_run(tmp_path).curves
    assert curves['loss'].iterations.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]
    assert curves['loss'].values.tolist() == [1, 1, 1, 1, 2, 3, 3, 3]
    assert 'mIoU' not in curves  # the validation at 60 belongs to what was given up; its successor is still to come


def test_validation_by_epoch_stands_where_the_epoch_ended(tmp_path):
    lines = [{**line, 'epoch': 1 + line['iter'] // 25} for line in training(range(10, 50, 10), 1.0)]
    write_log(
        tmp_path, [*lines[:2], {'accuracy/top1': 12.5, 'step': 1}, *lines[2:], {'accuracy/top1': 50.0, 'step': 2}]
    )
    curve = read_run(tmp_path).curves['accuracy/top1']
    assert curve.iterations.tolist() == [20, 40] and curve.values.tolist() == [12.5, 50.0]


def test_what_goes_wrong_in_a_log_is_said(browser, tmp_path):
    """Losses that are no numbers, a last line cut off, and lines that are something else."""
    lines = training(range(1, 6), 0.5)
    lines[2]['loss'], lines[3]['loss'] = math.nan, math.inf
    write_log(
        tmp_path,
        lines,
        end='\n{"loss": 0.4, "lr\n[1, 2]\n"x"\n\x00\n' + '[' * 100000 + '\n{"loss": 1e999, "step": 1' + '0' * 400 + '}',
    )
    with Shown(browser, write_report([tmp_path])) as shown:
        notes = ' '.join(shown.texts('#summary .note'))
        assert '6 lines of' in notes and 'not a finite number 2 times, first at iteration 3' in notes
        assert shown.curves[0]['loss']['values'] == [0.5, 0.5, None, None, 0.5]
        assert shown.page.locator('.chart[data-key=loss] path').get_attribute('d').count('M') == 2
        assert 'python tools/test.py CONFIG CHECKPOINT --work-dir' in shown.texts('.missing')[0]


def write_record(work_dir: Path, name: str, image: Path, truth: np.ndarray | None = None) -> Path:
    """A record of one image, under a class with a name, and nothing else of a run."""
    truth = np.zeros((20, 30), np.uint8) if truth is None else truth
    png = cv2.imencode('.png', truth)[1].tobytes()
    path = work_dir / '20260101_000000' / 'evaluation.json'
    path.parent.mkdir(parents=True)
    confusion = np.array([[500, 100], [0, 0], [7, 0]])
    example = Example(str(image), 0.5, png, png)
    write_evaluation(Evaluation('a test', [name, 'b'], [[1, 2, 3], [4, 5, 6]], confusion, 1, [example], []), path)
    return path


def test_hostile_names_are_only_names(browser, tmp_path):
    image = tmp_path / 'a<b>&"\'.png'
    cv2.imwrite(str(image), np.zeros((20, 30, 3), np.uint8))
    work = tmp_path / 'w<script>document.title="taken"<'
    write_record(work, HOSTILE, image)
    lines = [{**line, HOSTILE: 1} for line in training(range(3), 1.0)]
    write_log(work, lines, '20260102_000000').with_name('config.py').write_text(f'a = {HOSTILE!r}\n')
    (work / '20260102_000000' / 'x.log').write_text(f'    Python: {HOSTILE}\n')
    with Shown(browser, write_report([work])) as shown:
        assert shown.page.title() == f'Report: {work.name}'
        assert HOSTILE in shown.texts('#classes td:first-child')
        assert shown.texts('.picture > b') == [image.name]
        assert shown.page.locator('.panels img').count() == 3 == shown.page.locator('img').count()
        assert HOSTILE in shown.page.locator('#environment').text_content()
        assert repr(HOSTILE) in shown.page.locator('#configs').text_content()
        assert shown.page.locator('script').count() == 2


@pytest.mark.parametrize(
    ('harm', 'words'),
    [
        ('moved', 'cannot be read: No such file'),
        ('another', 'has another shape than its annotation'),
        ('text', 'is not an image'),
        ('maps', 'are damaged'),
    ],
)
def test_images_that_cannot_be_shown_are_said(browser, tmp_path, harm, words):
    image = tmp_path / 'image.png'
    record = write_record(tmp_path / 'work', 'a', image)
    if harm == 'another':
        cv2.imwrite(str(image), np.zeros((20, 50, 3), np.uint8))
    elif harm == 'text':
        image.write_text('no image')
    elif harm == 'maps':
        content = json.loads(record.read_text())
        content['worst'][0]['truth'] = 'AAAA'
        record.write_text(json.dumps(content))
    with Shown(browser, write_report([tmp_path / 'work'])) as shown:
        assert words in shown.texts('.picture .note')[0] and shown.page.locator('img').count() == 0
        assert '82.37' in shown.texts('#classes tbody tr')[0]  # 500 of 607


@pytest.mark.parametrize(
    'content', ['', '{"classes": ["a"]', '[]', '{}', '{"classes": ["a"], "confusion": [[5, 5, 5]]}']
)
def test_a_damaged_record_is_left_out(tmp_path, content):
    write_record(tmp_path, 'a', tmp_path / 'x').write_text(content)
    write_log(tmp_path, training(range(3), 1.0), '20260102_000000')
    assert 'evaluation.json cannot be read' in write_report([tmp_path]).read_text()


def test_a_million_lines_are_thinned_out(tmp_path):
    """What is drawn keeps every peak; here of a tenth of a million lines, which are read in a second."""
    values = np.random.default_rng(0).random(100_000)
    values[54_321] = 9
    values[60_000:60_500] = math.nan
    write_log(tmp_path, [dict(loss=value, iter=i, step=i) for i, value in enumerate(values.tolist())])
    path = write_report([tmp_path])
    assert path.stat().st_size < 100_000
    drawn = json.loads(re.search(r'id="curves">(.*?)</script>', path.read_text())[1])['curves'][0]['loss']
    assert len(drawn['iterations']) <= report.POINTS and drawn['iterations'] == sorted(drawn['iterations'])
    assert drawn['iterations'][0] == 0 and drawn['iterations'][-1] == 99_999
    assert drawn['values'][drawn['iterations'].index(54_321)] == 9
    assert all(value is None or value == values[i] for i, value in zip(drawn['iterations'], drawn['values']))
    short = Curve(np.arange(report.POINTS), values[: report.POINTS])
    assert report.thin_out(short) is short


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'notes.txt').write_text('{}')
    assert_user_error(
        run_tool('report', tmp_path / 'empty'), 'found nothing', 'vis_data/scalars.json', 'tools/train.py'
    )
    for path, words in (
        ('other', 'found notes.txt'),
        ('other/notes.txt', 'no line of a training log'),
        ('none', 'No such work dir'),
    ):
        with pytest.raises(UserError, match=words):
            write_report([tmp_path / path])
    write_log(tmp_path / 'run', training(range(2), 1.0))
    with pytest.raises(UserError, match='named twice'):
        write_report([tmp_path / 'run', tmp_path / 'other' / '..' / 'run'])
    with pytest.raises(UserError, match='is a folder'):
        write_report([tmp_path / 'run'], tmp_path)
    with pytest.raises(UserError, match='cannot be made a folder'):
        write_report([tmp_path / 'run'], tmp_path / 'other' / 'notes.txt' / 'report.html')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty', 'other', 'run']


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ('a/run', 'b/run', 'c'):
        write_log(tmp_path / place, training(range(2), 1.0))
    page = write_report([tmp_path / 'a/run', tmp_path / 'b/run', tmp_path / 'c']).read_text()
    names = ['a/run', 'b/run', f'{tmp_path.name}/c']
    assert f'<title>Report: {", ".join(names)}</title>' in page


def test_environment_of_both_stacks():
    new = '2026/11/23 07:03:47 - mmengine - INFO - \n---\nSystem environment:\n    sys.platform: linux\n'
    new += '    PyTorch compiling details: PyTorch built with:\n  - GCC 13.3\n  - Build settings: A=b, \n\n'
    new += '    OpenCV: 5.0.0\n'
    new += 'Runtime environment:\n    mp_cfg: {"a": 0}\n'
    assert parse_environment(new) == {'sys.platform': 'linux', 'OpenCV': '5.0.0', 'mp_cfg': '{"a": 0}'}
    assert parse_environment('GPU 0,1: NVIDIA A100\nMMCV: 1.7.2\n  - C++ Version: 2') == {
        'GPU 0,1': 'NVIDIA A100',
        'MMCV': '1.7.2',
    }


def test_the_page_asks_for_nothing():
    assert not re.search(
        r'(src|href)="?(https?:)?//', (ROOT / 'projects/recnext/recnext/reports/report.html').read_text()
    )
