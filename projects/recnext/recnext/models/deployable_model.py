"""What segmentor and classifier have in common: weights that fit or are refused, and a form for deployment."""

import re
from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..utils.errors import UserError
from ..weights.releases import find_checkpoint
from .folding import fold_conv_modules
from .pretrained import StrictlyPretrained, log_loaded, read_to_load
from .recnext import RecNeXt
from .state_dict import check_weights_fit, get_state_dict, of_other_classes

FUSE = ('none', 'norms', 'all')
"""What :meth:`DeployableModel.switch_to_deploy` multiplies out: nothing, the norms, or everything that is linear."""


class DeployableModel(StrictlyPretrained):
    """Mixed into a model of mmseg or mmpretrain, before it.

    - Weights that do not fit are refused, whoever loads them. mmengine loads with ``strict=False`` and only logs what
      is missing or left over. To start training from those for other classes, name them in
      ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.
    - :meth:`switch_to_deploy` folds what is fixed once training is over.
    - :meth:`set_format` converts the weights once, and images as they come.
    """

    kind: str
    """What this is, for messages."""

    class_tensors: re.Pattern
    """The names of the tensors whose first dimension is the number of classes."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        mine = {key.removeprefix(prefix): state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        fitting = self.fit(mine)
        if fitting.keys() != mine.keys():
            print_log(f'Weights in another form: {len(fitting)} tensors converted in memory.', logger='current')
        state_dict.update({prefix + key: value for key, value in fitting.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit(self, checkpoint: dict, other_classes: bool = False) -> dict[str, Tensor]:
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
        path = find_checkpoint(checkpoint)
        weights, own = self.fit(read_to_load(path), other_classes=True), self.state_dict()
        self.load_state_dict({**own, **weights})
        log_loaded(self.kind.capitalize(), path, weights, sorted(own.keys() - weights.keys()))

    def parts(self) -> dict[str, nn.Module]:
        """The parts of the network by name: backbone, neck if there is one, head."""
        raise NotImplementedError

    def network(self, inputs: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits, in single precision at least."""
        raise NotImplementedError

    def fold_head(self) -> None:
        """Multiply out what follows the backbone; in place, and idempotent."""
        raise NotImplementedError

    def switch_to_deploy(self, fuse: str = 'all') -> None:
        """Fold what is fixed after training; in place, and idempotent.

        Args:
            fuse: ``'norms'``: norms into the convolution before them, in RecNeXt and in mmcv's ConvModules; other
                modules stay as they are. ``'all'``: what follows the backbone as well (:meth:`fold_head`).
                ``'none'``: nothing.

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
        if fuse == 'all':
            self.fold_head()
        for part in self.parts().values():
            fold_conv_modules(part)

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

    def in_range(self, logits: Tensor) -> Tensor:
        """The logits as they are, unless float16 could not hold what led to them.

        Raises:
            UserError: they are not finite, in float16. The recursion of RecNeXt is known to overflow in it.
        """
        if self._input_format and self._input_format['dtype'] is torch.float16 and not logits.isfinite().all():
            raise UserError(
                'float16 cannot hold the activations of this network: its scores are not finite. '
                'Use bfloat16 (--precision bf16) or float32 (--precision fp32).'
            )
        return logits

    _input_format: dict | None = None

    def extract_feat(self, inputs: Tensor, *args: object, **kwargs: object) -> Sequence[Tensor]:
        """Images (N, 3, H, W) to the features that the head takes."""
        return super().extract_feat(
            inputs if self._input_format is None else inputs.to(**self._input_format), *args, **kwargs
        )


def at_least_single(logits: Tensor) -> Tensor:
    """16-bit numbers in single precision, others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
