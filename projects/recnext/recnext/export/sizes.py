"""The images that an exported file takes: of one size, of several, or of any."""

from collections.abc import Sequence
from typing import NamedTuple

from ..runtimes.capture import LEAST, STRIDE
from ..utils.errors import UserError


class ImageSizes(NamedTuple):
    """Sizes (height, width) in pixels: all that a file takes, or examples where it takes any.

    The network is captured at the first, and the file is verified at each.
    """

    sizes: Sequence[tuple[int, int]]
    free: bool = False

    def __str__(self) -> str:
        if self.free:
            return f'batches of any size, of multiples of {STRIDE} from {LEAST} pixels up'
        return ', '.join(f'{height} x {width}' for height, width in self.sizes) + ' pixels (height x width)'


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Make sure that images of these sizes (height, width) go through the network.

    Raises:
        UserError: one that is not a multiple of 32, or of 64 where there are several.
    """
    # With several sizes the scale of every resize must be known without knowing the size: a whole number.
    multiple, least = (STRIDE, STRIDE) if len(sizes) == 1 else (2 * STRIDE, 4 * STRIDE)
    wrong = [size for size in sizes if any(side % multiple or side < least for side in size)]
    if wrong:
        said = ', '.join(f'{height} x {width}' for height, width in wrong)
        several = f' Where several sizes are given, they are multiples of {multiple} from {least} up.'
        raise UserError(
            f'Height and width are multiples of {STRIDE}; found {said}.{several if len(sizes) > 1 else ""}\n'
            f'  The nearest: {", ".join(_nearest(size, multiple, least) for size in wrong)}'
        )
    if len(set(sizes)) < len(sizes):
        raise UserError('A size is given twice.')


def _nearest(size: tuple[int, int], multiple: int, least: int) -> str:
    return ' '.join(str(max(least, round(side / multiple) * multiple)) for side in size)
