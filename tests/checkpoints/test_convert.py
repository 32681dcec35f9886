"""The conversion command: as a user runs it, on good files and bad ones."""

import hashlib
import os

import pytest
import torch
from helpers.reference import SEGMENTORS, config_of
from helpers.tools import assert_user_error, run_tool
from safetensors.torch import save_file

from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.checkpoints.keys import ConversionError, get_state_dict
from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of


@pytest.mark.every(3)
@pytest.mark.parametrize('arch', SEGMENTORS)
def test_released_segmentors(released, tmp_path, arch):
    source, there, back = released(f'recnext_{arch}_ade20k'), tmp_path / 'there.pth', tmp_path / 'back.pth'
    report = convert_file(source, there, expected=build_on_meta(load_config(config_of(arch)).model).state_dict())
    assert (str(report.conversion.layout), report.conversion.arch) == ('legacy segmentor', arch)
    converted, original = read_checkpoint(there), read_checkpoint(source)
    assert converted['meta']['dataset_meta']['classes'] == tuple(original['meta']['CLASSES'])
    assert converted['meta']['source'] == dict(
        file=source.name, sha256=sha256_of(source), layout='legacy segmentor', arch=arch, ema=False
    )
    convert_file(there, back, target='legacy')
    restored = read_checkpoint(back)
    assert tuple(restored['meta']['CLASSES']) == tuple(original['meta']['CLASSES'])
    assert restored['meta']['PALETTE'] == original['meta']['PALETTE']
    assert list(restored['state_dict']) == list(original['state_dict'])
    assert all(torch.equal(restored['state_dict'][key], t) for key, t in original['state_dict'].items())


@pytest.mark.parametrize('form', ['pth', 'bare', 'safetensors', 'ddp'])
@pytest.mark.parametrize('arch', ['m0', pytest.param('a3', marks=pytest.mark.full)])
def test_imagenet_files(released, tmp_path, arch, form):
    weights = read_checkpoint(released(f'recnext_{arch}_distill_300e'))['model']
    source, there, back = tmp_path / f'source.{form}', tmp_path / 'there.pth', tmp_path / 'back.pth'
    if form == 'safetensors':
        save_file(weights, source)
    elif form == 'ddp':
        torch.save({'model': {f'module.{key}': tensor for key, tensor in weights.items()}}, source)
    else:
        torch.save(weights if form == 'bare' else {'model': weights, 'epoch': 299}, source)
    text = str(convert_file(source, there))
    assert 'legacy classifier' in text
    head = next(line for line in text.splitlines() if 'ImageNet classification head' in line)
    assert all(key in head for key in weights if key.startswith('head.'))
    assert ('not weights: epoch' in text) == (form == 'pth')
    convert_file(there, back, target='legacy')
    restored = read_checkpoint(back)['model']
    assert read_checkpoint(back)['meta']['source']['sha256'] == sha256_of(there)
    assert set(restored) == {key for key in weights if not key.startswith('head.')}
    assert all(torch.equal(tensor, weights[key]) for key, tensor in restored.items())


@pytest.mark.parametrize(
    ('arch', 'suffix'),
    [
        ('m0', '.pth'),
        ('a0', '.safetensors'),
        *(pytest.param('a3', suffix, marks=pytest.mark.full) for suffix in ('.pth', '.safetensors')),
    ],
)
def test_classifiers_there_and_back_are_bit_equal(released, tmp_path, arch, suffix):
    first = released(f'recnext_{arch}_distill_300e')
    weights = read_checkpoint(first)['model']
    said = ''
    source = first
    for target in ('timm', 'mmpretrain', 'timm', 'legacy', 'mmpretrain', 'legacy'):
        destination = tmp_path / f'{len(list(tmp_path.iterdir()))}-{target}{suffix}'
        said += str(convert_file(source, destination, target=target))
        source = destination
    restored = get_state_dict(read_checkpoint(source))
    # safetensors keep tensors in an order of their own.
    assert restored.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in restored.items())
    assert f"timm.create_model('recnext_{arch}', checkpoint_path=" in said and f'recnext-{arch}' in said
    convert_file(source, tmp_path / 'backbone.pth')
    with pytest.raises(ConversionError, match='without a classification head'):
        convert_file(tmp_path / 'backbone.pth', tmp_path / 'no.pth', target='timm')


def test_a_classifier_for_other_classes(released, tmp_path):
    weights = dict(read_checkpoint(released('recnext_m0_distill_300e'))['model'])
    for branch in ('head', 'head_dist'):
        for name in ('weight', 'bias'):
            weights[f'head.{branch}.linear.{name}'] = weights[f'head.{branch}.linear.{name}'][:7]
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / 'seven.safetensors')
    convert_file(tmp_path / 'seven.safetensors', tmp_path / 'seven.pth', target='mmpretrain')
    assert read_checkpoint(tmp_path / 'seven.pth')['state_dict']['head.head_dist.linear.bias'].shape == (7,)


CONFIG_NAME = 'fpn_recnext-m3_8xb4-80k_ade20k-512x512.py'


def test_command_on_the_genuine_file(real_m3, tmp_path):
    first = run_tool('convert_checkpoint', real_m3, tmp_path / 'first.pth')
    assert first.returncode == 0, first.stderr
    for words in ('legacy segmentor', 'm3', '577 tensors, 12 of them renamed', 'python ', 'tools/test.py', CONFIG_NAME):
        assert words in first.stdout
    second = run_tool('convert_checkpoint', real_m3, tmp_path / 'second.pth', '--config', config_of('m3'))
    assert second.returncode == 0, second.stderr
    assert sha256_of(tmp_path / 'first.pth') == sha256_of(tmp_path / 'second.pth')
    meta = read_checkpoint(tmp_path / 'first.pth')['meta']
    assert (meta['iter'], meta['seed'], len(meta['dataset_meta']['palette'])) == (299, 0, 150)


