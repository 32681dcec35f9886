"""The network: every variant, any size, the golden outputs of the 0.x implementation, folding, training options."""

import copy

import numpy as np
import pytest
import torch
from helpers.networks import randomise_norms
from helpers.reference import ARCH_NAMES, SEGMENTORS, golden_input, read_layout, shared
from helpers.strength import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from projects.recnext.recnext.checkpoints.keys import check_weights_fit, convert_state_dict, select_backbone
from projects.recnext.recnext.models.recnext import LinearAttention, RecNeXt, get_arch
from projects.recnext.recnext.models.semantic_fpn import RecNeXtSegmentor
from projects.recnext.recnext.utils.errors import UserError

TINY = dict(channels=(8, 16, 32, 64), depths=(1, 2, 1, 1), mlp_ratio=2, token_mixer='conv')
TINY_ATTN = {**TINY, 'channels': (16, 32, 64, 128), 'token_mixer': 'attn'}
TINIES = pytest.mark.parametrize('arch', [TINY, TINY_ATTN], ids=['conv', 'attn'])


def on_meta(arch: str) -> RecNeXtSegmentor:
    """Names, shapes and dtypes of the released segmentor."""
    with torch.device('meta'):
        return RecNeXtSegmentor(arch)


GOLDEN = [('m0', 'distill_300e'), ('a0', 'distill_300e'), ('m3', 'ade20k'), ('a3', 'ade20k')]


