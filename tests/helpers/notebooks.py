"""Notebooks, run as a reader runs them."""

import copy
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from helpers.reference import ROOT


def run_notebook(path: Path, folder: Path, changes: dict[str, str]) -> nbformat.NotebookNode:
    """The notebook with what it printed and drew.

    Args:
        path: Of the notebook.
        folder: To run it in; gets ``bin/recnext``, in the place of an installed command.
        changes: What of its code is replaced, by what: where it would ask the network.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    command = folder / 'bin' / 'recnext'
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m projects.recnext.recnext "$@"\n')
    command.chmod(0o755)
    notebook = nbformat.read(path, as_version=4)
    shown = copy.deepcopy(notebook)
    for cell in notebook.cells:
        for old, new in changes.items():
            cell.source = cell.source.replace(old, new)
    # Of a terminal that draws no bars: what is kept are the results.
    environment = dict(
        os.environ, TERM='dumb', NO_COLOR='1', PATH=f'{command.parent}:{os.environ["PATH"]}', PYTHONPATH=str(ROOT)
    )
    client = NotebookClient(notebook, timeout=1200, resources={'metadata': {'path': str(folder)}})
    client.execute(env=environment)
    for cell, ran in zip(shown.cells, notebook.cells):
        if cell.cell_type == 'code':
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    return shown
