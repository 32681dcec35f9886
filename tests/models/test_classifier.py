"""RecNeXt in MMPretrain: golden logits, one backbone everywhere, folded heads, a teacher, strict weights."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from helpers.networks import randomise_norms
from helpers.reference import ARCH_NAMES, CLASSIFIER_CONFIGS, golden_input, read_layout, released_model_cfg, shared
from mmengine.config import Config
from mmengine.registry import MODELS
from mmpretrain.registry import DATASETS, TRANSFORMS
from mmpretrain.structures import DataSample

import projects.recnext.recnext.timm  # noqa: F401  (registers)
from projects.recnext.recnext.checkpoints.convert import released_tensors
from projects.recnext.recnext.checkpoints.keys import ConversionError, convert_state_dict
from projects.recnext.recnext.models.classifier import TwoBranchHead
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.openmmlab import classifier as classifier_module
from projects.recnext.recnext.openmmlab import pretrained
from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.utils.errors import UserError

TINY = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratio=2, token_mixer='conv')
FOLDED_MILLIONS = dict(zip(ARCH_NAMES, (2.5, 5.2, 6.8, 8.2, 14.1, 22.9, 2.8, 5.9, 7.9, 9.0, 15.8, 25.7)))


def config_of(arch: str, distilled: bool = False) -> Config:
    name = f'recnext-{arch}{"-distilled" if distilled else ""}_8xb256_in1k'
    return Config.fromfile(next(path for path in CLASSIFIER_CONFIGS if path.stem == name))


def build(arch: str) -> torch.nn.Module:
    return MODELS.build(config_of(arch).model)


def tiny(num_classes: int = 5, **changes: object) -> torch.nn.Module:
    cfg = config_of('m0').model
    cfg.update(changes)
    cfg.backbone.arch = TINY
    cfg.head.update(in_channels=64, num_classes=num_classes)
    return MODELS.build(cfg)


def samples(*labels: int) -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in labels]


@pytest.mark.parametrize('deploy', [False, True], ids=['plain', 'folded'])
@pytest.mark.parametrize('arch', ['m0', 'm3', 'a0', 'a3'])
@pytest.mark.parametrize('framework', ['mmpretrain', 'timm'])
def test_golden_logits(arch, deploy, framework, formula_weights):
    golden = np.load(shared(f'legacy/golden/recnext_{arch}_distill_300e.npz'))['logits_64x96']
    model = (build(arch) if framework == 'mmpretrain' else timm.create_model(f'recnext_{arch}')).eval()
    model.load_state_dict(formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors']))
    model = model.double()
    if deploy:
        model.switch_to_deploy()
    with torch.no_grad():
        logits = model(golden_input(64, 96)).numpy()
    assert np.abs(logits - golden).max() < 1e-5 * np.abs(golden).max()


@pytest.mark.parametrize(
    'arch',
    [arch if arch in ('m0', 'a0', 'm3', 'a3') else pytest.param(arch, marks=pytest.mark.full) for arch in ARCH_NAMES],
)
def test_features_are_the_same_in_all_three_frameworks(arch, formula_weights):
    weights = formula_weights(read_layout(f'recnext_{arch}_distill_300e')['tensors'])
    cfg = config_of(arch).model
    cfg.backbone.out_indices = (0, 1, 2, 3)
    mmpretrain, in_timm = MODELS.build(cfg).eval(), timm.create_model(f'recnext_{arch}').eval()
    mmseg = MODELS.build(dict(released_model_cfg(arch), _scope_='mmseg')).backbone.eval()
    mmpretrain.load_state_dict(weights)
    in_timm.load_state_dict(weights)
    mmseg.load_state_dict(convert_state_dict(weights).state_dict)
    image = golden_input(64, 96).float()
    with torch.no_grad():
        expected = mmseg(image)
        for features in (mmpretrain.backbone(image), in_timm.forward_intermediates(image, intermediates_only=True)):
            assert len(features) == 4 and all(torch.equal(a, b) for a, b in zip(features, expected))


@pytest.mark.every(5)
@pytest.mark.parametrize('arch', ARCH_NAMES)
def test_parameters_of_the_folded_classifier(arch):
    with torch.device('meta'):
        model = build(arch).eval()
        assert sorted(model.state_dict()) == sorted(released_tensors('classifier', arch))
        model.switch_to_deploy()
    # The published figures have one decimal; M2's 6.853 M stand there as 6.8.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(FOLDED_MILLIONS[arch], abs=0.06)


@pytest.mark.parametrize(
    'path',
    [
        path if re.match('recnext-[ma][03]', path.stem) else pytest.param(path, marks=pytest.mark.full)
        for path in CLASSIFIER_CONFIGS
    ],
    ids=lambda path: path.stem,
)
def test_configs_build_and_are_what_their_names_say(path):
    cfg = Config.fromfile(path)
    arch = path.stem.split('_')[0].removeprefix('recnext-').removesuffix('-distilled')
    model = build_on_meta(cfg.model)
    assert cfg.model.backbone.arch == arch and model.kind == 'classifier'
    assert ('-distilled' in path.stem) == (model.distillation is not None) == model.head.distilled_training
    rates = dict(m4=0.2, a4=0.2, m5=0.3, a5=0.3)
    assert cfg.model.backbone.get('drop_path_rate', 0) == (0 if '-distilled' in path.stem else rates.get(arch, 0))
    with torch.device('meta'):
        assert model.eval()(torch.empty(2, 3, 64, 96)).shape == (2, model.num_classes)
    for step in (*cfg.train_pipeline, *cfg.test_pipeline):
        TRANSFORMS.build({**step, '_scope_': 'mmpretrain'})
    for split in ('train', 'val', 'test'):
        DATASETS.build({**cfg[f'{split}_dataloader'].dataset, '_scope_': 'mmpretrain', 'lazy_init': True})
    if 'in1k' in path.stem:
        assert cfg.train_cfg.max_epochs == cfg.param_scheduler[-1].end == 300
        assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size
        assert cfg.test_evaluator == dict(type='Accuracy', topk=(1, 5))
        assert cfg.optim_wrapper.optimizer.lr == 1e-3 * 2048 / 512 and len(cfg.data_preprocessor.mean) == 3


@pytest.mark.parametrize('fuse', ['none', 'norms', 'all'])
def test_deployment_changes_nothing(fuse):
    torch.manual_seed(0)
    model = tiny().eval()
    randomise_norms(model)
    model = model.double()
    image = torch.randn(2, 3, 64, 48, dtype=torch.double)
    with torch.no_grad():
        before = model(image)
        model.switch_to_deploy(fuse)
        model.switch_to_deploy(fuse)
        assert torch.allclose(model(image), before, rtol=1e-10, atol=1e-10)
    assert (model.head.head_dist is None) == (fuse == 'all')
    assert [sample.pred_label.item() for sample in model.predict(image)] == before.argmax(1).tolist()


def test_deployment_refuses_training_mode():
    with pytest.raises(UserError, match=r'call \.eval\(\)'):
        tiny().switch_to_deploy()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_format(dtype):
    torch.manual_seed(0)
    model = tiny().eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        model.to_dtype_and_layout(dtype, channels_last=True)
        after = model.forward_logits(image)
    assert after.dtype == torch.float32 and (after - before).abs().max() < 0.05


def test_head_is_the_mean_of_its_branches_but_in_distilled_training():
    torch.manual_seed(0)
    head, x = TwoBranchHead(8, 3), torch.randn(4, 8)
    for training, distilled in ((False, False), (False, True), (True, False)):
        head.train(training)
        head.distilled_training = distilled
        assert torch.allclose(copy.deepcopy(head)(x), (head.head(x) + head.head_dist(x)) / 2)
    head.distilled_training = True
    assert isinstance(head(x), tuple)


class Oracle(torch.nn.Module):
    """A teacher that finds class 2 most likely in every picture."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.eye(5)[torch.full((len(x),), 2)]


