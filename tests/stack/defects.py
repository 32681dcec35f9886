"""Print which of the defects that ``compat.PATCHES`` mends show, without us or with us (``--patched``), as JSON.

A defect is looked for in what the stack does, never in its versions.
"""

import functools
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PATCHED = '--patched' in sys.argv


class NeutralOps(ModuleType):
    """A stub of mmcv.ops that is nobody's: without us, mmseg cannot be imported otherwise."""

    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def needs_mmcv_ops() -> bool:
    """That mmseg's models cannot be imported; without us, another process tries it."""
    if PATCHED:
        importlib.import_module('mmseg.models')
        return False
    return subprocess.run([sys.executable, '-c', 'import mmseg.models'], capture_output=True).returncode != 0


def refuses_its_own_checkpoints() -> bool:
    """That mmengine cannot read the log of scalars that it wrote."""
    import torch
    from mmengine.logging import MessageHub
    from mmengine.runner.checkpoint import CheckpointLoader

    hub = MessageHub('defects')
    hub.update_scalar('train/loss', 1.5)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(message_hub=hub.state_dict()), f'{folder}/own.pth')
        try:
            read = CheckpointLoader.load_checkpoint(f'{folder}/own.pth', 'cpu')
        except Exception:
            return True
    return read['message_hub']['log_scalars']['train/loss'].mean() != 1.5


def knows_one_visualizer() -> bool:
    """That mmseg's hook stops a run with a visualizer of another class than mmseg's."""
    from mmengine.visualization import Visualizer
    from mmseg.engine import SegVisualizationHook

    class Other(Visualizer):
        pass

    Other.get_instance('other')
    try:
        SegVisualizationHook(draw=True)
    except RuntimeError:
        return True
    return False


def cannot_be_told_a_device() -> bool:
    """That a Runner runs on the device that mmengine found at import, whatever it is told."""
    from mmengine.device import get_device

    if not PATCHED:
        from mmengine.runner import Runner

        return 'device' not in inspect.signature(Runner.from_cfg).parameters
    import torch

    from projects.recnext.recnext.openmmlab.runner import run_on

    with run_on(torch.device('meta')):
        return get_device() != 'meta'


DEFECTS = {
    'stub of mmcv.ops': needs_mmcv_ops,
    'safe globals': refuses_its_own_checkpoints,
    'any visualizer': knows_one_visualizer,
    'device of a run': cannot_be_told_a_device,
}
"""The defect that each patch mends."""

if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    if PATCHED:
        importlib.import_module('projects.recnext.recnext.openmmlab')
    elif needs_mmcv_ops():
        sys.modules['mmcv.ops'] = NeutralOps('mmcv.ops')
    print(json.dumps([patch for patch, shows in DEFECTS.items() if shows()]))
