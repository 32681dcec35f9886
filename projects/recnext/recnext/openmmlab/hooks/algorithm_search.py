"""No search for the fastest convolutions in validation and testing, where images have many sizes."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class NoAlgorithmSearchHook(Hook):
    """Lets cuDNN choose its algorithms without trying them, in validation and testing; training keeps its setting.

    mmseg's configs have ``env_cfg.cudnn_benchmark=True``, with which each convolution tries many algorithms on the
    first images of every size. Training crops are of one size. Images that are tested come in hundreds, and for each
    the search takes longer than the images.
    """

    searching: bool | None = None

    def before_val(self, runner: Runner) -> None:
        """Stop searching."""
        self.searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False

    def after_val(self, runner: Runner) -> None:
        """Go on as before."""
        torch.backends.cudnn.benchmark = self.searching

    before_test = before_val
    after_test = after_val
