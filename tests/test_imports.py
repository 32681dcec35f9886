"""What happens when the parts of this project are imported: nothing on the network, and nothing that Windows lacks."""

import json
import socket
import subprocess
import sys

import pytest
from helpers.isolation import LOCAL
from helpers.reference import ROOT

PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'
MODULES = sorted(
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for path in PACKAGE.rglob('*.py')
)
# Loaded by the interpreter's own start, so they run again here: ``test`` is the name of a package of Python's.
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('[a-z]*.py') if path.stem != 'test')
NEEDS_AN_EXTRA = {'projects.recnext.recnext.models.classifier': 'mmpretrain'}

IMPORT_ALL = f"""
import importlib, importlib.util, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]
needs = {NEEDS_AN_EXTRA!r}
def import_all():
    for name in sys.argv[1:]:
        if name not in needs or importlib.util.find_spec(needs[name]):
            importlib.import_module(name)
"""
