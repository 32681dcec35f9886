"""RecNeXt with Semantic FPN for MMSegmentation 1.x. Importing this package registers its parts."""

from .compat import repair_stack

repair_stack()

from .backbone import RecNeXt  # noqa: E402  (mmseg can be imported only after the repairs)
from .engine import Bfloat16OptimWrapper, ChannelsLastHook, CompileHook, DeployHook, ThroughputHook  # noqa: E402
from .evaluation_record import EvaluationRecord, EvaluationRecordHook  # noqa: E402
from .finite_loss import FiniteLossHook  # noqa: E402
from .resume import ResumableSampler, ResumableTrainLoop, SeededDataset  # noqa: E402
from .segmentor import FastEncoderDecoder, RecNeXtEncoderDecoder  # noqa: E402
from .timm_registration import register_with_timm  # noqa: E402
from .visualizer import SegPanelVisualizer  # noqa: E402

register_with_timm()

__all__ = [
    'Bfloat16OptimWrapper',
    'ChannelsLastHook',
    'CompileHook',
    'DeployHook',
    'EvaluationRecord',
    'EvaluationRecordHook',
    'FastEncoderDecoder',
    'FiniteLossHook',
    'RecNeXt',
    'RecNeXtEncoderDecoder',
    'ResumableSampler',
    'ResumableTrainLoop',
    'SeededDataset',
    'SegPanelVisualizer',
    'ThroughputHook',
]
