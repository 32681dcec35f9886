"""Segmentors: mmseg's EncoderDecoder, strict about its weights, with the same label maps in less time and memory."""

import copy
import functools
import re
from collections.abc import Callable, Iterator

import torch
from mmcv.cnn import ConvModule
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads import FPNHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.necks import FPN
from mmseg.models.utils import Upsample
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoints.keys import ConversionError, convert_state_dict, get_state_dict
from ..models.deployable import to_float32
from ..models.folding import FoldedFPN, FoldedLevel, fold_levels, is_foldable
from ..models.label_map import ResizeStep, label_map, resize_all
from ..runtimes.capture import SUBSTITUTES
from ..utils.errors import UserError
from .deployable import DeployableModel, conv_modules, fold_conv_modules


class SegPrediction(SegDataSample):
    """A SegDataSample whose ``seg_logits`` are made when something asks for them, and not before.

    Full-size logits of 150 classes take hundreds of megabytes; the metrics, pictures and label maps need none of
    them, test-time augmentation does. Until then only the small logits of the head are kept, where they were made.

    ``'seg_logits' in prediction`` and ``to_dict()``, which metrics get, do not ask: they have them once they are made.
    """

    _make_logits: Callable[[], Tensor] | None = None

    def promise_logits(self, make_logits: Callable[[], Tensor]) -> None:
        """Say how ``seg_logits.data``, (C, H, W), will be made."""
        # Past BaseDataElement, which takes every attribute for data.
        object.__setattr__(self, '_make_logits', make_logits)

    @SegDataSample.seg_logits.getter
    def seg_logits(self) -> PixelData:
        if self._make_logits is not None and '_seg_logits' not in self.__dict__:
            self.seg_logits = PixelData(data=self._make_logits())
        return self._seg_logits

    def new(self, **kwargs: dict) -> 'SegPrediction':
        """A copy, which makes its own logits when asked for them."""
        return self._pass_on(super().new(**kwargs))

    def clone(self) -> 'SegPrediction':
        """A deep copy, which makes its own logits when asked for them."""
        return self._pass_on(super().clone())

    def _pass_on(self, copy: 'SegPrediction') -> 'SegPrediction':
        if self._make_logits is not None:
            copy.promise_logits(self._make_logits)
        return copy


def fold_fpn(neck: nn.Module, head: nn.Module) -> tuple[FoldedFPN, FPNHead]:
    """Return a new neck and a new head with the same head(neck(features)); those given stay as they are.

    Every norm of the head is folded, and every level of which :func:`.folding_saves_flops`; ``scale_heads[i][0]`` of a
    folded level moves into the neck. Idempotent: a :class:`FoldedFPN` and its head are returned unchanged.

    Raises:
        UserError: training mode, or a neck or head that cannot be folded.
    """
    if isinstance(neck, FoldedFPN):
        return neck, head
    for obstacle in _obstacles(neck, head):
        raise UserError(
            'Only FPN without norm or activation, with nearest upsampling, and FPNHead on all its outputs, with batch '
            f'normalisation or none, can be folded; found {obstacle}.'
        )
    if any(module.training for part in (neck, head) for module in part.modules()):
        raise UserError('fold_fpn() fixes the norm statistics for good: call .eval() on the network first.')

    neck, head = copy.deepcopy((neck, head))
    fold_conv_modules(head)
    firsts = [(scale_head[0].conv, _activation(scale_head[0])) for scale_head in head.scale_heads]
    laterals, convs = ([module.conv for module in part] for part in (neck.lateral_convs, neck.fpn_convs))
    levels = fold_levels(laterals, convs, firsts)
    for level, scale_head in zip(levels, head.scale_heads):
        if isinstance(level, FoldedLevel):
            scale_head[0] = nn.Identity()
    # New modules are in training mode.
    return FoldedFPN(levels, neck.start_level).eval(), head.eval()


def _activation(module: ConvModule) -> nn.Module:
    return module.activate if module.with_activation else nn.Identity()


