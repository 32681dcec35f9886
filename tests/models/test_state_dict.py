"""Between the layouts: every tensor mapped once or named, there and back bit-equal, disagreements listed."""

import pytest
import torch
from helpers.reference import read_layout, released_model_cfg
from hypothesis import given
from hypothesis import strategies as st
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage

from projects.recnext.recnext.checkpoints.convert import released_tensors
from projects.recnext.recnext.checkpoints.keys import (
    TARGETS,
    ConversionError,
    check_weights_fit,
    convert_state_dict,
    detect_layout,
    get_state_dict,
    rename,
    select_backbone,
)
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.openmmlab.builder import build_on_meta

LAYOUTS = [f'recnext_{arch}_distill_300e' for arch in ARCHS] + [
    f'recnext_{arch}_ade20k' for arch in ('m3', 'm4', 'm5', 'a3', 'a4', 'a5')
]


@pytest.fixture(scope='module')
def m0() -> dict:
    """A segmentor's state dict under the names of this project."""
    return {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in skeleton_state('m0').items()}


def skeleton_state(arch: str) -> dict:
    return released_tensors('segmentor', arch)


@pytest.mark.parametrize('arch', ARCHS)
def test_the_core_and_openmmlab_have_the_same_tensors(arch):
    mmseg = build_on_meta(released_model_cfg(arch))
    for ours, theirs in (
        (released_tensors('segmentor', arch), mmseg.state_dict()),
        (released_tensors('backbone', arch), mmseg.backbone.state_dict()),
    ):
        assert [(key, t.shape, t.dtype) for key, t in ours.items()] == [
            (k, t.shape, t.dtype) for k, t in theirs.items()
        ]


@pytest.mark.parametrize('name', LAYOUTS)
def test_there_and_back_is_bit_equal(name, formula_weights):
    source = formula_weights(read_layout(name)['tensors'])
    there = convert_state_dict(source)
    assert set(there.mapped.values()) | set(there.left_out) == set(source)
    assert str(there.layout) == f'legacy {"segmentor" if "ade20k" in name else "classifier"}'
    again = convert_state_dict(there.state_dict, 'mmseg1')
    assert again.layout.target == 'mmseg1' and all(new == old for new, old in again.mapped.items())
    back = convert_state_dict(there.state_dict, 'legacy')
    assert_same(back.state_dict, {key: source[key] for key in source if key not in there.left_out})


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])


@pytest.mark.every(5)
@pytest.mark.parametrize('arch', ARCHS)
def test_each_form_of_a_classifier_to_each(arch, formula_weights):
    source = formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors'])
    forms = {target: convert_state_dict(source, target) for target in ('legacy', 'timm', 'mmpretrain')}
    for target, there in forms.items():
        assert not there.left_out and there.arch == arch
        assert str(detect_layout(there.state_dict)) == f'{target} classifier'
        for other, expected in forms.items():
            assert_same(convert_state_dict(there.state_dict, other).state_dict, expected.state_dict)
        backbone = convert_state_dict(there.state_dict)
        assert str(detect_layout(backbone.state_dict)) == 'mmseg1 backbone'
        assert len(backbone.left_out) == 14 and all(key.startswith('head.') for key in backbone.left_out)
    assert_same(forms['legacy'].state_dict, source)
    check_weights_fit(forms['mmpretrain'].state_dict, released_tensors('classifier', arch), arch)


@pytest.mark.parametrize('target', ['timm', 'mmpretrain'])
def test_what_has_no_head_becomes_no_classifier(m0, target):
    for weights, kind in ((m0, 'segmentor'), (select_backbone(convert_state_dict(m0)).state_dict, 'backbone')):
        with pytest.raises(ConversionError, match=f'{target} form is for classifiers.* a {kind}, without'):
            convert_state_dict(weights, target)


