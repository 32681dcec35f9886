"""The tables of released models in the documentation, and metafile.yaml: made from the list of releases."""

import re
from pathlib import Path

import yaml
from mmengine.config import Config

from projects.recnext.recnext.checkpoints.releases import read_releases, read_sources
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import atomic_write
from projects.recnext.recnext.utils.paths import CLONE, CONFIGS

METAFILE = CLONE / 'projects' / 'recnext' / 'metafile.yaml'
MODEL_INDEX = CLONE / 'model-index.yml'  # where mim looks
README = CLONE / 'projects' / 'recnext' / 'README.md'
PAPER = dict(
    Title='RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations',
    URL='https://arxiv.org/abs/2412.19628',
)
COLLECTION = 'RecNeXt'
TASKS = dict(segmentation=('Semantic Segmentation', 'ADE20K'), classification=('Image Classification', 'ImageNet-1k'))
METRICS = dict(top1='Top 1 Accuracy')
"""What model-index calls a metric, where it is not the list's word."""

BLOCK = '<!-- {name}: made by tools/update_model_zoo.py from released.json -->'
END = '<!-- end of {name} -->'


def update_model_zoo() -> list[Path]:
    """Write the tables and the metafile anew.

    Returns:
        The files that changed.
    """
    changed = []
    for path, text in render_all().items():
        if not path.exists() or path.read_text() != text:
            with atomic_write(path) as beside:
                beside.write_text(text)
            changed.append(path)
    return changed


def render_all() -> dict[Path, str]:
    """Every file that holds something of the list -> its text as it should be."""
    places = {
        CLONE / 'README.md': [segmentation_table],
        README: [segmentation_table],
        CLONE / 'checkpoints' / 'README.md': [segmentation_names, classification_table],
    }
    texts = {METAFILE: metafile(), MODEL_INDEX: yaml.safe_dump(dict(Import=[_relative(METAFILE)]))}
    for path, tables in places.items():
        text = path.read_text()
        for table in tables:
            text = fill_block(text, table.__name__.replace('_', '-'), table(path.parent))
        texts[path] = text
    return texts


def fill_block(text: str, name: str, content: str) -> str:
    """Replace what stands between the two marks of that name.

    Raises:
        UserError: the marks are not there, once each.
    """
    begin, end = BLOCK.format(name=name), END.format(name=name)
    if (text.count(begin), text.count(end)) != (1, 1):
        raise UserError(f'Expected {begin} and {end}, once each.')
    return re.sub(
        f'{re.escape(begin)}.*?{re.escape(end)}', lambda _: f'{begin}\n\n{content}\n\n{end}', text, flags=re.DOTALL
    )


def segmentation_table(folder: Path) -> str:
    """The released segmentors with their figures; links to configs are relative to ``folder``."""
    rows = []
    for release in _releases('segmentation'):
        config = Path(*['..'] * len(folder.relative_to(CLONE).parts), _relative(CONFIGS / release['config']))
        figures = [f'{release["metrics"][metric]:.2f}' for metric in ('aAcc', 'mIoU', 'mAcc')]
        latency, parameters = f'{release["backbone_latency_ms"]:.1f} ms', f'{release["parameters_million"]:.2f} M'
        links = [f'[config]({config})', f'[{release["name"]}]({release["url"]})']
        rows.append([_title(release), *figures, latency, parameters, *links])
    header = ['model', 'aAcc', 'mIoU', 'mAcc', 'backbone latency', 'parameters', 'config', 'released file']
    return _table(header, rows)


def segmentation_names(folder: Path) -> str:
    """The names of the released segmentors."""
    return _table(
        ['model', 'name', 'mIoU'],
        [[_title(r), f'[`{r["name"]}`]({r["url"]})', f'{r["metrics"]["mIoU"]:.2f}'] for r in _releases('segmentation')],
    )


def classification_table(folder: Path) -> str:
    """The ImageNet weights, one row a variant."""
    rows = []
    for arch in ARCHS:
        pair = {'without' in r['name']: r for r in _releases('classification') if r['arch'] == arch}
        cells = [
            cell
            for release in (pair[False], pair[True])
            for cell in (f'[`{release["name"]}`]({release["url"]})', f'{release["metrics"]["top1"]:.1f}')
        ]
        hub = pair[False]['hub']
        rows.append([_title(pair[False]), *cells, f'[`{hub}`](https://huggingface.co/{hub})'])
    header = ['model', 'distilled', 'top-1', 'not distilled', 'top-1', 'distilled, on the hub']
    return _table(header, rows)


def metafile() -> str:
    """Every release in the form of model-index, as mmseg's metafiles are."""
    models = [_model(release) for release in read_releases()]
    collection = dict(
        Name=COLLECTION,
        License='Apache License 2.0',
        Metadata={'Training Data': [dataset for _, dataset in TASKS.values()]},
        Paper=dict(PAPER),
        README=README.name,  # model-index counts it from the metafile, and other paths from the root
        Frameworks=['PyTorch'],
    )
    head = '# Made by tools/update_model_zoo.py from released.json. Where the figures are from:\n'
    head += ''.join(f'# - {figures}: {source}\n' for figures, source in read_sources().items())
    return head + yaml.safe_dump(dict(Collections=[collection], Models=models), sort_keys=False, width=1000)


def _model(release: dict) -> dict:
    task, dataset = TASKS[release['task']]
    name, config = release['name'], {}
    metadata = {'Training Data': dataset, 'Architecture': [_title(release)]}
    if release['task'] == 'segmentation':
        name, config = Path(release['config']).stem, {'Config': _relative(CONFIGS / release['config'])}
        metadata['Architecture'].append('FPN')
        metadata['Batch Size'] = Config.fromfile(CONFIGS / release['config']).auto_scale_lr.base_batch_size
        metadata['Parameters'] = round(release['parameters_million'] * 1e6)
        metadata['Backbone latency (ms)'] = dict(
            value=release['backbone_latency_ms'], hardware='iPhone 12', backend='Core ML', resolution='(512, 512)'
        )
    metrics = {METRICS.get(metric, metric): value for metric, value in release['metrics'].items()}
    return {
        'Name': name,
        'In Collection': COLLECTION,
        'Results': dict(Task=task, Dataset=dataset, Metrics=metrics),
        **config,
        'Metadata': metadata,
        'Weights': release['url'],
        'Paper': dict(PAPER),
        'Code': 'projects/recnext/recnext/models/recnext.py',
        'Framework': 'PyTorch',
    }


def _releases(task: str) -> list[dict]:
    return [release for release in read_releases() if release['task'] == task]


def _title(release: dict) -> str:
    return f'RecNeXt-{release["arch"].upper()}'


def _relative(path: Path) -> str:
    return path.relative_to(CLONE).as_posix()


def _table(header: list[str], rows: list[list[str]]) -> str:
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, ['---'] * len(header), *rows))
