"""RecNeXt in timm: what timm's own tests ask of a model, the hub's files, and who imports what when."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.malicious import Command
from helpers.networks import randomise_norms
from helpers.reference import ARCH_NAMES, ROOT, read_layout
from safetensors.torch import save_file

import projects.recnext.recnext.timm  # noqa: F401  (registers)
from projects.recnext.recnext.checkpoints.keys import ConversionError, convert_state_dict
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.utils.errors import UserError

NAMES = [f'recnext_{arch}' for arch in ARCH_NAMES]
SMALL = ('recnext_m0', 'recnext_a0')

by_name = pytest.mark.parametrize('name', NAMES)
small_ones_always = pytest.mark.parametrize(
    'name', [name if name in SMALL else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
of_each_family = pytest.mark.parametrize('name', SMALL)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@by_name
def test_forward(name, image):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        out = model(image)
    assert out.shape == (2, 1000) and out.isfinite().all()


@small_ones_always
def test_backward_gives_every_parameter_a_gradient(name, image):
    model = timm.create_model(name, num_classes=42).train()
    model(image).mean().backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without and model.num_classes == 42


@small_ones_always
def test_default_cfgs(name):
    model = timm.create_model(name)
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg['hf_hub_id'] == f'suous/{name}.dist_300e_in1k' and cfg['url'].endswith(f'/{name}_distill_300e.pth')
    assert f'{name}.base_300e_in1k' in timm.list_pretrained('recnext*')
    assert all(f'{layer}.weight' in state for layer in (cfg['first_conv'], *cfg['classifier']))
    assert timm.data.resolve_data_config(cfg, model=model)['crop_pct'] == 0.875
    with torch.no_grad():
        small = model.eval().forward_features(torch.randn(1, 3, 64, 64))
        assert small.shape == (1, model.num_features, 2, 2) and model.num_features == ARCHS[name[-2:]]['channels'][3]
        model.reset_classifier(0)
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features)
        model.reset_classifier(0, '')
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, model.num_features, 2, 2)
        pooled = timm.create_model(name, num_classes=0)
        assert not any(key.startswith('head') for key in pooled.state_dict())


@small_ones_always
def test_features_only(name, image):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.channels() == list(ARCHS[name[-2:]]['channels'])
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        features = model(image)
    for feature, channels, reduction in zip(features, model.feature_info.channels(), model.feature_info.reduction()):
        assert feature.shape == (2, channels, 64 // reduction, 64 // reduction)
    some = timm.create_model(name, features_only=True, out_indices=(0, 2)).eval()
    names = some.state_dict().keys()
    some.load_state_dict({key: tensor for key, tensor in model.state_dict().items() if key in names})
    with torch.no_grad():
        for found, expected in zip(some(image), (features[0], features[2])):
            assert torch.equal(found, expected)


@of_each_family
def test_forward_intermediates(name, image):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(image)
        assert torch.equal(final, model.forward_features(image)) and torch.equal(final, intermediates[-1])
        last_two = model.forward_intermediates(image, indices=2, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(last_two, intermediates[2:]))
        early = model.forward_intermediates(image, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], intermediates[1])
        with pytest.raises(UserError, match='NCHW'):
            model.forward_intermediates(image, output_fmt='NLC')
        model.prune_intermediate_layers([1])
        pruned = model.forward_intermediates(image, intermediates_only=True)
    assert len(pruned) == 2 and all(torch.equal(a, b) for a, b in zip(pruned, intermediates))


@of_each_family
def test_other_channels_and_pooling(name):
    model = timm.create_model(name, in_chans=5, num_classes=3, drop_rate=0.1, drop_path_rate=0.1)
    assert model(torch.randn(2, 5, 64, 64)).shape == (2, 3)
    with pytest.raises(UserError, match="'avg' or ''; found 'max'"):
        timm.create_model(name, global_pool='max')


@of_each_family
def test_distilled_training_and_checkpointing(name, image):
    model = timm.create_model(name).train()
    model.set_distilled_training()
    assert [logits.shape for logits in model(image)] == [(2, 1000), (2, 1000)]
    model.set_distilled_training(False)
    recomputed = copy.deepcopy(model)
    recomputed.set_grad_checkpointing()
    for m in (model, recomputed):
        m(image).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), recomputed.parameters()))


@of_each_family
def test_parameters_are_grouped_by_layer(name):
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    assert len({group['lr_scale'] for group in groups}) > 10


@pytest.mark.parametrize('name', [SMALL[0], pytest.param(SMALL[1], marks=pytest.mark.full)])
@pytest.mark.parametrize(
    'how', ['trace', 'script', 'fx', pytest.param('compile', marks=pytest.mark.full), 'bf16', 'channels_last', 'deploy']
)
def test_other_ways_to_run_it(name, how, image):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        expected = model(image)
        if how == 'trace':
            found = torch.jit.trace(model, image)(image)
        elif how == 'script':
            found = torch.jit.script(model)(image)
        elif how == 'fx':
            found = torch.fx.symbolic_trace(model)(image)
        elif how == 'compile':
            found = torch.compile(model, backend='aot_eager')(image)
        elif how == 'bf16':
            found = model.bfloat16()(image.bfloat16()).float()
        elif how == 'channels_last':
            found = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
        else:
            model.switch_to_deploy()
            found = model(image)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= (0.1 if how == 'bf16' else 1e-4) * expected.abs().max()


@pytest.mark.every(3)
@small_ones_always
@pytest.mark.parametrize('deploy', [False, True], ids=['plain', 'folded'])
def test_scripted(name, deploy, image):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    randomise_norms(model)
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(image), model(image), rtol=1e-5, atol=1e-5)


def test_scripted_features(image):
    model = timm.create_model('recnext_m0', features_only=True, out_indices=(0, -2)).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(image), model(image), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def hub(tmp_path_factory, formula_weights):
    """Stand-ins for the hub's files, made on demand."""
    folder = tmp_path_factory.mktemp('hub')

    def make(arch: str):
        path = folder / arch / 'model.safetensors'
        if not path.exists():
            path.parent.mkdir()
            save_file(formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors']), path)
        return path

    return make


def create(name: str, file: object, **kwargs: object) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs)


