"""The segmentor in torch alone against mmseg's EncoderDecoder with the same state dict, and the genuine label maps."""

import copy
import inspect

import numpy as np
import pytest
import torch
from helpers.networks import randomise_norms
from helpers.reference import genuine_maps
from helpers.segmentors import MEAN, STD, build, deviation
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.checkpoints.keys import convert_state_dict, get_state_dict
from projects.recnext.recnext.models import recnext as core
from projects.recnext.recnext.models.folding import FoldedFPN
from projects.recnext.recnext.models.preprocess import Preprocess
from projects.recnext.recnext.models.recnext import ARCHS, DropPath
from projects.recnext.recnext.models.semantic_fpn import RecNeXtSegmentor
from projects.recnext.recnext.openmmlab.backbone import RecNeXt
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.images import read_image

# Of mmseg, on two classes.
pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.usefixtures('one_thread')]

TINY = dict(channels=(8, 16, 32, 64), depths=(1, 2, 1, 1), mlp_ratio=2, token_mixer='conv')
CASES = {
    'm3': dict(arch='m3', num_classes=150),
    'a3': dict(arch='a3', num_classes=19),
    'tiny': dict(arch=TINY, num_classes=7, fpn_channels=32, head_channels=4),
    'one map': dict(arch=TINY, num_classes=2, threshold=0.4, fpn_channels=16, head_channels=8),
    'six channels': dict(arch=TINY, num_classes=3, in_channels=6, fpn_channels=16, head_channels=16),
}
SIZES = ((64, 96), (32, 32), (160, 64), (70, 101), (1, 33))


def mmseg_cfg(arch, num_classes, in_channels=3, fpn_channels=256, head_channels=128, threshold=None) -> dict:
    """The same network, in a config's words."""
    channels = ARCHS[arch]['channels'] if isinstance(arch, str) else arch['channels']
    return dict(
        backbone=dict(type='RecNeXt', arch=arch, in_channels=in_channels),
        neck=dict(type='FPN', in_channels=list(channels), out_channels=fpn_channels, num_outs=4),
        decode_head=dict(
            type='FPNHead',
            in_channels=[fpn_channels] * 4,
            in_index=[0, 1, 2, 3],
            feature_strides=[4, 8, 16, 32],
            channels=head_channels,
            num_classes=num_classes,
            norm_cfg=dict(type='BN'),
            align_corners=False,
            **({} if threshold is None else dict(out_channels=1, threshold=threshold)),
        ),
        test_cfg=dict(mode='whole'),
    )


@pytest.fixture(scope='module', params=CASES)
def pair(request):
    """mmseg's segmentor and ours, with the weights of mmseg's."""
    args = CASES[request.param]
    torch.manual_seed(0)
    theirs = build(mmseg_cfg(**args), 'EncoderDecoder').eval()
    randomise_norms(theirs)
    torch.nn.init.normal_(theirs.decode_head.conv_seg.weight)
    torch.nn.init.normal_(theirs.decode_head.conv_seg.bias)
    ours = RecNeXtSegmentor(**args).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def test_one_state_dict_fits_both(pair):
    """The same keys and shapes in the same order, and so the same parameters for an optimizer, which counts them."""
    theirs, ours = pair
    for of in (lambda model: model.state_dict(), lambda model: dict(model.named_parameters())):
        mine, other = ([(name, tensor.shape, tensor.dtype) for name, tensor in of(m).items()] for m in (ours, theirs))
        assert mine == other