@given(
    st.sampled_from(['segmentor', 'classifier', 'backbone']),
    st.sampled_from(list(TARGETS)),
    st.sampled_from(list(TARGETS)),
    st.sampled_from(['stem.0.conv.weight', 'stem.2.norm.bias', 'stages.0.x', 'head.head.norm.bias', 'neck.y']),
)
def test_rename_depends_on_the_target_alone(kind, first, second, name):
    if kind == 'segmentor':
        first, second = ('legacy' if target == 'legacy' else 'mmseg1' for target in (first, second))
        name = name if name.startswith(('neck', 'head')) else f'backbone.{name}'
    assert rename(rename(name, first, kind), second, kind) == rename(name, second, kind)


@pytest.mark.parametrize('wrap', ['bare', 'state_dict', 'model', 'module.'])
def test_state_dict_is_found_in_every_wrapping(m0, wrap):
    if wrap == 'module.':
        checkpoint = {'state_dict': {f'module.{key}': tensor for key, tensor in m0.items()}}
    else:
        checkpoint = m0 if wrap == 'bare' else {wrap: m0, 'epoch': 3}
    assert list(get_state_dict(checkpoint)) == list(m0)


@pytest.mark.parametrize(
    'checkpoint', [{}, {'epoch': 3}, {'state_dict': {}}, {'model': {'a': 1}}, {'state_dict': {3: torch.ones(1)}}]
)
def test_no_state_dict_is_said(checkpoint):
    with pytest.raises(ConversionError, match='holds no state dict'):
        get_state_dict(checkpoint)


@pytest.mark.parametrize('key', ['model_ema', 'state_dict_ema'])
def test_ema_weights_are_taken_when_asked_for(m0, key):
    checkpoint = {'state_dict': m0, key: {name: tensor + 1 for name, tensor in m0.items()}}
    assert get_state_dict(checkpoint)['backbone.stem.0.conv.weight'].max() == 0
    ema = get_state_dict(checkpoint, ema=True)
    assert list(ema) == list(m0) and ema['backbone.stem.0.conv.weight'].min() == 1


def test_ema_weights_of_mmengine_stand_where_the_weights_do(m0):
    """As mmengine's own EMAHook writes them."""
    hook = EMAHook()
    raw = torch.nn.Linear(1, 1)
    hook.ema_model = ExponentialMovingAverage(raw)
    raw.weight.data.fill_(1.0)
    hook.ema_model.module.weight.data.fill_(0.5)
    checkpoint = {'state_dict': raw.state_dict()}
    hook.before_save_checkpoint(None, checkpoint)
    for ema in (False, True):
        assert get_state_dict(checkpoint, ema)['weight'] == 0.5
    with pytest.raises(ConversionError, match='holds no EMA'):
        get_state_dict({'state_dict': m0}, ema=True)


@pytest.mark.parametrize(
    'tensor',
    [torch.empty(3, device='meta'), torch.ones(3).to_sparse(), torch.ones(1).expand(10**9)],
    ids=['meta', 'sparse', 'expanded'],
)
def test_tensors_without_values_of_their_own_are_refused(m0, tensor):
    with pytest.raises(ConversionError, match=r"dense tensors.*'decode_head.conv_seg.bias'"):
        get_state_dict({**m0, 'decode_head.conv_seg.bias': tensor})


def test_module_prefix_is_taken_off_all_tensors_or_none(m0):
    mixed = {**m0, 'module.decode_head.conv_seg.bias': m0['decode_head.conv_seg.bias'] + 1}
    assert set(get_state_dict(mixed)) == set(mixed)
    with pytest.raises(ConversionError, match=r'unexpected: module\.decode_head'):
        check_weights_fit(convert_state_dict(get_state_dict(mixed)).state_dict, skeleton_state('m0'), 'm0')