def test_the_second_branch_learns_from_the_teacher(monkeypatch):
    asked = []
    monkeypatch.setattr(classifier_module, 'load_teacher', lambda *args: asked.append(args) or Oracle())
    torch.manual_seed(0)
    model = tiny(distillation=dict(model='regnety_160.deit_in1k', alpha=0.25), train_cfg=None)
    model.init_weights()
    assert asked == [('regnety_160.deit_in1k', None)]
    image = torch.randn(6, 3, 64, 64)
    losses = model.train().loss(image, samples(0, 1, 2, 3, 4, 0))
    assert set(losses) == {'loss', 'loss_teacher'}
    model.zero_grad()
    losses['loss_teacher'].backward()
    assert model.head.head.linear.weight.grad is None and model.head.head_dist.linear.weight.grad.abs().sum() > 0
    again = copy.deepcopy(model)
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        sum(again.loss(image, samples(0, 1, 2, 3, 4, 0)).values()).backward()
        optimizer.step()
    assert (again.head(again.extract_feat(image))[1].argmax(1) == 2).all()
    assert len(asked) == 1 and not any('teacher' in key for key in model.state_dict())


def test_a_teacher_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UserError, match=r'teacher no_such_model cannot be had.*\n.*model\.distillation=None'):
        classifier_module.load_teacher('no_such_model')
    torch.save({'weight': torch.ones(3)}, tmp_path / 'teacher.pth')
    with pytest.raises(UserError, match='teacher recnext_m0 cannot be had'):
        classifier_module.load_teacher('recnext_m0', str(tmp_path / 'teacher.pth'))
    model = timm.create_model('recnext_m0')
    torch.save({'model': model.state_dict()}, tmp_path / 'teacher.pth')
    teacher = classifier_module.load_teacher('recnext_m0', str(tmp_path / 'teacher.pth'))
    assert not teacher.training and torch.equal(teacher.head.head.norm.bias, model.head.head.norm.bias)


