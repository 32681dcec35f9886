"""The page of a segmentor on the Hugging Face hub: front matter for its search, and text for people."""

from collections.abc import Mapping
from pathlib import Path

ADE20K = 'ADEChallengeData2016'
DATASETS = {ADE20K: ('scene_parse_150', 'ADE20K')}
"""What the hub calls a dataset, and people, by its folder. The class in a config tells no more than the classes."""

FIGURES = {'mIoU': 'mean_iou', 'mAcc': 'mean_accuracy', 'aAcc': 'overall_accuracy'}
"""What the hub calls the figures."""

LOGS = 'https://github.com/suous/RecNeXt/tree/main/segmentation/logs'

TEXT = """
# {title}

{architecture} with the backbone {backbone}, for {number} classes, in the keys of MMSegmentation 1.x.

```bash
recnext predict hf://{repository} photo.jpg
```

```python
from projects.recnext.recnext.predict.predictor import Predictor

prediction = Predictor.from_pretrained('{repository}')('photo.jpg')
prediction.overlay().save('overlay.jpg')
```

## Figures

{figures}

## Where the weights are from

| | |
|---|---|
| file | `{file}` |
| its SHA-256 | `{sha256}` |
| released as | {release} |
| SHA-256 of `model.safetensors` | `{sha256_of_file}` |

`config.json` holds the config as data, the classes and their colours, and is what is read; `config.py` is the same
config for people.

## Classes

{classes}
"""


def write_card(path: Path, description: Mapping, repository: str, license: str) -> None:
    """Write the page of a segmentor.

    Args:
        path: Of the file.
        description: What :func:`push.write_segmentor` gives.
        repository: ``'user/name'``.
        license: As the hub spells it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    folder = Path(description['config']['test_dataloader']['dataset'].get('data_root') or 'unknown').name
    published, measured = description['published'], description['measured']
    if published and not measured:
        folder = ADE20K
    identifier, named = DATASETS.get(folder, (folder, folder))
    source = {} if measured else dict(source_name='training log', source_url=LOGS)
    if measured:
        named += f', {measured["images"]} images'
    results = [
        EvalResult('image-segmentation', identifier, named, kind, figures[figure], metric_name=figure, **source)
        for figures in [measured or published]
        if figures
        for figure, kind in FIGURES.items()
    ]
    front = ModelCardData(
        license=license,
        library_name='recnext',
        pipeline_tag='image-segmentation',
        tags=['semantic-segmentation', 'mmsegmentation', description['backbone'].get('type', 'unknown').lower()],
        datasets=[identifier] if folder in DATASETS else None,
        metrics=list(FIGURES.values()) if results else None,
        model_name=description['name'],
        eval_results=results or None,
    )
    origin = description['source']
    text = TEXT.format(
        title=repository.partition('/')[2],
        architecture=description['architecture'],
        backbone=' '.join(value for value in description['backbone'].values() if isinstance(value, str)),
        number=len(description['classes']),
        repository=repository,
        figures=_table(published, measured),
        file=origin['file'],
        sha256=origin['sha256'],
        release=origin['release'] or 'the SHA-256 is of no released file',
        sha256_of_file=description['weights']['sha256'],
        classes=', '.join(description['classes']),
    )
    path.write_text(f'---\n{front.to_yaml()}\n---\n{text}')


def _table(published: Mapping | None, measured: Mapping | None) -> str:
    figures = {'as published': published}
    if measured:
        figures[f'`recnext test`, {measured["images"]} images'] = measured
    rows = [
        f'| {where} | {" | ".join(f"{found[figure]:.2f}" for figure in FIGURES)} |'
        for where, found in figures.items()
        if found
    ]
    if not rows:
        return 'None: these weights are of no released file, and come without a record of a test.'
    return '\n'.join([f'| per cent | {" | ".join(FIGURES)} |', '|---|---|---|---|', *rows])
