"""Everything that touches OpenMMLab. Importing it registers what configs name.

``openmmlab.classifier``, which needs mmpretrain, is imported by the configs of ImageNet alone.
"""

from .compat import import_mmseg

import_mmseg()

from . import backbone, loops, optim, overlapped_testing, panel_visualizer, record, seeded, segmentor  # noqa: E402, F401
from .hooks import (  # noqa: E402, F401
    adaptive_clip,
    channels_last,
    compile,
    deploy,
    evaluation_record,
    finite_loss,
    throughput,
)
