"""What segmentor and classifier have in common: weights that fit or are refused, and a form for deployment."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from mmcv.cnn import ConvModule
from mmengine.logging import print_log
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..checkpoints.files import read_checkpoint
from ..checkpoints.keys import check_weights_fit, get_state_dict, of_other_classes
from ..checkpoints.releases import resolve_checkpoint
from ..models.deployable import Deployable
from ..models.folding import fold_norm, is_foldable
from .pretrained import StrictlyPretrained, log_loaded


class DeployableModel(Deployable, StrictlyPretrained):
    """Mixed into a model of mmseg or mmpretrain, before it.

    - Weights that do not fit are refused, whoever loads them. mmengine loads with ``strict=False`` and only logs what
      is missing or left over. To start training from those for other classes, name them in
      ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.
    - It can be fused and converted before it is run: see :class:`.Deployable`.
    """

    kind: str
    """What this is, for messages."""

    class_tensors: re.Pattern
    """The names of the tensors whose first dimension is the number of classes."""

    weights_checked = False
    """Whether what is loaded next has been adapted to this network already; see :meth:`load_checked`."""

    def load_checked(self, weights: dict[str, Tensor]) -> None:
        """Load what :meth:`adapt_state_dict` of a network of the same config has returned, without checking again."""
        self.weights_checked = True
        try:
            self.load_state_dict(weights)
        finally:
            del self.weights_checked

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if self.weights_checked:
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        mine = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        fitting = self.adapt_state_dict(mine)
        if fitting.keys() != mine.keys():
            print_log(f'Weights in another form: {len(fitting)} tensors converted in memory.', logger='current')
        state_dict.update({prefix + key: value for key, value in fitting.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adapt_state_dict(self, checkpoint: dict, other_classes: bool = False) -> dict[str, Tensor]:
        """The weights in a checkpoint, under this network's names.

        Args:
            checkpoint: What a file holds.
            other_classes: Whether they may be for another number of classes; then without the :attr:`class_tensors`.

        Raises:
            ConversionError: they do not fit this network exactly.
        """
        weights, described = self._rename(checkpoint)
        expected = self.state_dict()
        if other_classes:
            for key in of_other_classes(weights, expected, self.class_tensors):
                del weights[key], expected[key]
        check_weights_fit(weights, expected, described)
        return weights

    def _rename(self, checkpoint: dict) -> tuple[dict[str, Tensor], str]:
        """The weights in a checkpoint under this network's names, and what to call the two in an error."""
        return dict(get_state_dict(checkpoint)), f'this {self.kind}'

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a model of the same kind, all of it or all but the classifier of another number of classes."""
        path, own = resolve_checkpoint(checkpoint), self.state_dict()
        weights = self.adapt_state_dict(read_checkpoint(path), other_classes=True)
        self.load_checked({**own, **weights})
        log_loaded(self.kind.capitalize(), path, weights, sorted(own.keys() - weights.keys()))

    @property
    def calibration_side(self) -> int:
        """Pixels of the short side of the images that 8 bits are calibrated on: of the crops of training."""
        return min(getattr(self.data_preprocessor, 'size', None) or (super().calibration_side,))

    def to_network(self, image: np.ndarray) -> Tensor:
        inputs = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))
        return self.data_preprocessor(dict(inputs=[inputs], data_samples=[SegDataSample()]))['inputs']

    def fuse_norms(self) -> None:
        for part in self.parts().values():
            fold_conv_modules(part)

    def extract_feat(self, inputs: Tensor, *args: object, **kwargs: object) -> Sequence[Tensor]:
        """Return the features of images (N, C, H, W) that the head takes."""
        return super().extract_feat(self.to_input(inputs), *args, **kwargs)


def fold_conv_modules(module: nn.Module) -> None:
    """Fold the norm of every mmcv ConvModule inside into its convolution, where that is exact; in place, idempotent."""
    for part in conv_modules(module):
        plain = type(part.conv) is nn.Conv2d and not part.with_spectral_norm and part.order == ('conv', 'norm', 'act')
        if part.with_norm and plain and is_foldable(part.norm):
            part.conv = fold_norm(part.conv, part.norm)
            setattr(part, part.norm_name, nn.Identity().train(part.training))
            # It would look for statistics in the norm. mmcv 2.0 has no such forward, and does not look at this.
            part.efficient_conv_bn_eval_forward = None


def conv_modules(module: nn.Module) -> list[ConvModule]:
    """All of mmcv's ConvModules in a network."""
    return [m for m in module.modules() if isinstance(m, ConvModule)]
