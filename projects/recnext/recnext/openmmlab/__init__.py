"""Everything that touches OpenMMLab. Importing it registers what configs name.

``openmmlab.classifier``, which needs mmpretrain, is imported by the configs of ImageNet alone.
"""

from .compat import import_mmseg

import_mmseg()

from . import backbone, hooks, loops, panel_visualizer, record, resume, seeded, segmentor  # noqa: E402, F401
