"""The launch scripts as a user runs them."""

import os
import re
import subprocess
import sys

from helpers.reference import ROOT

# torchrun's processes get threads as the scripts say.
ENVIRONMENT = {**os.environ, 'PYTHON': sys.executable}
ENVIRONMENT.pop('OMP_NUM_THREADS', None)


STARTED: list[subprocess.Popen] = []


def start(script: str, *args: object, **variables: str) -> subprocess.Popen:
    process = subprocess.Popen(
        ['bash', str(ROOT / 'tools' / script), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**ENVIRONMENT, **variables},
    )  # fmt: skip
    STARTED.append(process)
    return process


def run(script: str, *args: object, **variables: str) -> str:
    process = start(script, *args, **variables)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def metrics(said: str) -> list[str]:
    """Everything that was measured, to the last digit: the table of classes and the summary."""
    lines = said.splitlines()
    table = [line for line in lines if re.match(r'\| +\S', line)]
    return [*table, re.search(r'aAcc.*mAcc: [\d.]+', said)[0]]