def test_ema_buffers_of_mmcv_are_taken_or_named(m0):
    parameters = [key for key in m0 if key.endswith(('weight', 'bias'))]
    buffers = {f'ema_{key.replace(".", "_")}': m0[key] + 1 for key in parameters}
    plain = convert_state_dict(get_state_dict({'state_dict': {**m0, **buffers}}))
    assert set(plain.left_out) == set(buffers) and 'EMAHook' in plain.left_out['ema_backbone_stem_0_conv_weight']
    ema = get_state_dict({'state_dict': {**m0, **buffers}}, ema=True)
    assert list(ema) == list(m0) and all(ema[key].min() == 1 for key in parameters)
    with pytest.raises(ConversionError, match='no parameter'):
        get_state_dict({**m0, **buffers, 'ema_backbone_nothing': torch.ones(1)}, ema=True)
    with pytest.raises(ConversionError, match='holds no EMA'):
        get_state_dict({'state_dict': m0}, ema=True)


def test_strangers_are_refused():
    with pytest.raises(ConversionError, match='not the weights of a RecNeXt'):
        detect_layout({'conv1.weight': torch.ones(1)})


def test_two_tensors_for_one_place_are_refused(m0):
    twice = {**m0, 'backbone.stem.stem.0.conv.weight': m0['backbone.stem.0.conv.weight']}
    with pytest.raises(ConversionError, match=r'Two tensors would both become backbone\.stem\.0\.conv\.weight'):
        convert_state_dict(twice)


@pytest.mark.parametrize('target', ['mmseg1', 'legacy'])
def test_arch_survives_a_missing_tensor(m0, target):
    state_dict = convert_state_dict(m0, target).state_dict
    for key in ('stages.3.blocks.0.channel_mixer.2.conv.weight', 'stages.2.blocks.8.token_mixer.down.weight'):
        rest = {k: t for k, t in state_dict.items() if k != f'backbone.{key}'}
        assert convert_state_dict(rest).arch == 'm0'


def test_unknown_arch_is_none(m0):
    assert convert_state_dict({k: t for k, t in m0.items() if 'stages.2.blocks.8' not in k}).arch is None


def test_backbone_of_a_segmentor(m0):
    backbone = select_backbone(convert_state_dict(m0))
    check_weights_fit(backbone.state_dict, released_tensors('backbone', 'm0'), 'm0')
    assert set(backbone.left_out) == {key for key in m0 if not key.startswith('backbone.')}


KEY = 'decode_head.conv_seg.weight'


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda s: s.pop(KEY), f'missing: {KEY}'),
        (lambda s: s.update(extra=torch.ones(1)), 'unexpected: extra'),
        (lambda s: s.update({KEY: s[KEY][:5]}), f'shape of {KEY}: found (5, 128, 1, 1), expected (150, 128, 1, 1)'),
        (lambda s: s.update({KEY: s[KEY].half()}), f'dtype of {KEY}: found torch.float16, expected torch.float32'),
    ],
)
def test_each_disagreement_is_listed(m0, change, words):
    expected = skeleton_state('m0')
    check_weights_fit(m0, expected, 'm0')
    state_dict = dict(m0)
    change(state_dict)
    with pytest.raises(ConversionError) as error:
        check_weights_fit(state_dict, expected, 'm0')
    assert '1 disagreement' in str(error.value) and words in str(error.value)


def test_ten_disagreements_and_a_count(m0):
    with pytest.raises(ConversionError) as error:
        check_weights_fit({}, m0, 'm0')
    lines = str(error.value).splitlines()
    assert f'{len(m0)} disagreement' in lines[0] and len(lines) == 12 and lines[-1].endswith(f'and {len(m0) - 10} more')


def test_another_variant_is_said_first(m0):
    m4 = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in skeleton_state('m4').items()}
    with pytest.raises(ConversionError, match=r'^The file is m4, the network m3\.\nThe weights do not fit it; \d+ dis'):
        check_weights_fit(m4, skeleton_state('m3'), 'it')
    with pytest.raises(ConversionError, match=r'^The weights do not fit'):
        check_weights_fit({**m0, KEY: m0[KEY][:5]}, skeleton_state('m0'), 'it')
