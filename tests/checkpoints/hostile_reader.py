"""A process that reads files from strangers, watched: one path a line in, one JSON line out.

Usage: hostile_reader.py FOLDER, in which the good files lie, NAME.good; the working directory must stay empty.
"""

import encodings.cp437  # of the names in old archives: zipfile imports it when it meets the first  # noqa: F401
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.checkpoints.keys import check_weights_fit, convert_state_dict, get_state_dict
from projects.recnext.recnext.utils.errors import UserError

EVENTS = (
    'exec',
    'compile',
    'import',
    'os.',
    'subprocess.',
    'socket.',
    'shutil.',
    'pickle.find_class',
    'ctypes.',
    'pty.',
)
MOST_MEMORY = 6 << 30
HARMLESS = ('os.listdir', 'os.scandir')


LOGGED = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    type(np.dtype('f8')),
    type(np.dtype('i8')),
    (getattr, 'builtins.getattr'),
]
LOGGED += [(np._core.multiarray._reconstruct, 'numpy._core.multiarray._reconstruct')]
"""What torch must be told that it may read of the good file with a log."""


class Watch:
    """What the interpreter does that no reading needs: code, imports, processes, connections, files written."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event == 'open':
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 'r' not in str(mode)
            if writes:
                self.seen.append(f'open {path} {mode}')
        elif event.startswith(EVENTS) and event not in HARMLESS:
            self.seen.append(f'{event} {arguments!r}'[:200])


def weights_in(path: Path) -> Mapping[str, torch.Tensor]:
    """The weights in a file as every tool takes them: read, found, renamed."""
    found = get_state_dict(read_checkpoint(path))
    classifier = any(key.startswith('head.') for key in found)
    return convert_state_dict(found, 'timm' if classifier else 'mmseg1').state_dict


def peak_memory() -> int:
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


def memory() -> int:
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def differing_bytes(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.contiguous().flatten().view(torch.uint8) != other.contiguous().flatten().view(torch.uint8)).sum())


def read(path: Path, expected: Mapping[str, torch.Tensor], watch: Watch) -> dict:
    """Read a file, watched; how that ended, and what it took."""
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    before, started = memory(), time.process_time()
    watch.seen, watch.on = [], True
    try:
        weights = weights_in(path)
        check_weights_fit(weights, expected, 'the good file')
        result = dict(outcome='loaded')
    except UserError as error:
        result = dict(outcome='refused', message=str(error))
    except BaseException as error:
        result = dict(outcome='raised', message=f'{type(error).__name__}: {error}'[:500])
    watch.on = False
    result |= dict(seconds=time.process_time() - started, memory=max(0, peak_memory() - before), seen=watch.seen)
    if result['outcome'] == 'loaded':
        result['bytes'] = sum(differing_bytes(weights[key], expected[key]) for key in expected)
        if result['bytes']:
            result['as_said'] = _as_torch_reads(path, weights)
    return result


def _as_torch_reads(path: Path, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether other readers find the same numbers in a file: safetensors' own parser has no other, so it counts."""
    if path.read_bytes()[8:9] == b'{':
        return True
    with torch.serialization.safe_globals(LOGGED):
        theirs = get_state_dict(torch.load(path, weights_only=True))
    found = convert_state_dict(
        theirs, 'timm' if any(key.startswith('head.') for key in theirs) else 'mmseg1'
    ).state_dict
    return found.keys() == weights.keys() and not any(differing_bytes(found[key], weights[key]) for key in found)


def main() -> None:
    # A reader that gives way should not take the machine with it.
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    torch.set_num_threads(1)
    good = {path.stem: dict(weights_in(path)) for path in Path(sys.argv[1]).glob('*.good')}
    watch = Watch()
    for name, expected in good.items():  # what is imported and set up once
        assert read(Path(sys.argv[1], f'{name}.good'), expected, watch)['outcome'] == 'loaded'
    print(json.dumps(dict(ready=True)), flush=True)
    for line in sys.stdin:
        name, path = json.loads(line)
        print(json.dumps(read(Path(path), good[name], watch)), flush=True)


if __name__ == '__main__':
    main()