def test_a_file_in_1x_form_is_said_to_be(real_m3, tmp_path):
    convert_file(real_m3, tmp_path / 'a.pth')
    report = convert_file(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert 'already in mmseg1 form' in str(report)
    a, b = (read_checkpoint(tmp_path / name)['state_dict'] for name in ('a.pth', 'b.pth'))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_optimizer_state_is_left_out_by_name(real_m3, tmp_path):
    content = {**read_checkpoint(real_m3), 'optimizer': {'state': {}}}
    torch.save(content, tmp_path / 'a.pth')
    assert 'optimizer state: optimizer' in str(convert_file(tmp_path / 'a.pth', tmp_path / 'b.pth'))
    assert set(read_checkpoint(tmp_path / 'b.pth')) == {'meta', 'state_dict'}


@pytest.mark.every(2)
@pytest.mark.parametrize('meta', [3, None, {'CLASSES': 3}, {'dataset_meta': ['a']}])
def test_strange_meta_counts_as_none(real_m3, tmp_path, meta):
    torch.save({'meta': meta, 'state_dict': read_checkpoint(real_m3)['state_dict']}, tmp_path / 'a.pth')
    convert_file(tmp_path / 'a.pth', tmp_path / 'b.pth')
    # 150 classes without names are ADE20K's.
    assert read_checkpoint(tmp_path / 'b.pth')['meta']['dataset_meta']['classes'][:2] == ('wall', 'building')


def test_own_classes_need_no_config(real_m3, tmp_path):
    content = read_checkpoint(real_m3)
    for name in ('weight', 'bias'):
        content['state_dict'][f'decode_head.conv_seg.{name}'] = content['state_dict'][f'decode_head.conv_seg.{name}'][
            :7
        ]
    torch.save(content, tmp_path / 'a.pth')
    report = convert_file(tmp_path / 'a.pth', tmp_path / 'my b.pth')
    assert read_checkpoint(tmp_path / 'my b.pth')['state_dict']['decode_head.conv_seg.bias'].shape == (7,)
    assert 'CONFIG' in str(report).splitlines()[-1] and f"'{tmp_path / 'my b.pth'}'" in str(report)


def _changed(change):
    def make(source, path):
        content = read_checkpoint(source)
        change(content['state_dict'])
        torch.save(content, path)

    return make


KEY = 'backbone.stages.1.blocks.0.norm.weight'
BAD_SOURCES = {
    'truncated': (lambda s, p: p.write_bytes(s.read_bytes()[:-1000]), ['truncated or damaged']),
    'one tensor missing': (_changed(lambda s: s.pop(KEY)), [f'missing: {KEY}', '1 disagreement']),
    'one too many': (_changed(lambda s: s.update(extra=torch.ones(1))), ['unexpected: extra', '1 disagreement']),
    'another shape': (
        _changed(lambda s: s.update({KEY: s[KEY][:5]})),
        [f'shape of {KEY}', 'found (5,), expected (128,)'],
    ),
    'no such file': (lambda s, p: None, ['No such checkpoint']),
}


@pytest.mark.parametrize('what', BAD_SOURCES)
def test_bad_sources_are_refused_and_nothing_is_written(real_m3, tmp_path, what):
    make, words = BAD_SOURCES[what]
    make(real_m3, tmp_path / 'bad.pth')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        convert_file(tmp_path / 'bad.pth', tmp_path / 'out.pth')
    for word in ['bad.pth', *words]:
        assert word in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize('what', ['one tensor missing', 'no such file'])
def test_the_command_says_so_and_exits_with_1(real_m3, tmp_path, what):
    make, words = BAD_SOURCES[what]
    make(real_m3, tmp_path / 'bad.pth')
    before = sorted(tmp_path.iterdir())
    assert_user_error(run_tool('convert_checkpoint', tmp_path / 'bad.pth', tmp_path / 'out.pth'), 'bad.pth', *words)
    assert sorted(tmp_path.iterdir()) == before


def test_another_arch_than_the_config_is_refused(real_m3, tmp_path):
    """The line that matters is the first."""
    result = run_tool('convert_checkpoint', real_m3, tmp_path / 'out.pth', '--config', config_of('m4'))
    assert_user_error(
        result, f'{real_m3}: The file is m3, the network m4.\n', f'fit {config_of("m4")}; 382 disagreement'
    )
    assert not (tmp_path / 'out.pth').exists()


def test_a_home_is_expanded(released, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a.pth').symlink_to(released('recnext_m0_distill_300e'))
    assert convert_file('~/a.pth', '~/b.pth').destination == tmp_path / 'b.pth'
    assert read_checkpoint(tmp_path / 'b.pth')['meta']['source']['file'] == 'a.pth'


def test_bad_destinations(real_m3, tmp_path):
    source = tmp_path / 'source.pth'
    source.write_bytes(real_m3.read_bytes())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    os.symlink(source, tmp_path / 'link.pth')
    for destination, words in (
        (tmp_path / 'no' / 'a.pth', 'No such folder'),
        (source, 'source itself'),
        (tmp_path / 'link.pth', 'source itself'),
    ):
        with pytest.raises(UserError, match=words):
            convert_file(source, destination)
    assert hashlib.sha256(source.read_bytes()).hexdigest() == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ['link.pth', 'source.pth']


def test_wrong_use_exits_with_2():
    assert run_tool('convert_checkpoint', fresh=True).returncode == 2
    assert run_tool('convert_checkpoint', 'a', 'b', '--to', 'elsewhere', fresh=True).returncode == 2
