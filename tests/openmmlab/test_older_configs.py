"""Configs that name the modules of before register the same parts."""

import subprocess
import sys

import pytest
from helpers.reference import ROOT
from helpers.tiny import write_tiny_config

from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.utils.errors import UserError

PACKAGE = 'projects.recnext.recnext'

REGISTERED = """
import sys
from projects.recnext.recnext.openmmlab.config import load_config
cfg = load_config(sys.argv[1])
from mmengine.registry import HOOKS
from mmseg.registry import MODELS
assert HOOKS.get('DeployHook') and MODELS.get('RecNeXtEncoderDecoder')
print(cfg.custom_imports.imports, 'mmpretrain' in sys.modules)
"""


def write_config(tmp_path, imports: object, **more: object):
    extra = f'custom_imports = dict(_delete_=True, imports={imports!r}, **{more!r})'
    return write_tiny_config(tmp_path, tmp_path, extra)


@pytest.mark.parametrize(
    ('imports', 'today'),
    [
        ([PACKAGE], ['openmmlab']),
        (PACKAGE, ['openmmlab']),
        ([f'{PACKAGE}.models.segmentor', f'{PACKAGE}.engine.hooks.finite_loss'], ['openmmlab']),
        ([f'{PACKAGE}.models.recnext', f'{PACKAGE}.datasets.seeded'], ['openmmlab']),
        ([PACKAGE, f'{PACKAGE}.models.timm_models'], ['openmmlab', 'timm']),
        ([f'{PACKAGE}.openmmlab'], ['openmmlab']),
        (['json', f'{PACKAGE}.openmmlab.hooks'], ['json', 'openmmlab.hooks']),
    ],
)
def test_names_of_before_are_those_of_today(tmp_path, imports, today):
    cfg = load_config(write_config(tmp_path, imports))
    assert [name.removeprefix(f'{PACKAGE}.') for name in cfg.custom_imports.imports] == today


@pytest.mark.parametrize(('module', 'with_mmpretrain'), [('models.segmentor', False), ('models.classifier', True)])
def test_parts_are_registered_in_a_new_interpreter(tmp_path, module, with_mmpretrain):
    if with_mmpretrain:
        pytest.importorskip('mmpretrain.models')
    config = write_config(tmp_path, [f'{PACKAGE}.{module}'])
    command = [sys.executable, '-c', REGISTERED, str(config)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == str(with_mmpretrain)


def test_modules_that_are_missing_are_named_unless_they_may_be(tmp_path):
    with pytest.raises(UserError, match="cannot be read: ModuleNotFoundError: No module named 'no_such_module'"):
        load_config(write_config(tmp_path, ['no_such_module']))
    load_config(write_config(tmp_path, ['no_such_module'], allow_failed_imports=True))