@pytest.mark.parametrize('deploy', [False, True], ids=['plain', 'folded'])
@pytest.mark.parametrize(('arch', 'kind'), GOLDEN, ids=[f'{arch}-{kind}' for arch, kind in GOLDEN])
def test_golden_features(arch, kind, deploy, formula_weights):
    golden = np.load(shared(f'legacy/golden/recnext_{arch}_{kind}.npz'))
    state_dict = formula_weights(read_layout(f'recnext_{arch}_{kind}')['tensors'])
    backbone = RecNeXt(arch).eval()
    backbone.load_state_dict(select_backbone(convert_state_dict(state_dict)).state_dict)
    backbone = backbone.double()
    if deploy:
        backbone.switch_to_deploy()
    sizes = sorted({key.split('_')[1] for key in golden if key.startswith('stage')})
    assert sizes == (['64x96', '97x61'] if kind == 'ade20k' else ['64x96'])
    for size in sizes:
        with torch.no_grad():
            features = backbone(golden_input(*map(int, size.split('x'))))
        for stage, feature in enumerate(features):
            expected = golden[f'stage{stage}_{size}']
            assert feature.shape == expected.shape
            assert np.abs(feature.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('arch', ['m3', 'a3'])
def test_golden_logits(arch, formula_weights):
    golden = np.load(shared(f'legacy/golden/recnext_{arch}_ade20k.npz'))
    model = RecNeXtSegmentor(arch).eval()
    state_dict = formula_weights(read_layout(f'recnext_{arch}_ade20k')['tensors'])
    model.load_state_dict(convert_state_dict(state_dict).state_dict)
    model = model.double()
    with torch.no_grad():
        logits = model(golden_input(64, 96))
    assert np.abs(logits.numpy() - golden['logits_64x96']).max() < 1e-5 * np.abs(golden['logits_64x96']).max()


@pytest.mark.parametrize('arch', SEGMENTORS)
def test_keys_and_shapes_of_released_segmentors(arch, formula_weights):
    conversion = convert_state_dict(formula_weights(read_layout(f'recnext_{arch}_ade20k')['tensors']))
    assert conversion.arch == arch and not conversion.left_out
    check_weights_fit(conversion.state_dict, on_meta(arch).state_dict(), arch)


@pytest.mark.parametrize('arch', ARCH_NAMES)
def test_keys_and_shapes_of_released_imagenet_models(arch, formula_weights):
    conversion = convert_state_dict(formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors']))
    assert conversion.arch == arch
    assert len(conversion.left_out) == 14 and all(key.startswith('head.') for key in conversion.left_out)
    check_weights_fit(conversion.state_dict, on_meta(arch).backbone.state_dict(), arch)


@pytest.mark.parametrize(
    ('arch', 'millions'), [('m3', 11.97), ('m4', 17.85), ('m5', 26.62), ('a3', 12.81), ('a4', 19.56), ('a5', 29.46)]
)
def test_parameters_of_the_segmentor(arch, millions):
    parameters = sum(p.numel() for p in on_meta(arch).parameters())
    assert round(parameters / 1e6, 2) == millions


@pytest.mark.parametrize(
    'arch', [arch if arch[1] in '03' else pytest.param(arch, marks=pytest.mark.full) for arch in ARCH_NAMES]
)
def test_every_parameter_of_the_segmentor_gets_a_gradient(arch):
    torch.manual_seed(0)
    model = RecNeXtSegmentor(arch, num_classes=7).train()
    logits = model(torch.randn(2, 3, 64, 64))
    nn.functional.cross_entropy(logits, torch.randint(0, 7, (2, 16, 16))).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@TINIES
@examples(40)
@given(height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_input_size(arch, height, width):
    model = RecNeXt(arch).eval()
    with torch.no_grad():
        features = model(torch.randn(1, 3, height, width))
    for stage, feature in enumerate(features):
        stride = 2 ** (stage + 2)
        assert feature.shape == (1, arch['channels'][stage], -(-height // stride), -(-width // stride))
        assert feature.isfinite().all()


@pytest.mark.parametrize(('arch', 'norm'), [*((arch, nn.BatchNorm2d) for arch in ARCH_NAMES), ('m0', nn.SyncBatchNorm)])
def test_deploy_folds_every_norm_and_changes_nothing(arch, norm):
    torch.manual_seed(0)
    model = RecNeXt(arch, norm=norm).eval()
    randomise_norms(model)
    image = torch.randn(1, 3, 65, 50)
    with torch.no_grad():
        before = model(image)
        model.switch_to_deploy()
        once = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        after = model(image)
        model.switch_to_deploy()
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    twice = model.state_dict()
    assert once.keys() == twice.keys() and all(torch.equal(tensor, twice[key]) for key, tensor in once.items())
    for a, b in zip(before, after):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_deploy_refuses_training_mode_and_other_norms():
    model = RecNeXt(TINY)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r'call \.eval\(\)'):
        model.switch_to_deploy()
    assert model.state_dict().keys() == before.keys()
    with pytest.raises(UserError, match='GroupNorm'):
        RecNeXt(TINY, norm=lambda channels: nn.GroupNorm(4, channels)).eval().switch_to_deploy()
    model.eval()
    model.stages.train()
    with pytest.raises(UserError, match=r'call \.eval\(\)'):
        model.switch_to_deploy()
    assert model.state_dict().keys() == before.keys()


@TINIES
def test_recomputed_activations_change_neither_gradients_nor_statistics(arch):
    torch.manual_seed(0)
    plain = RecNeXt(arch)
    recomputed = RecNeXt(arch, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 48, 40)
    for model in (plain, recomputed):
        sum(feature.square().mean() for feature in model(image)).backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), recomputed.buffers()):
        assert torch.equal(a, b), name
    assert recomputed.stages[0].blocks[0].channel_mixer[0].norm.num_batches_tracked == 1


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    model = RecNeXt(TINY, frozen_stages=frozen_stages).train()
    parts = [model.stem, *model.stages]
    for index, part in enumerate(parts):
        frozen = index <= frozen_stages
        assert all(p.requires_grad != frozen for p in part.parameters())
        assert part.training != frozen


def test_norm_eval_keeps_statistics_but_not_dropout():
    model = RecNeXt(TINY, norm_eval=True, drop_path_rate=0.5).train()
    before = copy.deepcopy(dict(model.named_buffers()))
    model(torch.randn(2, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.stages[0].blocks[0].drop_path.training
    trained = RecNeXt(TINY).train()
    trained(torch.randn(2, 3, 32, 32))
    assert trained.stem[0].norm.num_batches_tracked == 1


def test_drop_path_drops_whole_samples_in_training_only():
    torch.manual_seed(0)
    block = RecNeXt(TINY, drop_path_rate=0.5).stages[0].blocks[0]
    x = torch.randn(64, 8, 4, 4)
    kept = [not torch.equal(a, b) for a, b in zip(block(x), x)]
    assert 15 < sum(kept) < 49
    block.eval()
    assert not any(torch.equal(a, b) for a, b in zip(block(x), x))


def test_out_indices_and_in_channels():
    model = RecNeXt(TINY, in_channels=5, out_indices=(1, 3)).eval()
    assert [f.shape[1] for f in model(torch.randn(1, 5, 32, 32))] == [16, 64]


@TINIES
def test_an_arch_of_ones_own(arch):
    model = RecNeXt(arch)
    assert len(model.stages[1].blocks) == 2
    kinds = {type(block.token_mixer).__name__ for stage in model.stages for block in stage.blocks}
    assert kinds == {'RecConv' if arch is TINY else 'RecAttn'}


@pytest.mark.parametrize(
    ('arch', 'words'),
    [
        ('m9', 'm0, m1'),
        ({**TINY, 'typo': 1}, 'typo'),
        ({k: v for k, v in TINY.items() if k != 'depths'}, 'depths'),
        ({**TINY, 'channels': (8, 16, 32)}, '4 stages'),
        ({**TINY, 'channels': (8, 16, 32, 60)}, 'twice'),
        ({**TINY, 'token_mixer': 'pool'}, 'pool'),
        ({**TINY, 'channels': 64}, 'channels 64'),
        ({**TINY, 'depths': (1, 0, 1, 1)}, r'depths \(1, 0, 1, 1\)'),
        ({**TINY, 'channels': (1, 2, 4, 8)}, 'No channels are left'),
        ({**TINY, 'mlp_ratio': 0}, 'No channels are left'),
        (None, 'a name or a dict'),
    ],
)
def test_bad_arch_is_named(arch, words):
    with pytest.raises(UserError, match=words):
        get_arch(arch)


@pytest.mark.parametrize(
    'args', [dict(out_indices=(4,)), dict(out_indices=()), dict(out_indices=3), dict(frozen_stages=5)]
)
def test_bad_indices_are_named(args):
    with pytest.raises(UserError, match=next(iter(args))):
        RecNeXt(TINY, **args)


def test_attention_refuses_channels_that_do_not_split():
    with pytest.raises(UserError, match='2 heads; found 3 channels'):
        RecNeXt({**TINY_ATTN, 'channels': (3, 6, 12, 24)})


def test_linear_attention_orders_agree():
    torch.manual_seed(0)
    attention = LinearAttention(32, heads=4, tokens_first=False, norm=nn.BatchNorm2d).eval().double()
    x = torch.randn(2, 32, 5, 7, dtype=torch.double)
    channels_first = attention(x)
    attention.tokens_first = True
    assert torch.allclose(channels_first, attention(x), rtol=1e-12, atol=1e-12)
