"""What every trained network here can do before it is run: fuse what is fixed, change dtype and memory layout."""

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from .recnext import RecNeXt

FUSE = ('none', 'norms', 'all')
"""What :meth:`Deployable.switch_to_deploy` fuses: nothing, the norms, or everything that is linear."""


class Deployable:
    """Mixed into a module from images to logits, before it."""

    training: bool
    backbone: nn.Module
    _input_kwargs: dict | None = None

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts of the network by name: backbone, neck if there is one, head."""
        raise NotImplementedError

    def forward_logits(self, inputs: Tensor) -> Tensor:
        """Return the logits of normalised images (N, C, H, W), in float32 or float64."""
        raise NotImplementedError

    calibration_side = 224
    """Pixels of the short side of the images that 8 bits are calibrated on."""

    def to_network(self, image: np.ndarray) -> Tensor:
        """Return an image (H, W, channels), RGB, uint8, of a size that the network takes, as its input (1, C, H, W)."""
        raise NotImplementedError

    def fuse_head(self) -> None:
        """Fuse what follows the backbone, in place. Idempotent."""
        raise NotImplementedError

    def fuse_norms(self) -> None:
        """Fold the norms outside of RecNeXt into the convolutions before them, in place. Idempotent."""

    def switch_to_deploy(self, fuse: str = 'all') -> None:
        """Fuse what is fixed after training, in place. Idempotent.

        Args:
            fuse: ``'norms'``: fold norms into the convolution before them, in RecNeXt and in blocks of convolution,
                norm and activation; other modules stay as they are. ``'all'``: what follows the backbone as well
                (:meth:`fuse_head`). ``'none'``: nothing.

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
            self.fuse_head()
        self.fuse_norms()

    def to_dtype_and_layout(self, dtype: torch.dtype, channels_last: bool) -> None:
        """Convert the weights once; images are converted as they come, and 16-bit logits to float32.

        Args:
            dtype: Of weights and activations.
            channels_last: Memory layout of weights and activations.
        """
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for part in self.parts().values():
            part.to(dtype=dtype, memory_format=layout)
        self._input_kwargs = dict(dtype=dtype, memory_format=layout)

    def to_input(self, images: Tensor) -> Tensor:
        """Return images in the dtype and layout of :meth:`to_dtype_and_layout`."""
        return images if self._input_kwargs is None else images.to(**self._input_kwargs)

    def check_finite(self, logits: Tensor) -> Tensor:
        """Return the logits unless float16 could not hold what led to them.

        Raises:
            UserError: they are not finite, in float16. The recursion of RecNeXt is known to overflow in it.
        """
        if self._input_kwargs and self._input_kwargs['dtype'] is torch.float16 and not logits.isfinite().all():
            raise UserError(
                'float16 cannot hold the activations of this network: its scores are not finite. '
                'Use bfloat16 (--precision bf16) or float32 (--precision fp32).'
            )
        return logits


def to_float32(logits: Tensor) -> Tensor:
    """Return 16-bit numbers in float32, others as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
