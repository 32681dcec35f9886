"""Which defects of the stack are there, before the repairs of compat.py or after them (``--repaired``), as JSON.

One function a repair, of the same name: whether the defect that it mends shows. It is looked for in what the stack
does, never in its versions.
"""

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from contextlib import redirect_stderr
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPAIRED = '--repaired' in sys.argv


class Stranger:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def stand_in_for_mmcv_ops() -> bool:
    """That mmseg's models cannot be imported; without the repairs, another process tries it."""
    if REPAIRED:
        importlib.import_module('mmseg.models')
        return False
    return subprocess.run([sys.executable, '-c', 'import mmseg.models'], capture_output=True).returncode != 0


def shard_when_asked() -> bool:
    """That mmengine's runner brings PyTorch's ways to shard a model along."""
    return brings('torch.distributed.fsdp', 'import mmengine.runner')


def brings(module: str, statement: str) -> bool:
    """Whether a statement imports a module, in a process of its own, where nothing else does."""
    ours = 'import projects.recnext.recnext; ' if REPAIRED else ''
    code = f'{ours}{statement}; import sys; sys.exit({module!r} in sys.modules)'
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True).returncode != 0


def import_when_used() -> bool:
    """That mmseg brings timm, scipy's parts and a vocabulary along."""
    importlib.import_module('mmseg.models')
    importlib.import_module('mmseg.datasets')
    scipy = ('scipy.interpolate', 'scipy.ndimage', 'scipy.optimize')
    return any(name in sys.modules for name in ('timm', 'mmseg.utils.tokenizer', *scipy))


def find_packages_without_pkg_resources() -> bool:
    from mmengine.utils import get_installed_path, is_installed

    try:
        return not (is_installed('mmengine') or is_installed('onedl-mmengine')) or not get_installed_path('mmpretrain')
    except ModuleNotFoundError as error:
        if error.name != 'pkg_resources':
            raise
        return True


def draw_with_any_visualizer() -> bool:
    """That mmseg's hook knows no visualizer but mmseg's."""
    from mmseg.engine import SegVisualizationHook
    from mmseg.visualization import SegLocalVisualizer

    class Other(SegLocalVisualizer):
        pass

    Other.get_instance('other')
    try:
        SegVisualizationHook(draw=True)
    except RuntimeError:
        return True
    return False


def format_configs_once() -> bool:
    """That the same config is parsed for formatting as often as it is asked for."""
    from mmengine.config import Config
    from yapf.yapflib import yapf_api

    parse, parsed = yapf_api.pytree_utils.ParseCodeToTree, []
    yapf_api.pytree_utils.ParseCodeToTree = lambda text: parsed.append(text) or parse(text)
    cfg = Config(dict(a=1))
    assert cfg.pretty_text == cfg.pretty_text and parsed
    return len(parsed) > 1


def read_checkpoints_safely() -> bool:
    """That mmengine refuses what it wrote itself, or runs what a stranger wrote."""
    import torch
    from mmengine.logging import MessageHub
    from mmengine.runner.checkpoint import CheckpointLoader

    with tempfile.TemporaryDirectory() as folder:
        hub = MessageHub('defects')
        hub.update_scalar('train/loss', 1.5)
        torch.save(dict(state_dict={}, message_hub=hub.state_dict()), f'{folder}/own.pth')
        torch.save(dict(state_dict={}, stranger=Stranger(Path(folder, 'mark'))), f'{folder}/strange.pth')
        refused = []
        for name in ('own', 'strange'):
            try:
                CheckpointLoader.load_checkpoint(f'{folder}/{name}.pth', 'cpu')
            except Exception:
                refused.append(name)
        return refused != ['strange'] or Path(folder, 'mark').exists()


def write_files_atomically() -> bool:
    """That a writing that fails takes what was there with it."""
    from mmengine.fileio import get_file_backend

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'iter_1.pth')
        path.write_bytes(b'good')
        try:
            get_file_backend(path).put('a text cannot be written as bytes', path)
        except TypeError:
            pass
        return path.read_bytes() != b'good'


def resume_from_newest_complete() -> bool:
    """That a note which was not brought up to date counts for more than the checkpoints."""
    import torch
    from mmengine.runner.checkpoint import find_latest_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        for iteration in (1, 2):
            torch.save({}, Path(folder, f'iter_{iteration}.pth'))
        Path(folder, 'last_checkpoint').write_text(f'{folder}/iter_1.pth')
        return Path(find_latest_checkpoint(folder)).name != 'iter_2.pth'


def log_versions_without_importing() -> bool:
    """That the start of a run brings torchvision along."""
    return brings('torchvision', 'from mmengine.runner import runner; runner.collect_env()')


def silence_unavoidable_warnings() -> bool:
    """That mmseg warns of what it does itself."""
    from mmseg.engine import SegVisualizationHook
    from mmseg.visualization import SegLocalVisualizer

    if not REPAIRED:
        warnings.simplefilter('always')
    printed = io.StringIO()
    with redirect_stderr(printed):
        SegLocalVisualizer.get_instance('defects')
        SegVisualizationHook(draw=False)
    return 'The draw is False' in printed.getvalue()


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    if REPAIRED:
        from projects.recnext.recnext.openmmlab import compat
    else:
        sys.path.insert(0, str(ROOT / 'projects' / 'recnext' / 'recnext'))
        import compat

        compat.stand_in_for_mmcv_ops()  # without it, mmseg's hooks cannot be imported
    found = [repair.__name__ for repair in compat.REPAIRS if globals()[repair.__name__]()]
    active = [repair.__name__ for repair in compat.REPAIRS if repair.__name__ in compat.ACTIVE]
    print(json.dumps(dict(defects=found, active=active)))
