"""What a segmentor predicts for one image."""

from collections.abc import Callable

from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor


class SegPrediction(SegDataSample):
    """A SegDataSample whose ``seg_logits`` are made when something asks for them, and not before.

    Full-size logits of 150 classes take hundreds of megabytes; the metrics, pictures and label maps need none of
    them, test-time augmentation does. Until then only the small logits of the head are kept, where they were made.

    ``'seg_logits' in prediction`` and ``to_dict()``, which metrics get, do not ask: they have them once they are made.
    """

    _make_logits: Callable[[], Tensor] | None = None

    def promise_logits(self, make_logits: Callable[[], Tensor]) -> None:
        """Say how ``seg_logits.data``, (C, H, W), will be made."""
        # Past BaseDataElement, which takes every attribute for data.
        object.__setattr__(self, '_make_logits', make_logits)

    @SegDataSample.seg_logits.getter
    def seg_logits(self) -> PixelData:
        if self._make_logits is not None and '_seg_logits' not in self.__dict__:
            self.seg_logits = PixelData(data=self._make_logits())
        return self._seg_logits

    def new(self, **kwargs: dict) -> 'SegPrediction':
        """A copy, which makes its own logits when asked for them."""
        return self._pass_on(super().new(**kwargs))

    def clone(self) -> 'SegPrediction':
        """A deep copy, which makes its own logits when asked for them."""
        return self._pass_on(super().clone())

    def _pass_on(self, copy: 'SegPrediction') -> 'SegPrediction':
        if self._make_logits is not None:
            copy.promise_logits(self._make_logits)
        return copy