@pytest.mark.every(5)
@pytest.mark.parametrize('arch', ARCH_NAMES)
def test_pretrained_from_the_hubs_file(arch, hub, formula_weights):
    weights = convert_state_dict(
        formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors']), 'timm'
    ).state_dict
    state = create(f'recnext_{arch}', hub(arch)).state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in state)


@pytest.mark.parametrize('form', ['legacy', 'mmpretrain', 'timm'])
def test_checkpoint_path_takes_every_form(form, formula_weights, tmp_path):
    weights = formula_weights(read_layout('recnext_m0_distill_300e')['tensors'])
    torch.save({'state_dict': convert_state_dict(weights, form).state_dict}, tmp_path / 'weights.pth')
    for model in (
        timm.create_model('recnext_m0', checkpoint_path=str(tmp_path / 'weights.pth')),
        create('recnext_m0', tmp_path / 'weights.pth'),
    ):
        assert torch.equal(model.state_dict()['stem.0.conv.weight'], weights['stem.stem.0.conv.weight'])
        assert torch.equal(model.head.head_dist.linear.bias, weights['head.head_dist.linear.bias'])


def test_head_for_other_classes_is_named(hub, caplog):
    with caplog.at_level('WARNING'):
        model = create('recnext_m0', hub('m0'), num_classes=7)
    assert model.head.head.linear.out_features == 7
    for branch in ('head', 'head_dist'):
        assert f'head.{branch}.linear.weight' in caplog.text and f'head.{branch}.linear.bias' in caplog.text
    whole = create('recnext_m0', hub('m0'))
    assert torch.equal(model.head.head.norm.bias, whole.head.head.norm.bias)
    gray = create('recnext_m0', hub('m0'), in_chans=1)
    assert torch.allclose(gray.stem[0].conv.weight, whole.stem[0].conv.weight.sum(1, keepdim=True))
    features = create('recnext_m0', hub('m0'), features_only=True)
    assert torch.equal(features.state_dict()['model.stem.0.conv.weight'], whole.stem[0].conv.weight)


def test_bad_files_are_refused(hub, tmp_path):
    with pytest.raises(ConversionError, match='do not fit this TimmRecNeXt'):
        create('recnext_m1', hub('m0'))
    truncated = tmp_path / 'truncated.safetensors'
    truncated.write_bytes(hub('m0').read_bytes()[:-1000])
    with pytest.raises(UserError, match=r'truncated\.safetensors is truncated or damaged'):
        create('recnext_m0', truncated)
    torch.save({'model': {}, 'evil': Command(tmp_path / 'touched')}, tmp_path / 'evil.pth')
    with pytest.raises(UserError, match='is refused: it wants to run'):
        create('recnext_m0', tmp_path / 'evil.pth')
    assert not (tmp_path / 'touched').exists()


def test_importing_one_file_registers_with_timm(tmp_path):
    run_offline(
        'import sys, projects.recnext.recnext, timm\n'
        "assert not timm.is_model('recnext_m0')\n"
        'import projects.recnext.recnext.timm\n'
        "timm.create_model('recnext_m0')\n"
        "assert timm.is_model('recnext_m3') and not {'mmengine', 'mmcv', 'mmseg', 'mmpretrain'} & set(sys.modules)",
        tmp_path,
    )


@pytest.mark.full
def test_pretrained_from_the_cache_of_the_hub(hub, tmp_path):
    """A file in the place where huggingface_hub keeps what it has downloaded; what is not there is named."""
    cache = tmp_path / 'hub' / 'models--suous--recnext_m0.dist_300e_in1k'
    (cache / 'snapshots' / 'abc').mkdir(parents=True)
    (cache / 'snapshots' / 'abc' / 'model.safetensors').symlink_to(hub('m0'))
    (cache / 'refs').mkdir()
    (cache / 'refs' / 'main').write_text('abc')
    run_offline(
        'import projects.recnext.recnext.timm, timm, torch\n'
        'from safetensors.torch import load_file\n'
        f'weights = load_file({str(hub("m0"))!r})\n'
        "model = timm.create_model('recnext_m0', pretrained=True)\n"
        "assert torch.equal(model.stem[0].conv.weight, weights['stem.stem.0.conv.weight'])\n"
        'from projects.recnext.recnext.utils.errors import UserError\n'
        "try: timm.create_model('recnext_m3', pretrained=True)\n"
        "except UserError as error: assert 'suous/recnext_m3.dist_300e_in1k' in str(error) and 'file=' in str(error)\n"
        "else: raise SystemExit('no error')",
        tmp_path,
    )


def run_offline(script: str, home: Path) -> None:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1', HF_HOME=str(home))
    result = subprocess.run([sys.executable, '-c', script], env=environment, cwd=home, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
