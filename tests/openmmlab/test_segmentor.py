"""FastEncoderDecoder against mmseg's EncoderDecoder with the same weights: predictions, logits on demand, test-time
augmentation, batches, folding, formats, strict loading."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import Largest
from helpers.segmentors import (
    NORM,
    SIZE,
    deviation,
    head_logits,
    pair,
    raw_images,
    recnext_cfg,
    resnet_cfg,
    sample_of,
    smooth_images,
    step,
)
from mmengine.registry import HOOKS
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FPNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from projects.recnext.recnext.checkpoints.keys import ConversionError
from projects.recnext.recnext.models.folding import FoldedFPN
from projects.recnext.recnext.models.recnext import RecNeXt
from projects.recnext.recnext.openmmlab import segmentor
from projects.recnext.recnext.openmmlab.hooks import compile_for_training
from projects.recnext.recnext.openmmlab.segmentor import SegPrediction
from projects.recnext.recnext.runtimes import deployment as deploy_module
from projects.recnext.recnext.utils.errors import UserError

# Of mmseg, on two classes, align_corners and a head without feature strides.
pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.usefixtures('one_thread')]


@MODELS.register_module(force=True)
class SharpeningFPNHead(FPNHead):
    """A head with a mind of its own about how logits become predictions."""

    def predict_by_feat(self, seg_logits, batch_img_metas):
        seg_logits = seg_logits - seg_logits.mean(1, keepdim=True)
        size = tuple(batch_img_metas[0]['img_shape'][:2])
        return 3 * F.interpolate(seg_logits, size=size, mode='bicubic', align_corners=self.align_corners)


def metas(name, number):
    """Data samples of a batch, or None."""
    other = [(150, 201), (61, 70), (96, 128)]
    if name == 'none':
        return None
    samples = []
    for index in range(number):
        sample = sample_of(ori_shape=other[index])
        if name == 'img_padding_size':
            sample.set_metainfo(dict(img_padding_size=[0, 13 + index, 0, 9], padding_size=[1, 1, 1, 1]))
        elif name == 'padding_size':
            sample.set_metainfo(dict(padding_size=[2, 5, 3, 7 + index]))
        elif name == 'horizontal':
            sample.set_metainfo(dict(flip=True, flip_direction='horizontal'))
        elif name == 'vertical, padded':
            sample.set_metainfo(dict(flip=True, flip_direction='vertical', padding_size=[0, 5, 3, 0]))
        elif name == 'flips':
            sample.set_metainfo(dict(flip=index > 0, flip_direction=[None, 'horizontal', 'vertical'][index]))
        elif name == 'no pad_shape':
            sample = SegDataSample(metainfo=dict(img_shape=SIZE, ori_shape=other[index]))
        elif name == 'three lengths':
            sample = SegDataSample(metainfo=dict(img_shape=(*SIZE, 3), pad_shape=(*SIZE, 3), ori_shape=other[index]))
        samples.append(sample)
    return samples


METAS = (
    'none',
    'plain',
    'img_padding_size',
    'padding_size',
    'horizontal',
    'vertical, padded',
    'flips',
    'no pad_shape',
    'three lengths',
)
PAIRS = {
    'seven classes': lambda **options: recnext_cfg(7, **options),
    'two classes': lambda **options: recnext_cfg(2, **options),
    'one map': lambda **options: recnext_cfg(2, head=dict(out_channels=1, threshold=0.4), **options),
    'its own head': lambda **options: recnext_cfg(7, head=dict(type='SharpeningFPNHead'), **options),
    'ResNetV1c and FCNHead': lambda **options: resnet_cfg(7, **options),
    'ResNet and FCNHead': lambda **options: resnet_cfg(7, backbone='ResNet', **options),
}


@torch.no_grad()
def predict(model, images, samples=None):
    return model.predict(images, copy.deepcopy(samples))


def assert_equal_data(ours, theirs, what):
    assert isinstance(ours, PixelData)
    ours, theirs = ours.data, theirs.data
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    assert torch.equal(ours, theirs), f'{what}: {(ours != theirs).sum()} of {ours.numel()} differ'


def assert_same_predictions(ours, theirs):
    assert len(ours) == len(theirs)
    for index, (our, their) in enumerate(zip(ours, theirs)):
        assert isinstance(our, SegPrediction)
        assert_equal_data(our.pred_sem_seg, their.pred_sem_seg, f'labels {index}')
        assert our.metainfo == their.metainfo
        assert_equal_data(our.seg_logits, their.seg_logits, f'logits {index}')


@pytest.mark.every(3)
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('name', PAIRS)
def test_predictions_are_those_of_mmseg(name, mode, align_corners):
    stock, fast = pair(PAIRS[name](mode=mode, align_corners=align_corners))
    images = smooth_images(3)
    seen = set()
    # What slides takes the same last steps as what does not, and more time.
    for meta in METAS if mode == 'whole' else ('none', 'padding_size', 'flips', 'no pad_shape'):
        for number in (1, 3) if mode == 'whole' or meta == 'none' else (3,):
            samples = metas(meta, number)
            expected = predict(stock, images[:number], samples)
            assert_same_predictions(predict(fast, images[:number], samples), expected)
            seen.update(label.item() for sample in expected for label in sample.pred_sem_seg.data.unique())
    # A test on which one label wins everywhere would not tell much.
    assert len(seen) > stock.num_classes / 2


@pytest.mark.parametrize('crop', [(96, 128), (200, 300), (33, 47)])
def test_slide_with_any_crop(crop):
    cfg = recnext_cfg()
    cfg['test_cfg'] = dict(mode='slide', crop_size=crop, stride=(31, 29))
    stock, fast = pair(cfg)
    for samples in (None, metas('plain', 2)):
        images = smooth_images(2)
        assert_same_predictions(predict(fast, images, samples), predict(stock, images, samples))


@pytest.mark.parametrize('size', [(32, 32), (64, 64), (70, 101)])
def test_small_inputs(size):
    """Sizes at which PyTorch resizes with other kernels."""
    stock, fast = pair(recnext_cfg())
    images = smooth_images(3, size)
    samples = [sample_of(size, ori_shape=ori_shape) for ori_shape in ((20, 30), (64, 64), (100, 177))]
    for given in (None, samples):
        assert_same_predictions(predict(fast, images, given), predict(stock, images, given))


def confident(model):
    """Make one class win by far, everywhere."""
    with torch.no_grad():
        model.decode_head.conv_seg.bias[2] = 1e6
    return model


def test_one_class_everywhere():
    stock, fast = map(confident, pair(recnext_cfg()))
    for samples in (None, metas('plain', 3)):
        assert_same_predictions(predict(fast, smooth_images(3), samples), predict(stock, smooth_images(3), samples))


@pytest.mark.parametrize('name', ['slide', 'its own head'])
def test_one_class_everywhere_without_any_step(name):
    cfg = recnext_cfg(mode='slide') if name == 'slide' else PAIRS[name]()
    stock, fast = map(confident, pair(cfg))
    images = smooth_images(2)
    assert_same_predictions(predict(fast, images), predict(stock, images))


# --- Logits on demand ---


@pytest.fixture(scope='module')
def fast():
    return pair(recnext_cfg())[1]


@pytest.fixture
def prediction(fast):
    sample = sample_of(ori_shape=(150, 201))
    sample.gt_sem_seg = PixelData(data=torch.ones(1, 150, 201, dtype=torch.long))
    return predict(fast, smooth_images(1), [sample])[0]


def test_logits_are_not_made_unless_asked_for(prediction):
    assert 'seg_logits' not in prediction and 'seg_logits' not in prediction.keys()
    assert set(prediction.keys()) == {'pred_sem_seg', 'gt_sem_seg'}
    logits = prediction.seg_logits
    assert logits.data.shape == (7, 150, 201)
    assert 'seg_logits' in prediction and prediction.seg_logits is logits
    assert torch.equal(logits.data.argmax(0, keepdim=True), prediction.pred_sem_seg.data)


def test_full_size_logits_never_exist():
    """150 classes at twice the size of the input."""
    cfg = recnext_cfg(150)
    stock, fast = pair(cfg)
    samples = [sample_of(ori_shape=(192, 256)), sample_of(ori_shape=(200, 250))]
    most = {}
    for name, model in (('stock', stock), ('fast', fast)):
        with Largest() as largest:
            predictions = predict(model, smooth_images(2), samples)
        most[name] = largest.elements
    full = 150 * 96 * 128
    assert most['stock'] >= 4 * full and most['fast'] < full / 2
    with Largest() as largest:
        assert predictions[0].seg_logits.data.numel() == 4 * full
    assert largest.elements == 4 * full


COPIES = {
    'clone': lambda sample: sample.clone(),
    'new': lambda sample: sample.new(),
    'cpu': lambda sample: sample.cpu(),
    'to': lambda sample: sample.to('cpu'),
    'detach': lambda sample: sample.detach(),
    'deepcopy': copy.deepcopy,
    'pickle': lambda sample: pickle.loads(pickle.dumps(sample)),
}


@pytest.mark.parametrize('asked', [False, True])
@pytest.mark.parametrize('name', COPIES)
def test_copies_make_logits_too(prediction, name, asked):
    if asked:
        assert prediction.seg_logits is not None
    made = COPIES[name](prediction)
    assert type(made) is SegPrediction and made is not prediction
    assert ('seg_logits' in made) == asked
    assert made.metainfo == prediction.metainfo
    for key in ('pred_sem_seg', 'gt_sem_seg', 'seg_logits'):
        assert_equal_data(getattr(made, key), getattr(prediction, key), key)


def test_labels_as_numpy(prediction):
    labels = prediction.numpy().pred_sem_seg.data
    assert (labels == prediction.pred_sem_seg.data.numpy()).all() and labels.shape == (1, 150, 201)


def test_as_dict(prediction):
    values = prediction.to_dict()
    assert values['ori_shape'] == (150, 201) and 'seg_logits' not in values
    assert torch.equal(values['pred_sem_seg']['data'], prediction.pred_sem_seg.data)
    assert values['gt_sem_seg']['data'].min() == 1
    assert prediction.seg_logits is not None
    assert prediction.to_dict()['seg_logits']['data'].shape == (7, 150, 201)


def test_what_was_given_stays_as_it_was(fast):
    samples = metas('flips', 3)
    before = [sample.to_dict() for sample in samples]
    with torch.no_grad():
        predictions = fast.predict(smooth_images(3), samples)
    assert [sample.to_dict() for sample in samples] == before
    assert all(made is not given for made, given in zip(predictions, samples))


def test_a_sample_without_a_promise_has_no_logits():
    sample = SegPrediction()
    assert not hasattr(sample, 'seg_logits')
    sample.seg_logits = PixelData(data=torch.ones(2, 3, 4))
    assert sample.seg_logits.data.shape == (2, 3, 4)


def test_logits_of_an_earlier_prediction_are_not_kept(fast):
    images = smooth_images(2)
    first = predict(fast, images[:1], [sample_of()])
    assert first[0].seg_logits is not None
    second = predict(fast, images[1:], first)[0]
    assert torch.equal(second.seg_logits.data.argmax(0, keepdim=True), second.pred_sem_seg.data)


@pytest.mark.parametrize('with_samples', [True, False])
def test_sizes_may_differ_within_a_batch(with_samples, monkeypatch):
    stock, fast = pair(recnext_cfg())
    sizes = [(64, 96), (96, 64), (64, 96), (70, 83), (96, 64)]
    images = raw_images(sizes)
    samples = None
    if with_samples:
        samples = [sample_of(size, ori_shape=(90 + index, 120), index=index) for index, size in enumerate(sizes)]
    batches = []
    network = fast.forward_logits
    monkeypatch.setattr(fast, 'forward_logits', lambda inputs: (batches.append(len(inputs)), network(inputs))[1])
    together = step(fast, images, samples)
    assert sorted(batches) == [1, 2, 2]
    for index, image in enumerate(images):
        given = None if samples is None else samples[index : index + 1]
        # With the same images in the batch: convolutions round as they like for another number of images.
        group = [place for place, size in enumerate(sizes) if size == sizes[index]]
        chosen = None if samples is None else [samples[place] for place in group]
        expected = step(stock, [images[place] for place in group], chosen)[group.index(index)]
        assert_same_predictions([together[index]], [expected])
        alone = step(stock, [image], given)[0]
        assert (alone.pred_sem_seg.data == together[index].pred_sem_seg.data).double().mean() > 0.999
        if with_samples:
            assert together[index].index == index


@pytest.mark.parametrize('form', [list, torch.stack])
def test_a_batch_of_one_size_goes_as_it_goes_in_mmseg(form):
    stock, fast = pair(recnext_cfg())
    images = form(raw_images([(64, 96)] * 3))
    samples = [sample_of((64, 96), ori_shape=(90, 120 + index)) for index in range(3)]
    with torch.no_grad():
        ours, theirs = (
            model.test_step(dict(inputs=images, data_samples=copy.deepcopy(samples))) for model in (fast, stock)
        )
    assert_same_predictions(ours, theirs)


def test_padding_by_the_data_preprocessor():
    cfg = recnext_cfg()
    cfg['data_preprocessor']['test_cfg'] = dict(size_divisor=32)
    stock, fast = pair(cfg)
    images = raw_images([(70, 99)] * 2)
    samples = [sample_of((70, 99), ori_shape=(100, 140 + index)) for index in range(2)]
    assert_same_predictions(step(fast, images, samples), step(stock, images, samples))


# --- Test-time augmentation ---


@pytest.mark.parametrize('name', ['seven classes', 'one map'])
def test_augmented_labels_are_those_of_mmseg(name):
    cfg = PAIRS[name]()
    # SegTTAModel takes the sigmoid of what is one already.
    cfg['decode_head']['threshold'] = 0.61
    stock, fast = pair(cfg)
    sizes = [(64, 96), (96, 144), (128, 192)]
    images, samples = [], []
    for size in sizes:
        for flip in (None, 'horizontal', 'vertical'):
            image = F.interpolate(raw_images([(80, 120)])[0][None].float(), size=size, mode='bilinear')[0].byte()
            dims = {None: (), 'horizontal': (2,), 'vertical': (1,)}[flip]
            sample = sample_of(size, ori_shape=(100, 151), flip=flip is not None, flip_direction=flip, img_path='a.jpg')
            sample.gt_sem_seg = PixelData(data=torch.full((1, 100, 151), 3))
            images.append([image.flip(dims)])
            samples.append([sample])
    merged = []
    for model in (stock, fast):
        data = dict(inputs=[list(group) for group in images], data_samples=copy.deepcopy(samples))
        with torch.no_grad():
            merged += MODELS.build(dict(type='SegTTAModel', module=model)).test_step(data)
    theirs, ours = merged
    assert len(theirs.pred_sem_seg.data.unique()) >= 2
    assert_equal_data(ours.pred_sem_seg, theirs.pred_sem_seg, 'labels')
    assert ours.gt_sem_seg.data.min() == 3 and ours.img_path == 'a.jpg'


# --- Folding ---


def norms(part):
    """The batch norms inside."""
    return [module for module in part.modules() if isinstance(module, _BatchNorm)]


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(segmentor, 'print_log', lambda message, **_: messages.append(message))
    return messages


# With 32 channels of FPN and 4 of the head, all levels pay but the topmost, which is never folded.
WIDE = recnext_cfg(neck=dict(out_channels=32), head=dict(in_channels=[32] * 4, channels=4))


@pytest.mark.every(3)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.double, 1e-12)])
@pytest.mark.parametrize('fuse', ['norms', 'all'])
@pytest.mark.parametrize(
    'cfg', [WIDE, recnext_cfg(), resnet_cfg(), resnet_cfg(backbone='ResNet')], ids=['wide', 'fpn', 'v1c', 'resnet']
)
def test_folding_changes_nothing_but_the_rounding(cfg, fuse, dtype, tolerance):
    model = pair(cfg)[1].to(dtype)
    for images in (smooth_images(2).to(dtype), smooth_images(1, (97, 130)).to(dtype)):
        plain, folded = copy.deepcopy(model), copy.deepcopy(model)
        assert norms(folded)
        folded.switch_to_deploy(fuse)
        parts = folded.parts()
        if not isinstance(folded.backbone, RecNeXt):
            # What its forward method does with its norms is not known.
            parts.pop('backbone')
        assert not any(map(norms, parts.values())) and not folded.training
        expected = head_logits(plain, images)
        assert deviation(head_logits(folded, images), expected) < tolerance
    keys = list(folded.state_dict())
    assert isinstance(getattr(folded, 'neck', None), FoldedFPN) == (fuse == 'all' and folded.with_neck)
    if fuse == 'all' and cfg is WIDE:
        assert folded.neck.folded == (0, 1, 2)
    before = head_logits(folded, images)
    folded.switch_to_deploy(fuse)
    assert list(folded.state_dict()) == keys and torch.equal(head_logits(folded, images), before)


@MODELS.register_module(force=True)
class NormAndActivation(nn.BatchNorm2d):
    """As timm has them: no norm that could be folded alone."""

    def forward(self, x):
        return super().forward(x).relu() - 0.1


@pytest.mark.parametrize('fuse', ['norms', 'all'])
def test_norms_that_do_more_are_left_alone(fuse):
    model = pair(recnext_cfg(head=dict(norm_cfg=dict(type='NormAndActivation'))))[1].double()
    expected = head_logits(model, smooth_images(1).double())
    model.switch_to_deploy(fuse)
    assert not norms(model.backbone) and norms(model.decode_head)
    assert deviation(head_logits(model, smooth_images(1).double()), expected) < 1e-12


def test_norms_first_and_all_later():
    model = pair(WIDE)[1].double()
    expected = head_logits(model, smooth_images(1).double())
    model.switch_to_deploy('norms')
    model.switch_to_deploy('all')
    assert isinstance(model.neck, FoldedFPN)
    assert deviation(head_logits(model, smooth_images(1).double()), expected) < 1e-12


def test_folded_segmentors_predict(fast):
    model = copy.deepcopy(fast)
    model.switch_to_deploy()
    for mine, plain in zip(*(predict(each, smooth_images(3), metas('flips', 3)) for each in (model, fast))):
        assert (mine.pred_sem_seg.data == plain.pred_sem_seg.data).double().mean() > 0.999
        assert deviation(mine.seg_logits.data, plain.seg_logits.data) < 1e-5


def test_none_changes_nothing(fast):
    model = copy.deepcopy(fast)
    for training in (False, True):
        model.train(training).switch_to_deploy('none')
    assert model.training and len(norms(model)) == len(norms(fast))
    for key, tensor in fast.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)


@pytest.mark.parametrize('cfg', [recnext_cfg(), resnet_cfg()], ids=['recnext', 'resnet'])
def test_folding_wrongly_is_refused(cfg):
    model = pair(cfg)[1]
    number = len(norms(model))
    with pytest.raises(UserError, match=r'none, norms, all.*found everything'):
        model.switch_to_deploy('everything')
    for fuse in ('norms', 'all'):
        with pytest.raises(UserError, match=r'call .eval\(\)'):
            model.train().switch_to_deploy(fuse)
    assert len(norms(model)) == number


@pytest.mark.parametrize(
    ('cfg', 'words'),
    [
        (recnext_cfg(neck=dict(norm_cfg=NORM)), 'an FPN with a norm (BatchNorm2d)'),
        (recnext_cfg(head=dict(type='SharpeningFPNHead')), 'SharpeningFPNHead in the place of FPNHead'),
    ],
)
def test_of_a_neck_that_cannot_be_folded_the_norms_are(cfg, words, said):
    model = pair(cfg)[1].double()
    images = smooth_images(1).double()
    expected = head_logits(model, images)
    said.clear()
    model.switch_to_deploy('all')
    assert len(said) == 1 and said[0].startswith('Only the norms are folded.') and words in said[0]
    assert not norms(model) and type(model.neck).__name__ == 'FPN'
    assert deviation(head_logits(model, images), expected) < 1e-12


# --- Formats ---


@pytest.mark.every(3)
@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize(
    ('dtype', 'agree', 'close'),
    [(torch.float32, 0.999, 1e-5), (torch.float16, 0.99, 0.01), (torch.bfloat16, 0.95, 0.08)],
)
@pytest.mark.parametrize('cfg', [recnext_cfg(), resnet_cfg(), recnext_cfg(mode='slide')], ids=['fpn', 'v1c', 'slide'])
def test_formats(cfg, dtype, agree, close, channels_last):
    """The bounds: some ten layers, each of which rounds by an epsilon or so; a few pixels lie between two classes."""
    plain = pair(cfg)[1]
    model = copy.deepcopy(plain)
    model.to_dtype_and_layout(dtype, channels_last)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for module in convolutions:
        assert module.weight.dtype == dtype and module.weight.is_contiguous(memory_format=layout)
    images = smooth_images(3)
    logits = head_logits(model, images)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert deviation(logits, head_logits(plain, images)) < close
    for mine, theirs in zip(*(predict(each, images, metas('flips', 3)) for each in (model, plain))):
        assert mine.seg_logits.data.dtype == torch.float32
        assert (mine.pred_sem_seg.data == theirs.pred_sem_seg.data).double().mean() >= agree
        # And they are the labels of these logits.
        assert torch.equal(mine.seg_logits.data.argmax(0, keepdim=True), mine.pred_sem_seg.data)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_images_are_normalised_in_single_precision(dtype):
    model = pair(recnext_cfg())[1]
    before = {name: tensor.clone() for name, tensor in model.data_preprocessor.named_buffers()}
    model.to_dtype_and_layout(dtype, True)
    after = dict(model.data_preprocessor.named_buffers())
    assert set(after) >= {'mean', 'std'}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
    assert step(model, raw_images([(64, 96)]), [sample_of((64, 96))])[0].pred_sem_seg.data.shape == (1, 64, 96)


def test_the_format_is_of_one_model_only(fast):
    copy.deepcopy(fast).to_dtype_and_layout(torch.bfloat16, True)
    assert head_logits(copy.deepcopy(fast), smooth_images(1)).dtype == torch.float32
    assert segmentor.FastEncoderDecoder._input_kwargs is None


# --- DeployHook ---


@pytest.mark.parametrize('wrappers', [0, 1, 2])
def test_deploy_hook_reaches_the_segmentor_inside(wrappers):
    model = pair(recnext_cfg())[1].train()
    outer = model
    for _ in range(wrappers):
        outer = SimpleNamespace(module=outer)
    messages = []
    hook = HOOKS.build(dict(type='DeployHook', fuse='norms', precision='bf16', channels_last=True))
    hook.before_test(SimpleNamespace(model=outer, logger=SimpleNamespace(info=messages.append)))
    assert not model.training and not norms(model)
    assert model.backbone.stem[0].conv.weight.dtype == torch.bfloat16
    assert messages == ['Network: bf16, folded: norms, channels last.']


def test_deploy_hook_by_default_and_twice():
    model = pair(recnext_cfg())[1]
    expected = head_logits(model, smooth_images(1))
    hook = HOOKS.build(dict(type='DeployHook'))
    runner = SimpleNamespace(model=model, logger=logging.getLogger('test_fast_segmentor'))
    for _ in range(2):
        hook.before_test(runner)
        assert isinstance(model.neck, FoldedFPN)
        assert deviation(head_logits(model, smooth_images(1)), expected) < 1e-5


def test_deploy_hook_on_another_segmentor_is_refused():
    runner = SimpleNamespace(model=pair(recnext_cfg())[0], logger=logging.getLogger('test_fast_segmentor'))
    with pytest.raises(UserError, match='FastEncoderDecoder or RecNeXtClassifier; found EncoderDecoder'):
        HOOKS.build(dict(type='DeployHook')).before_test(runner)


@pytest.mark.parametrize('lacks', [False, True])
def test_16_bits_without_instructions_for_them_are_warned_of(monkeypatch, caplog, lacks):
    model = pair(recnext_cfg())[1]
    monkeypatch.setattr(deploy_module.logger, 'handlers', [caplog.handler])
    monkeypatch.setattr(deploy_module.logger, 'propagate', False)
    monkeypatch.setattr(deploy_module, 'lacks_half_precision', lambda device: lacks)
    for precision in ('fp32', 'bf16'):
        deploy_module.deploy(model, deploy_module.Deployment(precision=precision))
    assert [line.endswith('Use --precision fp32.') for line in caplog.messages] == [True] * lacks


@pytest.mark.parametrize('option', [dict(fuse='some'), dict(precision='int4')])
def test_deploy_hook_refuses_other_words(option):
    with pytest.raises(UserError, match=next(iter(option.values()))):
        HOOKS.build(dict(type='DeployHook', **option))


# --- Compilation: its capture of the graph; that of inductor takes minutes ---


@pytest.mark.full
def test_compiled_training_has_the_same_loss_gradients_and_keys():
    eager = pair(recnext_cfg())[1].double().train()
    eager.decode_head.dropout = None
    compiled = copy.deepcopy(eager)
    compile_for_training(compiled, backend='aot_eager')
    assert list(compiled.state_dict()) == list(eager.state_dict())
    samples = [sample_of() for _ in range(2)]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(7, (1, *SIZE), generator=torch.Generator().manual_seed(0)))
    gradients = []
    for model in (eager, compiled):
        loss = model.loss(smooth_images(2).double(), samples)['decode.loss_ce']
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# --- Strict loading ---


CHANGES = {
    'missing': (lambda state: state.pop('backbone.layer1.0.conv1.weight'), 'missing: backbone.layer1.0.conv1.weight'),
    'unexpected': (lambda state: state.update(extra=torch.ones(1)), 'unexpected: extra'),
    'shape': (
        lambda state: state.update({'decode_head.conv_seg.bias': torch.ones(8)}),
        r'shape of decode_head.conv_seg.bias: found \(8,\), expected \(7,\)',
    ),
}


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('change', CHANGES)
def test_weights_that_do_not_fit_are_refused(change, strict):
    stock, fast = pair(resnet_cfg())
    before = copy.deepcopy(fast.state_dict())
    state = {key: torch.zeros_like(tensor) for key, tensor in stock.state_dict().items()}
    alter, words = CHANGES[change]
    alter(state)
    given = dict(state)
    with pytest.raises(ConversionError, match=rf'(?s)this segmentor; 1 disagreement.*{words}'):
        fast.load_state_dict(state, strict=strict)
    assert state.keys() == given.keys()
    for key, tensor in fast.state_dict().items():
        assert torch.equal(tensor, before[key]), key