def _obstacles(neck: nn.Module, head: nn.Module) -> Iterator[str]:
    """What stands in the way, in words; each is looked for where those before it are absent."""
    # Not isinstance: what a subclass computes is not known.
    for part, kind in ((neck, FPN), (head, FPNHead)):
        if type(part) is not kind:
            yield f'{type(part).__name__} in the place of {kind.__name__}'
    levels = len(neck.lateral_convs)
    if neck.num_outs != levels:
        yield f'an FPN with {neck.num_outs} outputs from {levels} levels (add_extra_convs={neck.add_extra_convs})'
    if list(head.in_index) != list(range(levels)):
        yield f'an FPNHead with in_index={head.in_index} on {levels} outputs'
    if {'mode': 'nearest', **neck.upsample_cfg} != {'mode': 'nearest'}:
        yield f'an FPN with upsample_cfg={dict(neck.upsample_cfg)}'
    for module in conv_modules(neck):
        if module.with_norm:
            yield f'an FPN with a norm ({type(module.norm).__name__})'
        if module.with_activation:
            yield f'an FPN with an activation ({type(module.activate).__name__})'

    firsts = [scale_head[0] for scale_head in head.scale_heads]
    for place, modules, size in (
        ('lateral_convs', neck.lateral_convs, 1),
        ('fpn_convs', neck.fpn_convs, 3),
        ('scale_heads', firsts, 3),
    ):
        for module in modules:
            yield from (f'{found} in {place}' for found in _conv_obstacles(module, size))
    for module in conv_modules(head):
        if module.order != ('conv', 'norm', 'act'):
            yield f'an FPNHead with the order {" -> ".join(module.order)}'
        if isinstance(module.norm, _BatchNorm) and module.norm.running_mean is None:
            yield 'an FPNHead with a norm that keeps no running statistics'
        elif module.with_norm and not (is_foldable(module.norm) or isinstance(module.norm, nn.Identity)):
            yield f'an FPNHead with {type(module.norm).__name__}'


