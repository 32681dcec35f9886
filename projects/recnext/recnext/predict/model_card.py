"""The page of a segmentor on the Hugging Face hub: front matter for its search, and text for people."""

from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.folder import Description

FIGURES = {'mIoU': 'mean_iou', 'mAcc': 'mean_accuracy', 'aAcc': 'overall_accuracy'}
"""What the hub calls the figures."""

LOGS = 'https://github.com/suous/RecNeXt/tree/main/segmentation/logs'

TEXT = """
# {title}

RecNeXt ({arch}) with Semantic FPN, for {number} classes.

```bash
recnext predict hf://{repository} photo.jpg
```

```python
import recnext

prediction = recnext.load('hf://{repository}')('photo.jpg')
prediction.overlay().save('overlay.jpg')
```

## Figures

{figures}

## Where the weights are from

| | |
|---|---|
{provenance}

## Classes

{classes}
"""


def write_card(path: Path, description: Description, repository: str, license: str, measured: bool) -> None:
    """Write the page of a segmentor.

    Args:
        path: Of the file.
        description: Its description, with figures and provenance.
        repository: ``'user/name'``.
        license: As the hub spells it.
        measured: Whether the figures were measured, or published.
    """
    from huggingface_hub import EvalResult, ModelCardData

    title = repository.partition('/')[2]
    figures = {name: description.metrics[name] for name in FIGURES if name in description.metrics}
    images = description.metrics.get('images', 0)
    # Those published are of ADE20K. On which data others were measured a checkpoint does not say.
    dataset = ('unknown', f'{images:g} images') if measured else ('scene_parse_150', 'ADE20K')
    source = {} if measured else dict(source_name='training log', source_url=LOGS)
    results = [
        EvalResult('image-segmentation', *dataset, FIGURES[name], value, metric_name=name, **source)
        for name, value in figures.items()
    ]
    front = ModelCardData(
        license=license,
        library_name='recnext',
        pipeline_tag='image-segmentation',
        tags=['semantic-segmentation', 'mmsegmentation', 'recnext'],
        datasets=[dataset[0]] if results and not measured else None,
        metrics=list(FIGURES.values()) if results else None,
        model_name=title,
        eval_results=results or None,
    )
    arch = description.network['arch']
    text = TEXT.format(
        title=title,
        arch=arch if isinstance(arch, str) else 'a variant of its own',
        number=len(description.classes),
        repository=repository,
        figures=_table(figures, dataset[1] if measured else None),
        provenance='\n'.join(f'| {name} | `{value}` |' for name, value in description.provenance.items()),
        classes=', '.join(name.strip() for name in description.classes),
    )
    path.write_text(f'---\n{front.to_yaml()}\n---\n{text}')


def _table(figures: Mapping, measured_on: str | None) -> str:
    if not figures:
        return 'None: these weights are of no released file, and come without a record of a test.'
    where = f'`recnext test`, {measured_on}' if measured_on else 'as published'
    values = ' | '.join(f'{value:.2f}' for value in figures.values())
    return f'| per cent | {" | ".join(figures)} |\n|{"---|" * (len(figures) + 1)}\n| {where} | {values} |'
