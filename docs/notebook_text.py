"""A notebook as Markdown: its text, its code, and what that printed and drew, as it was saved."""

from collections.abc import Iterator


def to_markdown(notebook: dict) -> Iterator[str]:
    """Blocks of Markdown, from the JSON of a notebook; code that begins with ``!`` is a command of the shell."""
    for cell in notebook['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            yield text
            continue
        yield f'```bash\n{text[1:]}\n```' if text.startswith('!') else f'```python\n{text}\n```'
        for output in cell['outputs']:
            data = output.get('data', {})
            if picture := next((kind for kind in data if kind.startswith('image/')), None):
                yield f'![{cell["metadata"]["alt"]}](data:{picture};base64,{"".join(data[picture]).strip()})'
            else:
                yield f'```text\n{"".join(output.get("text", data.get("text/plain", ""))).rstrip()}\n```'
