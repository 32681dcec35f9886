"""Segmentors: mmseg's EncoderDecoder, strict about its weights, with the same label maps in less time and memory."""

import functools
import re
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .backbone import RecNeXt
from .checkpoint import read_checkpoint
from .conversion import ConversionError, check_fit, convert, get_state_dict
from .errors import UserError
from .folded_fpn import fold_conv_modules, fold_fpn
from .label_map import Step, label_map, resize_all
from .prediction import SegPrediction
from .pretrained import StrictlyPretrained, log_loaded
from .released import find_checkpoint

FUSE = ('none', 'norms', 'all')
"""What :meth:`FastEncoderDecoder.switch_to_deploy` folds: nothing, the norms, or Semantic FPN as well."""

CLASSIFIER = re.compile(r'(decode|auxiliary)_head\.(\d+\.)?conv_seg\.(weight|bias)')
"""The tensors whose first dimension is the number of classes, in every head of mmseg's."""


@MODELS.register_module()
class FastEncoderDecoder(StrictlyPretrained, EncoderDecoder):
    """An EncoderDecoder for any mmseg config: change ``model.type`` and nothing else.

    - The label maps are those of EncoderDecoder, pixel for pixel (see :func:`label_map.label_map`), without the
      full-size logits of all classes. ``seg_logits`` of a prediction are made when something asks for them.
    - Weights that do not fit are refused, whoever loads them. mmengine loads with ``strict=False`` and only logs what
      is missing or left over. To start training from those for other classes, name them in
      ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.
    - :meth:`switch_to_deploy` folds what is fixed once training is over.
    - Images of several sizes may come in one batch: those of one size go through the network together.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        mine = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        fitting = self.fit(mine)
        if fitting.keys() != mine.keys():
            print_log(f'Weights of mmseg 0.x: {len(fitting)} tensors converted in memory.', logger='current')
        state_dict.update({prefix + key: value for key, value in fitting.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, checkpoint: dict, other_classes: bool = False) -> dict[str, Tensor]:
        """The weights in a checkpoint, under this network's names.

        Args:
            checkpoint: What a file holds.
            other_classes: Whether they may be for another number of classes; then without the :data:`CLASSIFIER`.

        Raises:
            ConversionError: they do not fit this network exactly.
        """
        weights, described = self._rename(checkpoint)
        expected = self.state_dict()
        if other_classes:
            for key in filter(CLASSIFIER.fullmatch, weights.keys() & expected.keys()):
                found, wanted = weights[key].shape, expected[key].shape
                if found != wanted and found[1:] == wanted[1:]:
                    del weights[key], expected[key]
        check_fit(weights, expected, described)
        return weights

    def _rename(self, checkpoint: dict) -> tuple[dict[str, Tensor], str]:
        """The weights in a checkpoint under this network's names, and what to call the two in an error."""
        return dict(get_state_dict(checkpoint)), 'this segmentor'

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a segmentor of the same kind, all of it or all but the classifier of another number of classes."""
        path = find_checkpoint(checkpoint)
        weights, own = self.fit(read_checkpoint(path), other_classes=True), self.state_dict()
        self.load_state_dict({**own, **weights})
        log_loaded('Segmentor', path, weights, sorted(own.keys() - weights.keys()))

    def switch_to_deploy(self, fuse: str = 'all') -> None:
        """Fold what is fixed after training; in place, and idempotent.

        Args:
            fuse: ``'norms'``: norms into the convolution before them, in RecNeXt and in mmcv's ConvModules; other
                modules stay as they are. ``'all'``: FPN and FPNHead into each other as well, where that pays (see
                :mod:`folded_fpn`). ``'none'``: nothing.

        Raises:
            UserError: another word, a network in training mode, or a norm that cannot be folded.
        """
        if fuse not in FUSE:
            raise UserError(f'fuse is one of {", ".join(FUSE)}; found {fuse}.')
        if fuse == 'none':
            return
        if self.training:
            raise UserError('switch_to_deploy() fixes the norm statistics for good: call .eval() on the network first.')
        if isinstance(self.backbone, RecNeXt):
            self.backbone.switch_to_deploy()
        if fuse == 'all' and self.with_neck:
            try:
                self.neck, self.decode_head = fold_fpn(self.neck, self.decode_head)
            except UserError as error:
                print_log(f'Only the norms are folded. {error}', logger='current')
        for part in self.parts().values():
            fold_conv_modules(part)

    def parts(self) -> dict[str, nn.Module]:
        """The parts of the network by name: backbone, neck if there is one, head."""
        neck = dict(neck=self.neck) if self.with_neck else {}
        return dict(backbone=self.backbone, **neck, head=self.decode_head)

    def set_format(self, dtype: torch.dtype, channels_last: bool) -> None:
        """Convert the weights once; images are converted as they come, and 16-bit logits to single precision.

        Args:
            dtype: Of weights and activations.
            channels_last: Memory layout of weights and activations.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for part in self.parts().values():
            part.to(dtype=dtype, memory_format=layout)
        self._input_format = dict(dtype=dtype, memory_format=layout)

    _input_format: dict | None = None

    def extract_feat(self, inputs: Tensor) -> Sequence[Tensor]:
        """Images (N, 3, H, W) to the features that the head takes."""
        return super().extract_feat(inputs if self._input_format is None else inputs.to(**self._input_format))

    def network(self, inputs: Tensor) -> Tensor:
        """Images (N, 3, H, W) to the logits of the head (N, C, h, w)."""
        return _at_least_single(self.decode_head(self.extract_feat(inputs)))

    def _forward(self, inputs: Tensor, data_samples: object = None) -> Tensor:
        return self.network(inputs)

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Images (N, 3, H, W) to logits (N, C, H, W), as mmseg resizes them."""
        if not self._head_only_resizes:
            return _at_least_single(super().encode_decode(inputs, batch_img_metas))
        return self.decode_head.predict_by_feat(self.network(inputs).contiguous(), batch_img_metas)

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
            logits = self.network(inputs)
            # Which size the head would resize to, it tells best itself.
            probe = self.decode_head.predict_by_feat(logits.new_empty(1, 1, 1, 1, device='meta'), known)
            steps = (Step(tuple(probe.shape[2:]), self.align_corners),)
        else:
            logits, steps = self.inference(inputs, known), ()
        predictions = []
        for index, single in enumerate(logits):
            sample = data_samples[index] if data_samples else SegDataSample()
            path = (*steps, _to_original(metas[index], self.align_corners)) if metas else steps
            predictions.append(self._predict_one(single, path, sample))
        return predictions

    def _predict_one(self, logits: Tensor, steps: tuple[Step, ...], sample: SegDataSample) -> SegPrediction:
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
        conversion = convert(get_state_dict(checkpoint))
        if not conversion.layout.is_segmentor:
            raise ConversionError(
                f'These are the weights of a backbone (arch {conversion.arch}, {conversion.layout}), not of a '
                'segmentor. To start training from them, set model.backbone.init_cfg.checkpoint to the file.'
            )
        return conversion.state_dict, f'this segmentor; they are of arch {conversion.arch}'


def _to_original(meta: dict, align_corners: bool) -> Step:
    """mmseg's last step for an image: without its padding, unflipped, at its original size."""
    padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    flip = str(meta.get('flip_direction')) if meta.get('flip') else None
    size = tuple(int(length) for length in meta['ori_shape'][:2])
    return Step(size, align_corners, tuple(int(length) for length in padding), flip)


def _probability(logits: Tensor, steps: tuple[Step, ...]) -> Tensor:
    return resize_all(logits, steps).sigmoid()


def _at_least_single(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
