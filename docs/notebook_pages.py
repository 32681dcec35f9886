"""Notebooks as pages of the site: their Markdown, their code and what it printed and drew, as they were saved."""

import json
from collections.abc import Iterator

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx


class NotebookParser(MystParser):
    """A MyST page out of a notebook; nothing in it is run."""

    supported = ('notebook',)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        super().parse('\n\n'.join(to_markdown(json.loads(inputstring))), document)


def to_markdown(notebook: dict) -> Iterator[str]:
    for cell in notebook['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            yield text
            continue
        yield f'```python\n{text}\n```'
        for output in cell['outputs']:
            data = output.get('data', {})
            if picture := next((kind for kind in data if kind.startswith('image/')), None):
                yield f'![{cell["metadata"]["alt"]}](data:{picture};base64,{"".join(data[picture]).strip()})'
            else:
                yield f'```text\n{"".join(output.get("text", data.get("text/plain", ""))).rstrip()}\n```'


def setup(app: Sphinx) -> dict:
    app.add_source_suffix('.ipynb', 'notebook')
    app.add_source_parser(NotebookParser)
    return dict(parallel_read_safe=True)