def test_weights_that_do_not_fit_are_refused(formula_weights):
    weights = formula_weights(read_layout('recnext_m0_distill_300e')['tensors'])
    with pytest.raises(ConversionError, match='this classifier; they are of arch m0'):
        build('m1').load_state_dict(weights, strict=False)
    less = {key: tensor for key, tensor in weights.items() if 'head_dist.norm.bias' not in key}
    with pytest.raises(ConversionError, match=r'1 disagreement.*\n.*missing: head\.head_dist\.norm\.bias'):
        build('m0').load_state_dict(less, strict=False)
    with pytest.raises(ConversionError, match='without a classification head'):
        build('m0').adapt_state_dict(convert_state_dict(weights).state_dict)


def test_a_head_for_other_classes_starts_anew_and_is_named(formula_weights, tmp_path, monkeypatch):
    weights = formula_weights(read_layout('recnext_m0_distill_300e')['tensors'])
    torch.save({'model': weights}, tmp_path / 'released.pth')
    cfg = config_of('m0').model
    cfg.head.num_classes = 7
    cfg.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'released.pth'))
    model, said = MODELS.build(cfg), []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, **_: said.append(line))
    model.init_weights()
    assert torch.equal(model.head.head.norm.bias, weights['head.head.norm.bias'])
    assert torch.equal(model.backbone.stem[0].conv.weight, weights['stem.stem.0.conv.weight'])
    left_out = {key for key in model.state_dict() if model.class_tensors.fullmatch(key)}
    assert '378 tensors loaded, 4 left out' in said[0] and all(key in said[0] for key in left_out)
    assert len(left_out) == 4 and ARCHS['m0']['channels'][-1] == model.head.head.linear.in_features
    with pytest.raises(ConversionError, match=r'shape of head\.head\.linear\.weight'):
        MODELS.build(cfg).load_state_dict(weights)