def _conv_obstacles(module: nn.Module, size: int) -> Iterator[str]:
    conv = getattr(module, 'conv', None)
    if not isinstance(module, ConvModule) or type(conv) is not nn.Conv2d:
        yield type(module if conv is None else conv).__name__
        return
    if module.with_spectral_norm:
        yield 'a spectral norm'
    if module.with_explicit_padding:
        yield f'a padding by {type(module.padding_layer).__name__}'
    expected = dict(kernel_size=size, padding=size // 2, stride=1, dilation=1)
    for name, value in expected.items():
        if getattr(conv, name) != (value, value):
            yield f'a convolution with {name}={getattr(conv, name)}'
    if conv.groups != 1 or conv.padding_mode != 'zeros':
        yield f'a convolution with groups={conv.groups}, padding_mode={conv.padding_mode!r}'


def takes_rgb(preprocessor: nn.Module) -> bool:
    """Return whether OpenCV's BGR is turned into RGB; mmseg and its maintained fork name that differently."""
    return any(preprocessor.__dict__.get(name) for name in ('channel_conversion', '_channel_conversion'))


@MODELS.register_module()
class FastEncoderDecoder(DeployableModel, EncoderDecoder):
    """An EncoderDecoder for any mmseg config: change ``model.type`` and nothing else.

    - The label maps are those of EncoderDecoder, pixel for pixel (see :func:`label_map.label_map`), without the
      full-size logits of all classes. ``seg_logits`` of a prediction are made when something asks for them.
    - Weights that do not fit are refused, and what is fixed after training can be folded; see
      :class:`.DeployableModel`. ``fuse='all'`` folds FPN and FPNHead into each other where that pays
      (see :func:`.fold_levels`).
    - Images of several sizes may come in one batch: those of one size go through the network together.
    """

    kind = 'segmentor'
    class_tensors = re.compile(r'(decode|auxiliary)_head\.(\d+\.)?conv_seg\.(weight|bias)')

    def parts(self) -> dict[str, nn.Module]:
        """The parts of the network by name: backbone, neck if there is one, head."""
        neck = dict(neck=self.neck) if self.with_neck else {}
        return dict(backbone=self.backbone, **neck, head=self.decode_head)

    def fuse_head(self) -> None:
        """Fold FPN and FPNHead into each other; other necks and heads stay as they are."""
        if self.with_neck:
            try:
                self.neck, self.decode_head = fold_fpn(self.neck, self.decode_head)
            except UserError as error:
                print_log(f'Only the norms are folded. {error}', logger='current')

    def forward_logits(self, inputs: Tensor) -> Tensor:
        """Images (N, 3, H, W) to the logits of the head (N, C, h, w)."""
        return to_float32(self.decode_head(self.extract_feat(inputs)))

    def _forward(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> Tensor:
        return self.forward_logits(inputs)

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Images (N, 3, H, W) to logits (N, C, H, W), as mmseg resizes them."""
        if not self._head_only_resizes:
            return to_float32(super().encode_decode(inputs, batch_img_metas))
        return self.decode_head.predict_by_feat(self.forward_logits(inputs).contiguous(), batch_img_metas)

    @property
    def _head_only_resizes(self) -> bool:
        """Whether the head predicts as most heads do: its logits, resized to the size of the input."""
        kind = type(self.decode_head)
        return kind.predict is BaseDecodeHead.predict and kind.predict_by_feat is BaseDecodeHead.predict_by_feat

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict for a batch, in which images of several sizes are allowed; in its order."""
        inputs, samples = data['inputs'], data.get('data_samples')
        sizes = [tuple(image.shape[-2:]) for image in inputs]
        if len(set(sizes)) < 2:
            return super().test_step(data)
        predictions = [None] * len(inputs)
        for size in dict.fromkeys(sizes):
            places = [place for place, other in enumerate(sizes) if other == size]
            group = dict(inputs=[inputs[place] for place in places])
            if samples is not None:
                group['data_samples'] = [samples[place] for place in places]
            for place, prediction in zip(places, super().test_step(group)):
                predictions[place] = prediction
        return predictions

    val_step = test_step

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Label maps of a batch.

        Args:
            inputs: (N, 3, H, W), normalised.
            data_samples: What is known of the images. Their ``ori_shape`` is the size of the label maps; without
                them, it is that of the inputs.

        Returns:
            One :class:`SegPrediction` an image: ``pred_sem_seg``, and ``seg_logits`` on demand.
        """
        metas = [sample.metainfo for sample in data_samples or ()]
        unknown = dict(dict.fromkeys(('ori_shape', 'img_shape', 'pad_shape'), inputs.shape[2:]), padding_size=[0] * 4)
        known = metas or [unknown] * len(inputs)
        if self.test_cfg.mode == 'whole' and self._head_only_resizes:
            logits = self.forward_logits(inputs)
            # Which size the head would resize to, it tells best itself: it is asked to resize a batch of no images.
            probe = self.decode_head.predict_by_feat(torch.empty(0, 1, 1, 1), known)
            steps = (ResizeStep(tuple(probe.shape[2:]), self.align_corners),)
        else:
            logits, steps = self.inference(inputs, known), ()
        predictions = []
        for index, single in enumerate(self.check_finite(logits)):
            sample = data_samples[index] if data_samples else SegDataSample()
            path = (*steps, _to_original(metas[index], self.align_corners)) if metas else steps
            predictions.append(self._predict_one(single, path, sample))
        return predictions

    def _predict_one(self, logits: Tensor, steps: tuple[ResizeStep, ...], sample: SegDataSample) -> SegPrediction:
        given = {name: value for name, value in sample.items() if name != 'seg_logits'}
        prediction = SegPrediction(metainfo=sample.metainfo, **given)
        if len(logits) == 1:
            # Two classes told apart by one map.
            prediction.promise_logits(functools.partial(_probability, logits, steps))
            probability = _probability(logits, steps)
            labels = (probability > self.decode_head.threshold).to(probability)
        else:
            prediction.promise_logits(functools.partial(resize_all, logits, steps))
            labels = label_map(logits, steps)[None]
        prediction.pred_sem_seg = PixelData(data=labels)
        return prediction


@MODELS.register_module()
class RecNeXtEncoderDecoder(FastEncoderDecoder):
    """A FastEncoderDecoder on RecNeXt, which takes the released 0.x weights as they are."""

    def _rename(self, checkpoint: dict) -> tuple[dict[str, Tensor], str]:
        """The weights in a checkpoint of mmseg 0.x or 1.x.

        Raises:
            ConversionError: not the weights of a segmentor on RecNeXt.
        """
        conversion = convert_state_dict(get_state_dict(checkpoint))
        if conversion.layout.kind != 'segmentor':
            raise ConversionError(
                f'These are the weights of a {conversion.layout.kind} (arch {conversion.arch}, {conversion.layout}), '
                'not of a segmentor. To start training from them, set model.backbone.init_cfg.checkpoint to the file.'
            )
        return conversion.state_dict, f'this segmentor; they are of arch {conversion.arch}'


def _enlarge_by_factor(upsample: Upsample) -> nn.Module:
    """Return the same as PyTorch's module: mmseg's computes a size as a number, which a graph would keep."""
    if upsample.size:
        return upsample
    return nn.Upsample(scale_factor=upsample.scale_factor, mode=upsample.mode, align_corners=upsample.align_corners)


SUBSTITUTES[Upsample] = _enlarge_by_factor


def _to_original(meta: dict, align_corners: bool) -> ResizeStep:
    """mmseg's last step for an image: without its padding, unflipped, at its original size."""
    padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    flip = str(meta.get('flip_direction')) if meta.get('flip') else None
    size = tuple(int(length) for length in meta['ori_shape'][:2])
    return ResizeStep(size, align_corners, tuple(int(length) for length in padding), flip)


def _probability(logits: Tensor, steps: tuple[ResizeStep, ...]) -> Tensor:
    return resize_all(logits, steps).sigmoid()
