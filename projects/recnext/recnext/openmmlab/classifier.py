"""RecNeXt as an image classifier in MMPretrain. Importing this module imports mmpretrain, and registers."""

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmpretrain.models import ClsHead, ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ..checkpoints.files import read_checkpoint
from ..checkpoints.keys import ConversionError, convert_state_dict, get_state_dict
from ..checkpoints.releases import resolve_checkpoint
from ..models.classifier import CLASS_TENSORS, TwoBranchHead
from ..models.deployable import to_float32
from ..utils.errors import UserError
from .deployable import DeployableModel


@MODELS.register_module()
class RecNeXtClsHead(TwoBranchHead, ClsHead):
    """A :class:`.TwoBranchHead` as a head of MMPretrain: pooled features, a tuple of (N, C), to (N, classes).

    Args:
        num_classes: Classes.
        in_channels: C.
        loss, topk, cal_acc, init_cfg: As in mmpretrain's ``ClsHead``.
    """

    def __init__(self, num_classes: int, in_channels: int, **kwargs: object) -> None:
        super().__init__(in_channels, num_classes, **kwargs)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(self.pre_logits(feats))


@MODELS.register_module()
class RecNeXtClassifier(DeployableModel, ImageClassifier):
    """An ImageClassifier on RecNeXt that takes the released ImageNet files as they are, and no weights that do not fit.

    Args:
        distillation: To train with a teacher: ``model``, the name of a timm model; ``checkpoint``, its weights, where
            they should not come from the hub; ``alpha``, the share of the teacher in the loss. The second branch of
            the head learns which class the teacher finds most likely, the first one the labels. (Touvron et al.,
            https://arxiv.org/abs/2012.12877, hard distillation.)
        others: As in mmpretrain's ``ImageClassifier``.
    """

    kind = 'classifier'
    class_tensors = CLASS_TENSORS

    def __init__(self, *args: object, distillation: dict | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.head.distilled_training = distillation is not None
        self.distillation = distillation
        # In a list, so that it is no part of the network: checkpoints do not hold it.
        self._teacher: list[nn.Module] = []

    @property
    def num_classes(self) -> int:
        """Of the head."""
        return self.head.num_classes

    def parts(self) -> dict[str, nn.Module]:
        """Backbone, neck and head."""
        return dict(backbone=self.backbone, neck=self.neck, head=self.head)

    def fuse_head(self) -> None:
        """Two branches into one linear layer."""
        self.head.switch_to_deploy()

    def forward_logits(self, inputs: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes), in single precision at least."""
        return to_float32(self.head(self.extract_feat(inputs)))

    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        """Scores and the most likely class of each image."""
        return self.head._get_predictions(self.check_finite(self.forward_logits(inputs)), data_samples)

    def _rename(self, checkpoint: dict) -> tuple[dict[str, Tensor], str]:
        """The weights in a released ImageNet file, of timm or of mmpretrain.

        Raises:
            ConversionError: not the weights of a classifier on RecNeXt.
        """
        conversion = convert_state_dict(get_state_dict(checkpoint), 'mmpretrain')
        return conversion.state_dict, f'this classifier; they are of arch {conversion.arch}'

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """The loss of the labels; with a teacher, also ``loss_teacher``, the two weighted with ``alpha``."""
        if self.distillation is None:
            return super().loss(inputs, data_samples)
        labels, teacher = self.head(self.extract_feat(inputs))
        alpha = self.distillation.get('alpha', 0.5)
        losses = self.head._get_loss(labels, data_samples)
        losses['loss'] = (1 - alpha) * losses['loss']
        losses['loss_teacher'] = alpha * F.cross_entropy(teacher, self.ask_teacher(inputs))
        return losses

    def init_weights(self) -> None:
        """Initialise, and get the teacher if there is one: a missing one stops a run before its first iteration."""
        super().init_weights()
        if self.distillation is not None:
            self._get_teacher()

    def _get_teacher(self) -> nn.Module:
        if not self._teacher:
            self._teacher.append(load_teacher(self.distillation['model'], self.distillation.get('checkpoint')))
        return self._teacher[0]

    @torch.no_grad()
    def ask_teacher(self, inputs: Tensor) -> Tensor:
        """The class (N,) that the teacher finds most likely."""
        return self._get_teacher().to(inputs.device)(inputs).argmax(1)


def load_teacher(model: str, checkpoint: str | None = None) -> nn.Module:
    """A trained classifier of timm, in eval mode.

    Raises:
        UserError: timm knows no such model, or its weights cannot be had or do not fit.
    """
    import timm

    try:
        if checkpoint is None:
            return timm.create_model(model, pretrained=True).eval()
        teacher = timm.create_model(model).eval()
        teacher.load_state_dict(get_state_dict(read_checkpoint(resolve_checkpoint(checkpoint))))
    except (RuntimeError, OSError, ConversionError) as error:
        raise UserError(
            f'The teacher {model} cannot be had: {error}\n'
            '  Name a file of its weights in model.distillation.checkpoint, or train without it: '
            '--cfg-options model.distillation=None'
        ) from None
    return teacher
