"""The wheel, installed: everything works in any folder, without the clone and without PYTHONPATH."""

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import mmseg
import numpy as np
import pytest
from helpers.reference import ROOT, genuine_maps
from helpers.tiny import write_tiny_config
from PIL import Image

CONFIG = 'fpn_recnext-m3_8xb4-80k_ade20k-512x512'
DATA = ('.css', '.html', '.js', '.json', '.yaml')
GENUINE = 'aAcc: 88.6900  mIoU: 38.6000  mAcc: 46.7300'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('wheel')
    copy = folder / 'source'
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):  # building leaves files behind
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    pip('wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', folder, copy)
    (path,) = folder.glob('*.whl')
    return path


def pip(*arguments: object) -> None:
    result = subprocess.run([sys.executable, '-m', 'pip', *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmseg', 'mmpretrain', 'timm', 'torchvision', 'matplotlib']))
"""
"""What `pip install .` does not bring cannot be imported."""


class Installed:
    """An environment of its own, which has the dependencies of this one, and the wheel or the clone beside them."""

    def __init__(self, folder: Path, *what: object, extras: bool = True) -> None:
        venv.create(folder, symlinks=True)
        self.bin = folder / 'bin'
        (packages,) = folder.glob('lib/python*/site-packages')
        (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
        if not extras:
            (packages / 'sitecustomize.py').write_text(WITHOUT)
        pip('--python', self.bin / 'python', 'install', '--no-deps', '--no-build-isolation', '--no-index', *what)

    def run(self, program: str, *arguments: object, cwd: Path, fails: bool = False) -> str:
        environment = dict(PATH='/usr/bin:/bin', HOME=str(cwd), OMP_NUM_THREADS='1')
        result = subprocess.run(
            [str(self.bin / program), *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=600,
            env=environment,
        )  # fmt: skip
        assert (result.returncode != 0) == fails, result.stderr
        return result.stderr if fails else result.stdout


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp('environment'), wheel)


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'projects').rglob('*.py')}
    ours |= {path.relative_to(ROOT).as_posix() for path in (ROOT / 'projects').rglob('*') if path.suffix in DATA}
    assert {name for name in names if '.dist-info/' not in name} == ours | {'recnext.py'}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith('/METADATA'))).decode()
    wanted = re.findall(r'^Requires-Dist: ([\w-]+)(?!.*extra)', metadata, re.MULTILINE)
    assert 'torch' in wanted and not {'mmengine', 'mmcv-lite', 'mmsegmentation', 'mmpretrain', 'timm'} & set(wanted)
    assert not {'projects/__init__.py', 'projects/recnext/__init__.py'} & set(names)


@pytest.fixture(scope='module')
def core(wheel, tmp_path_factory) -> Installed:
    """Without what the extras bring."""
    return Installed(tmp_path_factory.mktemp('core'), wheel, extras=False)


def test_the_command_in_an_empty_folder(core, real_m3, ade20k_sample, tmp_path):
    assert 'predict' in core.run('recnext', '--help', cwd=tmp_path)
    assert f'{CONFIG}  (recnext_m3_ade20k)' in core.run('recnext', 'configs', cwd=tmp_path)
    photos = sorted((ade20k_sample / 'images' / 'validation').glob('*.jpg'))
    core.run('recnext', 'predict', 'recnext_m3_ade20k', real_m3, *photos[:1], cwd=tmp_path)
    labels = np.array(Image.open(tmp_path / 'predicted' / 'labels' / f'{photos[0].stem}.png'))
    assert (labels != genuine_maps()[photos[0].stem]).sum() == 0
    assert Image.open(tmp_path / 'predicted' / 'overlays' / f'{photos[0].stem}.jpg').width == 683


@pytest.mark.parametrize('command', ['train', 'test'])
def test_what_takes_openmmlab_says_what_to_install(core, command, tmp_path):
    said = core.run('recnext', command, CONFIG, *([] if command == 'train' else ['w.pth']), cwd=tmp_path, fails=True)
    assert 'pip install ".[mmseg]"' in said and 'Traceback' not in said
    said = core.run('recnext', 'predict', CONFIG, 'w.pth', 'photo.jpg', cwd=tmp_path, fails=True)
    assert 'pip install ".[mmseg]"' in said or 'photo.jpg' in said


SHORT = """
import multiprocessing, sys
import recnext
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.apply(recnext.list_models) == recnext.list_models()
    model = recnext.load('recnext_m3_ade20k', checkpoint=sys.argv[1])
    assert not any(sys.modules[name] for name in ('mmengine', 'mmcv', 'mmseg', 'timm'))
    print(recnext.__file__, model(sys.argv[2]).areas[0].pixels)
"""


@pytest.mark.parametrize('where', ['elsewhere', 'clone', 'clone/projects/recnext'])
def test_the_short_import(core, real_m3, ade20k_sample, tmp_path, where):
    """From a wheel; from a wheel in a clone, where the clone's counts; and in the folder that has `recnext/` in it."""
    (tmp_path / 'elsewhere').mkdir()
    for name in ('recnext.py', 'projects/recnext/recnext'):
        (tmp_path / 'clone' / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / 'recnext.py', tmp_path / 'clone')
    shutil.copytree(ROOT / 'projects' / 'recnext' / 'recnext', tmp_path / 'clone/projects/recnext/recnext')
    script = tmp_path / where / 'short.py'
    script.write_text(SHORT)
    photo = ade20k_sample / 'images' / 'validation' / 'ADE_val_00000001.jpg'
    file, pixels = core.run('python', script, real_m3, photo, cwd=tmp_path / where).split()
    assert pixels == '140617'
    assert file.startswith(str(tmp_path / 'clone')) == where.startswith('clone')


def test_testing_without_data_is_said(installed, tmp_path):
    said = installed.run('recnext', 'test', CONFIG, tmp_path / 'm4.pth', cwd=tmp_path, fails=True)
    assert 'with --data-root' in said and 'Traceback' not in said


@pytest.mark.full
def test_where_weights_are_looked_for(installed, tmp_path):
    said = installed.run('recnext', 'train', CONFIG, '--data-root', tmp_path, cwd=tmp_path, fails=True)
    assert 'with --data-root' in said
    code = 'from projects.recnext.recnext.utils.paths import CHECKPOINTS; print(CHECKPOINTS)'
    assert installed.run('python', '-c', code, cwd=tmp_path) == f'{tmp_path}/.cache/recnext/checkpoints\n'


@pytest.mark.full
def test_mmsegs_own_tool_with_our_config(installed, real_m3, ade20k_sample, tmp_path):
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'test.py'
    config = next(installed.bin.parent.glob(f'lib/python*/site-packages/projects/recnext/configs/{CONFIG}.py'))
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', f'test_dataloader.dataset.data_root={ade20k_sample}']
    assert GENUINE in installed.run('python', tool, config, real_m3, *options, cwd=tmp_path)


BESIDE = """
import projects.theirs, projects.recnext.recnext.timm, timm
assert timm.create_model('recnext_m0') is not None
print(projects.theirs.__file__, projects.recnext.recnext.__file__)
"""


@pytest.mark.full
def test_beside_another_projects_folder(installed, tmp_path):
    """As in a clone of mmsegmentation, whose ``projects`` is no package either."""
    (tmp_path / 'projects' / 'theirs').mkdir(parents=True)
    (tmp_path / 'projects' / 'theirs' / '__init__.py').touch()
    theirs, ours = installed.run('python', '-c', BESIDE, cwd=tmp_path).split()
    assert theirs.startswith(str(tmp_path)) and ours.startswith(str(installed.bin.parent))
    assert 'predict' in installed.run('recnext', '--help', cwd=tmp_path)


@pytest.mark.full
def test_the_rest_of_the_command(installed, real_m3, ade20k_sample, scenes, tmp_path):
    said = installed.run('recnext', 'convert', real_m3, 'm3.pth', cwd=tmp_path)
    assert 'recnext test ' in said
    said = installed.run('recnext', 'test', CONFIG, 'm3.pth', '--data-root', ade20k_sample, cwd=tmp_path)
    assert GENUINE in said
    options = ['--part', 'backbone', '--size', '64', '64', '--no-verify']
    for to, name in (('onnx', 'm3.onnx'), ('coreml', 'm3.mlpackage')):
        installed.run('recnext', 'export', CONFIG, 'm3.pth', '--to', to, '--out', name, *options, cwd=tmp_path)
        assert (tmp_path / name).exists()
    config = write_tiny_config(tmp_path, scenes)
    installed.run('recnext', 'train', config, '--cfg-options', 'train_cfg.max_iters=2', cwd=tmp_path)
    assert (tmp_path / 'work_dirs' / 'tiny' / 'iter_2.pth').exists()
    installed.run('recnext', 'report', 'work_dirs/tiny', cwd=tmp_path)
    inferencer = (
        'import projects.recnext.recnext.openmmlab, sys; from mmseg.apis import MMSegInferencer\n'
        'from projects.recnext.recnext.utils.paths import find_config\n'
        "found = MMSegInferencer(model=str(find_config(sys.argv[1])), weights='m3.pth', device='cpu')(sys.argv[2])\n"
        "print(found['predictions'].shape)"
    )
    photo = min(ade20k_sample.rglob('*.jpg'))
    shape = installed.run('python', '-c', inferencer, CONFIG, photo, cwd=tmp_path).splitlines()[-1]
    assert shape == str(Image.open(photo).size[::-1])


@pytest.mark.full
def test_an_editable_installation(tmp_path):
    clone = tmp_path / 'clone'
    subprocess.run(['git', 'clone', '-q', ROOT, clone], check=True)
    editable = Installed(tmp_path / 'environment', '--editable', clone)
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    said = editable.run('recnext', 'doctor', cwd=elsewhere)
    assert f'package: {clone}/projects/recnext/recnext (a clone)' in said
