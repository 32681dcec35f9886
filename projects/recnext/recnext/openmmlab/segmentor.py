"""Segmentors: mmseg's EncoderDecoder, strict about its weights, with the same label maps in less time and memory."""

import functools
import re

import torch
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import Upsample
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..checkpoints.keys import ConversionError, convert_state_dict, get_state_dict
from ..models.deployable import to_float32
from ..models.label_map import ResizeStep, label_map, resize_all
from ..runtimes.capture import SUBSTITUTES
from ..utils.errors import UserError
from .deployable import DeployableModel
from .folding import fold_fpn
from .lazy_prediction import SegPrediction


@MODELS.register_module()
class FastEncoderDecoder(DeployableModel, EncoderDecoder):
    """An EncoderDecoder for any mmseg config: change ``model.type`` and nothing else.

    - The label maps are those of EncoderDecoder, pixel for pixel (see :func:`label_map.label_map`), without the
      full-size logits of all classes. ``seg_logits`` of a prediction are made when something asks for them.
    - Weights that do not fit are refused, and what is fixed after training can be folded; see
      :class:`deployable_model.DeployableModel`. ``fuse='all'`` folds FPN and FPNHead into each other where that pays
      (see :mod:`folded_fpn`).
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