@torch.no_grad()
@pytest.mark.parametrize('batch', [1, 3])
def test_logits_are_mmsegs_bit_for_bit(pair, batch):
    theirs, ours = pair
    for size in SIZES:
        images = torch.randn(batch, ours.backbone.stem[0].conv.in_channels, *size)
        logits = ours(images)
        assert logits.dtype == torch.float32 and logits.shape[2:] == tuple(-(-side // 4) for side in size)
        assert torch.equal(logits, theirs(images)), size


@torch.no_grad()
@pytest.mark.parametrize('fuse', ['norms', 'all'])
def test_fused_they_stay_within_the_rounding(pair, fuse):
    theirs, ours = pair
    fused = copy.deepcopy(ours)
    fused.switch_to_deploy(fuse)
    assert not any(isinstance(module, core.NORMS) for module in fused.modules())
    assert isinstance(fused.neck, FoldedFPN) == (fuse == 'all')
    keys = list(fused.state_dict())
    fused.switch_to_deploy(fuse)
    assert list(fused.state_dict()) == keys and not fused.training
    for size in SIZES:
        images = torch.randn(2, ours.backbone.stem[0].conv.in_channels, *size)
        assert deviation(fused(images), theirs(images)) < 1e-5
    # In double precision nothing is left of it.
    double = copy.deepcopy(ours).double()
    expected = double(images.double())
    double.switch_to_deploy(fuse)
    assert deviation(double(images.double()), expected) < 1e-12


@torch.no_grad()
def test_fused_as_mmsegs_modules_are_fused():
    """The arithmetic is the same, and so are the bits."""
    torch.manual_seed(0)
    theirs = build(mmseg_cfg(**CASES['tiny']), 'FastEncoderDecoder').eval()
    randomise_norms(theirs)
    ours = RecNeXtSegmentor(**CASES['tiny']).eval()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.switch_to_deploy()
    assert ours.neck.folded == theirs.neck.folded == (0, 1, 2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96)
    assert torch.equal(ours(images), theirs.forward_logits(images))


def test_label_maps_are_mmsegs(pair):
    """Of images of several sizes, each resized, predicted and brought back; in their order."""
    theirs, ours = pair
    if ours.threshold is not None and 'sigmoid' not in inspect.getsource(theirs.postprocess_result):
        pytest.skip('mmsegmentation 1.0 compares the logit itself with the threshold')
    channels = ours.backbone.stem[0].conv.in_channels
    generator = np.random.default_rng(0)
    ours = copy.copy(ours)
    statistics = dict(mean=tuple(MEAN) * (channels // 3), std=tuple(STD) * (channels // 3))
    ours.preprocess = Preprocess((160, 64), **statistics)
    sizes = [(70, 101), (40, 64), (90, 33), (70, 101)]
    photos = [generator.integers(0, 256, (*size, channels), np.uint8) for size in sizes]
    batch = [ours.prepare(photo) for photo in photos]
    labels = ours.label_maps(batch)
    for index, size in enumerate(sizes):
        assert labels[index].shape == size and labels[index].dtype == torch.int64
        # With the same images beside it: a convolution rounds as it likes for another number of images.
        group = [other for other, one in enumerate(sizes) if one == size]
        images = ours.preprocess.normalise(torch.stack([batch[other].inputs for other in group]))
        metainfo = dict(img_shape=tuple(images.shape[2:]), ori_shape=size)
        with torch.no_grad():
            results = theirs.predict(images, [SegDataSample(metainfo=metainfo) for _ in group])
        expected = results[group.index(index)].pred_sem_seg.data[0]
        assert torch.equal(labels[index], expected.long())


def test_the_genuine_label_maps_pixel_for_pixel(real_m3, ade20k_sample):
    """Of mmseg 0.30, with its own checkpoint and three photos."""
    model = RecNeXtSegmentor('m3').eval()
    model.load_state_dict(convert_state_dict(get_state_dict(read_checkpoint(real_m3))).state_dict)
    maps = genuine_maps()
    photos = {path.stem: path for path in ade20k_sample.rglob('*.jpg')}
    assert len(maps) == 3 and maps.keys() <= photos.keys()
    for name, expected in maps.items():
        (labels,) = model.label_maps([model.prepare(read_image(photos[name]))])
        assert np.array_equal(labels.numpy(), expected), name


def test_a_threshold_is_for_two_classes():
    with pytest.raises(UserError, match='A threshold tells two classes apart; found 3 classes'):
        RecNeXtSegmentor(TINY, 3, threshold=0.5)


def test_training_mode_and_other_words_are_not_fused():
    model = RecNeXtSegmentor(TINY, 2)
    with pytest.raises(UserError, match=r'call \.eval\(\)'):
        model.switch_to_deploy()
    with pytest.raises(UserError, match='none, norms, all; found some'):
        model.eval().switch_to_deploy('some')


def test_sixteen_bits_and_channels_last():
    torch.manual_seed(0)
    model = RecNeXtSegmentor(**CASES['tiny']).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
        model.to_dtype_and_layout(torch.bfloat16, channels_last=True)
        logits = model(images)
    assert logits.dtype == torch.float32 and deviation(logits, expected) < 0.1
    assert model.backbone.stem[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    model.to_dtype_and_layout(torch.float16, channels_last=False)
    with pytest.raises(UserError, match='--precision bf16'):
        model.check_finite(torch.tensor([1.0, torch.inf]))


# --- The backbone here and the core's ---


@pytest.mark.parametrize('arch', ['m0', 'a0', TINY], ids=['m0', 'a0', 'dict'])
def test_the_backbone_for_configs_is_the_cores(arch):
    """Keys, the order of the parameters, which optimizers count by, and the random draws."""
    made = []
    for kind, kwargs in ((core.RecNeXt, {}), (RecNeXt, dict(norm_cfg=dict(type='BN', requires_grad=True)))):
        torch.manual_seed(3)
        made.append((kind(arch, drop_path_rate=0.1, **kwargs), torch.rand(4)))
    (plain, after), (ours, after_ours) = made
    assert torch.equal(after, after_ours)
    for mine, other in zip(
        (list(ours.named_parameters()), list(ours.named_buffers()), list(ours.state_dict().items())),
        (list(plain.named_parameters()), list(plain.named_buffers()), list(plain.state_dict().items())),
    ):
        assert [name for name, _ in mine] == [name for name, _ in other]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(mine, other))
    assert not hasattr(plain, 'init_weights')  # mmengine would call it
    ours.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rate', [0.0, 0.1, 0.5, 1.0])
def test_stochastic_depth_is_that_of_mmcv(rate, dtype):
    ours, theirs = DropPath(rate), MODELS.build(dict(type='DropPath', drop_prob=rate))
    x = torch.randn(64, 3, 2, 2).to(dtype)
    for training in (True, False):
        outputs = []
        for module in (ours.train(training), theirs.train(training)):
            torch.manual_seed(5)
            outputs.append((module(x), torch.rand(1)))
        assert torch.equal(outputs[0][0].nan_to_num(), outputs[1][0].nan_to_num())
        assert torch.equal(outputs[0][1], outputs[1][1])
